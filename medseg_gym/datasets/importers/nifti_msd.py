"""The layout of the Medical Segmentation Decathlon and of nnU-Net: dataset.json, imagesTr/, labelsTr/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import RawCase, Skipped, check_options, identify, inside, read_json
from medseg_gym.datasets.importers import nifti_pairs as pairs
from medseg_gym.datasets.importers.intensities import window_for
from medseg_gym.datasets.importers.labels import STRUCTURE_HELP, parts_of
from medseg_gym.datasets.importers.nifti_file import SUFFIXES, need_nibabel, stem
from medseg_gym.datasets.importers.volumes import CUT_OPTIONS, parse_cut
from medseg_gym.errors import BadDataError, MedSegError

OPTIONS: dict[str, str] = {
    "structure": STRUCTURE_HELP,
    **CUT_OPTIONS,
    "channel": "of images with several: the number or name in dataset.json, 0 by default",
    "affine": pairs.OPTIONS["affine"],
}
WANT = '{"labels": {"1": NAME, ...} or {NAME: 1, ...}, "training": [{"image", "label"}]}'
PARTS = (("Tr", None), ("Ts", "test"))  # suffix of the folders, split where both halves of a dataset have labels


def plan(source: Path, card: DatasetCard, options: Mapping[str, str]) -> tuple[list[pairs.Item], list[Skipped]]:
    """One item a labelled volume, by dataset.json's list or, where it has none (nnU-Net), by the folders.

    Volumes of imagesTs that have a label in labelsTs are the test split, and the others then train.
    """
    check_options(options, OPTIONS, "nifti-msd")
    need_nibabel()
    record = read_json(source / "dataset.json", WANT)
    parts = parts_of(options.get("structure"), card, _listed(source, record.get("labels")))
    channels = record.get("channel_names") or record.get("modality") or {}
    channels = {str(k): str(v) for k, v in channels.items()} if isinstance(channels, dict) else {}
    channel = _channel(options.get("channel", "0"), channels)
    modality = card.modality or ("CT" if channels.get(str(channel), "").upper().startswith("CT") else "")
    cut = parse_cut(options, window_for(modality, card.region, [part.structure for part in parts]))
    trust = pairs.trust_affine(options)
    entries, skipped = _entries(source, record, channel)
    with_test = any(split for _, _, split in entries)
    items = []
    for image, label, split in entries:
        name = stem(label)
        patient, own = identify(name, card.patient, otherwise=name)
        items.append(
            pairs.Item(
                source, image, ((label, tuple(parts)),), cut, channel, trust, patient,
                pairs.prefix_of(own, patient), (split or "train") if with_test else None, "structure" in options,
            )
        )  # fmt: skip
    return sorted(items, key=lambda item: item.image), skipped


def _listed(source: Path, labels: Any) -> dict[str, tuple[int, ...]]:
    """Structure -> values of dataset.json: {"1": name} (MSD), {name: 1} or {name: [1, 2]} (nnU-Net), 0 left out."""
    path = source / "dataset.json"
    if not isinstance(labels, dict) or not labels:
        raise BadDataError(f"{path}: no labels; wanted {WANT}")
    out: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        if isinstance(value, str) and key.strip().isdigit():
            name, values = value, [int(key)]
        elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            name, values = key, value
        elif isinstance(value, int):
            name, values = key, [value]
        else:
            raise BadDataError(f"{path}: label {key!r} is {value!r}; wanted {WANT}")
        if values != [0] and key not in ("ignore",):
            if name in out:
                raise BadDataError(f"{path}: two labels are called {name!r}")
            out[name] = tuple(values)
    if not out:
        raise BadDataError(f"{path}: only the background has a label; wanted {WANT}")
    return out


def _channel(text: str, names: Mapping[str, str]) -> int:
    """The number of a channel by number or name."""
    by_name = {name.casefold(): key for key, name in names.items()}
    text = by_name.get(text.casefold(), text)
    if not (text.isascii() and text.isdigit() and len(text) < 5):
        known = ", ".join(f"{key} {name}" for key, name in names.items()) or "a number from 0 up"
        raise MedSegError(f"channel {text!r}; wanted one of: {known}")
    return int(text)


def _entries(
    source: Path, record: dict[str, Any], channel: int
) -> tuple[list[tuple[str, str, str | None]], list[Skipped]]:
    """(image, label, split) of every labelled volume."""
    found: list[tuple[str, str, str | None]] = []
    skipped: list[Skipped] = []
    training = record.get("training")
    if training is not None and not isinstance(training, list):
        raise BadDataError(f"{source / 'dataset.json'}: 'training' is a {type(training).__name__}; wanted a list")
    for number, entry in enumerate(training or []):
        try:
            if not isinstance(entry, dict):
                raise BadDataError(f"a {type(entry).__name__}; wanted an object with image and label")
            for key in ("image", "label"):
                inside(source, entry.get(key))
        except BadDataError as error:
            skipped.append(Skipped(f"dataset.json, training {number}", str(error)))
            continue
        label, image = (str(Path(entry[key]).as_posix()) for key in ("label", "image"))
        found.append((_with_channel(source, image, channel), label, None))
    for suffix, split in PARTS:
        if suffix == "Tr" and found:
            continue
        for path in sorted((source / f"labels{suffix}").glob("*")):
            name = stem(path.name)
            if name.startswith(".") or not path.name.endswith(SUFFIXES):
                continue
            image = f"images{suffix}/{path.name}"
            found.append((_with_channel(source, image, channel), f"labels{suffix}/{path.name}", split))
    return found, skipped


def _with_channel(source: Path, image: str, channel: int) -> str:
    """nnU-Net's name of an image's channel, case_0000.nii.gz, where that file is there; else the name itself."""
    folder, slash, file = image.rpartition("/")
    name = stem(file)
    other = f"{folder}{slash}{name}_{channel:04}{file[len(name) :]}"
    return other if not (source / image).is_file() and (source / other).is_file() else image


def read(item: pairs.Item) -> Iterator[RawCase | Skipped]:
    """The slices of the volume."""
    yield from pairs.read(item)

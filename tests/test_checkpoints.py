"""Original checkpoints: nothing is left over on either side unless it is named, and SAM 2.1's own names load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import tools
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.tools.checkpoints import fill
from medseg_gym.tools.sam2 import Sam2Tool, read_model
from medseg_gym.tools.sam2_config import sam21_config
from medseg_gym.tools.sam2_original import VIDEO_KEYS, original_name, size_of, to_original

torch = pytest.importorskip("torch")

KEYS = Path(__file__).parent / "parity" / "sam2.1_hiera_t_keys.tsv"  # names and shapes of the sam2 package's own model


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


def two_layers() -> Any:
    return torch.nn.ModuleDict({"first": torch.nn.Linear(2, 3), "second": torch.nn.Linear(3, 1)})


def state() -> dict[str, Any]:
    return {
        "a.weight": torch.ones(3, 2),
        "a.bias": torch.zeros(3),
        "b.weight": torch.ones(1, 3),
        "b.bias": torch.ones(1),
    }


def rename(key: str) -> str | None:
    layer, _, kind = key.partition(".")
    return {"a": f"first.{kind}", "b": f"second.{kind}"}.get(layer)


def test_every_weight_gets_its_place_and_is_a_copy() -> None:
    model, given = two_layers(), state() | {"a.weight": torch.full((3, 2), 7.0, dtype=torch.float16)}
    fill(model, given, rename)
    given["a.bias"].fill_(9)
    # 7 * 1 + 7 * 2 = 21 in each of three, and 21 * 3 + 1
    assert model["second"](model["first"](torch.tensor([1.0, 2.0]))).item() == 64
    assert model["first"].weight.dtype == torch.float32


def test_a_model_on_the_meta_device_is_filled() -> None:
    with torch.device("meta"):
        model = two_layers()
    fill(model, state(), rename)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"c.weight": torch.ones(1)}, r"1 of its 5 weights have no place in the model \(c\.weight\)"),
        ({"a.bias": None}, r"1 of the model's 4 weights are not in it \(first\.bias\)"),
        ({"a.bias": torch.ones(4)}, r"1 have another shape \(a\.bias is \(4,\), wanted \(3,\)\)"),
        ({"a.bias": "text"}, r"no place in the model \(a\.bias\); 1 of the model's"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_alone(change: dict[str, Any], told: str) -> None:
    model = two_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {key: value for key, value in (state() | change).items() if value is not None}
    with pytest.raises(BadDataError, match=rf"^x\.pt does not fit: .*{told}"):
        fill(model, given, rename, source="x.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_named_may_be_left_over_on_either_side() -> None:
    model, given = two_layers(), state() | {"extra.c": torch.ones(1)}
    del given["b.bias"]
    fill(model, given, rename, ignore=("extra.*", "second.bias"))
    with pytest.raises(BadDataError, match=r"second\.bias"):
        fill(model, given, rename, ignore=("extra.*",))
    with pytest.raises(BadDataError, match=r"extra\.c"):
        fill(model, given, rename, ignore=("second.*",))


def test_a_place_given_twice_is_refused() -> None:
    with pytest.raises(BadDataError, match=r"no place in the model \(z\.bias\)"):
        fill(two_layers(), state() | {"z.bias": torch.zeros(3)}, lambda key: rename(key.replace("z.", "a.")))


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    """The names and shapes of the sam2 package's own tiny model, video included; weight i is i everywhere.

    A file keeps the one number of each, so that a test writes kilobytes.
    """
    rows = (line.split("\t") for line in KEYS.read_text().splitlines())
    return {key: torch.tensor(float(i)).expand([int(n) for n in s.split("x")]) for i, (key, s) in enumerate(rows)}


def saved(state: dict[str, Any], path: Path) -> Path:
    torch.save({"model": state}, path)
    return path


def test_a_file_of_the_sam2_package_loads_with_nothing_left_over(original: dict[str, Any], tmp_path: Path) -> None:
    model = read_model(saved(original, tmp_path / "sam2.1_hiera_tiny.pt"))
    back = to_original(model.state_dict())
    left = {key.split(".")[0] for key in original if key not in back}
    assert left == {pattern.removesuffix(".*") for pattern in VIDEO_KEYS}
    assert all(torch.equal(original[key], value) for key, value in back.items())
    point = model.prompt_encoder.point_embed.weight  # four weights in the original: negative, positive, two corners
    assert torch.equal(point[2], original["sam_prompt_encoder.point_embeddings.2.weight"][0])
    position = original["sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert torch.equal(model.shared_image_embedding.positional_embedding, position)
    assert torch.equal(model.prompt_encoder.shared_embedding.positional_embedding, position)


@pytest.mark.parametrize("key", ["sam_mask_decoder.iou_token.weight", "sam_prompt_encoder.point_embeddings.3.weight"])
def test_a_file_with_a_weight_less_is_refused(original: dict[str, Any], tmp_path: Path, key: str) -> None:
    path = saved({name: value for name, value in original.items() if name != key}, tmp_path / "less.pt")
    with pytest.raises(BadDataError, match=r"less\.pt does not fit: .*(iou_token|point_embed)"):
        Sam2Tool.from_pretrained(path)


def test_a_file_with_a_weight_more_is_refused(original: dict[str, Any], tmp_path: Path) -> None:
    path = saved(original | {"image_encoder.adapter": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(BadDataError, match=r"no place in the model \(image_encoder\.adapter\).*size T"):
        Sam2Tool.from_pretrained(path)


def test_a_file_of_another_size_is_named(original: dict[str, Any], tmp_path: Path) -> None:
    path = saved(original, tmp_path / "tiny.pt")
    with pytest.raises(BadDataError, match=r"another shape.*It looks like a checkpoint of SAM 2's size T"):
        tools.load("SAM2.1BPlus", weights=path)
    assert size_of({"some.key": torch.ones(1)}) is None


@pytest.mark.parametrize("hiera", ["T", "S", "BPlus", "L"])
def test_names_of_all_sizes_are_told_apart_and_come_back(hiera: str) -> None:
    from transformers import Sam2Model

    with torch.device("meta"):
        names = Sam2Model(sam21_config(hiera)).state_dict()
    originals = [original_name(name) for name in names]
    assert len(set(originals)) == len(originals) - 1  # the position matrix is kept twice
    assert size_of(to_original(names)) == hiera


def test_the_catalogue_loads_original_files_as_it_loads_folders(original: dict[str, Any], tmp_path: Path) -> None:
    """MedSAM2 is SAM 2.1 tiny at 512; one set of weights gives one fingerprint, whatever the format."""
    path = saved(original, tmp_path / "MedSAM2_latest.pt")
    read_model(path, size=512).save_pretrained(tmp_path / "folder")
    file, folder = (tools.load("MedSAM2", weights=given) for given in (path, tmp_path / "folder"))
    assert file.fingerprint == folder.fingerprint and file.prior_shape(9, 9) == (128, 128)


def test_a_lone_file_of_transformers_is_sent_to_its_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"vision_encoder.neck.convs.0.bias": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadDataError, match=r"name the folder that holds it"):
        tools.load("SAM2.1T", weights=tmp_path / "model.safetensors")


def test_engines_and_options_are_checked_before_weights_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MedSegError, match=r'engine="sam2" needs the sam2 package: `pip install .*--no-build-isolation'):
        tools.load("SAM2.1T", engine="sam2")
    with pytest.raises(UnknownNameError, match="unknown engine 'sam3'; did you mean 'sam2'"):
        tools.load("SAM2.1T", engine="sam3")
    with pytest.raises(UnknownNameError, match="did you mean 'multimask'"):
        tools.load("SAM2.1T", multi_mask=False)


def test_a_device_that_is_not_there_is_named() -> None:
    from test_sam2 import tiny_config

    with pytest.raises(MedSegError, match="device 'cuda:99'.*device='cpu'"):
        Sam2Tool.from_config(tiny_config(), 0, device="cuda:99")


def test_compile_asks_torch_for_the_encoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_sam2 import image, tiny_config

    from medseg_gym.types import Click, Query

    calls: list[str] = []

    def compiled(function: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(function.__name__)
            return function(*given)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    plain, fast = (Sam2Tool.from_config(tiny_config(), 0, compile=switch) for switch in (False, True))
    (a,), (b,) = (tool.predict([Query(tool.encode([image(40, 56)])[0], (Click(3, 3),))]) for tool in (plain, fast))
    assert calls == ["features"] and np.array_equal(a.logits, b.logits)
    assert plain.fingerprint == fast.fingerprint

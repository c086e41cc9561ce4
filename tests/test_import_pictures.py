"""Pictures: pairs by pattern, the pool's index, COCO outlines and colour-coded masks."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_import_nifti import MINE, cases
from test_importers import rgb, save, square

from medseg_gym.datasets.cards import DATASETS, DatasetCard
from medseg_gym.datasets.importers import pairs
from medseg_gym.datasets.importers.coco import outline_mask
from medseg_gym.datasets.importers.colour_masks import by_colour
from medseg_gym.datasets.importers.intensities import bounds, to_bytes
from medseg_gym.datasets.importers.labels import parse_structures
from medseg_gym.datasets.importers.pictures import read_foreground, read_picture, read_values
from medseg_gym.datasets.prepare import prepare
from medseg_gym.errors import BadDataError, MedSegError


def white(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def folder(
    root: Path, names: tuple[str, ...] = ("a", "b"), image: str = "images/{}.png", mask: str = "masks/{}.png"
) -> None:
    """8 x 10 images, each with a square as its mask; the square's place tells them apart."""
    for number, name in enumerate(names):
        save(root / image.format(name), rgb(8, 10, number))
        save(root / mask.format(name), white(square(8, 10, number, number)))


# Pairs


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("images/{}.png", "masks/{}.png", {}),
        ("{}.jpg", "{}_mask.png", {}),
        ("Original/{}.tif", "Ground Truth/{}.tif", {}),
        ("x/{}-img.bmp", "y/m_{}.png", {"image": "x/{id}-img.bmp", "mask": "y/m_{id}.png"}),
        ("x/{}.png", "x/{}_gt.png", {"image": "x/*.png", "mask": "x/*_gt.png"}),
        ("x/{}.png", "y/{}.png", {"image": "*/*.png", "mask": "y/{name}.png"}),
    ],
)
def test_images_and_masks_are_paired_by_pattern(tmp_path: Path, image: str, mask: str, options: dict[str, str]) -> None:
    folder(tmp_path, image=image, mask=mask)
    if options.get("mask") == "y/{name}.png":
        with pytest.raises(MedSegError, match="wanted what they share in braces"):
            cases("png-pairs", tmp_path, structure="polyp", **options)
        return
    found, left = cases("png-pairs", tmp_path, structure="polyp", **options)
    assert left == {} and [case.patient for case in found] == ["a", "b"]
    for number, case in enumerate(found):
        assert case.file == image.format("ab"[number]) and case.name == "ab"[number]
        np.testing.assert_array_equal(case.masks["polyp"], square(8, 10, number, number))


def test_several_masks_an_image_are_named_by_their_target(tmp_path: Path) -> None:
    for stem in ("1", "1_optic", "a__b"):
        save(tmp_path / f"images/{stem}.png", rgb(8, 10))
        for number, target in enumerate(("optic_cup", "disc")):
            save(tmp_path / f"masks/{stem}__{target}.png", white(square(8, 10, number)))
    found, left = cases("png-pairs", tmp_path)
    assert left == {} and [case.name for case in found] == ["1", "1_optic", "a__b"]
    assert all(sorted(case.masks) == ["disc", "optic cup"] for case in found)


def test_where_two_images_fit_a_mask_the_longer_name_has_it(tmp_path: Path) -> None:
    for stem in ("1", "1_left"):
        save(tmp_path / f"images/{stem}.png", rgb(8, 10))
        save(tmp_path / f"masks/{stem}_eye.png", white(square(8, 10)))
    found, left = cases("png-pairs", tmp_path, image="images/{id}.png", mask="masks/{id}_{target}.png")
    assert left == {} and [(case.name, list(case.masks)) for case in found] == [("1", ["eye"]), ("1_left", ["eye"])]


@pytest.mark.parametrize("ending", ["png", "*"])
def test_the_work_of_pairing_grows_with_the_files(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    class Counted:
        def __init__(self, expression: re.Pattern[str]) -> None:
            self.expression = expression

        def fullmatch(self, text: str) -> re.Match[str] | None:
            work["matches"] += 1
            return self.expression.fullmatch(text)

    def counted(*args: Any, **options: Any) -> Counted:
        work["expressions"] += 1
        return Counted(expression(*args, **options))

    expression, work = pairs._expression, Counter[str]()
    monkeypatch.setattr(pairs, "_expression", counted)
    done = []
    for number in (200, 400):
        names = [f"p_{index}.png" for index in range(number)]
        targets = ("cup", "disc", "fovea")
        files = sorted(f"{top}/{name}" for top in ("images", *(f"masks/{t}" for t in targets)) for name in names)
        work.clear()
        found, left = pairs._match(
            DatasetCard("Mine", "Mine", "", ""), f"images/{{id}}.{ending}", f"masks/{{target}}/{{id}}.{ending}", files
        )
        assert left == [] and [pair.image for pair in found] == files[:number]
        assert all(pair.masks == tuple((f"masks/{t}/{Path(pair.image).name}", t) for t in targets) for pair in found)
        done.append(work.total())
    assert done[1] <= 2.2 * done[0] and done[1] <= 4 * 4 * 400


def test_where_a_name_reads_in_several_ways_every_way_is_tried(tmp_path: Path) -> None:
    for name in ("images/a", "images/a_b", "masks/cup_a", "masks/x_cup_a_2", "masks/cup_a_b_1", "masks/cup_d_1"):
        save(tmp_path / f"{name}.png", rgb(8, 10))
    card = DatasetCard("Mine", "Mine", "", "")
    found, left = pairs.find_pairs(tmp_path, card, [("images/{id}.png", "masks/{target}_{id}*.png")], [".png"])
    assert [(pair.name, pair.masks) for pair in found] == [
        ("a", (("masks/cup_a.png", "cup"), ("masks/x_cup_a_2.png", "x cup"))),
        ("a_b", (("masks/cup_a_b_1.png", "cup"),)),
    ]
    assert [(entry.file, entry.reason) for entry in left] == [("masks/cup_d_1.png", "no image of this mask")]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere")
    source = tmp_path / "source"
    source.mkdir()
    try:
        for top in ("images", "masks"):
            (source / top).symlink_to(tmp_path / "elsewhere" / top, target_is_directory=True)
        (source / "masks/round").symlink_to(source, target_is_directory=True)
        (source / "more").symlink_to(source / "images", target_is_directory=True)
    except OSError:
        pytest.skip("no links here")
    assert list(pairs._files(source)) == ["images/a.png", "images/b.png", "masks/a.png", "masks/b.png"]


def test_patients_and_splits_come_from_the_pattern_or_a_rule(tmp_path: Path, home: Path) -> None:
    for split in ("training", "test"):
        for number in range(2):
            save(tmp_path / f"{split}/p{split[1]}/img{number}.png", rgb(8, 10))
            save(tmp_path / f"{split}/p{split[1]}/img{number}_m.png", white(square(8, 10)))
    options = {"image": "{split}/{patient}/{id}.png", "mask": "{split}/{patient}/{id}_m.png", "structure": "polyp"}
    found, left = cases("png-pairs", tmp_path, **options)
    assert left == {}
    assert [(c.patient, c.name, c.split) for c in found] == [
        ("pe", "img0", "test"), ("pe", "img1", "test"), ("pr", "img0", "train"), ("pr", "img1", "train"),
    ]  # fmt: skip
    report = prepare("Mine", tmp_path, layout="png-pairs", options=options)
    assert report.splits["train"].patients == report.splits["test"].patients == 1
    folder(tmp_path / "flat", ("TCGA_1_3", "TCGA_1_4", "TCGA_2_1"))
    card = DatasetCard("Mine", "Mine", "", "", patient=r"TCGA_(?P<patient>\d)_(?P<slice>\d)")
    found, _ = cases("png-pairs", tmp_path / "flat", card, structure="glioma")
    assert [(c.patient, c.name) for c in found] == [("1", "slice-003"), ("1", "slice-004"), ("2", "slice-001")]


def test_the_only_structure_of_a_card_needs_no_naming(tmp_path: Path) -> None:
    folder(tmp_path)
    found, _ = cases("png-pairs", tmp_path, DATASETS["KvasirSEG"])
    assert list(found[0].masks) == ["polyp"]
    with pytest.raises(MedSegError, match="nothing says what the masks outline; add --structure NAME"):
        cases("png-pairs", tmp_path)
    with pytest.raises(MedSegError, match="read by --layout colour-masks"):
        cases("png-pairs", tmp_path, structure="1=polyp")


def test_bad_pictures_cost_themselves_and_are_told_of(tmp_path: Path, home: Path) -> None:
    folder(tmp_path, tuple("abcdefgh"))
    (tmp_path / "images/a.png").write_bytes(b"not an image")
    (tmp_path / "masks/b.png").write_bytes((tmp_path / "masks/b.png").read_bytes()[:40])
    (tmp_path / "masks/c.png").unlink()
    (tmp_path / "images/d.png").unlink()
    save(tmp_path / "masks/e.png", white(square(8, 9)))
    save(tmp_path / "masks/f.png", white(square(8, 10)) * 0)
    pages = [Image.fromarray(white(square(8, 10)))] * 2
    (tmp_path / "masks/g.png").unlink()
    pages[0].save(tmp_path / "masks/g.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "notes.txt").write_text("not looked at")
    report = prepare("Mine", tmp_path, layout="png-pairs", options={"structure": "polyp"})
    reasons = {entry.file: entry.reason for entry in report.skipped}
    assert (
        reasons["images/a.png"] == "not a readable image (cannot identify image file); its 1 masks are left out with it"
    )
    assert reasons["masks/b.png"].startswith("not a readable image")
    assert reasons["images/c.png"] == "no mask of this image"
    assert reasons["masks/d.png"] == "no image of this mask"
    assert reasons["images/e.png"] == "mask of 'polyp' is 8x9, the image 8x10 (height x width)"
    assert reasons["images/f.png"] == "mask of 'polyp' has no foreground"
    assert reasons["masks/g.tif"] == "holds 2 pages; wanted one image"
    assert len(reasons) == 7 and report.images == 1 and report.damaged == 5
    assert not any(str(tmp_path) in text for text in reasons.values())


@pytest.mark.parametrize("pattern", ["../{id}.png", "/{id}.png", "C:/{id}.png", "a/../../{id}.png", ""])
def test_patterns_that_lead_out_are_refused(tmp_path: Path, pattern: str) -> None:
    folder(tmp_path)
    with pytest.raises(MedSegError, match="outside the folder|wanted a text"):
        cases("png-pairs", tmp_path, structure="polyp", image=pattern, mask="masks/{id}.png")


def test_a_pattern_that_finds_nothing_shows_what_is_there(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(BadDataError, match=r"no image with a mask by --image .*files are like images/a.png"):
        cases("png-pairs", tmp_path, structure="polyp", image="img/{id}.png", mask="masks/{id}.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadDataError, match="no file that ends in"):
        cases("png-pairs", tmp_path / "empty", structure="polyp")


def test_deep_grey_goes_through_the_window(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 40000, (8, 10)).astype(np.uint16)
    save(tmp_path / "a.png", values)
    save(tmp_path / "a.tif", values)
    for name in ("a.png", "a.tif"):
        expected = to_bytes(values, *bounds(values, "percentile"))
        np.testing.assert_array_equal(read_picture(tmp_path / name), expected)
        np.testing.assert_array_equal(read_picture(tmp_path / name, (0.0, 40000.0)), to_bytes(values, 0, 40000))
    save(tmp_path / "b.png", values.astype(np.uint8))
    np.testing.assert_array_equal(read_picture(tmp_path / "b.png"), values.astype(np.uint8))  # 8 bits stay as they are


def test_foreground_is_any_value_but_in_jpeg_files(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 9:23] = 255
    mask[0, 0] = 1
    save(tmp_path / "a.png", mask)
    assert read_foreground(tmp_path / "a.png").sum() == 12 * 14 + 1
    assert read_foreground(tmp_path / "a.png", 2).sum() == 12 * 14
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=60)
    assert (np.asarray(Image.open(tmp_path / "a.jpg")) > 0).sum() > 12 * 14  # it rings
    assert read_foreground(tmp_path / "a.jpg").sum() == 12 * 14
    blue = np.zeros((4, 4, 3), np.uint8)
    blue[1, 1, 2] = 1
    save(tmp_path / "b.png", blue)
    assert np.argwhere(read_foreground(tmp_path / "b.png")).tolist() == [[1, 1]]


def test_a_tiff_of_three_samples_that_calls_itself_grey_is_read_in_colour(tmp_path: Path) -> None:
    pixels = rgb(8, 10)
    save(tmp_path / "a.tif", pixels)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        if struct.unpack_from("<H", content, at)[0] == 262:
            struct.pack_into("<H", content, at + 8, 1)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(OSError):
        Image.open(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif"), pixels)


# Colour-coded and indexed masks


def test_colours_are_structures(tmp_path: Path) -> None:
    mask = np.zeros((8, 10, 3), np.uint8)
    mask[1:4, 1:4] = (0, 0, 255)
    mask[2, 2] = (255, 0, 0)
    save(tmp_path / "images/a.png", rgb(8, 10))
    save(tmp_path / "masks/a.png", mask)
    (case,), left = cases("colour-masks", tmp_path, structure="blue+red=kidney,#FF0000=kidney tumor,green=cyst")
    assert left == {} and {s: int(m.sum()) for s, m in case.masks.items()} == {"kidney": 9, "kidney tumor": 1}


def test_jpeg_colours_are_taken_within_the_tolerance_and_others_told_of() -> None:
    pixels = np.zeros((2, 20, 3), np.uint8)
    pixels[0] = (10, 20, 200)  # 55 off blue
    pixels[1] = (120, 120, 0)  # near nothing
    parts = parse_structures("blue=kidney,red=tumor")
    masks, unnamed = by_colour(pixels, parts, 60)
    assert masks["kidney"].sum() == 20 and not masks["tumor"].any()
    assert unnamed == "colours #787800 (20 pixels) have no name and are left out"
    masks, unnamed = by_colour(pixels, parts, 54)
    assert not masks["kidney"].any() and "#0a14c8 (20 pixels)" in unnamed
    assert by_colour(pixels[:, :8], parts, 60)[1] == ""  # a few pixels are an edge


def test_label_values_are_read_from_grey_values_and_palettes(tmp_path: Path) -> None:
    values = np.zeros((8, 10), np.uint8)
    values[1:3, 1:3], values[4:6, 4:6], values[7, 7] = 1, 2, 5
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 0] + [9] * 30)
    for name in ("grey", "indexed", "triple"):
        save(tmp_path / f"images/{name}.png", rgb(8, 10))
    save(tmp_path / "masks/grey.png", values)
    palette.save(tmp_path / "masks/indexed.png")
    save(tmp_path / "masks/triple.png", np.stack([values] * 3, axis=2))
    found, left = cases("colour-masks", tmp_path, structure="1=disc,1+2=all")
    assert [{s: int(m.sum()) for s, m in case.masks.items()} for case in found] == [{"disc": 4, "all": 8}] * 3
    assert left["masks/indexed.png"] == "label values 5 have no name and are left out" and len(left) == 3
    by_card, _ = cases("colour-masks", tmp_path, DATASETS["MSDLiver"])
    assert sorted(by_card[0].masks) == ["liver", "liver tumor"]
    save(tmp_path / "masks/triple.png", rgb(8, 10))
    with pytest.raises(BadDataError, match="holds colours or fractions; wanted label values"):
        read_values(tmp_path / "masks/triple.png")


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (None, "nothing says what the masks' values mean"),
        ("kidney", "nothing says what the masks' values mean"),
        ("blu=kidney", "label 'blu'; wanted a whole number, #rrggbb, or one of"),
        ("1+blue=kidney", "mixes label values and colours"),
        ("1=kidney,blue=cyst", "colours and label values; wanted one kind"),
        ("1=kidney,2=kidney", "names one twice; join its values with"),
        ("1=kidney,2", "structure '2' in .* wanted VALUE=NAME"),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path: Path, structure: str | None, message: str) -> None:
    folder(tmp_path)
    with pytest.raises(MedSegError, match=message):
        cases("colour-masks", tmp_path, **({} if structure is None else {"structure": structure}))


# The pool's index


def pool(root: Path, **changes: Any) -> list[dict[str, Any]]:
    """Two images with two targets each; returns the index."""
    records = []
    for stem in ("p1_3", "p1_4"):
        save(root / f"images/{stem}.png", rgb(8, 10))
        for number, target in enumerate(("optic cup", "optic disc")):
            mask = f"masks/{stem}__{target.replace(' ', '_')}.png"
            save(root / mask, white(square(8, 10, number)))
            records.append(
                {"image": f"images/{stem}.png", "mask": mask, "target": target, "modality": "Fundus (colour)",
                 "site": "retina", "dataset": "X", **changes}
            )  # fmt: skip
    (root / "index.json").write_text(json.dumps(records))
    return records


def test_an_index_names_targets_and_words_them(tmp_path: Path) -> None:
    pool(tmp_path)
    found, left = cases("pool", tmp_path)
    assert left == {} and [(case.patient, case.name) for case in found] == [("p1_3", "p1_3"), ("p1_4", "p1_4")]
    assert found[0].instructions == {s: f"{s} in retina Fundus" for s in ("optic cup", "optic disc")}
    pool(tmp_path, patient="p1", split="val")
    found, _ = cases("pool", tmp_path)
    assert [(case.patient, case.name, case.split) for case in found] == [("p1", "p1_3", "val"), ("p1", "p1_4", "val")]


def test_a_folder_of_sets_keeps_them_apart(tmp_path: Path) -> None:
    pool(tmp_path / "A")
    pool(tmp_path / "B", dataset="KiTS19")
    found, left = cases("pool", tmp_path)
    assert left == {} and [case.patient for case in found] == ["A.p1_3", "A.p1_4", "B.p1_3", "B.p1_4"]
    assert [case.file for case in found][::2] == ["A/images/p1_3.png", "B/images/p1_3.png"]
    assert len(cases("pool", tmp_path, sets="B")[0]) == 2
    with pytest.raises(BadDataError, match="no set 'C'.*there are A, B"):
        cases("pool", tmp_path, sets="A,C")


def test_bad_entries_of_an_index_cost_themselves(tmp_path: Path) -> None:
    records: list[Any] = pool(tmp_path)
    (tmp_path / records[1]["mask"]).write_bytes(b"no")
    records += [
        {**records[0], "image": "../x.png"}, {**records[0], "target": ""}, "x",
        {**records[0], "image": "images/no.png"}, records[0],
    ]  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(records))
    found, left = cases("pool", tmp_path)
    assert [sorted(case.masks) for case in found] == [["optic cup"], ["optic cup", "optic disc"]]
    assert left["index.json, 4"].endswith("leads outside the folder; refused")
    assert "target is ''" in left["index.json, 5"] and "a str" in left["index.json, 6"]
    assert left["images/no.png"] == "no such file; its 1 masks are left out with it"
    assert left["masks/p1_3__optic_disc.png"].startswith("not a readable image")
    assert left["masks/p1_3__optic_cup.png"].startswith("a second mask of 'optic cup'")
    assert len(left) == 6
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(BadDataError, match="holds a dict; wanted"):
        cases("pool", tmp_path)


# COCO


def coco(
    root: Path, annotations: list[dict[str, Any]] | None = None, where: str = "annotations/instances_val.json"
) -> dict[str, Any]:
    """One 8 x 10 image with two rectangles of a cell and one of a nucleus; returns the record."""
    save(root / "images/a.png", rgb(8, 10))
    cell = [[1, 1, 4, 1, 4, 3, 1, 3]]
    if annotations is None:
        annotations = [
            {"image_id": 1, "category_id": 1, "segmentation": cell},
            {"image_id": 1, "category_id": 1, "segmentation": [[6, 5, 9, 5, 9, 8, 6, 8]]},
            {"image_id": 1, "category_id": 2, "segmentation": {"size": [8, 10], "counts": [9, 2, 69]}},
        ]
    record = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "cell_nucleus"}],
        "annotations": annotations,
    }
    path = root / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return record


def test_instances_of_a_category_are_one_mask_or_a_case_each(tmp_path: Path) -> None:
    coco(tmp_path)
    (case,), left = cases("coco", tmp_path)
    assert left == {} and (case.patient, case.split, case.file) == ("a", "val", "images/a.png")
    expected = np.zeros((8, 10), np.bool_)
    expected[1:3, 1:4] = expected[5:8, 6:9] = True
    np.testing.assert_array_equal(case.masks["cell"], expected)
    assert np.argwhere(case.masks["cell nucleus"]).tolist() == [[1, 1], [2, 1]]  # columns first: pixels 9 and 10
    each, _ = cases("coco", tmp_path, instances="each")
    assert [(c.name, list(c.masks)) for c in each] == [
        ("a-00000", ["cell"]),
        ("a-00001", ["cell"]),
        ("a-00002", ["cell nucleus"]),
    ]


def test_run_lengths_as_text_are_those_of_coco(tmp_path: Path) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((70, 90)) < density
        packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        outline = {"size": [70, 90], "counts": packed["counts"].decode()}
        np.testing.assert_array_equal(outline_mask(outline, 70, 90), mask)


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"size": [8, 9], "counts": [72]}, "of size .8, 9., the image .8, 10."),
        ({"size": [8, 10], "counts": [79]}, "add up to 79; wanted 80"),
        ({"size": [8, 10], "counts": [90, -10]}, "not whole numbers from 0 up"),
        ({"size": [8, 10], "counts": [10**12]}, "not whole numbers from 0 up"),
        ({"size": [8, 10], "counts": "PPPPPPPPPPP"}, "middle of a number"),
        ({"size": [8, 10], "counts": "\x7f"}, "hold the character"),
        ({"size": [8, 10], "counts": None}, "not whole numbers"),
        ([[1, 1, 2, 2]], r"polygon \[1, 1, 2, 2\]; wanted"),
        ([[1, 1, 2, 2, 3]], "polygon .* wanted"),
        ([[1, 1, 2, 2, 3, 1e9]], "far outside the 10x8 image"),
        ([[1, 1, 2, 2, 3, float("nan")]], "far outside"),
        ([[1, 1, 2, 2, 3, "4"]], "far outside"),
        ([[0, 0, 20, 20] * 52000], "more than 100000 points"),
        ([1, 2, 3], "polygon 1; wanted"),
        ("RLE", "segmentation is a str"),
    ],
)
def test_outlines_that_are_none_are_refused(outline: Any, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        outline_mask(outline, 8, 10)


def test_a_polygon_that_takes_all_memory_to_draw_is_refused() -> None:
    with pytest.raises(BadDataError, match="longer than 2000000 pixels"):
        outline_mask([[0, 0, 3999, 3999] * 500], 4000, 4000)


def test_bad_entries_of_a_coco_file_cost_themselves(tmp_path: Path, home: Path) -> None:
    record = coco(tmp_path, where="all.json")
    sound = record["annotations"][0]
    record["annotations"] += [
        {**sound, "category_id": 7}, {**sound, "image_id": 9}, {**sound, "segmentation": []},
        {**sound, "segmentation": [[1, 1, 1, 1, 1, 1]]}, 5, {**sound, "image_id": 2}, {**sound, "image_id": 3},
    ]  # fmt: skip
    record["images"] += [
        {"id": 2, "file_name": "../../b.png"},
        {"id": 3, "file_name": "gone.png"},
        {"id": 4, "file_name": "c.png"},
        7,
    ]
    (tmp_path / "all.json").write_text(json.dumps(record))
    report = prepare("Mine", tmp_path, layout="coco")
    reasons = {entry.file: entry.reason for entry in report.skipped}
    assert reasons == {
        "all.json, annotation 3": "no category has the id 7",
        "all.json, annotation 4": "no image has the id 9",
        "all.json, annotation 5": "no segmentation",
        "all.json, annotation 6": "its mask has no foreground",
        "all.json, annotation 7": "wanted an object with image_id, category_id and segmentation",
        "all.json, image 1": "file name '../../b.png' leads outside the folder; refused",
        "all.json, image 4": "7; wanted an object with id and file_name",
        "gone.png": "no such file; its 1 annotations are left out with it",
        "c.png": "no annotation of this image",
    }
    assert (report.images, report.cases, report.damaged) == (1, 2, 8)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "no .json in it or in annotations/"),
        ("{}", {}, "no list of images; wanted"),
        ("[]", {}, "holds a list; wanted"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', {}, "wanted id and name"),
        ("{}", {"json": "../x.json"}, "leads outside the folder"),
        ("{}", {"instances": "all"}, "unknown value of instances"),
    ],
)
def test_a_folder_without_a_coco_file_is_an_error(
    tmp_path: Path, content: str | None, options: dict[str, str], message: str
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(MedSegError, match=message):
        cases("coco", tmp_path, MINE, **options)


# Real files


def test_clinicdb_tiffs_are_read_in_colour(samples: Path, home: Path) -> None:
    folder = samples / "tif-pairs" / "CVC-ClinicDB"
    report = prepare("CVCClinicDB", folder, layout="png-pairs", options={"structure": "polyp"})
    assert (report.images, report.cases, report.skipped) == (6, 6, ())
    found, _ = cases("png-pairs", folder, structure="polyp")
    for case in found:
        inside = case.image[case.masks["polyp"]].mean(axis=0)
        assert case.image.shape == (288, 384, 3) and inside[0] > inside[1] > inside[2]  # polyps are reddish


def test_kits_colours_give_kidney_and_tumour(samples: Path, home: Path) -> None:
    report = prepare(
        "Mine", samples / "colour-masks" / "KiTS19", layout="colour-masks",
        options={"structure": "blue+red=kidney,red=kidney tumor"}, patient=r"(?P<patient>\d+)_(?P<slice>\d+)",
    )  # fmt: skip
    assert (report.images, report.cases, report.skipped) == (4, 7, ())
    assert {s: sum(row.values()) for s, row in report.structures.items()} == {"kidney": 4, "kidney tumor": 3}


@pytest.mark.slow
def test_the_pool_gives_every_pair(samples: Path, home: Path) -> None:
    report = prepare("Mine", samples / "pool", layout="pool")
    listed = [json.loads(path.read_text()) for path in (samples / "pool").glob("*/index.json")]
    assert len(listed) == 28 and sum(map(len, listed)) == 653
    assert report.cases == 653 and report.skipped == ()
    assert report.images == sum(len({record["image"] for record in records}) for records in listed)


def test_a_set_of_the_pool_is_paired_by_pattern_too(samples: Path) -> None:
    for name, count in (("ACDC", 58), ("Drishti-GS", 20), ("LiverUS", 36), ("SMDG_Glaucoma", 30)):
        by_pattern, left = cases("png-pairs", samples / "pool" / name)
        by_index, _ = cases("pool", samples / "pool" / name)
        assert left == {} and sum(len(case.masks) for case in by_pattern) == count
        for a, b in zip(by_pattern, by_index, strict=True):
            assert a.file == b.file and a.masks.keys() == b.masks.keys()
            np.testing.assert_array_equal(a.image, b.image)

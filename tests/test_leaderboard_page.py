"""The leaderboard's page for people and machines: complete, self-contained, accessible, the same for equal results."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from page_tree import Node, tree

from medseg_gym.bench import leaderboard_gallery, suites
from medseg_gym.bench.leaderboard import build
from medseg_gym.bench.leaderboard_gallery import chosen, galleries
from medseg_gym.bench.leaderboard_page import TEMPLATES, page
from medseg_gym.bench.leaderboard_read import read_all
from medseg_gym.bench.leaderboard_run import run_suite
from medseg_gym.bench.leaderboard_svg import apart, styles
from medseg_gym.bench.leaderboard_tables import results_of
from medseg_gym.bench.reported import MARK, reported
from medseg_gym.bench.suites import Entry, Suite
from medseg_gym.types import Box, Decision, Stop, Undo, View

COMMITTED = ROOT / "benchmarks" / "leaderboard.html"
EVIL = "<script>alert('x')</script> & \"quotes\""
PHANTOM = Entry("Phantom", "Stub", cases=4, horizon=8, options={"dataset_options": {"size": 64}})
TINY = Suite("tiny", "Tiny", "Four phantoms.", (PHANTOM,), ("BoxOnce",))


class Talker:
    """Boxes the middle seven times, then stops; says something strange each time, and something long at first."""

    name = "Talker"

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        return [self.choose(view) for view in views]

    def choose(self, view: View) -> Decision:
        said = EVIL if view.turn else "long " * 400
        action = Stop() if view.turn == 7 else Undo() if view.turn == 1 else Box(10, 10, 40 + view.turn, 44)
        return Decision(action, text=said)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms, played by an oracle and by one that talks."""
    out = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "SUITES", {**suites.SUITES, "tiny": TINY})
        run_suite("tiny", ["BoxOnce", Talker()], out=out)
    return out


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {**suites.SUITES, "tiny": TINY})


@pytest.fixture(scope="module", params=["played here", "committed"])
def text(request: pytest.FixtureRequest, played: Path) -> str:
    """A page with strange answers, and the one that is published."""
    if request.param == "committed":
        if not COMMITTED.is_file():
            pytest.skip("no committed page beside the tests")
        return COMMITTED.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "SUITES", {**suites.SUITES, "tiny": TINY})
        return made(played)


@pytest.fixture(scope="module")
def root(text: str) -> Node:
    return tree(text)


def made(folder: Path) -> str:
    runs, skipped = read_all([folder])
    results = [results_of(suites.suite(name), found) for name, found in runs.items()]
    return page(results, skipped, galleries=galleries(results), reported=reported())


def named(node: Node) -> str:
    return node.get("aria-label") or node.text


def test_the_page_says_its_language_title_and_charset(text: str, root: Node) -> None:
    assert text.lstrip().startswith("<!doctype html>")
    assert root.one("html")["lang"] == "en"
    assert root.one("title").text == "Leaderboard · MedSeg Gym"
    assert root.one("meta", charset="utf-8")
    assert "width=device-width" in root.one("meta", name="viewport")["content"]


def test_nothing_is_loaded_from_anywhere(text: str, root: Node) -> None:
    assert not {node.tag for node in root.below()} & {"link", "iframe", "object", "embed", "base", "audio", "video"}
    for node in root.below():
        for name in ("src", "srcset", "data", "action", "poster", "background"):
            assert name not in node.attrs, f"<{node.tag} {name}>"
        target = node.get("href")
        assert (
            target[:1] in ("#", "")
            or target.startswith("data:image/")
            or (node.tag == "a" and target.startswith("https://"))
        ), target
    style = root.one("style").text
    assert not re.search(r"@import|url\((?!#)", style)
    assert len(text.encode()) < 3_000_000


def test_the_content_policy_allows_this_script_and_no_other(root: Node) -> None:
    (script,) = root.all("script")
    policy = root.one("meta", http_equiv="Content-Security-Policy")["content"]
    digest = base64.b64encode(hashlib.sha256("".join(map(str, script.children)).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [name for node in root.below() for name in node.attrs if name.startswith("on")]


def test_links_inside_the_page_lead_somewhere_and_ids_are_unique(root: Node) -> None:
    ids = [node["id"] for node in root.all(id="*")]
    assert len(ids) == len(set(ids)) and all(ids)
    for node in root.all(href="*"):
        assert not node["href"].startswith("#") or node["href"][1:] in ids, node["href"]
    assert {ref[5:-1] for ref in re.findall(r"url\(#[\w-]+\)", root.one("style").text)} <= set(ids)


def test_headings_descend_one_level_at_a_time(root: Node) -> None:
    levels = [int(node.tag[1]) for node in root.below() if re.fullmatch(r"h[1-6]", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert all(node.text for node in root.below() if re.fullmatch(r"h[1-6]", node.tag))


def test_every_picture_says_what_it_shows_or_is_hidden_from_those_who_do_not_see_it(root: Node) -> None:
    drawn = root.all("svg")
    assert drawn
    for node in drawn:
        assert node.get("aria-hidden") == "true" or (node.get("role") == "img" and node.get("aria-label")), node.attrs
    assert all("alt" in node.attrs for node in root.all("img"))


def test_every_control_has_a_name_and_works_without_the_mouse(root: Node) -> None:
    for tag in ("select", "input", "textarea"):
        for control in root.all(tag):
            labels = [node for node in control.above() if node.tag == "label"]
            assert labels and "".join(c for c in labels[0].children if isinstance(c, str)).strip(), control.attrs
    assert all(named(button) for button in root.all("button"))
    assert all(link.text for link in root.all("a"))
    assert not root.all(title="*"), "a tooltip cannot be read without a mouse"
    assert {node["tabindex"] for node in root.all(tabindex="*")} <= {"0", "-1"}
    skip = root.all("a", "skip")[0]
    assert next(node for node in root.below() if node.tag in ("a", "button", "select")) is skip
    assert root.one(id=skip["href"][1:]).tag == "main"


def test_wide_tables_can_be_reached_and_scrolled_by_keyboard(root: Node) -> None:
    for table in root.all("table"):
        holder = next(node for node in table.above() if "wide" in node.get("class").split())
        assert (holder["tabindex"], holder["role"]) == ("0", "region") and holder["aria-label"]


def test_table_heads_have_a_scope_and_every_row_a_head(root: Node) -> None:
    for table in root.all("table"):
        (head,) = table.all("thead")
        assert {cell["scope"] for cell in head.all("th")} <= {"col", "colgroup"}
        for row in table.one("tbody").all("tr"):
            assert [cell["scope"] for cell in row.all("th")] == ["row"], row.text
    for table in root.all("table", data_sortable="*"):
        heads = table.one("thead").all("th")
        assert all(len(head.all("button")) == 1 and head["data-sort"] for head in heads)
        for row in table.one("tbody").all("tr"):
            cells = [cell for cell in row.children if isinstance(cell, Node)]
            assert [cell["data-k"] for cell in cells] == [head["data-sort"] for head in heads]
            for cell, head in zip(cells, heads, strict=True):
                assert "data-words" in head.attrs or cell["data-v"] == "" or float(cell["data-v"]) is not None


def test_without_the_script_all_is_there_and_nothing_pretends_to_work(root: Node) -> None:
    assert all("disabled" in button.attrs for button in root.one("main").all("button"))
    hidden = [node for node in root.all(hidden="*") if node.tag != "form" and "bar" not in node.get("class")]
    assert {node.get("class") for node in hidden} <= {"empty"}


def _colours(scheme: str) -> dict[str, tuple[float, float, float]]:
    """The custom properties of one scheme; dark and print replace some of the light ones."""
    style = (TEMPLATES / "leaderboard.css").read_text(encoding="utf-8")
    blocks = re.findall(r"(@media [^{]*\{)?:root\{([^}]*)\}", style)
    assert [media[:9] for media, _ in blocks] == ["", "@media (p", "@media pr"]
    chosen_blocks = {"light": blocks[:1], "dark": blocks[:2], "print": (blocks[0], blocks[2])}[scheme]
    found = {}
    for _, block in chosen_blocks:
        for name, value in re.findall(r"--([\w-]+):\s*(#[0-9a-f]{3,6})", block):
            digits = value[1:] if len(value) == 7 else "".join(2 * d for d in value[1:])
            found[name] = tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return found  # type: ignore[return-value]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """WCAG 2: (L1 + .05) / (L2 + .05) of the relative luminances."""

    def light(colour: tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_the_guidelines_do() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast((0x77 / 255,) * 3, (1, 1, 1)) == pytest.approx(4.48, abs=0.005)  # the guidelines' own example


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_texts_stand_out_from_what_is_behind_them(scheme: str) -> None:
    colours = _colours(scheme)
    behind = {"bg": ("ink", "soft", "muted", "accent", "oracle", "bad"), "card": ("ink", "muted")}
    behind |= {"paper": ("ink", "muted", "oracle", "accent"), "hair": ("soft", "ink"), "badwash": ("bad",)}
    for ground, texts in behind.items():
        for name in texts:
            assert contrast(colours[name], colours[ground]) >= 4.5, f"{name} on {ground}"
    for name in (*(f"p{n}" for n in range(8)), "better", "worse"):  # lines and marks: 3 is asked of them
        assert contrast(colours[name], colours["bg"]) >= 3, name


def test_lines_differ_by_dashes_or_markers_too_not_by_colour_alone(root: Node) -> None:
    for figure in root.all("svg", "plot"):
        looks = [
            (line.get("stroke-dasharray"), re.sub(r"M[\d.]+ [\d.]+", "", line.parent.all("path", "mark")[0]["d"]))
            for line in figure.all("path", "line")
            if line.parent is not None
        ]
        assert len(set(looks)) == len(looks)


def test_policies_keep_their_look_over_all_figures() -> None:
    assert list(styles(["Mine", "Random", "Yours"]).items())[-2:] == [("Mine", 6), ("Yours", 7)]
    assert styles(["Random"])["OracleClicks"] == styles(["Mine"])["OracleClicks"]


def test_labels_keep_apart_and_in_order() -> None:
    assert apart([10, 11, 50], 10, 0, 100) == [10, 20, 50]
    assert apart([98, 99], 10, 0, 100) == [90, 100]
    assert apart([5.0, 1.0], 10, 0, 100) == [11, 1]


def test_equal_results_give_equal_bytes(played: Path, tiny: None, tmp_path: Path) -> None:
    assert made(played) == made(played)
    build([played], out=tmp_path)
    assert (tmp_path / "leaderboard.html").read_text(encoding="utf-8") == made(played)


def test_answers_of_language_models_are_shown_as_text_and_cut_where_long(played: Path, tiny: None) -> None:
    root = tree(made(played))
    assert len(root.all("script")) == 1
    said = root.all("ol", "said")
    assert said and all(node["tabindex"] == "0" and "Talker" in node["aria-label"] for node in said)
    lines = [item.text for item in said[0].all("li")]
    assert lines[0].startswith("1 long long") and lines[0].endswith("1100 more characters")  # of 2000, 900 kept
    assert lines[1] == f"2 {EVIL}"


def test_of_long_episodes_the_first_and_last_turns_are_drawn_and_the_gap_is_told(played: Path, tiny: None) -> None:
    strip = tree(made(played)).all("div", "strip", data_policy="Talker")[0]
    turns = [
        int(frame.all("p")[0].text.split()[0]) for frame in strip.one("ol", "reel").children if isinstance(frame, Node)
    ]
    assert turns == [1, 2, 3, 7, 8]
    assert "3 turns in between are left out" in strip.text


def test_real_images_are_never_in_the_page(played: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leaderboard_gallery.PICTURES == ("Phantom",)
    assert tree(made(played)).all("image")
    monkeypatch.setattr(leaderboard_gallery, "PICTURES", ())  # as if these were someone's patients
    root = tree(made(played))
    assert not root.all("image") and "data:image" not in made(played)
    assert root.all("path", "m") and "not ours to hand on" in root.one("main").text


def test_a_case_whose_drawing_has_changed_is_shown_without_its_picture(
    played: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard_gallery, "iou", lambda mask, target: 2.0)
    assert not tree(made(played)).all("image")


def test_a_page_has_no_more_drawings_than_its_budget(played: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard_gallery, "BUDGET", 0)
    root = tree(made(played))
    assert len(root.all("article", "exhibit")) == 1
    assert "2 more cases did not fit" in root.one("main").text


def test_the_agents_shown_are_ceilings_then_those_without_the_target_then_the_best(played: Path, tiny: None) -> None:
    runs, _ = read_all([played])
    (table,) = results_of(TINY, runs["tiny"]).tables
    assert [(row.policy, row.ceiling, row.sees_target) for row in table.rows] == [
        ("BoxOnce", "BoxOnce", True),
        ("Talker", "BoxOnce", False),
    ]
    assert chosen(table) == [("Stub", "BoxOnce"), ("Stub", "Talker")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard_gallery, "STRIPS", 1)
        assert chosen(table) == [("Stub", "BoxOnce")]


def test_the_papers_rows_are_marked_and_never_ranked(root: Node) -> None:
    blocks = root.all("div", "reported")
    assert blocks
    for block in blocks:
        assert block.one(cls="stamp").text == MARK == "reported, not run here"
        assert not block.all(data_k="rank") and not block.all("table", "board")
        assert not block.all("button")
    boards = {id(row) for table in root.all("table", "board") for row in table.all("tr")}
    assert not boards & {id(row) for block in blocks for row in block.all("tr")}

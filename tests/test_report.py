"""The HTML report: complete, self-contained, escaped, honest about what it shows, and clear about broken input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from medseg_gym.bench import report
from medseg_gym.bench.gallery import Score, final_score, pick, svg_path
from medseg_gym.bench.plots import Series, _quantile, _spread, curves, spread
from medseg_gym.bench.report import read_episodes, write_report
from medseg_gym.episodes import encode_mask, to_json
from medseg_gym.errors import BadDataError
from medseg_gym.metrics import dice, iou
from medseg_gym.tools.base import advance, empty_state
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Episode, Sample, Stop, Turn, Undo, Unreadable

ENV = "MedSeg-Disc-Stub-v0"
EVIL = "<script>alert('x')</script>"


class Cases(dict):
    name = "Disc"
    structures = ("disc",)

    def keys(self, split="test", structures=()):
        return list(super().keys())


def sample(number: int, structure: str = "disc") -> Sample:
    rng = np.random.default_rng(number)
    rows, columns = np.ogrid[:64, :80]
    target = (rows - 30) ** 2 + (columns - 30 - 2 * number) ** 2 < 90
    image = (rng.integers(0, 60, (64, 80, 3)) + 120 * target[..., None]).astype(np.uint8)
    return Sample(f"Disc/{number:03d}/{structure}", image, target, structure, f"{structure} in a toy", f"p{number % 3}")


def play(case: Sample, number: int, policy: str, actions, ended="stopped", text="", env=ENV) -> Episode:
    """Plays actions on the Stub tool; undo is not needed here."""
    tool, state = Stub(), empty_state(case)
    turns, ious, dices = [], [iou(state.mask, case.target)], [dice(state.mask, case.target)]
    for action in actions:
        called = isinstance(action, Click | Box)
        if called:
            (state,) = advance(tool, [case], [state], [action])
        ious.append(iou(state.mask, case.target))
        dices.append(dice(state.mask, case.target))
        terms = {"gain": ious[-1] - ious[-2], "cost": -0.01 * called}
        turns.append(Turn(action, sum(terms.values()), terms, called, encode_mask(state.mask), text))
    return Episode(
        *(env, tool.fingerprint, policy, number, case.key),
        *(case.structure, case.instruction, case.patient, 0, 5, "shaped"),
        turns=tuple(turns),
        iou=tuple(ious),
        dice=tuple(dices),
        ended=ended,
        error="out of memory" if ended == "failed" else "",
    )


def row(policy: str, episodes: list[Episode], env: str = ENV, dataset: str = "Disc", **changes) -> dict:
    mine = [e for e in episodes if e.policy == policy and e.env == env]
    structures = sorted({e.structure for e in mine})
    return {
        "env": env,
        "dataset": dataset,
        "tool": "Stub",
        "tool_fingerprint": "Stub:0123456789abcdef",
        "policy": policy,
        "horizon": 5,
        "episodes": len(mine),
        "patients": 3,
        "dice": float(np.mean([final_score(e) for e in mine])),
        "iou": 0.5,
        "dice_at": [0.0, 0.4, 0.5, 0.6, 0.6, 0.6],
        "iou_at": [0.0, 0.3, 0.4, 0.5, 0.5, 0.5],
        "noc": {
            "80": {"mean": 1.5, "reached": 2, "nof": 0.5},
            "85": {"mean": 2.5, "reached": 2, "nof": 0.5},
            "90": {"mean": None, "reached": 0, "nof": 1.0},
        },
        "actions": 3.0,
        "tool_calls": 2.0,
        "reward": 0.4,
        "unreadable_turns": 1,
        "ended": {"stopped": len(mine), "horizon": 0, "unreadable": 0, "failed": 0},
        "structures": {s: {"episodes": 1, "dice": 0.7, "iou": 0.6} for s in structures},
        **changes,
    }


def write(folder, episodes, rows, times=None):
    (folder / "episodes.jsonl").write_text("".join(to_json(e) + "\n" for e in episodes), encoding="utf-8")
    summary = {"schema": 1, "split": "test", "seed": 0, "cases_asked": 200, "cases": 4, "notes": ["4 cases & no more"]}
    (folder / "summary.json").write_text(json.dumps({**summary, "rows": rows}), encoding="utf-8")
    if times is not None:
        (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """Four cases of two structures, three policies."""
    cases = [sample(n, "disc" if n % 2 else "plate") for n in range(4)]
    episodes = []
    for n, case in enumerate(cases):
        x = 30 + 2 * n
        good = [Box(x - 9, 21, x + 9, 39), Click(x, 30), Stop()]
        poor = [Click(x + 12, 30), Unreadable("no call"), Click(70, 60, False), Undo()]
        episodes.append(play(case, n, "good", good))
        episodes.append(play(case, n, "poor", poor, "horizon", text="<tool_call>{}</tool_call>"))
        episodes.append(play(case, n, "broken", [Click(x, 30)], "failed"))
    write(tmp_path, episodes, [row(p, episodes) for p in ("good", "poor", "broken")])
    return tmp_path, episodes, {ENV: Cases({c.key: c for c in cases})}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and tags that do not nest."""

    VOID = frozenset({"meta", "input", "br", "link", "img", "circle", "path", "rect", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, cls=""):
        return [a for t, a in self.tags if t == tag and (not cls or cls in (a.get("class") or "").split())]


def page_of(path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_report_is_one_well_formed_page(run):
    folder, _, datasets = run
    path = write_report(folder, datasets)
    text, page = page_of(path)
    assert path == folder / "report.html" and text.startswith("<!doctype html>")
    assert page.crossed == [] and page.open == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_report_asks_nothing_of_the_outside(run):
    folder, _, datasets = run
    text, page = page_of(write_report(folder, datasets))
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    assert all("src" not in a for _, a in page.tags)
    assert {u.split(",")[0] for u in re.findall(r"url\(([^)]*)\)", text)} == {"data:image/webp;base64"}
    assert all(a["href"].startswith("#") for _, a in page.tags if "href" in a)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_reference_inside_the_page_has_its_target(run):
    folder, _, datasets = run
    _, page = page_of(write_report(folder, datasets))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    wanted = {a["href"][1:] for _, a in page.tags if "href" in a} | {
        a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a
    }
    assert wanted and wanted <= ids


def test_equal_runs_give_equal_reports(run):
    folder, _, datasets = run
    assert write_report(folder, datasets).read_bytes() == write_report(folder, datasets).read_bytes()


def test_every_case_is_shown_for_every_policy_with_every_turn(run):
    folder, _, datasets = run
    _, page = page_of(write_report(folder, datasets))
    assert len(page.all("article", "case")) == 4
    assert len(page.all("div", "strip")) == 12
    # 3 + 4 + 1 turns a case; the hero adds its target and its 3 turns
    assert len(page.all("figure", "shot")) == 4 * 8 + 4
    assert len(page.all("figure", "unreadable")) == 4


def test_the_gallery_is_no_larger_than_asked(run):
    folder, _, datasets = run
    assert len(page_of(write_report(folder, datasets, gallery=2))[1].all("article", "case")) == 2
    text, page = page_of(write_report(folder, datasets, gallery=0))
    assert not page.all("article", "case") and "Case by case" not in text


def test_cases_that_would_make_the_file_too_large_are_left_out_and_counted(run, monkeypatch):
    folder, _, datasets = run
    monkeypatch.setattr(report, "PICTURE_BUDGET", 1)
    text, page = page_of(write_report(folder, datasets))
    assert len(page.all("article", "case")) == 1 and "3 more would have made this file too large" in text


def test_what_leaves_the_part_shown_is_said(run):
    folder, _, datasets = run
    _, page = page_of(write_report(folder, datasets))
    # the target is 19 pixels wide, the part shown 57: only poor's click at (70, 60), in force one turn, is outside
    marked = page.all("span", "far")
    assert 0 < len(marked) <= 4 * 2


def test_names_and_completions_are_escaped(tmp_path):
    case = sample(1, EVIL)
    nasty = f"{EVIL} </span></script><img src=x onerror=alert(1)> \ud800"
    episodes = [play(case, 0, EVIL, [Click(30, 30)], text=nasty), play(case, 0, "b", [Unreadable(nasty)])]
    write(tmp_path, episodes[:1], [row(EVIL, episodes, tool=EVIL, dataset=EVIL), row("b", episodes, dataset=EVIL)])
    lines = [json.dumps(json.loads(to_json(e))) for e in episodes]  # ASCII escapes carry the half surrogate
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    text, page = page_of(write_report(tmp_path, {ENV: Cases({case.key: case})}))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert page.crossed == [] and page.open == []
    assert any("onerror=alert(1)" in words for words in page.words)


def test_a_missing_dataset_costs_the_pictures_only(run):
    folder, _, _ = run
    text, page = page_of(write_report(folder, {}))
    assert "Pictures are missing for Disc: the dataset is not on this machine" in text
    assert "data:image" not in text
    assert len(page.all("article", "case")) == 4 and page.all("path", "m")


def test_another_version_of_a_case_is_not_drawn_under_the_masks(run):
    folder, episodes, datasets = run
    key = episodes[0].key
    case = datasets[ENV][key]
    datasets[ENV][key] = Sample(key, case.image[:50], case.target[:50], case.structure, "", case.patient)
    assert "has another size here" in write_report(folder, datasets).read_text()


def test_never_reached_is_a_dash_beside_its_failures(run):
    folder, _, datasets = run
    text = write_report(folder, datasets).read_text()
    assert re.search(r"<span>—</span><small>100\N{NO-BREAK SPACE}%</small>", text)


def test_best_is_marked_once_a_column_and_by_failures_first(run):
    folder, episodes, datasets = run
    rows = [row(p, episodes) for p in ("good", "poor")]
    rows[0]["noc"]["80"] = {"mean": 3.0, "reached": 4, "nof": 0.0}  # slower, but always there
    rows[1]["noc"]["80"] = {"mean": 1.0, "reached": 1, "nof": 0.75}
    rows[0]["iou"], rows[1]["iou"] = 0.4, 0.6
    write(folder, episodes, rows)
    text = write_report(folder, datasets).read_text()
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    first, second = body.split("</tr>")[:2]
    assert 'class="best">3.0' in first and 'class="best">1.0' not in second
    assert 'class="best">0.600' in second and 'class="best">0.400' not in first
    # nobody reached 90 %: nobody is best at it
    assert 'class="best">—' not in body


def test_a_single_row_is_not_called_best(run):
    folder, episodes, datasets = run
    write(folder, episodes, [row("good", episodes)])
    assert 'class="best"' not in write_report(folder, datasets).read_text()


def test_failures_are_named_and_count_nothing(run):
    folder, episodes, datasets = run
    assert final_score(episodes[2]) == 0.0 and episodes[2].dice[-1] > 0.5
    text = write_report(folder, datasets).read_text()
    assert text.count("failed: counts 0") == 4 and text.count("out of memory") == 4


def test_an_episode_that_failed_before_its_first_turn_is_shown(tmp_path):
    case = sample(1)
    episodes = [play(case, 0, "broken", [], "failed")]
    write(tmp_path, episodes, [row("broken", episodes)])
    assert "no turn was played" in write_report(tmp_path, {ENV: Cases({case.key: case})}).read_text()
    assert "no turn was played" in write_report(tmp_path, {}).read_text()


def test_times_add_their_columns_and_machine(run):
    folder, episodes, datasets = run
    assert "Encodes" not in write_report(folder, datasets).read_text()
    entry = {"env": ENV, "policy": "good", "seconds_per_case": 1.25, "seconds_per_action": 0.5, "encodes": 7}
    entry["cache_hits"] = 9
    write(folder, episodes, [row(p, episodes) for p in ("good", "poor")], {"machine": "a <laptop>", "rows": [entry]})
    text = write_report(folder, datasets).read_text()
    assert ">Encodes<" in text and ">1.25<" in text and "9 cached" in text and "a &lt;laptop&gt;" in text


def test_tools_on_one_dataset_are_compared_case_by_case(run):
    folder, episodes, datasets = run
    other = "MedSeg-Disc-Other-v0"
    case = datasets[ENV][episodes[0].key]
    episodes = [*episodes, play(case, 0, "good", [Click(30, 30)], env=other)]
    write(folder, episodes, [row("good", episodes), row("good", episodes, env=other, tool="Other")])
    text, page = page_of(write_report(folder, datasets))  # the other env's dataset is not given: the case is the same
    assert "good on Disc with Other and Stub" in text and "Pictures are missing" not in text
    first = text[text.index('<article class="case"') :]
    assert "data-policy" in first and {a["data-policy"] for a in page.all("div", "strip")} == {"0", "1"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line 13: not an episode"),
        ("", "line 13: not an episode"),
        ('{"schema": 99}', "line 13: episode schema 99"),
        ("[1]", "line 13: not an episode"),
    ],
)
def test_a_broken_line_is_named(run, line, problem):
    folder, _, datasets = run
    path = folder / "episodes.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadDataError, match=problem) as error:
        write_report(folder, datasets)
    assert str(path) in str(error.value)


def test_an_episode_whose_values_do_not_match_its_turns_is_named(run):
    folder, _, _ = run
    path = folder / "episodes.jsonl"
    record = json.loads(path.read_text().split("\n")[0])
    record["iou"].pop()
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(BadDataError, match=r"line 1: 3 turns with 3 IoU and 4 Dice values; wanted 4"):
        read_episodes(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "wanted an object"),
        ('{"schema": 7}', "schema 7"),
        ('{"schema": 1, "split": "test", "cases": 0, "rows": []}', "nothing to report"),
        ('{"schema": 1, "split": "test", "cases": 1, "rows": [{"env": "x"}]}', "row 0 has no 'dataset'"),
    ],
)
def test_a_broken_summary_is_named(run, content, problem):
    folder, _, datasets = run
    path = folder / "summary.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadDataError, match=problem) as error:
        write_report(folder, datasets)
    assert str(path) in str(error.value)


def test_cases_are_picked_by_rule():
    scores = [Score(f"k{n}", "a" if n < 6 else "b", n / 10) for n in range(9)]
    # ranked k8 ... k0: median k4, best k8, worst k0; then b's median k7 and a's (k5 ... k0) third or so
    chosen = pick(scores, 5)
    assert list(chosen)[:3] == ["k4", "k8", "k0"]
    assert chosen["k4"][0] == "median of all" and chosen["k8"][0] == "best of all" and chosen["k0"][0] == "worst of all"
    # a's six ranked k5 k4 k3 k2 k1 k0: position round(2.5) = 2, k3; b's three ranked k8 k7 k6: k7
    assert list(chosen)[3:] == ["k3", "k7"]
    assert chosen["k3"] == ["median of a"] and chosen["k7"] == ["median of b"]


def test_picking_ends_with_all_cases_and_prefers_the_earlier_of_equals():
    same = [Score(f"k{n}", "a", 0.5) for n in range(4)]
    assert sorted(pick(same, 10)) == ["k0", "k1", "k2", "k3"]
    assert next(iter(pick(same, 1))) == "k2"  # the middle of four equals in case order
    assert pick([], 5) == {} and pick(same, 0) == {}


def test_a_masks_path_is_its_outline_in_thousandths():
    mask = np.zeros((100, 100), np.bool_)
    mask[20:60, 10:50] = True  # x 100 to 500, y 200 to 600
    numbers = [int(n) for n in re.findall(r"-?\d+", svg_path(mask))]
    points = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0)
    assert np.abs(points.min(0) - [100, 200]).max() <= 3 and np.abs(points.max(0) - [500, 600]).max() <= 3
    assert svg_path(np.zeros((5, 5), np.bool_)) == ""
    assert svg_path(mask).count("M") == 1 and svg_path(mask).endswith("z")


def test_a_hole_is_a_loop_of_its_own_and_a_pixel_is_seen():
    ring = np.ones((50, 50), np.bool_)
    ring[20:30, 20:30] = False
    assert svg_path(ring).count("M") == 2
    speck = np.zeros((2000, 3000), np.bool_)
    speck[5, 5] = True
    assert svg_path(speck) != ""


def test_labels_keep_their_distance_and_order():
    assert _spread([10, 12, 100], 20, 0, 200) == [10, 30, 100]
    assert _spread([195, 198], 20, 0, 200) == [180, 200]
    assert _spread([50, 10], 20, 0, 200) == [50, 10]
    assert _spread([], 20, 0, 200) == []


def test_quantiles_are_linear_between_values():
    assert _quantile([4.0, 1.0, 2.0], 0.5) == 2.0
    assert _quantile([0.0, 1.0], 0.25) == 0.25
    assert _quantile([7.0], 0.75) == 7.0


def test_figures_draw_a_line_and_a_dot_for_each():
    series = [Series("a", 0, (0.0, 0.5, 1.0)), Series("b <i>", 1, (0.0, 0.2))]
    lines = curves(series, "Dice", "title")
    assert lines.count('class="line') == 2 and "b &lt;i&gt;" in lines and "<i>" not in lines
    # a's last point: the right end of the axis, the top (value 1)
    assert re.search(r'class="line c0"[^>]*d="M34\.0 264\.0L[\d.]+ 139\.0L[\d.]+ 14\.0"', lines)
    dots = spread([*series, Series("none", 2, ())], "Dice", "title")
    assert sum(path.count("h0") for path in re.findall(r'class="dots[^>]*d="([^"]*)"', dots)) == 5

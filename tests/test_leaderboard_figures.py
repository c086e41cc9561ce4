"""What the leaderboard's figures and robustness columns are made of, worked out by hand."""

from __future__ import annotations

import pytest
from page_tree import Node, tree

from medseg_gym.bench.leaderboard_page import page
from medseg_gym.bench.leaderboard_read import Case, Played
from medseg_gym.bench.leaderboard_records import Results
from medseg_gym.bench.leaderboard_robust import corrupted, noisy
from medseg_gym.bench.leaderboard_tables import results_of
from medseg_gym.bench.leaderboard_turns import Gain, turns_of
from medseg_gym.bench.suites import CORRUPTIONS, Entry, Suite, suite

DRAWN, SCAN, OTHER = (
    Entry("Phantom", "Nano", horizon=3),
    Entry("BTCV", "Nano", horizon=3),
    Entry("AMOSCT", "Nano", horizon=3),
)
THREE = Suite("hand", "Worked by hand", "Three datasets of two modalities.", (DRAWN, SCAN, OTHER))


def case(*iou: float, kinds: tuple[str, ...] = (), ended: str = "stopped") -> Case:
    """Begins with an empty mask; Dice equals IoU, so that means are easily worked out."""
    curve = (0.0, *iou)
    return Case("p", curve, curve, len(iou), len(iou), 0, ended, None, None, None, None, kinds or ("click",) * len(iou))


def run(entry: Entry, policy: str, *cases: Case) -> Played:
    return Played(
        entry=entry,
        policy=policy,
        fingerprint="Nano:0123",
        data="sha256",
        cases={(0, f"{entry.dataset}/{i}"): one for i, one in enumerate(cases)},
        asked=len(cases),
        trial=False,
        seconds=1.0,
        provenance={"command": "medseg-gym leaderboard run", "machine": "one"},
    )


def test_curves_are_averaged_by_case_dataset_and_modality_and_keep_the_last_value() -> None:
    """Dice@1: drawn (.2 + .6) / 2 = .4; CT (.5 + (.1 + .3) / 2) / 2 = .35; overall .375. Dice@3: .7, (.5 + .2) / 2."""
    runs = [
        run(DRAWN, "Agent", case(0.2, 0.8), case(0.6)),
        run(SCAN, "Agent", case(0.5)),
        run(OTHER, "Agent", case(0.1), case(0.3)),
    ]
    results = results_of(THREE, runs)
    (agent,) = turns_of(results, results.tables[0])
    assert agent.dice_at == pytest.approx((0.0, 0.375, 0.525, 0.525))
    assert agent.iou_at == agent.dice_at
    assert agent.dice_at[-1] == pytest.approx(results.tables[0].rows[0].dice.overall.mean)


def test_gains_of_each_turn_worked_by_hand() -> None:
    """Turn 1: +.5, +.6, and an unreadable one; turn 2: +.2, +.005 (as before), a stop; turn 3: -.3, a stop."""
    cases = (
        case(0.5, 0.7, 0.4, kinds=("box", "click", "undo")),
        case(0.6, 0.605, 0.605, kinds=("box", "click", "stop")),
        case(0.0, 0.0, kinds=("unreadable", "stop")),
    )
    results = results_of(THREE, [run(DRAWN, "Agent", *cases)])
    (agent,) = turns_of(results, results.tables[0])
    assert agent.episodes == 3
    assert agent.gains == (
        Gain(1, 3, 2, 1, 0, 0, pytest.approx(1.1 / 3)),
        Gain(2, 2, 1, 1, 0, 1, pytest.approx(0.205 / 2)),
        Gain(3, 1, 0, 0, 1, 1, pytest.approx(-0.3)),
    )
    figure = tree(page([results], [])).one("div", "gains").one("figure")
    assert [node.text for node in figure.all("text", "value")] == [
        *("+.37", "3", "+.10", "2", "\N{MINUS SIGN}.30", "1"),
    ]
    heights = [float(rect["height"]) for rect in figure.all("rect", "better")]
    assert heights[0] / heights[2] == pytest.approx((1.1 / 3) / (0.205 / 2), rel=0.01)  # gains; [1] is a count
    below = [float(rect["height"]) for rect in figure.all("rect", "stopped")]
    assert below == pytest.approx([62 / 3, 62 / 3], abs=0.06)


def test_a_turn_that_only_stops_has_no_gain() -> None:
    results = results_of(THREE, [run(DRAWN, "Agent", case(0.0, kinds=("stop",)))])
    (agent,) = turns_of(results, results.tables[0])
    assert agent.gains == (Gain(1, 0, 0, 0, 0, 1, None),)
    table = tree(page([results], [])).one("table", id="t-hand-gain")
    assert [cell.text for cell in table.one("tbody").all("td")] == ["Nano", "\N{EM DASH}"]


def robust(*, clean: float | None = 0.8, left_out: str = "") -> Results:
    """BoxOnce with Nano on Phantom: .8 clean; corrupted .6 at severity 3 and .4 at 5, but .3 for blur-5."""
    one = suite("robust")
    runs = []
    for entry in one.entries:
        if (entry.dataset, entry.tool) != ("Phantom", "Nano") or entry.group == left_out:
            continue
        if entry.group == "clean":
            if clean is not None:
                runs.append(run(entry, "BoxOnce", case(clean)))
                runs.append(run(entry, "BoxOnce:jitter=15", case(clean - 0.3)))
            continue
        value = 0.3 if entry.group == "blur-5" else 0.6 if entry.group.endswith("3") else 0.4
        runs.append(run(entry, "BoxOnce", case(value)))
    return results_of(one, runs)


def test_what_is_kept_under_corruption_worked_by_hand() -> None:
    """At 5: (7 * .4 + .3) / 8 = .3875, which is 48.4375 % of .8; at 3: .6, 75 %."""
    (found,) = corrupted([robust()]).values()
    assert (found.dataset, found.tool, found.policy, found.clean, found.whole) == (
        "Phantom",
        "Nano",
        "BoxOnce",
        0.8,
        True,
    )
    assert found.mean(3) == pytest.approx(0.6) and found.mean(5) == pytest.approx(0.3875)
    assert found.kept(3) == pytest.approx(0.75) and found.kept(5) == pytest.approx(0.484375)


def test_a_mean_over_some_corruptions_is_none() -> None:
    (found,) = corrupted([robust(left_out="noise-3")]).values()
    assert not found.whole and found.mean(3) is None and found.kept(5) is None
    row = tree(page([robust(left_out="noise-3")], [])).one("table", id="t-corrupted").one("tbody").one("tr")
    assert row.one(data_k="noise-3").text == row.one(data_k="mean-3").text == "\N{EM DASH}"
    assert row.one(data_k="noise-5").text == "0.40 \N{MINUS SIGN}0.40"


def test_without_the_clean_images_no_share_is_told() -> None:
    (found,) = corrupted([robust(clean=None)]).values()
    assert found.clean is None and found.kept(3) is None and found.mean(3) == pytest.approx(0.6)
    assert tree(page([robust(clean=None)], [])).one("table", id="t-corrupted").one(data_k="clean").text == "\N{EM DASH}"


def test_noise_in_prompts_stands_beside_the_same_policy_without() -> None:
    (found,) = noisy([robust()])
    assert (found.policy, found.clean, found.noisy) == ("BoxOnce", 0.8, {"jitter=15": pytest.approx(0.5)})


def test_robustness_is_a_column_beside_the_scores_on_the_same_data() -> None:
    quick = suite("quick")
    nano = next(entry for entry in quick.entries if entry.tool == "Nano")
    results = [results_of(quick, [run(nano, "BoxOnce", case(0.8)), run(nano, "Agent", case(0.7))]), robust()]
    root = tree(page(results, []))
    cells = {row["data-policy"]: row.one(data_k="corrupted").text for row in body(root, "t-quick")}
    assert cells == {"BoxOnce": "0.60, 0.39 75 %, 48 %", "Agent": "\N{EM DASH}"}
    heads = root.one("table", id="t-corrupted").one("thead").all("th")
    assert [head.text for head in heads if head["scope"] == "colgroup"] == [*CORRUPTIONS, "mean"]
    assert "Corrupted" in root.one("dl", "how").text


def body(root: Node, table: str) -> list[Node]:
    return root.one("table", id=table).one("tbody").all("tr")

"""Suites: every entry names an env that exists, the papers' sets are whole, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import pytest

from medseg_gym import datasets
from medseg_gym.bench import suites
from medseg_gym.bench.suites import SUITES, Entry, missing, needed, suite
from medseg_gym.datasets.cards import DATASETS
from medseg_gym.datasets.corruptions import KINDS as CORRUPTIONS
from medseg_gym.envs.config import EnvConfig
from medseg_gym.errors import UnknownNameError
from medseg_gym.policies import make
from medseg_gym.tools.cards import TOOLS

ENTRIES = [(one.name, entry) for one in SUITES.values() for entry in one.entries]


def test_the_suites_of_the_protocol_are_there() -> None:
    assert list(SUITES) == [
        *("quick", "btcv", "medsam-agent-21", "ibis-click", "refine", "absent", "robust", "cross-tool"),
    ]


def test_every_entry_is_a_registered_env_with_settings_the_env_takes() -> None:
    for name, entry in ENTRIES:
        assert entry.env in gym.registry, (name, entry)
        EnvConfig.of({"split": entry.split, "horizon": entry.horizon, **entry.options})
        assert entry.cases is None or entry.cases > 0
        assert entry.modality and entry.title


def test_no_two_entries_of_a_suite_share_a_folder_or_a_place_in_a_table() -> None:
    for one in SUITES.values():
        folders = [entry.folder for entry in one.entries]
        places = [(entry.group, entry.tool, entry.title, entry.seed) for entry in one.entries]
        assert len(set(folders)) == len(folders)
        assert len(set(places)) == len(places)


def test_every_policy_of_a_suite_can_play_its_entries(blobs: object) -> None:
    for one in SUITES.values():
        for entry in one.entries:
            verbs = entry.options.get("verbs", ("positive", "negative", "box", "stop", "undo"))
            for spec in one.policies_of(entry):
                assert make(spec, None, dataset=blobs, verbs=verbs).name == spec


def test_the_papers_21_datasets_with_its_three_tools_and_five_actions() -> None:
    entries = suite("medsam-agent-21").entries
    assert len({entry.dataset for entry in entries}) == 21
    assert {entry.tool for entry in entries} == {"SAM2.1BPlus", "MedSAM2", "IMISNet"}
    assert len(entries) == 63
    assert {entry.horizon for entry in entries} == {5}
    assert {entry.options["verbs"] for entry in entries} == {("positive", "negative", "box", "stop")}  # no undo
    modalities = [entry.modality for entry in entries if entry.tool == "MedSAM2"]
    assert {kind: modalities.count(kind) for kind in dict.fromkeys(modalities)} == {
        "CT": 6,
        "MRI": 3,
        "X-Ray": 6,
        "ultrasound": 3,
        "fundus": 1,
        "endoscope": 2,
    }


def test_ibis_click_has_20_turns_of_clicks_alone() -> None:
    for entry in suite("ibis-click").entries:
        assert entry.horizon == 20
        assert entry.options["verbs"] == ("positive", "negative", "stop")


def test_quick_needs_nothing_but_the_package() -> None:
    assert {entry.dataset for entry in suite("quick").entries} == {"Phantom"}
    assert all(missing(entry) is None for entry in suite("quick").entries)


def test_networks_on_pixels_play_the_one_structure_they_know() -> None:
    """And nothing else of the suite, where a picture would not tell them what is wanted."""
    quick = suite("quick")
    playing = [entry for entry in quick.entries if "PPO-SB3" in quick.policies_of(entry)]
    assert [(entry.group, entry.options["structures"]) for entry in playing] == [("optic disc", ("optic disc",))]
    assert set(quick.policies_of(playing[0])) == {*quick.policies, "PPO-SB3", "PPO-RLlib"}


def test_every_entry_that_needs_no_data_has_cases_of_its_kind() -> None:
    drawn = [entry for _, entry in ENTRIES if entry.dataset == "Phantom"]
    for entry in drawn:
        data = datasets.load("Phantom", **entry.options.get("dataset_options", {}))
        key = data.keys(entry.split)[0]
        assert data[key].image.ndim == 3
        if entry.variant == "refine":
            assert data.start_mask(key).any()  # type: ignore[attr-defined]
    assert {"refine", "half-absent", "noise-3"} <= {entry.variant for entry in drawn}


def test_robust_corrupts_in_every_way_and_has_the_same_agents_on_clean_images() -> None:
    entries = suite("robust").entries
    kinds = {entry.group.rpartition("-")[0] for entry in entries if entry.group != "clean"}
    assert kinds == set(CORRUPTIONS)
    oracles = {"BoxOnce", "OracleClicks", "OracleBoxThenClicks"}
    assert all(oracles <= set(entry.policies) for entry in entries if entry.group != "clean")
    clean = {spec for entry in entries if entry.group == "clean" for spec in entry.policies}
    assert clean >= {spec for entry in entries for spec in entry.policies}
    assert any("jitter" in spec for spec in clean) and any("miss" in spec for spec in clean) and "CentreClick" in clean


def test_absent_weighs_present_and_absent_alike() -> None:
    btcv = [entry for entry in suite("absent").entries if (entry.dataset, entry.tool) == ("BTCV", "Nano")]
    assert [entry.variant for entry in btcv] == ["present", "absent"]
    assert len({entry.group for entry in btcv}) == 1


def test_what_an_entry_lacks_is_named_with_the_commands_that_get_it(home: Path) -> None:
    found = missing(Entry("BTCV", "MedSAM2"))
    assert found is not None
    assert found.what == "needs BTCV prepared and MedSAM2's weights"
    assert found.commands == (
        "medseg-gym data prepare BTCV --from FOLDER",
        "medseg-gym tools download MedSAM2",
    )
    assert missing(Entry("BTCV", "Nano")) == suites.Missing(
        "needs BTCV prepared", ("medseg-gym data prepare BTCV --from FOLDER",)
    )
    assert missing(Entry("Phantom", "Nano")) is None


def test_what_an_entry_needs_does_not_hang_on_the_machine(home: Path) -> None:
    before = needed(Entry("BTCV", "Nano"))
    (home / "datasets").mkdir(parents=True)
    (home / "datasets" / "BTCV.h5").touch()
    assert missing(Entry("BTCV", "Nano")) is None
    assert needed(Entry("BTCV", "Nano")) == before is not None
    assert needed(Entry("Phantom", "GrabCut")) is None


def test_an_unknown_suite_raises_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'quick'"):
        suite("quik")


def test_an_entry_tells_its_folder_title_and_record() -> None:
    entry = Entry("BTCV", "Nano", seed=3, variant="noise-3", group="noise-3", options={"verbs": ("box", "stop")})
    assert entry.folder == "MedSeg-BTCV-Nano-v0@noise-3@seed-3"
    assert entry.title == DATASETS["BTCV"].title  # the group says noise-3
    assert Entry("BTCV", "Nano", variant="absent").title == "BTCV (absent)"
    assert entry.record()["options"] == {"verbs": ["box", "stop"]}
    assert "group" not in entry.record()


def test_all_tools_but_the_one_for_tests_cross() -> None:
    assert {entry.tool for entry in suite("cross-tool").entries} == set(TOOLS) - {"Stub"}

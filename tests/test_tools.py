"""Loading tools by name, the catalogue, and the conformance kit over every tool that runs without weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import tools
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError, WeightsMissingError
from medseg_gym.tools.base import SegmentationTool, advance, empty_state, given_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.grabcut import GrabCut
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Prediction, Query, Sample

IDS = "SAM2.1T SAM2.1S SAM2.1BPlus SAM2.1L MedSAM2 SAMB SAML SAMH MedSAM IMISNet Nano GrabCut Stub"


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_GYM_HOME", str(tmp_path))


def test_the_catalogue_lists_the_tools_in_order() -> None:
    assert " ".join(tools.TOOLS) == IDS
    assert all(card.id == name and card.title and card.summary for name, card in tools.TOOLS.items())


def test_equal_names_and_options_share_one_model_and_one_cache() -> None:
    assert tools.load("Stub") is tools.load("Stub")
    assert tools.load("Stub", memory="latest") is tools.load("Stub", memory="latest")
    assert tools.load("Stub", memory="latest") is not tools.load("Stub")
    assert tools.load("Stub", memory="latest").memory == "latest"
    assert tools.load("Stub", cache_bytes=7).cache.max_bytes == 7


def test_a_ready_tool_is_wrapped_once() -> None:
    tool = Stub()
    cached = tools.load(tool)
    assert cached.tool is tool and tools.load(tool) is cached and tools.load(cached) is cached
    assert tools.load(Stub()) is not cached
    with pytest.raises(UnknownNameError, match="a ready tool takes no options"):
        tools.load(tool, memory="latest")
    with pytest.raises(MedSegError, match="int is not a segmentation tool: it lacks name"):
        tools.load(3)  # type: ignore[arg-type]


def test_a_tool_of_ones_own_loads_by_module_and_class() -> None:
    assert tools.load("medseg_gym.tools.stub:Stub", memory="latest").memory == "latest"
    with pytest.raises(UnknownNameError, match=r"wanted package\.module:Class"):
        tools.load("no_such_module_here:Tool")
    with pytest.raises(UnknownNameError, match=r"wanted package\.module:Class"):
        tools.load("medseg_gym.tools.stub:Stubb")


def test_unknown_names_and_options_say_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'MedSAM2'"):
        tools.load("medsam2")
    with pytest.raises(UnknownNameError, match="did you mean 'memory'"):
        tools.load("Stub", memori="latest")
    with pytest.raises(UnknownNameError, match="did you mean 'multimask'"):
        tools.load("SAM2.1T", multi_mask=False)
    with pytest.raises(UnknownNameError):
        tools.available("Grabcutt")


@pytest.mark.parametrize("name", [name for name in IDS.split() if name not in ("Nano", "GrabCut", "Stub")])
def test_missing_weights_name_the_command(name: str) -> None:
    assert not tools.available(name)
    with pytest.raises(WeightsMissingError, match=f"`medseg-gym tools download {name}`"):
        tools.load(name)


def test_an_incomplete_weights_folder_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsMissingError, match=r"has no model\.safetensors"):
        tools.load("MedSAM2", weights=tmp_path)


def test_listing_and_loading_without_weights_need_no_torch() -> None:
    code = (
        "import sys, medseg_gym.tools as t; [t.available(n) for n in t.TOOLS]; t.load('Stub'); t.load('GrabCut')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "tool",
    [
        Stub(),
        Stub(memory="latest", max_batch=3),
        CachedTool(Stub(), max_bytes=8),
        GrabCut(),
        GrabCut(memory="latest"),
        CachedTool(GrabCut(), max_bytes=20_000),
    ],
    ids=lambda tool: f"{type(tool).__name__}-{tool.fingerprint}",
)
def test_every_tool_without_weights_conforms(tool: SegmentationTool) -> None:
    check_tool(tool, tolerance=0)


class MutatesPrior(Stub):
    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        for query in queries:
            if query.prior is not None:
                query.prior[0, 0] += 1
        return super().predict(queries)


class DependsOnBatch(Stub):
    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return [
            Prediction(p.logits * np.float32(len(queries)), p.predicted_iou, p.prior) for p in super().predict(queries)
        ]


class Remembers(Stub):
    calls = 0

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.calls += 1
        return [
            Prediction(p.logits + np.float32(self.calls), p.predicted_iou, p.prior) for p in super().predict(queries)
        ]


class WrongPriorShape(Stub):
    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return 8, 8


class Infinite(Stub):
    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return [Prediction(p.logits * np.float32(np.inf), 0.5, p.prior) for p in super().predict(queries)]


class DoublePrecision(Stub):
    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        double: list[Logits] = [p.logits.astype(np.float64) for p in super().predict(queries)]  # type: ignore[misc]
        return [Prediction(d, 0.5, d) for d in double]


class DoublePrior(Stub):
    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        double: list[Logits] = [p.prior.astype(np.float64) for p in super().predict(queries)]  # type: ignore[misc]
        return [Prediction(d.astype(np.float32), 0.5, d) for d in double]


class Reverses(Stub):
    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        return super().encode(images)[::-1]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (MutatesPrior, "changed a prior"),
        (DependsOnBatch, "one by one gives what a batch gives"),
        (Remembers, "predict twice gives the same"),
        (WrongPriorShape, "not prior_shape"),
        (Infinite, "logits are finite"),
        (DoublePrecision, "logits are float64, not float32"),
        (DoublePrior, "the prior is float64, not float32"),
        (Reverses, "embedding of a"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_conformance_kit_finds_a_broken_tool(broken: type[Stub], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_tool(broken())


def test_the_conformance_kit_checks_only_the_prompts_a_tool_takes() -> None:
    class BoxOnly(Stub):
        def predict(self, queries: Sequence[Query]) -> list[Prediction]:
            assert all(isinstance(p, Box) for query in queries for p in query.prompts)
            return super().predict(queries)

    tool = BoxOnly()
    tool.prompts = frozenset({Box})
    check_tool(tool)


def sample() -> Sample:
    return Sample("s", np.zeros((16, 32, 3), np.uint8), np.zeros((16, 32), np.bool_), "disc", "a disc", "1")


def test_advance_refuses_a_prompt_the_tool_cannot_take() -> None:
    tool = Stub()
    tool.prompts = frozenset({Box})
    with pytest.raises(ValueError, match="Stub cannot take a Click; it takes Box"):
        advance(tool, [sample()], [empty_state(sample())], [Click(1, 1)])


def test_a_newer_box_replaces_the_older_and_clicks_stay() -> None:
    tool = Stub()
    states = [empty_state(sample())]
    for action in (Box(0, 0, 3, 3), Click(20, 8), Box(8, 0, 9, 1)):
        states = advance(tool, [sample()], states, [action])
    assert states[0].prompts == (Click(20, 8), Box(8, 0, 9, 1))
    assert not states[0].mask[2, 2] and states[0].mask[0, 8] and states[0].mask[8, 20]


def test_a_given_mask_becomes_a_prior_of_plus_and_minus_ten() -> None:
    mask = np.zeros((4, 4), np.bool_)
    mask[:2] = True

    class Coarse(Stub):
        def prior_shape(self, height: int, width: int) -> tuple[int, int]:
            return 4, 1

    state = given_state(Coarse(), mask)
    assert state.prediction is not None
    assert state.prediction.prior.ravel().tolist() == [10, 10, -10, -10]
    assert np.array_equal(state.mask, mask)


@pytest.mark.parametrize("answer", ["short", "array", "none"])
def test_a_tools_answer_of_the_wrong_kind_is_named(answer: str) -> None:
    import dataclasses

    class Wrong(Stub):
        def predict(self, queries: Any) -> Any:
            made = super().predict(queries)
            if answer == "none":
                return []
            return [dataclasses.replace(p, logits=p.logits[1:]) if answer == "short" else p.logits for p in made]

    image = np.zeros((8, 9, 3), np.uint8)
    sample = Sample("k", image, np.zeros((8, 9), np.bool_), "s", "s", "p")
    with pytest.raises(BadDataError, match=r"Stub gave"):
        advance(Wrong(), [sample], [empty_state(sample)], [Click(1, 1)])

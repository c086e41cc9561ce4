"""SAM 2.1 against the sam2 package's own SAM2ImagePredictor, prompt by prompt, at full size, through its own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import tools
from medseg_gym.tools.base import advance, empty_state
from medseg_gym.types import Box, Click, Prompt, Sample

pytest.importorskip("sam2", reason="the sam2 package is not here; `make test-parity` has it")

from sam2_reference import Original, original, predictor, predictor_turn

TOLERANCE = 1e-4  # of the logits' standard deviation
EPISODES: tuple[tuple[Prompt, ...], ...] = (
    (Box(60, 50, 150, 140), Click(100, 90), Click(70, 130, False), Click(140, 60)),
    (Click(120, 80), Click(30, 190, False), Click(200, 20), Box(20, 10, 230, 180)),
)
TOOLS = {"T": "SAM2.1T", "BPlus": "SAM2.1BPlus"}


@pytest.fixture(scope="module")
def sample() -> Sample:
    """A drawn abdomen, cut so that height and width differ, with the target the prompts were placed for."""
    from medseg_gym.datasets.phantom import Phantom

    dataset = Phantom(task="ct", size=256)
    drawn = dataset[dataset.keys("test")[0]]
    image = np.ascontiguousarray(drawn.image[8:208, 4:252])
    image.flags.writeable = False
    return Sample(drawn.key, image, drawn.target[8:208, 4:252], drawn.structure, drawn.instruction, drawn.patient)


@pytest.fixture(scope="module", params=["T", "BPlus"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original(request.param, 1024, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def reference(given: Original, sample: Sample) -> Any:
    return predictor(given, sample.image)


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


@pytest.mark.parametrize("engine", ["transformers", "sam2"])
def test_cached_predictions_equal_the_packages_predictor(
    given: Original, reference: Any, sample: Sample, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two episodes of box, clicks and previous logits, with and without multimask; one encode for each tool."""
    for multimask in (True, False):
        tool = tools.load(TOOLS[given.hiera], weights=given.path, engine=engine, multimask=multimask)
        worst, quietest = follow(tool, reference, sample, multimask)
        with capsys.disabled():
            print(f"\n{tool.name} {engine} multimask={multimask}: error {worst:.1e} of the deviation, {quietest:.2f}")
        assert tool.counters()["encodes"] == 1
        tools.unload()


def follow(tool: Any, reference: Any, sample: Sample, multimask: bool) -> tuple[float, float]:
    """The largest error as a share of the logits' deviation, and the smallest deviation, over the episodes."""
    worst, quietest = 0.0, float("inf")
    for actions in EPISODES:
        states, prior = [empty_state(sample)], None
        for turn, action in enumerate(actions, start=1):
            states += advance(tool, [sample], states[-1:], [action])
            logits, iou, prior = predictor_turn(reference, states[-1].prompts, prior, multimask)
            prediction, told = states[-1].prediction, f"turn {turn} of {actions}"
            assert prediction is not None
            spread = float(logits.std())
            error = float(np.abs(prediction.logits - logits).max()) / spread
            worst, quietest = max(worst, error), min(quietest, spread)
            assert spread >= 1, told
            assert error <= TOLERANCE, told
            assert np.abs(prediction.prior - prior[0]).max() <= TOLERANCE * spread, told
            assert prediction.predicted_iou == pytest.approx(iou, abs=1e-4), told
            assert np.array_equal(states[-1].mask, logits > 0), told
    return worst, quietest


@pytest.mark.parametrize("engine", ["transformers", "sam2"])
def test_medsam2_equals_the_predictor_at_512(tmp_path: Path, sample: Sample, engine: str) -> None:
    """MedSAM2's authors publish SAM 2.1 tiny for an input of 512."""
    given = original("T", 512, tmp_path)
    tool = tools.load("MedSAM2", weights=given.path, engine=engine)
    assert tool.prior_shape(200, 248) == (128, 128)
    follow(tool, predictor(given, sample.image), sample, True)

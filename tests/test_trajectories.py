"""Sampling trajectories: progress constraint and retries, the greedy clicker, and records equal to the env's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import HAVE_TORCH, Blobs

from medseg_gym import oracle, tools
from medseg_gym.datasets.instructions import seeded
from medseg_gym.datasets.phantom import Phantom
from medseg_gym.envs import SegmentEnv
from medseg_gym.errors import MedSegError, ToolUnavailableError, UnknownNameError
from medseg_gym.frames import Grid
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.stub import Stub
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.sample import sample
from medseg_gym.trajectories.strategies import STRATEGIES, Course, Settings, boxes, clicks
from medseg_gym.types import Box, Click, Episode, Image, Mask, Prediction, Query, Sample, Stop

PLAIN = {"box_jitter": (0, 0), "click_jitter": (0, 0)}


class Scripted(Stub):
    """A Stub that answers its n-th question with the mask that `masks(n, query)` gives."""

    def __init__(self, masks: Callable[[int, Query], Mask]) -> None:
        super().__init__()
        self.masks, self.asked = masks, []  # type: ignore[var-annotated]

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        answers = []
        for query in queries:
            logits = np.where(self.masks(len(self.asked), query), np.float32(10), np.float32(-10))
            self.asked.append(query.prompts[-1])
            answers.append(Prediction(logits, float("nan"), logits))
        return answers


def empty(_: int, query: Query) -> Mask:
    return np.zeros((query.embedding.height, query.embedding.width), np.bool_)


def square(side: int = 100, at: int = 40, size: int = 20) -> Sample:
    """A target of size x size pixels at (at, at) in a black image."""
    target = np.zeros((side, side), np.bool_)
    target[at : at + size, at : at + size] = True
    image = np.zeros((side, side, 3), np.uint8)
    for array in (target, image):
        array.flags.writeable = False
    return Sample("Drawn/1/square", image, target, "square", "square in drawing", "1")


def one(tool: Any, strategy: str, case: Sample | None = None, **settings: Any) -> Trajectory:
    made = sample(tool, [case or square()], strategy, Settings.of({**PLAIN, **settings}))
    assert len(made) == 1
    return made[0]


def actions(trajectory: Trajectory) -> list[Any]:
    return [turn.action for turn in trajectory.episode.turns]


def played(dataset: Any, tool: Any, episode: Episode, **options: Any) -> Episode:
    """The episode's actions in an env."""
    from medseg_gym.episodes import decode_mask

    env = SegmentEnv(dataset, tool, horizon=episode.horizon, size=16, observation="dict", **options)
    start = None if episode.start is None else decode_mask(episode.start)
    env.reset(options={"sample": episode.key, "start_mask": start})
    for turn in episode.turns:
        env.step(turn.action)
    return env.episode(episode.policy, episode.seed, episode.case)


# records


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tool", ["Stub", "GrabCut", *(["Nano"] if HAVE_TORCH else [])])
def test_the_record_is_the_episode_that_the_env_gives_for_the_same_actions(tool: str, strategy: str) -> None:
    data, made = Phantom(size=64), tools.load(tool)
    cases = [data[key] for key in data.keys("train")[:6]]
    found = sample(made, cases, strategy, seed=3, env=f"MedSeg-Phantom-{tool}-v0", cases=range(10, 16))
    assert any(len(t.episode.turns) > 2 for t in found)
    for trajectory in found:
        assert trajectory.episode == played(data, made, trajectory.episode)
        assert trajectory.episode.ended == "stopped" and trajectory.strategy == trajectory.episode.policy == strategy


@pytest.mark.parametrize(("reward", "timing"), [("medsam-agent", None), ("medsam-agent", "terminal"), ("ibis", None)])
def test_every_reward_is_the_envs_own(reward: str, timing: str | None) -> None:
    from medseg_gym.rewards import resolve

    data = Phantom(size=64)
    cases = [data[key] for key in data.keys("train")[:4]]
    for trajectory in sample(Stub(), cases, "sequential-click", reward=resolve(reward, timing)):
        again = played(data, Stub(), trajectory.episode, reward=reward, timing=timing)
        assert again.turns == trajectory.episode.turns and again.reward == trajectory.episode.reward


def test_a_case_does_not_depend_on_what_is_sampled_beside_it() -> None:
    data = Phantom(size=64)
    cases = [data[key] for key in data.keys("train")[:6]]
    settings = Settings(self_correction=0.4, wrong_start=0.3)

    def rng(case: Sample) -> np.random.Generator:
        return seeded(1, case.key)

    together = sample(Stub(max_batch=4), cases, "sequential-click", settings, [rng(c) for c in cases])
    alone = [sample(Stub(), [c], "sequential-click", settings, [rng(c)], cases=[i])[0] for i, c in enumerate(cases)]
    assert together == alone and len({t.kind for t in together}) > 1


def test_an_image_is_encoded_once_for_all_its_cases_and_strategies() -> None:
    blobs, tool = Blobs(), CachedTool(Stub())
    for strategy in STRATEGIES:
        sample(tool, [blobs[key] for key in blobs.keys("train")], strategy)
    assert tool.counters()["encodes"] == 3  # of six cases by three strategies


def test_only_what_the_grid_can_say_is_asked_and_stored() -> None:
    tall = Sample("Drawn/2/bar", np.zeros((1703, 900, 3), np.uint8), np.zeros((1703, 900), np.bool_), "bar", "bar", "2")
    tall.target[301:1404, 403:601] = True
    grid = Grid(1703, 900)
    for strategy in ("box-to-point", "sequential-click"):
        tool = Scripted(empty)
        made = one(tool, strategy, tall, box_jitter=(5, 20), click_jitter=(1, 5))
        assert made.tries == len(tool.asked) == 6
        assert all(grid.snap(prompt) == prompt for prompt in tool.asked)


# the progress constraint


def test_a_tool_that_never_answers_is_asked_six_times_and_the_trajectory_dropped() -> None:
    for strategy, kind in (("box-to-point", Box), ("sequential-click", Click)):
        tool = Scripted(empty)
        made = one(tool, strategy, box_jitter=(5, 20))
        assert actions(made) == [Stop()] and made.dropped == "iou" and made.tries == 6
        assert len(set(tool.asked)) == 6 and all(isinstance(prompt, kind) for prompt in tool.asked)


def test_the_first_candidate_that_gains_enough_is_taken() -> None:
    target = square().target
    half = target.copy()
    half[50:] = False  # IoU .5
    little = half.copy()
    little[50, 40:54] = True  # 14 of 400 pixels more: IoU .535
    more = half.copy()
    more[50, 40:60] = True  # 20 of 400 pixels more: IoU .55
    tool = Scripted(lambda n, _: [half, little, little, more, target][n])
    made = one(tool, "sequential-click")
    assert made.tries == 5 and made.episode.iou == (0, 0.5, 0.55, 1, 1) and made.dropped == ""
    assert actions(made) == [tool.asked[0], tool.asked[3], tool.asked[4], Stop()]


@pytest.mark.parametrize(("bar", "curve"), [(0.5, (0, 0)), (0.25, (0, 0.5, 0.5)), (0.24, (0, 0.5, 0.75, 0.75))])
def test_a_gain_has_to_exceed_the_bar(bar: float, curve: tuple[float, ...]) -> None:
    masks = [square().target.copy() for _ in range(2)]
    masks[0][50:], masks[1][55:] = False, False  # IoU .5, .75
    tool = Scripted(lambda n, _: masks[min(n, 1)])
    assert one(tool, "sequential-click", min_gain=bar, retries=0).episode.iou == curve


def test_nothing_is_asked_where_nothing_can_gain_enough() -> None:
    target = square().target
    almost = target.copy()
    almost[40, 40:52] = False  # 388 of 400: .97, and .97 + .04 > 1
    made = one(Scripted(lambda n, _: almost), "box-to-point")
    assert made.tries == 1 and len(made.episode.turns) == 2


def test_the_retries_are_further_maxima_then_any_pixel_of_the_error() -> None:
    target = np.zeros((100, 100), np.bool_)
    target[10:40, 10:40] = target[60:70, 60:90] = True
    case = replace(square(), target=target)
    tool = Scripted(empty)
    one(tool, "sequential-click", case, maxima=3)
    expected = [*oracle.error_clicks(np.zeros_like(target), target, 3)][:4]
    assert [(c.x, c.y) for c in tool.asked[:4]] == [(c.x, c.y) for c in expected]
    assert all(10 <= c.x < 40 and 10 <= c.y < 40 for c in (*tool.asked[:3], *tool.asked[4:]))  # the largest region
    assert 60 <= tool.asked[3].x < 90


def test_a_trajectory_has_no_more_turns_than_the_horizon() -> None:
    target = square().target

    def rows(n: int, query: Query) -> Mask:
        mask = target.copy()
        mask[40 + 2 * (n + 1) :] = False  # a tenth more each time
        return mask

    made = one(Scripted(rows), "box-to-point")
    assert len(made.episode.turns) == made.episode.horizon == 5 and made.tries == 4
    assert made.dropped == "iou" and made.episode.iou[-1] == 0.4
    made = one(Scripted(rows), "box-to-point", horizon=9)
    assert len(made.episode.turns) == 9 and made.dropped == "" and made.episode.iou[-1] == 0.8


def test_jitter_keeps_to_its_range_and_clicks_to_the_error() -> None:
    case = square(side=512, at=200, size=100)
    course = Course(case, Grid(512, 512), [], 5)
    rng = np.random.default_rng(0)
    drawn = boxes(course, Settings(box_jitter=(6, 20)), rng)  # 3 to 10 pixels of this image
    moves = np.array([[b.x1 - 200, b.y1 - 200, b.x2 - 299, b.y2 - 299] for b in (next(drawn) for _ in range(200))])
    assert abs(moves).min() >= 3 and abs(moves).max() == 10 and (moves > 0).any() and (moves < 0).any()
    drawn = boxes(course, Settings(box_jitter=(6, 200), jitter_share=0.05), rng)
    assert max(abs(next(drawn).x1 - 200) for _ in range(50)) == 5
    from medseg_gym.tools.base import empty_state

    course.states.append(empty_state(case))
    for _ in range(50):
        moved = next(clicks(course, Settings(click_jitter=(0, 200), jitter_share=1), rng))
        assert case.target[moved.y, moved.x] and moved.positive


# IBISAgent's clicks


def test_the_greedy_clicker_stops_at_its_goal_and_asks_once_a_click() -> None:
    target = square().target
    masks = [target.copy() for _ in range(3)]
    masks[0][45:], masks[1][55:], masks[2][57:] = False, False, False  # IoU .25, .75, .85
    made = one(Scripted(lambda n, _: masks[n]), "xu")
    assert made.episode.iou == (0, 0.25, 0.75, 0.85, 0.85) and made.tries == 3 and made.dropped == ""
    assert actions(made)[0] == oracle.greedy_click(np.zeros_like(target), target)
    assert made.episode.horizon == 21


def test_the_greedy_clicker_loops_where_the_tool_is_deaf_and_is_dropped_for_its_length() -> None:
    made = one(Scripted(empty), "xu")
    assert len(made.episode.turns) == 21 and len(set(actions(made))) == 2 and made.dropped == "length"
    assert one(Scripted(empty), "xu", longest=20).dropped == "dice"
    assert one(Scripted(empty), "xu", longest=20, min_dice=0.0).dropped == ""
    assert len(one(Scripted(empty), "xu", horizon=5).episode.turns) == 5


# absent structures, failures, wrong arguments


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_absent_structure_is_stopped_at_at_once_or_dropped(strategy: str) -> None:
    absent = replace(square(), target=np.zeros((100, 100), np.bool_))
    made = one(Stub(), strategy, absent)
    assert actions(made) == [Stop()] and made.dropped == "" and made.episode.iou == (1, 1)
    assert one(Stub(), strategy, absent, absent="drop").dropped == "empty"


def test_a_tools_exception_drops_its_own_case_only() -> None:
    def masks(n: int, query: Query) -> Mask:
        if query.embedding.height == 60 and len(query.prompts) == 2:
            raise ZeroDivisionError("by zero")
        mask = empty(n, query)
        mask[40 : 40 + 5 * len(query.prompts), 40:60] = True
        return mask

    small = square(side=60, at=40)
    made = sample(Scripted(masks), [square(), small, square()], "sequential-click", Settings.of(PLAIN))
    assert [t.dropped for t in made] == ["", "failed", ""] and made[0].episode.iou[-1] == 1
    failed = made[1].episode
    assert failed.ended == "failed" and failed.error == "ZeroDivisionError: by zero"
    assert len(failed.turns) == 1 and failed.iou == (0, 0.25)


def test_a_tool_that_is_gone_ends_the_sampling() -> None:
    def gone(n: int, query: Query) -> Mask:
        raise ToolUnavailableError("the server is gone")

    with pytest.raises(ToolUnavailableError):
        one(Scripted(gone), "xu")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UnknownNameError, match="min_gain"):
        Settings.of({"mingain": 0.1})
    with pytest.raises(UnknownNameError, match="box-to-point"):
        one(Stub(), "box-to-points")
    for wrong in ({"min_gain": 2}, {"retries": -1}, {"box_jitter": (5, 2)}, {"horizon": 1}, {"goal": "high"}):
        with pytest.raises(MedSegError, match=next(iter(wrong))):
            Settings.of(wrong)
    with pytest.raises(MedSegError, match="add up"):
        Settings(self_correction=0.6, wrong_start=0.6)
    clicker = Stub()
    clicker.prompts = frozenset({Click})
    with pytest.raises(MedSegError, match="needs a Box"):
        one(clicker, "box-to-point")
    assert one(clicker, "sequential-click").tries > 0


def test_images_of_several_sizes_share_a_call() -> None:
    calls: list[int] = []

    class Counting(Stub):
        def encode(self, images: Sequence[Image]) -> list[Any]:
            calls.append(len(images))
            return super().encode(images)

    sample(Counting(), [square(), square(side=80)], "sequential-click", Settings.of({**PLAIN, "retries": 0}))
    assert calls[0] == 2

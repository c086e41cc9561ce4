"""The scripted policies and `make`: what they do in an episode, when they undo and stop, and how they are asked for."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medseg_gym import oracle, rewards
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.metrics import dice, iou
from medseg_gym.policies import base, make
from medseg_gym.policies.base import Policy
from medseg_gym.policies.scripted import (
    BoxOnce,
    CentreClick,
    OracleBoxThenClicks,
    OracleClicks,
    Random,
    Targets,
    XuClicks,
    failed_clicks,
)
from medseg_gym.tools.base import advance, empty_state
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Action, Box, Click, Decision, Mask, MaskState, Sample, Stop, Undo, Unreadable, View

VERBS = ("positive", "negative", "box", "stop", "undo")
NO_UNDO = ("positive", "negative", "box", "stop")


class One:
    """A dataset of one case; counts how often it is read."""

    name = "One"
    structures = ("thing",)

    def __init__(self, target: Mask) -> None:
        self.target = target
        self.reads = 0

    def keys(self, split: str, structures: Sequence[str] = ()) -> tuple[str, ...]:
        return ("One/1/thing",)

    def __getitem__(self, key: str) -> Sample:
        self.reads += 1
        return Sample(
            key=key,
            image=np.zeros((*self.target.shape, 3), np.uint8),
            target=self.target,
            structure="thing",
            instruction="thing in drawing",
            patient="1",
        )


def ellipse(height: int = 64, width: int = 64) -> Mask:
    rows, columns = np.mgrid[:height, :width]
    return ((rows - 30) / 22) ** 2 + ((columns - 34) / 14) ** 2 <= 1


def two_squares() -> Mask:
    """A 20 x 20 square on the left, a 16 x 16 one on the right."""
    target = np.zeros((64, 64), np.bool_)
    target[10:30, 5:25] = True
    target[30:46, 40:56] = True
    return target


def view_of(mask: Mask, *, turn: int = 0, horizon: int = 5, prompts: Any = (), history: Any = ()) -> View:
    return View(
        key="One/1/thing",
        image=np.zeros((*mask.shape, 3), np.uint8),
        mask=mask,
        prompts=prompts,
        structure="thing",
        instruction="thing in drawing",
        turn=turn,
        horizon=horizon,
        history=history,
    )


@dataclass
class Played:
    actions: list[Action]
    iou: list[float]
    reward: float  # "shaped"


def play(policy: Policy, data: One, *, horizon: int = 5, tool: Any = None, seed: int = 0) -> Played:
    """One episode by the env's rules: undo pops a state, stop and the horizon end it."""
    sample = data["One/1/thing"]
    tool, rng = tool or Stub(), np.random.default_rng(seed)
    stack: list[MaskState] = [empty_state(sample)]
    history: tuple[tuple[Mask, Action], ...] = ()
    played = Played([], [iou(stack[-1].mask, sample.target)], 0.0)
    progress = rewards.start(played.iou[0], dice(stack[-1].mask, sample.target))
    for turn in range(horizon):
        state = stack[-1]
        view = view_of(state.mask, turn=turn, horizon=horizon, prompts=state.prompts, history=history)
        action = policy.act([view], [rng])[0].action
        assert action is not None
        if isinstance(action, Click | Box):
            stack += advance(tool, [sample], [state], [action])
        elif isinstance(action, Undo) and len(stack) > 1:
            stack.pop()
        history = (*history, (state.mask, action))
        played.actions.append(action)
        played.iou.append(iou(stack[-1].mask, sample.target))
        progress = rewards.after(progress, action, played.iou[-1], dice(stack[-1].mask, sample.target))
        if isinstance(action, Stop):
            break
    played.reward = sum(rewards.resolve("shaped").potential(progress).values())
    return played


class Scripted:
    """A tool that answers the n-th query of an episode with the n-th mask, by the number of prompts in force."""

    name, fingerprint, memory, max_batch = "Scripted", "Scripted:0", "cumulative", 1
    prompts = frozenset((Click, Box))

    def __init__(self, *masks: Mask) -> None:
        self.masks = list(masks)
        self.stub = Stub()

    def encode(self, images: Any) -> Any:
        return self.stub.encode(images)

    def predict(self, queries: Any) -> Any:
        mask = self.masks.pop(0) if len(self.masks) > 1 else self.masks[0]
        (prediction,) = self.stub.predict(queries)
        return [replace(prediction, logits=np.where(mask, np.float32(10), np.float32(-10)))]

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return height, width


# what each does


def test_centre_click_clicks_once_and_stops() -> None:
    data = One(ellipse())
    played = play(CentreClick(data), data)
    assert played.actions == [oracle.centre_click(data.target), Stop()]


def test_box_once_boxes_once_and_stops() -> None:
    data = One(two_squares())
    played = play(BoxOnce(data), data)
    assert played.actions == [Box(5, 10, 55, 45), Stop()]
    assert played.iou[-1] == pytest.approx(656 / (51 * 36))


def test_oracle_clicks_begin_at_the_centre_and_follow_the_largest_error() -> None:
    data = One(ellipse())
    played = play(OracleClicks(data), data, horizon=3)
    first = oracle.centre_click(data.target)
    assert first is not None
    assert played.actions[0] == first
    (after,) = advance(Stub(), [data[""]], [empty_state(data[""])], [first])
    assert played.actions[1] == oracle.error_click(after.mask, data.target)


def test_box_then_clicks_boxes_first_and_never_again() -> None:
    data = One(ellipse())
    played = play(OracleBoxThenClicks(data, stop_iou=1.0, min_gain=0), data, horizon=9)
    assert played.actions[0] == oracle.target_box(data.target)
    assert sum(isinstance(action, Box) for action in played.actions) == 1
    assert isinstance(played.actions[1], Click)


@pytest.mark.parametrize("target", [ellipse(), two_squares()], ids=["ellipse", "squares"])
@pytest.mark.parametrize("oracle_class", [OracleClicks, OracleBoxThenClicks])
def test_oracles_end_higher_and_earn_more_than_one_prompt(target: Mask, oracle_class: Any) -> None:
    data = One(target)
    best = play(oracle_class(data), data, horizon=12)
    for other in (CentreClick(data), Random(VERBS)):
        lesser = play(other, data, horizon=12)
        assert best.iou[-1] > lesser.iou[-1]
        assert best.reward > lesser.reward
    assert best.iou[-1] == max(best.iou)
    if oracle_class is OracleBoxThenClicks:  # four clicks in vain at most
        assert best.reward >= play(BoxOnce(data), data).reward - 4 * 0.008


def test_xu_clicks_take_the_deepest_pixel_until_point_eight() -> None:
    """Masks of 400, then 500, then 529 of the target's 656 pixels: .61, .76, .81."""
    data = One(two_squares())
    masks = [data.target.copy() for _ in range(3)]
    for mask, rows in zip(masks, (0, 100, 129), strict=True):
        mask[30:46, 40:56] = (np.arange(256) < rows).reshape(16, 16)
    played = play(XuClicks(data), data, horizon=20, tool=Scripted(*masks))
    clicks = [oracle.greedy_click(mask, data.target) for mask in (np.zeros_like(data.target), *masks[:2])]
    assert played.actions == [*clicks, Stop()]
    assert played.iou[1:4] == [400 / 656, 500 / 656, 529 / 656]


def test_xu_clicks_repeat_where_the_tool_does_not_respond() -> None:
    data = One(ellipse())
    played = play(XuClicks(data), data, horizon=4, tool=Scripted(np.zeros_like(data.target)))
    assert len(set(played.actions)) == 1


# stopping


@pytest.mark.parametrize("name", ["CentreClick", "BoxOnce", "OracleClicks", "OracleBoxThenClicks", "XuClicks"])
def test_an_absent_structure_is_stopped_at_once(name: str) -> None:
    """The best there is: nothing outlined, nothing spent, 1.0."""
    data = One(np.zeros((32, 32), np.bool_))
    played = play(make(name, dataset=data), data)
    assert played.actions == [Stop()]
    assert played.reward == pytest.approx(1.0)


def test_oracles_stop_at_stop_iou() -> None:
    data = One(two_squares())
    good = data.target.copy()
    good[10, 5:25] = False  # 636 of 656 pixels: .9695
    assert OracleClicks(data).decide(view_of(good), np.random.default_rng(0)) == Stop()
    assert OracleClicks(data, stop_iou=0.97).decide(view_of(good), np.random.default_rng(0)) == Click(5, 10, True)


def test_errors_too_small_to_be_worth_a_click_are_left() -> None:
    """80 pixels missed of 656 in ten lines of 8: IoU .878, and no line gains more than .0122."""
    data = One(two_squares())
    mask = data.target.copy()
    mask[11:29:2, 6:14] = False
    mask[31, 41:49] = False
    rng = np.random.default_rng(0)
    assert OracleClicks(data, min_gain=0.012).decide(view_of(mask), rng) == Click(6, 11, True)
    assert OracleClicks(data, min_gain=0.013).decide(view_of(mask), rng) == Stop()


def test_a_mask_beside_the_target_is_not_given_up() -> None:
    """IoU 0: no single repair of the larger, spilled error gains any, and yet it has to be clicked."""
    data = One(two_squares())
    mask = np.zeros_like(data.target)
    mask[50:, :] = True
    action = OracleClicks(data, verbs=NO_UNDO).decide(view_of(mask, turn=1), np.random.default_rng(0))
    assert isinstance(action, Click)
    assert not action.positive


# undo


def test_a_prompt_that_lowered_the_iou_is_undone_and_the_next_error_tried_once() -> None:
    data = One(two_squares())
    left = data.target.copy()
    left[:, 32:] = False  # IoU 400 / 656
    worse = np.zeros_like(left)
    worse[0, 0] = True
    tool = Scripted(left, worse, worse)
    played = play(OracleClicks(data, retries=1), data, horizon=8, tool=tool)
    first, second, undo, third, again, stop = played.actions
    assert first == oracle.centre_click(data.target)
    assert second == oracle.error_click(left, data.target)
    assert undo == Undo()
    assert isinstance(third, Click)
    assert third != second
    assert data.target[third.y, third.x]  # one error only: another place in it
    assert again == Undo()
    assert stop == Stop()
    assert played.iou[-1] == max(played.iou)


def test_after_an_undo_the_second_largest_error_is_next() -> None:
    data = One(two_squares())
    start = np.zeros_like(data.target)
    view = view_of(start, turn=2, history=((start, Click(15, 20)), (np.eye(64, dtype=np.bool_), Undo())))
    assert OracleClicks(data).decide(view, np.random.default_rng(0)) == oracle.error_click(start, data.target, rank=1)


def test_on_the_last_turn_a_loss_is_undone_and_a_second_try_is_not_made() -> None:
    data = One(two_squares())
    left = data.target.copy()
    left[:, 32:] = False
    worse = np.zeros_like(left)
    for horizon, last in ((3, Undo()), (4, Stop())):
        played = play(OracleClicks(data), data, horizon=horizon, tool=Scripted(left, worse))
        assert played.actions[-1] == last
        assert played.iou[-1] == played.iou[1] == max(played.iou)


def test_on_the_last_turn_a_fair_mask_is_not_risked_and_a_poor_one_is() -> None:
    data, rng = One(two_squares()), np.random.default_rng(0)
    fair, poor = data.target.copy(), data.target.copy()
    fair[30:42, 40:56] = False  # 464 of 656: .707
    poor[30:43, 40:56] = False  # 448 of 656: .683
    for mask, turn, clicks in ((fair, 3, True), (fair, 4, False), (poor, 4, True)):
        assert isinstance(OracleClicks(data).decide(view_of(mask, turn=turn), rng), Click) is clicks
    assert isinstance(OracleClicks(data, NO_UNDO).decide(view_of(fair, turn=4), rng), Click)


def test_without_undo_the_clicks_go_on() -> None:
    data = One(two_squares())
    left = data.target.copy()
    left[:, 32:] = False
    worse = np.zeros_like(left)
    worse[12:20, 8:16] = True
    for policy in (OracleClicks(data, NO_UNDO), OracleClicks(data, undo_losses=False)):
        played = play(policy, data, horizon=3, tool=Scripted(left, worse, left))
        assert played.actions[2] == oracle.error_click(worse, data.target)


def test_a_click_without_effect_is_not_repeated() -> None:
    data = One(two_squares())
    played = play(OracleClicks(data, retries=1), data, horizon=9, tool=Scripted(np.zeros_like(data.target)))
    first, second = (oracle.error_click(np.zeros_like(data.target), data.target, rank=k) for k in (0, 1))
    assert played.actions == [first, second, Stop()]


def test_clicks_that_hardly_help_end_the_episode() -> None:
    """Each query adds one row of 16 pixels (.024): below a min_gain of .03 a second try is made, then none."""
    data = One(two_squares())
    masks = [data.target.copy() for _ in range(8)]
    for rows, mask in enumerate(masks):
        mask[30 + rows : 46, 40:56] = False
    assert len(play(OracleClicks(data, min_gain=0.03, retries=1), data, horizon=8, tool=Scripted(*masks)).actions) == 4
    assert (
        len(
            play(
                OracleClicks(data, min_gain=0.02, retries=1, undo_losses=False), data, horizon=8, tool=Scripted(*masks)
            ).actions
        )
        == 8
    )


def test_undo_earns_more_than_leaving_the_loss() -> None:
    data = One(two_squares())
    left = data.target.copy()
    left[:, 32:] = False
    tool = Scripted(left, np.zeros_like(left))
    with_undo = play(OracleClicks(data), data, horizon=4, tool=tool)
    tool = Scripted(left, np.zeros_like(left))
    without = play(OracleClicks(data, undo_losses=False), data, horizon=4, tool=tool)
    assert with_undo.reward > without.reward + 0.3


def test_a_start_mask_beside_the_target_is_discarded_once() -> None:
    data, rng = One(two_squares()), np.random.default_rng(0)
    wrong = np.zeros_like(data.target)
    wrong[50:, :30] = True
    assert OracleClicks(data).decide(view_of(wrong), rng) == Undo()
    stuck = view_of(wrong, turn=1, history=((wrong, Undo()),))
    assert isinstance(OracleClicks(data).decide(stuck, rng), Click)
    assert isinstance(OracleClicks(data, NO_UNDO).decide(view_of(wrong), rng), Click)


def test_what_is_outlined_of_an_absent_structure_is_taken_back() -> None:
    data, rng = One(np.zeros((32, 32), np.bool_)), np.random.default_rng(0)
    blob = np.zeros((32, 32), np.bool_)
    blob[4:9, 4:9] = True
    assert OracleClicks(data).decide(view_of(blob), rng) == Undo()
    assert OracleClicks(data, NO_UNDO).decide(view_of(blob), rng) == Click(6, 6, False)


def test_failed_clicks_reads_the_history() -> None:
    """On a target of all four pixels; a holds none, b one, c one other, d two."""
    a, b, c, d = (np.zeros((2, 2), np.bool_) for _ in range(4))
    b[0, 0] = c[1, 1] = d[0] = True
    click, box = Click(0, 0), Box(0, 0, 1, 1)

    def failed(*history: tuple[Mask, Any], now: Mask, min_gain: float = 0.01) -> tuple[int, int]:
        return failed_clicks(view_of(now, history=history), np.ones((2, 2), np.bool_), min_gain)

    assert failed(now=a) == (0, 0)
    assert failed((a, click), now=b) == (0, 0)
    assert failed((a, click), now=a) == (1, 1)  # no effect
    assert failed((a, click), (b, Undo()), (a, click), (c, Undo()), now=a) == (2, 2)
    assert failed((a, click), (b, Undo()), (a, click), now=c) == (0, 0)  # a new mask, a new count
    assert failed((a, click), (b, click), now=c) == (0, 1)  # another mask, no better
    assert failed((a, click), (b, click), now=d, min_gain=0.3) == (0, 2)  # .25 each
    assert failed((a, click), (b, click), (c, Undo()), now=b) == (1, 1)
    assert failed((a, box), (b, Undo()), now=a) == (0, 0)  # boxes do not count
    assert failed((a, Undo()), (a, Unreadable("?")), (a, click), now=a) == (1, 1)


# keep_clicking


def test_keep_clicking_neither_undoes_nor_stops() -> None:
    data = One(ellipse())
    played = play(OracleClicks(data, keep_clicking=True), data, horizon=20)
    assert len(played.actions) == 20
    assert all(isinstance(action, Click) for action in played.actions)


def test_keep_clicking_stops_at_a_perfect_mask() -> None:
    data = One(two_squares())
    played = play(OracleClicks(data, keep_clicking=True), data, horizon=20, tool=Scripted(data.target))
    assert played.actions[1:] == [Stop()]


def test_keep_clicking_leaves_an_error_that_does_not_respond_and_comes_back_to_it() -> None:
    data = One(two_squares())
    nothing = np.zeros_like(data.target)
    played = play(OracleClicks(data, keep_clicking=True), data, horizon=4, tool=Scripted(nothing))
    large, small = (oracle.error_click(nothing, data.target, rank=k) for k in (0, 1))
    assert played.actions == [large, small, large, small]


# noise, verbs, names


def test_jitter_moves_prompts_by_the_generator_and_stays_inside() -> None:
    data, shape = One(two_squares()), (64, 64)
    for name in ("CentreClick", "BoxOnce", "OracleClicks", "OracleBoxThenClicks", "XuClicks"):
        policy, exact = make(f"{name}:jitter=4", dataset=data), make(name, dataset=data)
        view = view_of(np.zeros(shape, np.bool_))
        seen = {policy.act([view], [np.random.default_rng(seed)])[0].action for seed in range(20)}
        wanted = exact.act([view], [np.random.default_rng(0)])[0].action
        assert len(seen) > 5
        assert policy.act([view], [np.random.default_rng(3)]) == policy.act([view], [np.random.default_rng(3)])
        for action in seen:
            numbers = [getattr(action, field) - getattr(wanted, field) for field in type(action).__slots__]  # type: ignore[union-attr]
            assert max(abs(number) for number in numbers) <= 4


def test_miss_sends_clicks_anywhere() -> None:
    data = One(two_squares())
    view = view_of(np.zeros((64, 64), np.bool_))
    policy = CentreClick(data, miss=1.0)
    clicks = [policy.decide(view, np.random.default_rng(seed)) for seed in range(100)]
    assert len(set(clicks)) > 90
    assert {click.positive for click in clicks if isinstance(click, Click)} == {True}
    hits = [
        CentreClick(data, miss=0.25).decide(view, np.random.default_rng(seed)) == Click(14, 19) for seed in range(200)
    ]
    assert 0.65 < np.mean(hits) < 0.85


def test_random_uses_every_allowed_verb_and_stays_inside() -> None:
    view, rng = view_of(np.zeros((3, 50), np.bool_)), np.random.default_rng(0)
    actions = [Random(VERBS).decide(view, rng) for _ in range(500)]
    kinds = [(type(a), getattr(a, "positive", None)) for a in actions]
    assert {kinds.count(kind) for kind in set(kinds)} <= set(range(70, 131))  # 100 of each expected
    assert len(set(kinds)) == 5
    for action in actions:
        if isinstance(action, Click):
            assert 0 <= action.x < 50
            assert 0 <= action.y < 3
        if isinstance(action, Box):
            assert 0 <= action.x1 <= action.x2 < 50
            assert 0 <= action.y1 <= action.y2 < 3
    assert {type(Random(("positive",)).decide(view, rng)) for _ in range(20)} == {Click}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("CentreClick", "positive"),
        ("BoxOnce", "box"),
        ("OracleClicks", "negative"),
        ("OracleBoxThenClicks", "box"),
        ("XuClicks", "positive"),
    ],
)
def test_a_verb_that_is_needed_and_not_allowed_is_named(name: str, missing: str) -> None:
    verbs = tuple(verb for verb in VERBS if verb != missing)
    with pytest.raises(ValueError, match=f"{name} needs the verb '{missing}'"):
        make(name, dataset=One(ellipse()), verbs=verbs)


@pytest.mark.parametrize("name", ["CentreClick", "BoxOnce", "OracleClicks", "OracleBoxThenClicks", "XuClicks"])
@pytest.mark.parametrize("undo", [True, False])
def test_without_stop_the_newest_prompt_is_repeated(name: str, undo: bool) -> None:
    data = One(two_squares())
    verbs = tuple(verb for verb in VERBS if verb != "stop" and (undo or verb != "undo"))
    played = play(make(name, dataset=data, verbs=verbs), data, horizon=6, tool=Scripted(data.target))
    assert played.actions == [played.actions[0]] * 6
    assert played.iou[-1] == 1


def test_without_stop_an_absent_structure_gets_an_undo_of_nothing_or_a_negative_click() -> None:
    data, rng = One(np.zeros((8, 8), np.bool_)), np.random.default_rng(0)
    view = view_of(data.target)
    assert OracleClicks(data, ("positive", "negative", "undo")).decide(view, rng) == Undo()
    assert OracleClicks(data, ("positive", "negative")).decide(view, rng) == Click(0, 0, False)
    assert CentreClick(data, ("positive",)).decide(view, rng) == Click(0, 0, True)
    assert BoxOnce(data, ("box",)).decide(view, rng) == Box(0, 0, 0, 0)


def test_act_answers_every_view_in_order() -> None:
    data = One(two_squares())
    views = [view_of(np.zeros((64, 64), np.bool_)), view_of(data.target, turn=1)]
    rngs = [np.random.default_rng(i) for i in range(2)]
    assert OracleClicks(data).act(views, rngs) == [Decision(Click(14, 19, True)), Decision(Stop())]
    with pytest.raises(ValueError, match="zip"):
        OracleClicks(data).act(views, rngs[:1])


def test_targets_are_read_once_and_the_oldest_forgotten() -> None:
    data = One(ellipse())
    targets = Targets(data, size=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert targets[key] is data.target
    assert data.reads == 4  # a, b, c, and b again: a was used since
    assert len(pickle.loads(pickle.dumps(OracleClicks(data))).targets._kept) == 0


# make


@pytest.mark.parametrize(
    "spec",
    [
        "Random",
        "CentreClick",
        "BoxOnce:jitter=3",
        "OracleClicks",
        "OracleClicks:jitter=5",
        "OracleClicks:jitter=2.5,miss=0.1,stop_iou=0.9,undo_losses=false,retries=0,min_gain=0.0,keep_clicking=true",
        "OracleBoxThenClicks:jitter=5,stop_iou=0.8",
        "XuClicks:stop_iou=0.9",
    ],
)
def test_a_policys_name_builds_it_again(spec: str) -> None:
    policy = make(spec, dataset=One(ellipse()))
    assert policy.name == spec
    assert isinstance(policy, Policy)


def test_defaults_are_not_in_the_name() -> None:
    assert make("OracleClicks:jitter=0,stop_iou=0.95", dataset=One(ellipse())).name == "OracleClicks"
    assert make("XuClicks", dataset=One(ellipse()), stop_iou=0.7).name == "XuClicks:stop_iou=0.7"


def test_dataset_and_verbs_come_from_the_env() -> None:
    data = One(ellipse())
    env = SimpleNamespace(unwrapped=SimpleNamespace(dataset=data, verbs=NO_UNDO))
    policy = make("OracleClicks", env)
    assert isinstance(policy, OracleClicks)
    assert policy.targets.dataset is data
    assert policy.verbs == NO_UNDO
    assert make("Random", env).verbs == NO_UNDO  # type: ignore[attr-defined]
    assert make(Random, env, verbs=("stop",)).verbs == ("stop",)  # type: ignore[attr-defined]


def test_a_ready_policy_is_returned_as_it_is() -> None:
    policy = Random()
    assert make(policy) is policy
    with pytest.raises(UnknownNameError, match="takes no options"):
        make(policy, jitter=3)


class Mine:
    name = "Mine"

    def __init__(self, shade: str = "grey", level: int = 0) -> None:
        self.shade, self.level = shade, level

    def act(self, views: Any, rngs: Any) -> list[Decision]:
        return [Decision(Stop()) for _ in views]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable package.module with a policy class, a ready policy and something else."""
    module = ModuleType("elsewhere.agents")
    module.Mine, module.ready, module.number = Mine, Mine(level=9), 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    monkeypatch.setitem(sys.modules, "elsewhere.agents", module)
    return module


def test_a_class_by_its_path(module: ModuleType) -> None:
    policy = make("elsewhere.agents:Mine")
    assert isinstance(policy, Mine)
    policy = make("elsewhere.agents:Mine:shade=http://host:80/v1,level=3", env=SimpleNamespace(unwrapped=object()))
    assert isinstance(policy, Mine)
    assert (policy.shade, policy.level) == ("http://host:80/v1", 3)
    assert make("elsewhere.agents:ready") is module.ready


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("elsewhere.agents:Nobody", "elsewhere.agents:Nobody"),
        ("nowhere.at.all:Mine", "No module named 'nowhere'"),
        ("elsewhere.agents:number", "neither a Policy class"),
        ("elsewhere.agents:ready:level=3", "neither a Policy class"),
        ("elsewhere.agents:Mine:lvel=3", "did you mean 'level'"),
    ],
)
def test_a_path_that_leads_to_no_policy_says_so(module: ModuleType, spec: str, text: str) -> None:
    with pytest.raises(UnknownNameError, match=text):
        make(spec)


def test_an_entry_point_by_its_name(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        metadata.EntryPoint("Foreign", "elsewhere.agents:Mine", base.GROUP),
        metadata.EntryPoint("Broken", "elsewhere.agents:Nobody", base.GROUP),
    ]
    monkeypatch.setattr(base.metadata, "entry_points", lambda group: points if group == base.GROUP else [])
    policy = make("Foreign:level=4")
    assert isinstance(policy, Mine)
    assert policy.level == 4
    assert base.names()[-2:] == ["Broken", "Foreign"]
    with pytest.raises(UnknownNameError, match=r"'Broken' is the entry point 'elsewhere.agents:Nobody'"):
        make("Broken")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("OracleClick", "did you mean 'OracleClicks'"),
        ("", "unknown policy ''"),
        ("OracleClicks:jiter=5", "did you mean 'jitter'"),
        ("Random:jitter=5", "jitter"),
        ("OracleClicks:jitter=", "key=value"),
        ("OracleClicks:jitter=1,jitter=2", "key=value"),
        ("OracleClicks:jitter=1,,", "key=value"),
        ("OracleClicks:__import__('os')=1", "key=value"),
    ],
)
def test_a_spec_that_cannot_be_read_says_why(spec: str, text: str) -> None:
    with pytest.raises(UnknownNameError, match=text.replace("(", r"\(")):
        make(spec, dataset=One(ellipse()))


@pytest.mark.parametrize(
    "spec",
    [
        "OracleClicks:jitter=-1",
        "OracleClicks:jitter=nan",
        "OracleClicks:jitter=lots",
        "OracleClicks:jitter=true",
        "OracleClicks:miss=1.5",
        "OracleClicks:stop_iou=95",
        "OracleClicks:retries=none",
        "OracleClicks:keep_clicking=1",
        "XuClicks:stop_iou=2",
    ],
)
def test_an_option_out_of_range_says_what_was_wanted(spec: str) -> None:
    with pytest.raises(MedSegError, match="wanted"):
        make(spec, dataset=One(ellipse()))


def test_an_option_given_twice_raises() -> None:
    with pytest.raises(UnknownNameError, match="both in the spec"):
        make("OracleClicks:jitter=1", dataset=One(ellipse()), jitter=2)


def test_without_a_dataset_an_oracle_says_what_it_needs() -> None:
    with pytest.raises(MedSegError, match="OracleClicks needs 'dataset': give make an env or dataset="):
        make("OracleClicks")

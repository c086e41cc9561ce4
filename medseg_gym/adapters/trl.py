"""TRL: an env as GRPOTrainer's `environment_factory`, its actions as tools that answer with the picture of the mask.

What TRL does with it, as read in trl 1.16: every public method is a tool, called with what the model wrote; a tool's
list of content parts goes to the model as it is, pictures included; a rollout ends with the first answer that calls
nothing, or at `max_tool_calling_iterations`, which belongs at the horizon. TRL goes on asking after a stop, so a call
after the end is answered and changes nothing. A call of a function that is not there is TRL's to answer and costs no
turn here; one with wrong arguments is an unreadable turn, as in our own rollouts.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.errors import MedSegError
from medseg_gym.policies.chat import SIZE, check_size, plain
from medseg_gym.policies.protocols.base import Moment
from medseg_gym.policies.protocols.medsam_agent import MedSAMAgent
from medseg_gym.types import Unreadable

SYSTEM = """\
You annotate medical images with the help of a segmentation model. Call one function a turn; the model then draws its \
mask anew, and you are shown it in see-through green over the image. Positions are whole numbers from 0 to 999, \
measured over the whole picture with any black borders. The mask is right when all of the target is green and nothing \
beside it."""
OVER = "The work on this image is over. Answer without a call."
Parts = list[dict[str, Any]]


def environment(env_id: str = "MedSeg-v0", *, size: int = SIZE, horizon: int = 5, **options: Any) -> type[Environment]:
    """A class for `environment_factory`: an instance plays one episode at a time, all share dataset and tool.

    `size` is the side of the pictures, `options` go to `gym.make` (split, structures, reward, tool_options, ...).
    The tools are MedSAM-Agent's functions, those that the env's verbs allow. TRL logs the reward as rewards/<env_id>.
    """
    import gymnasium as gym

    if "observation" in options:
        raise MedSegError("observation= is the adapter's own: TRL is given the picture with the mask and a text")
    first: Any = gym.make(env_id, observation="dict", size=check_size(size), horizon=horizon, **options).unwrapped
    given = {"observation": "dict", "size": size, "horizon": horizon, **options}
    for loaded in ("dataset_options", "tool_options", "dataset", "tool"):
        given.pop(loaded, None)
    made = functools.partial(SegmentEnv, first.dataset, first.tool, **given)
    protocol = MedSAMAgent(first.verbs)
    members = {"_made": staticmethod(made), "_protocol": protocol, "__doc__": f"{env_id} as TRL wants it."}
    members |= {name: tool for name, tool in _tools(protocol.signs).items() if name in protocol._wanted}
    return type(env_id, (Environment,), members)


def cases(kind: type[Environment], count: int, *, seed: int = 0, system: str = SYSTEM) -> Any:
    """A `datasets.Dataset` for `train_dataset`: `count` cases of the env's split in random order, all before any again.

    Columns: prompt (system and an empty user turn, which `reset` fills) and sample, the case that a group shares.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise MedSegError("TRL's data are a datasets.Dataset: pip install datasets") from None
    keys, rng = kind._made().engine.keys, np.random.default_rng(seed)
    order = [int(i) for _ in range(-(-count // len(keys))) for i in rng.permutation(len(keys))][:count]
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": ""}]
    return Dataset.from_list([{"prompt": prompt, "sample": keys[i]} for i in order])


def final_dice(environments: Sequence[Environment], **_: Any) -> list[float]:
    """A reward function for the log: the Dice of every rollout's last mask; give it the weight 0."""
    return [float(env._env.engine.slot(0).dice[-1]) for env in environments]


def final_iou(environments: Sequence[Environment], **_: Any) -> list[float]:
    """As final_dice, with the IoU."""
    return [float(env._env.engine.slot(0).iou[-1]) for env in environments]


class Environment:
    """What TRL asks: `reset`, `get_reward`, and the tools that `environment` adds. All else begins with an underscore,
    as TRL would make it a tool."""

    _made: Callable[[], Any]
    _protocol: MedSAMAgent

    def __init__(self) -> None:
        self._env = self._made()
        self._broken: Exception | None = None

    def reset(self, sample: str | None = None, seed: int | None = None, **row: Any) -> Parts:
        """Begins an episode and gives the parts of its first user turn; the row's other columns are ignored."""
        if sample is None and seed is None:
            raise MedSegError(
                "the row has neither a sample nor a seed, so every rollout of a group would get a case of its own; "
                "train_dataset=cases(environment, count) gives rows that have"
            )
        self._broken = None
        self._env.reset(seed=seed, options=None if sample is None else {"sample": sample})
        return self._shown(None)

    def get_reward(self) -> float:
        """The episode's return. One that TRL cut short ends at the turns it has; one without any said nothing readable.

        Asking again gives the same. What broke the env in the episode is raised here: TRL shows errors to the model.
        """
        if self._broken is not None:
            raise self._broken
        engine = self._env.engine
        if not engine.slot(0).outcomes:
            self._env.step(Unreadable("no function was called"))
        if engine.slot(0).ended is None:
            engine.truncate(0)
        return float(sum(outcome.reward for outcome in engine.slot(0).outcomes))

    def _call(self, name: str, arguments: Mapping[str, Any]) -> Parts | str:
        slot = self._env.engine.slot(0)
        if slot.ended is not None:
            return OVER
        call = json.dumps({"name": name, "arguments": dict(arguments)}, default=repr)
        decision = self._protocol.parse(f"<tool_call>{call}</tool_call>", slot.grid)
        action = Unreadable(decision.reason) if decision.action is None else decision.action
        try:
            self._env.step(action)
        except Exception as error:
            self._broken = error
            raise
        return OVER if self._env.engine.slot(0).ended is not None else self._shown(action)

    def _shown(self, last: Any) -> Parts:
        from PIL import Image

        view = self._env.view()
        moment = Moment(view.instruction, view.turn, bool(view.mask.any()), last)
        picture = Image.fromarray(self._env.engine.observe(0)["overlay"])
        return [{"type": "image", "image": picture}, {"type": "text", "text": plain(self._protocol.user(moment))}]


def _tools(signs: tuple[str, ...]) -> dict[str, Callable[..., Parts | str]]:
    """The four tools. Their hints and docstrings are what the model reads: TRL makes JSON schemas of them."""

    def add_bbox(self: Environment, bbox_2d: list[int]) -> Any:
        """
        Encloses the target in a box; replaces an earlier box.

        Args:
            bbox_2d: [left, top, right, bottom], each from 0 to 999.

        Returns:
            The image with the new mask.
        """
        return self._call("add_bbox", {"bbox_2d": bbox_2d})

    def add_point(self: Environment, point_2d: list[int], point_type: str) -> Any:
        """
        Sets a point: a positive one marks it as target, a negative one as not target.

        Args:
            point_2d: [x, y], each from 0 to 999.
            point_type: The kind of point.

        Returns:
            The image with the new mask.
        """
        return self._call("add_point", {"point_2d": point_2d, "point_type": point_type})

    def undo_action(self: Environment) -> Any:
        """
        Takes back the newest box or point, or a mask that was given at the start.

        Returns:
            The image with the mask before it.
        """
        return self._call("undo_action", {})

    def stop_action(self: Environment) -> Any:
        """
        Ends the work: the mask is right, or the target is not in the image and there is no mask.

        Returns:
            That the work is over.
        """
        return self._call("stop_action", {})

    kind = Literal[signs] if signs else str  # type: ignore[valid-type]
    return {
        "add_bbox": _tool(add_bbox, bbox_2d=list[int]),
        "add_point": _tool(add_point, point_2d=list[int], point_type=kind),
        "undo_action": _tool(undo_action),
        "stop_action": _tool(stop_action),
    }


def _tool(told: Callable[..., Any], **hints: Any) -> Callable[..., Any]:
    """The method with these hints, and with an unreadable turn where it is called with wrong arguments."""
    signature = inspect.signature(told)

    def call(self: Environment, /, *values: Any, **arguments: Any) -> Any:
        try:
            signature.bind(self, *values, **arguments)
        except TypeError:
            return self._call(told.__name__, arguments)
        return told(self, *values, **arguments)

    functools.update_wrapper(call, told)
    call.__annotations__ = {**hints, "return": Any}
    return call

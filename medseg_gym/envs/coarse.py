"""Actions small networks can learn: a coarse grid of cells, boxes of a few sizes, and a choice of verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorActionWrapper, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from medseg_gym.envs.config import whole_number
from medseg_gym.envs.spaces import VERBS
from medseg_gym.errors import InvalidActionError, MedSegError, unknown
from medseg_gym.frames import GRID

CELLS = 12
SIZES = (0.125, 0.25, 0.5)  # sides of boxes, in sides of the padded square

Ints = NDArray[np.int64]


class CoarseCodec:
    """Coarse actions -> the env's vectors (verb, x1, y1, x2, y2) on the 0-999 grid.

    The padded square is cut into `cells` x `cells`. A click falls on its cell's centre, a box is a square around it
    with one of the `sizes` (in (0, 1], of the square's side), cut where it leaves the square. `verbs` is a choice of
    the env's `of`, in any order. An action is (verb, column, row, size), of which stop and undo use the verb alone and
    clicks no size; with `flat` it is one number instead, which has every different action once: a block for each
    verb, within it row by row, within a cell size by size.
    """

    def __init__(
        self,
        verbs: Sequence[str] | None = None,
        cells: int = CELLS,
        sizes: Sequence[float] = SIZES,
        *,
        flat: bool = False,
        of: Sequence[str] = VERBS,
    ) -> None:
        self.cells = whole_number("cells", cells, 1, GRID)
        self.sizes = tuple(sizes)
        self.verbs = tuple(of if verbs is None else verbs)
        self.flat = flat
        for verb in self.verbs:
            if verb not in of:
                raise unknown("verb", verb, of)
        if not self.verbs or len(set(self.verbs)) != len(self.verbs):
            raise InvalidActionError(f"verbs={self.verbs!r}; wanted at least one verb, each once")
        if not self.sizes or not all(isinstance(s, int | float) and 0 < s <= 1 for s in self.sizes):
            raise MedSegError(f"sizes={self.sizes!r}; wanted at least one number in (0, 1], of the image's longer side")
        self._verb = [tuple(of).index(verb) for verb in self.verbs]
        # the grid position that holds the cell's centre
        self._centre = [(2 * i + 1) * GRID // (2 * self.cells) for i in range(self.cells)]
        self._edges = [[self._box_edges(i, size) for size in self.sizes] for i in range(self.cells)]
        self._blocks = [self._options(verb) for verb in self.verbs]
        self.space: spaces.Discrete[np.int64] | spaces.MultiDiscrete = (
            spaces.Discrete(sum(self._blocks))
            if flat
            else spaces.MultiDiscrete([len(self.verbs), self.cells, self.cells, len(self.sizes)])
        )

    def vector(self, action: Any) -> Ints:
        """The env's action vector, (5,) int64, of a coarse action; another than the space has raises."""
        verb, column, row, size = self.parts(action)
        name, numbers = self.verbs[verb], [0, 0, 0, 0]
        if name in ("positive", "negative"):
            numbers = [self._centre[column], self._centre[row], 0, 0]
        elif name == "box":
            (x1, x2), (y1, y2) = self._edges[column][size], self._edges[row][size]
            numbers = [x1, y1, x2, y2]
        return np.array([self._verb[verb], *numbers], np.int64)

    def vectors(self, actions: Any) -> Ints:
        """The env's (N, 5) vectors of N coarse actions."""
        return np.stack([self.vector(action) for action in actions])

    def parts(self, action: Any) -> tuple[int, int, int, int]:
        """(verb, column, row, size) of an action; spare numbers of a flat action are 0."""
        array = np.asarray(action)
        if array.dtype.kind not in "iu" or not self.space.contains(array.astype(np.int64)):
            raise InvalidActionError(f"coarse action {action!r}; wanted one of {self.space}")
        if not self.flat:
            verb, column, row, size = array.tolist()
            return verb, column, row, size
        rest, verb = int(array), 0
        while rest >= self._blocks[verb]:
            rest -= self._blocks[verb]
            verb += 1
        cell, size = divmod(rest, len(self.sizes)) if self.verbs[verb] == "box" else (rest, 0)
        return verb, cell % self.cells, cell // self.cells, size

    def _options(self, verb: str) -> int:
        cells = self.cells**2
        return {"positive": cells, "negative": cells, "box": cells * len(self.sizes)}.get(verb, 1)

    def _box_edges(self, cell: int, size: float) -> tuple[int, int]:
        """First and last grid position along one axis, both inside."""
        middle, half = (cell + 0.5) * GRID / self.cells, size * GRID / 2
        first = min(max(round(middle - half), 0), GRID - 1)
        return first, min(max(round(middle + half) - 1, first), GRID - 1)


class CoarseGrid(gym.ActionWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A single env with coarse actions; arguments are CoarseCodec's, `verbs` a choice of the env's own."""

    def __init__(self, env: gym.Env[Any, Any], **options: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, **options)
        gym.ActionWrapper.__init__(self, env)
        self.codec = _codec(env, options)
        self.action_space = self.codec.space

    def action(self, action: Any) -> Ints:
        return self.codec.vector(action)


class VectorCoarseGrid(VectorActionWrapper):
    """CoarseGrid for the native vector env; `actions` has one row, or with `flat` one number, a slot."""

    def __init__(self, env: VectorEnv[Any, Any, Any], **options: Any) -> None:
        super().__init__(env)
        self.codec = _codec(env, options)
        self.single_action_space = self.codec.space
        self.action_space = batch_space(self.codec.space, env.num_envs)

    def actions(self, actions: Any) -> Any:
        if not hasattr(actions, "__len__") or len(actions) != self.num_envs:
            raise InvalidActionError(f"coarse actions {actions!r}; wanted one for each of {self.num_envs} slots")
        return self.codec.vectors(actions)


def _codec(env: Any, options: dict[str, Any]) -> CoarseCodec:
    engine = getattr(env.unwrapped, "engine", None)
    if engine is None:
        raise MedSegError(f"CoarseGrid wraps a MedSeg env; {env} is none")
    return CoarseCodec(**options, of=engine.codec.verbs)

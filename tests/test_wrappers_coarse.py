"""Coarse actions: each is valid, lands where its cell is, and means the same on single and vector envs."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from medseg_gym.envs.coarse import CoarseCodec, CoarseGrid, VectorCoarseGrid
from medseg_gym.envs.spaces import VERBS, ActionCodec
from medseg_gym.errors import InvalidActionError, MedSegError
from medseg_gym.frames import Grid
from medseg_gym.types import Box, Click, Stop, Undo

ENV = "MedSeg-Phantom-Stub-v0"
SMALL: dict[str, Any] = {"structures": ("liver",), "size": 32, "dataset_options": {"size": 64, "task": "ct"}}
SHAPES = [(64, 64), (48, 64), (200, 31), (1024, 700), (1, 1)]


def _all_actions(codec: CoarseCodec) -> list[Any]:
    if codec.flat:
        return list(range(int(codec.space.n)))  # type: ignore[union-attr]
    return [np.array(a) for a in np.ndindex(*codec.space.nvec.tolist())]  # type: ignore[union-attr]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cells", [1, 5])
def test_every_coarse_action_is_a_valid_action_inside_the_image(cells: int, shape: tuple[int, int], flat: bool) -> None:
    coarse, env, (height, width) = CoarseCodec(cells=cells, flat=flat), ActionCodec(VERBS), shape
    for action in _all_actions(coarse):
        vector = coarse.vector(action)
        assert env.space.contains(vector)
        decoded = env.decode(vector, Grid(height, width))
        if isinstance(decoded, Click):
            assert 0 <= decoded.x < width and 0 <= decoded.y < height
        elif isinstance(decoded, Box):
            assert 0 <= decoded.x1 <= decoded.x2 < width and 0 <= decoded.y1 <= decoded.y2 < height


@pytest.mark.parametrize("cells", [1, 3, 7, 12, 16, 24, 128])
def test_a_click_falls_on_the_grid_position_that_holds_its_cells_centre(cells: int) -> None:
    codec = CoarseCodec(["positive"], cells)
    for i in range(cells):
        verb, x, y, *_ = codec.vector((0, i, cells - 1 - i, 0)).tolist()
        centre = (i + 0.5) * 1000 / cells
        assert verb == 0 and x <= centre < x + 1
        assert y <= 1000 - centre < y + 1 or np.isclose(1000 - centre, y + 1)


def test_a_cells_centre_is_exact_in_pixels_where_a_pixel_is_there() -> None:
    """5 cells of 75 pixels are 15 wide: cell i is pixels 15 i to 15 i + 14, its middle one is 15 i + 7."""
    codec, env = CoarseCodec(cells=5), ActionCodec(VERBS)
    for i in range(5):
        assert env.decode(codec.vector((0, i, 4 - i, 0)), Grid(75, 75)) == Click(15 * i + 7, 67 - 15 * i)
    # 20 of the square's rows above a 35 x 75 image are padding: cells there give its nearest row
    assert env.decode(codec.vector((1, 0, 2, 0)), Grid(35, 75)) == Click(7, 17, positive=False)
    assert env.decode(codec.vector((1, 0, 0, 0)), Grid(35, 75)) == Click(7, 0, positive=False)


def test_a_box_is_a_square_around_its_cells_centre() -> None:
    """Cells of 100, sizes of 200 and 500: around the centre 450 lie 350-549 and 200-699; at the border it is cut."""
    codec = CoarseCodec(cells=10, sizes=(0.2, 0.5))
    assert codec.vector((2, 4, 4, 0)).tolist() == [2, 350, 350, 549, 549]
    assert codec.vector((2, 4, 0, 1)).tolist() == [2, 200, 0, 699, 299]
    assert codec.vector((2, 9, 9, 1)).tolist() == [2, 700, 700, 999, 999]


def test_flat_actions_are_all_different_and_the_same_as_the_others() -> None:
    codec = CoarseCodec(cells=4, sizes=(0.2, 0.5), flat=True)
    assert codec.space == gym.spaces.Discrete(16 + 16 + 32 + 1 + 1)
    vectors = [tuple(codec.vector(a).tolist()) for a in range(66)]
    assert len(set(vectors)) == 66
    square = CoarseCodec(cells=4, sizes=(0.2, 0.5))
    # boxes begin at 32; cell 6 is column 2 of row 1
    assert vectors[32 + 6 * 2 + 1] == tuple(square.vector((2, 2, 1, 1)).tolist())
    assert vectors[16 + 6] == tuple(square.vector((1, 2, 1, 0)).tolist())


def test_masked_verbs_never_come_out_and_keep_the_envs_numbers() -> None:
    env = gym.make(ENV, verbs=("undo", "box", "stop"), **SMALL)
    coarse = CoarseGrid(env, verbs=("stop", "box"), cells=3)
    assert coarse.action_space.nvec.tolist() == [2, 3, 3, 3]  # type: ignore[attr-defined]
    decode, grid = coarse.unwrapped.engine.codec.decode, Grid(64, 64)  # type: ignore[attr-defined]
    assert {type(decode(coarse.action(a), grid)) for a in _all_actions(coarse.codec)} == {Stop, Box}
    with pytest.raises(MedSegError, match="positive"):
        CoarseGrid(env, verbs=("positive",))
    assert type(decode(CoarseGrid(env).action((0, 0, 0, 0)), grid)) is Undo


@pytest.mark.parametrize("flat", [False, True])
def test_single_and_vector_envs_take_the_same_coarse_actions(flat: bool) -> None:
    options: dict[str, Any] = {"verbs": ("box", "positive", "stop"), "cells": 6, "flat": flat}
    vector = VectorCoarseGrid(gym.make_vec(ENV, num_envs=3, **SMALL), **options)
    singles = [CoarseGrid(gym.make(ENV, **SMALL), **options) for _ in range(3)]
    assert vector.single_action_space == singles[0].action_space
    vector.reset(seed=5)
    for i, single in enumerate(singles):
        single.reset(seed=5 + i)
    vector.action_space.seed(1)
    for _ in range(2):
        actions = vector.action_space.sample()
        obs, rewards, *_ = vector.step(actions)
        for i, single in enumerate(singles):
            if single.unwrapped.engine.slot(0).ended is None:  # type: ignore[attr-defined]
                one = single.step(actions[i])
                np.testing.assert_array_equal(one[0], obs[i])
                assert one[1] == rewards[i]


def test_gymnasiums_checker_accepts_a_coarse_env() -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(CoarseGrid(gym.make(ENV, **SMALL)), skip_render_check=True)


@pytest.mark.parametrize(
    "action", [(0, 0, 0), (5, 0, 0, 0), (0, 12, 0, 0), (0, 0, 0, 3), (-1, 0, 0, 0), (0.0, 0, 0, 0), "click", None]
)
def test_what_is_no_coarse_action_is_refused(action: Any) -> None:
    with pytest.raises(InvalidActionError):
        CoarseCodec().vector(action)


@pytest.mark.parametrize(
    "options", [{"cells": 0}, {"cells": 1001}, {"sizes": ()}, {"sizes": (0,)}, {"sizes": (1.5,)}, {"verbs": ()}]
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MedSegError):
        CoarseCodec(**options)


def test_only_medseg_envs_can_be_wrapped() -> None:
    with pytest.raises(MedSegError, match="CartPole"):
        CoarseGrid(gym.make("CartPole-v1"))
    with pytest.raises(InvalidActionError, match="3 slots"):
        VectorCoarseGrid(gym.make_vec(ENV, num_envs=3, **SMALL)).step(np.zeros((2, 4), np.int64))

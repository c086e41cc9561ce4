"""Nano's training: what may be learned from, simulated prompts, and runs that go on exactly where they were cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg_gym.errors import BadDataError
from medseg_gym.tools import nano_maps as view
from medseg_gym.tools.nano_train import cases, evaluation, sessions, synthetic
from medseg_gym.types import Sample

TINY = (8, 8, 16, 16)


def disc_case(cx: float = 60, cy: float = 40, radius: float = 12) -> cases.Case:
    rows, columns = np.ogrid[:100, :120]
    target = (columns - cx) ** 2 + (rows - cy) ** 2 <= radius**2
    image = np.where(target, 180, 60).astype(np.uint8)
    made = cases.make_case("disc", "disc/1", image, target)
    assert made is not None
    return made


def test_the_unseen_sets_and_those_without_a_licence_are_never_learned_from(samples: Path) -> None:
    learned = set(cases.training_sets(samples, "all"))
    assert learned and not learned & {*cases.UNSEEN, *cases.UNLICENSED}
    assert {"ACDC", "KiTS19", "CAMUS"} <= learned
    assert set(cases.training_sets(samples, "open")) <= learned


def test_no_test_patient_of_btcv_is_learned_from(samples: Path) -> None:
    learned = {item.patient for item in cases.btcv_items(samples, test=False)}
    tested = {item.patient for item in cases.btcv_items(samples, test=True)}
    assert tested == {"028", "029", "030", "031", "032"}
    assert not learned & tested and "001" in learned


def test_medscribbles_copies_of_unseen_collections_stay_out(samples: Path) -> None:
    found = [sample.key for _, sample in cases.pool_samples(samples, ["MedScribble"])]
    assert found and not [key for key in found if "/CHAOS_" in key or "/BTCV_" in key]


def test_all_images_of_a_patient_are_learned_from_or_held_out_together() -> None:
    slices = [f"patient{p:03}_frame{f:02}_slice_{s}" for p in range(40) for f in (1, 9) for s in (2, 5)]
    by_patient: dict[str, set[bool]] = {}
    for stem in slices:
        by_patient.setdefault(stem[:10], set()).add(cases.held_out("ACDC", stem))
    assert all(len(ways) == 1 for ways in by_patient.values())
    assert 1 <= sum(True in ways for ways in by_patient.values()) <= 12


def test_a_box_session_starts_with_the_targets_box_in_the_scene() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        session = sessions.start(disc_case(), rng, boxed=True)
        assert session.box is not None
        seen, target, _ = sessions.look_at(session, rng)
        inside = seen[6] > 0
        assert target.any()
        # jitter moves an edge by a tenth of the box at most, and by 5 % more
        assert (target & ~inside).sum() <= 0.35 * target.sum()


def test_a_first_click_lies_on_the_target_wherever_the_scene_is_turned() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        session = sessions.start(disc_case(), rng, boxed=False)
        ((x, y, positive),) = session.clicks
        seen, target, _ = sessions.look_at(session, rng)
        assert session.window is not None and positive
        column, row = sessions._mapped(session.window.inverse(), x, y)
        column, row = round(column), round(row)
        if 1 <= column < view.SIDE - 1 and 1 <= row < view.SIDE - 1:
            assert target[row - 1 : row + 2, column - 1 : column + 2].any()
        assert seen.shape == (view.CHANNELS, view.SIDE, view.SIDE) and np.isfinite(seen).all()


def test_the_answer_of_a_session_comes_back_as_the_prior_of_the_next_window() -> None:
    rng = np.random.default_rng(5)
    session = sessions.start(disc_case(), rng, boxed=True)
    _, target, _ = sessions.look_at(session, rng)
    sessions.answer(session, np.where(target, 8, -8).astype(np.float32), rng)
    seen, target, _ = sessions.look_at(session, rng)
    assert ((seen[12] > 0) != target).mean() < 0.02


def test_an_error_click_says_missed_or_spilled() -> None:
    target = np.zeros((20, 20), np.bool_)
    target[2:9, 2:9] = True
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y, positive = sessions.error_pixel(np.zeros_like(target), target, rng) or (0, 0, False)
        assert positive and target[y, x]
        x, y, positive = sessions.error_pixel(np.ones_like(target), target, rng) or (0, 0, True)
        assert not positive and not target[y, x]
    assert sessions.error_pixel(target, target, rng) is None


def test_the_centre_of_a_square_is_its_middle() -> None:
    square = np.zeros((20, 20), np.bool_)
    square[5:10, 8:13] = True
    assert sessions.centre(square) == (10, 7)


def test_drawn_cases_have_a_target_and_depend_on_the_seed_alone() -> None:
    first, second = (synthetic.phantom_cases(3, 7) for _ in range(2))
    assert [a.name for a in first] == [b.name for b in second]
    derived = synthetic.derived_cases(first, 6, 7)
    again = synthetic.derived_cases(first, 6, 7)
    for a, b in zip(derived, again, strict=True):
        assert np.array_equal(a.image[0], b.image[0]) and np.array_equal(a.target[0], b.target[0])
        assert 12 <= int((a.target[0] > 127).sum()) < a.target[0].size


def test_the_ellipse_in_the_box_of_a_disc_is_the_disc() -> None:
    rows, columns = np.ogrid[:41, :41]
    disc = (rows - 20) ** 2 + (columns - 20) ** 2 <= 15.5**2
    sample = Sample("a/1", np.zeros((41, 41, 3), np.uint8), disc, "disc", "disc", "1")
    assert (evaluation.ellipse(sample) == disc).all()


def test_the_means_count_every_set_once() -> None:
    found = {"a": {"box": [[0.0], [1.0]], "click": [[0.2], [0.2]]}, "b": {"box": [[0.9]], "click": [[0.4]]}}
    assert evaluation.means(found) == {"box": [pytest.approx(0.7)], "click": [pytest.approx(0.3)]}


@pytest.fixture
def sources():  # type: ignore[no-untyped-def]
    from medseg_gym.tools.nano_train import loop

    return [loop.Source(0.5, [disc_case()]), loop.Source(0.5, [disc_case(40, 60, 20), disc_case(70, 30, 8)])]


def test_a_run_resumed_from_a_checkpoint_ends_at_the_same_weights(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch

    from medseg_gym.tools.nano_train import loop

    settings = loop.Settings(seed=1, steps=12, batch=3, widths=TINY)
    straight = loop.begin(settings)
    loop.train(straight, sources, settings)
    cut = loop.begin(settings)
    loop.train(cut, sources, settings, until=5)
    assert 5 <= cut.step < 12
    loop.save_checkpoint(tmp_path / "c.pt", cut, settings)
    torch.manual_seed(99)  # what the process did in between does not matter
    resumed = loop.load_checkpoint(tmp_path / "c.pt", settings)
    loop.train(resumed, sources, settings)
    assert resumed.step == straight.step
    for kept, wanted in (
        (resumed.model.state_dict(), straight.model.state_dict()),
        (resumed.averaged, straight.averaged),
    ):
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert not torch.equal(cut.averaged["stem.0.weight"], straight.averaged["stem.0.weight"])


def test_a_run_may_be_made_longer_while_its_rate_is_level_and_not_later(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch

    from medseg_gym.tools.nano_train import loop

    short, long = (loop.Settings(seed=1, steps=n, batch=2, widths=TINY) for n in (20, 40))
    state = loop.begin(long)
    loop.train(state, sources, long, until=4)
    loop.save_checkpoint(tmp_path / "c.pt", state, long)
    other = loop.begin(short)
    loop.train(other, sources, short, until=4)
    resumed = loop.load_checkpoint(tmp_path / "c.pt", short)
    assert all(torch.equal(v, other.averaged[k]) for k, v in resumed.averaged.items())
    loop.train(resumed, sources, short, until=18)
    loop.save_checkpoint(tmp_path / "c.pt", resumed, short)
    with pytest.raises(BadDataError, match="choose another --out"):
        loop.load_checkpoint(tmp_path / "c.pt", long)


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from medseg_gym.tools.nano_train import loop

    settings = loop.Settings(steps=20, batch=2, widths=TINY)
    loop.save_checkpoint(tmp_path / "c.pt", loop.begin(settings), settings)
    with pytest.raises(BadDataError, match="choose another --out"):
        loop.load_checkpoint(tmp_path / "c.pt", loop.Settings(seed=5, steps=20, batch=2, widths=TINY))
    (tmp_path / "c.pt").write_bytes(b"half a file")
    with pytest.raises(BadDataError, match="delete it to begin anew"):
        loop.load_checkpoint(tmp_path / "c.pt", settings)


def test_the_rate_warms_up_stays_level_and_cools() -> None:
    from medseg_gym.tools.nano_train import loop

    settings = loop.Settings(steps=1000, rate=1.0)
    assert loop.cooling_from(settings) == 650
    assert loop.rate_at(0, settings) == pytest.approx(0.01)
    assert loop.rate_at(99, settings) == loop.rate_at(650, settings) == pytest.approx(1.0)
    assert loop.rate_at(825, settings) == pytest.approx(0.01 + 0.99 / 2)
    assert loop.rate_at(1000, settings) == pytest.approx(0.01)


def test_training_on_one_disc_learns_it(sources) -> None:  # type: ignore[no-untyped-def]
    from medseg_gym.tools.nano_train import loop

    settings = loop.Settings(seed=2, steps=60, batch=4, rate=3e-3, widths=TINY)
    seen: list[float] = []
    state = loop.begin(settings)
    loop.train(state, sources, settings, every=10, report=lambda _, figures: seen.append(figures["loss"]))
    assert seen[-1] < 0.75 * seen[0]


def test_written_weights_are_half_precision_and_load_as_a_tool(tmp_path: Path) -> None:
    from safetensors import safe_open

    from medseg_gym.tools.nano import Nano
    from medseg_gym.tools.nano_train import loop

    state = loop.begin(loop.Settings(widths=TINY))
    loop.write_weights(tmp_path / "n.safetensors", state.averaged, {"data": "open"})
    with safe_open(tmp_path / "n.safetensors", "pt") as file:
        assert file.metadata() == {"data": "open"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert Nano(weights=tmp_path / "n.safetensors").name == "Nano"

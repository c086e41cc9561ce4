"""Instructions: families are IBISAgent's, every template fits any structure, and a seed and a key fix the words."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Blobs

from medseg_gym.datasets.base import Dataset, WithStartMasks
from medseg_gym.datasets.instructions import (
    FAMILIES,
    OPENINGS,
    PHRASE,
    QUESTIONS,
    REFINEMENT,
    TEMPLATES,
    Worded,
    draw,
    fill,
    seeded,
)
from medseg_gym.errors import UnknownNameError


def test_the_families_are_the_papers() -> None:
    assert len(QUESTIONS) == 5 and len(REFINEMENT) == 3
    assert (PHRASE, "direct", "goal", *QUESTIONS, *REFINEMENT) == FAMILIES
    assert set(TEMPLATES) == set(FAMILIES) - {PHRASE}


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_template_names_what_it_asks_for_and_leaves_no_gap(family: str) -> None:
    templates = TEMPLATES[family]
    assert len(set(templates)) == len(templates) >= 3
    for template in templates:
        text = fill(template, "left lung", "chest X-Ray")
        assert "{" not in text and text[0].isupper() and text[-1] in ".?!"
        assert "left lung" in text.casefold() or family in REFINEMENT
        assert fill(template, "lungs").count("image") == template.count("{modality}")  # without a modality


def test_a_misspelt_gap_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'structure'"):
        fill("the {structur}", "liver")


def test_draws_cover_all_templates_and_families_count_alike() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(rng, "liver", modality="abdomen CT") for _ in range(3000)]
    assert {text for _, text in drawn} == {fill(t, "liver", "abdomen CT") for f in OPENINGS for t in TEMPLATES[f]}
    for family in OPENINGS:
        assert abs(sum(f == family for f, _ in drawn) - 3000 / 7) < 80
    assert draw(rng, "liver", phrase="liver in CT", families=(PHRASE,)) == (PHRASE, "liver in CT")
    assert draw(rng, "liver", families=(PHRASE,)) == (PHRASE, "liver")


@pytest.mark.parametrize("families", [(), "direct", ("direkt",)])
def test_unknown_families_are_refused(families: tuple[str, ...]) -> None:
    with pytest.raises(UnknownNameError, match="direct"):
        draw(np.random.default_rng(0), "liver", families=families)


def test_a_worded_dataset_changes_the_words_and_nothing_else(blobs: Blobs) -> None:
    worded = Worded(blobs, ("direct",), seed=1)
    key = blobs.keys("train")[1]
    plain, other = blobs[key], worded[key]
    assert isinstance(worded, Dataset) and worded.name == "Blobs" and worded.keys("val") == blobs.keys("val")
    assert other.instruction in {fill(t, "disc", "drawing") for t in TEMPLATES["direct"]}
    assert plain.instruction == "disc in drawing"
    assert np.array_equal(other.target, plain.target) and other.structure == "disc" and other.key == key
    assert worded.start_mask(key) is None and isinstance(worded, WithStartMasks)


def test_words_hang_on_seed_and_key_alone(blobs: Blobs) -> None:
    keys = [key for split in ("train", "val", "test") for key in blobs.keys(split)]
    first = [Worded(blobs, seed=1)[key].instruction for key in keys]
    again = Worded(blobs, seed=1)
    assert [again[key].instruction for key in reversed(keys)] == first[::-1]
    assert [Worded(blobs, seed=2)[key].instruction for key in keys] != first
    assert len(set(first)) > 6
    assert seeded(1, "a", "b").integers(2**60) != seeded(1, "ab", "").integers(2**60)

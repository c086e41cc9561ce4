"""The cards: every dataset of the two papers, numbers that add up to the papers' totals, facts in their places."""

from __future__ import annotations

from medseg_gym.datasets.cards import DATASETS, DatasetCard
from medseg_gym.datasets.cards.record import IBISAGENT, MEDSAM_AGENT
from medseg_gym.datasets.importers import LAYOUTS


def numbers(source: str) -> dict[str, list[int]]:
    return {
        name: [number.cases for number in card.expected if number.source == source] for name, card in DATASETS.items()
    }


def test_medsam_agents_21_are_there_and_add_up_to_its_total() -> None:
    given = {name: cases for name, cases in numbers(MEDSAM_AGENT).items() if cases}
    assert len(given) == 21
    assert sum(sum(cases) for cases in given.values()) == 419_659
    assert given["BTCV"] == [12_176] and given["LiverUS"] == [39] and given["RadiographyCOVID"] == [10_844]


def test_ibisagents_groups_are_there_and_add_up_to_its_total() -> None:
    """Its table counts AMOS once for CT and MRI, and Radiography once for four parts."""
    groups: dict[tuple[str, int], int] = {}
    for card in DATASETS.values():
        for number in card.expected:
            if number.source == IBISAGENT:
                shared = number.what if number.rule == "note" and card.title.startswith(("AMOS", "Radio")) else card.id
                groups[shared, number.cases] = number.cases
    assert len(groups) == 38
    assert sum(groups.values()) == 47_146


def test_all_that_the_issue_names_are_in_the_catalogue() -> None:
    titles = {card.title for card in DATASETS.values()}
    wanted = [
        "FLARE22",
        "KiTS",
        "LIDC-IDRI",
        "BTCV",
        "AMOS-CT",
        "WORD",
        "ACDC",
        "LGG",
        "AMOS-MRI",
        "CXRMask",
        "CDD-CESM",
        "BreastUS",
        "LiverUS",
        "FH-PS-AOP",
        "REFUGE",
        "NeoPolyp",
        "PolypGen",
        "CAMUS",
        "COVID-19_CT",
        "COVID-QU-Ex",
        "G1020",
        "GlaS",
        "ISIC",
        "OCT-CME",
        "PanNuke",
        "QaTa-COV19",
        "UWaterlooSkinCancer",
        "siim-acr-pneumothorax",
        "MeCOVQA-G+",
        "Kvasir-SEG",
        "CVC-ClinicDB",
        "DRIVE",
    ]
    assert set(wanted) <= titles
    assert sum(title.startswith("MSD Task") for title in titles) == 10
    assert sum(title.startswith("Radiography: ") for title in titles) == 4


def test_every_card_can_be_prepared_and_its_facts_have_the_right_form() -> None:
    for name, card in DATASETS.items():
        assert name == card.id
        assert card.layout in LAYOUTS or name == "Phantom"
        labels = [structure.label for structure in card.structures if structure.label is not None]
        assert len(set(labels)) == len(labels) and all(label > 0 for label in labels)
        assert card.url is None or card.url.startswith(("http://", "https://"))
        assert all(number.rule in ("equal", "at least", "note") and number.cases > 0 for number in card.expected)
        for fact in (card.licence, card.citation, card.url):
            assert fact is None or fact.strip() == fact != ""


def test_rules_in_words() -> None:
    btcv = DATASETS["BTCV"]
    assert btcv.patient_rule.startswith("read from the file stem by ABD_")
    assert "val: patients 025, 026, 027; test: patients 028" in btcv.split_rule
    plain = DatasetCard("Mine", "Mine", "CT", "")
    assert "by a hash of the patient" in plain.split_rule and "--patient" in plain.patient_rule

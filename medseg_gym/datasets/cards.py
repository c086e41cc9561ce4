"""One row a dataset: id, display name, modality, region, structures, and how its patients are told apart and split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Structure:
    """What a dataset outlines, in the instruction's wording, and its value in the published label maps."""

    name: str
    label: int | None = None


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """All that is known of a dataset before its data is there. Ids hold letters, digits and dots only."""

    id: str
    title: str  # with the original punctuation
    modality: str  # as instructions word it; "" where it varies from image to image
    region: str  # as instructions word it; "" where it varies or says nothing
    layout: str = "biomedparse"  # the importer `medseg-gym data prepare` takes unless told otherwise
    structures: tuple[Structure, ...] = ()  # in label order; () where the files name them
    patient: str = ""  # regular expression over an image's file stem, groups `patient` and, for volumes, `slice`
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # patients of val and test; the others train
    notes: str = ""


def instruction(card: DatasetCard, structure: str) -> str:
    """The phrase that names the target, MedSAM-Agent's wording: "right kidney in abdomen CT"."""
    where = " ".join(part for part in (card.region, card.modality) if part)
    return f"{structure} in {where}" if where else structure


def _labels(*names: str, first: int = 1) -> tuple[Structure, ...]:
    return tuple(Structure(name, label) for label, name in enumerate(names, first))


def _by_id(cards: Iterable[DatasetCard]) -> dict[str, DatasetCard]:
    return {card.id: card for card in cards}


_ABDOMEN_AMOS = _labels(
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip

_BTCV = DatasetCard(
    "BTCV", "BTCV", "CT", "abdomen",
    layout="imis-bench",
    structures=_labels(
        "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
    ),
    patient=r"ABD_(?P<patient>\d+)_(?P<slice>\d+)",
    splits={"val": ("025", "026", "027"), "test": ("028", "029", "030", "031", "032")},
    notes="IMIS-Bench's slices lie with the spine on top; the patient's right is on the image's left.",
)  # fmt: skip

DATASETS: dict[str, DatasetCard] = _by_id((
    DatasetCard("Phantom", "Phantom", "", "", layout="", notes="Procedural; made as it is asked for."),
    # MedSAM-Agent's 21
    DatasetCard("FLARE22", "FLARE22", "CT", "abdomen", structures=_labels(
        "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
        "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
    )),
    DatasetCard("KiTS", "KiTS", "CT", "abdomen"),
    DatasetCard("LIDCIDRI", "LIDC-IDRI", "CT", "chest"),
    _BTCV,
    DatasetCard("AMOSCT", "AMOS-CT", "CT", "abdomen", structures=_ABDOMEN_AMOS),
    DatasetCard("WORD", "WORD", "CT", "abdomen"),
    DatasetCard("ACDC", "ACDC", "MRI", "heart",
                structures=_labels("right heart ventricle", "myocardium", "left heart ventricle")),
    DatasetCard("LGG", "LGG", "MRI", "brain"),
    DatasetCard("AMOSMRI", "AMOS-MRI", "MRI", "abdomen", structures=_ABDOMEN_AMOS),
    DatasetCard("CXRMask", "CXRMask", "X-Ray", "chest"),
    DatasetCard("RadiographyCOVID", "Radiography: COVID", "X-Ray", "chest"),
    DatasetCard("RadiographyLungOpacity", "Radiography: Lung_Opacity", "X-Ray", "chest"),
    DatasetCard("RadiographyNormal", "Radiography: Normal", "X-Ray", "chest"),
    DatasetCard("RadiographyViralPneumonia", "Radiography: Viral Pneumonia", "X-Ray", "chest"),
    DatasetCard("CDDCESM", "CDD-CESM", "X-Ray", "breast"),
    DatasetCard("BreastUS", "BreastUS", "ultrasound", "breast"),
    DatasetCard("LiverUS", "LiverUS", "ultrasound", "liver"),
    DatasetCard("FHPSAOP", "FH-PS-AOP", "ultrasound", "transperineal"),
    DatasetCard("REFUGE", "REFUGE", "fundus", "retinal"),
    DatasetCard("NeoPolyp", "NeoPolyp", "endoscope", "colon"),
    DatasetCard("PolypGen", "PolypGen", "endoscope", "colon"),
    # IBISAgent's further ones
    DatasetCard("CAMUS", "CAMUS", "ultrasound", "heart"),
    DatasetCard("COVID19CT", "COVID-19_CT", "CT", "chest"),
    DatasetCard("COVIDQUEx", "COVID-QU-Ex", "X-Ray", "chest"),
    DatasetCard("G1020", "G1020", "fundus", "retinal"),
    DatasetCard("GlaS", "GlaS", "pathology", "colon"),
    DatasetCard("ISIC", "ISIC", "dermoscopy", "skin"),
    DatasetCard("MMs", "M&Ms", "MRI", "heart"),
    DatasetCard("OCTCME", "OCT-CME", "OCT", "retinal"),
    DatasetCard("PanNuke", "PanNuke", "pathology", ""),
    DatasetCard("QaTaCOV19", "QaTa-COV19", "X-Ray", "chest"),
    DatasetCard("UWaterlooSkinCancer", "UWaterlooSkinCancer", "dermoscopy", "skin"),
    DatasetCard("SIIMPneumothorax", "siim-acr-pneumothorax", "X-Ray", "chest"),
    DatasetCard("MSDBrainTumour", "MSD Task01_BrainTumour", "MRI", "brain"),
    DatasetCard("MSDHeart", "MSD Task02_Heart", "MRI", "heart", structures=_labels("left heart atrium")),
    DatasetCard("MSDLiver", "MSD Task03_Liver", "CT", "abdomen", structures=_labels("liver", "liver tumor")),
    DatasetCard("MSDHippocampus", "MSD Task04_Hippocampus", "MRI", "brain",
                structures=_labels("anterior hippocampus", "posterior hippocampus")),
    DatasetCard("MSDProstate", "MSD Task05_Prostate", "MRI", "prostate"),
    DatasetCard("MSDLung", "MSD Task06_Lung", "CT", "chest", structures=_labels("lung tumor")),
    DatasetCard("MSDPancreas", "MSD Task07_Pancreas", "CT", "abdomen",
                structures=_labels("pancreas", "pancreas tumor")),
    DatasetCard("MSDHepaticVessel", "MSD Task08_HepaticVessel", "CT", "abdomen",
                structures=_labels("hepatic vessel", "liver tumor")),
    DatasetCard("MSDSpleen", "MSD Task09_Spleen", "CT", "abdomen", structures=_labels("spleen")),
    DatasetCard("MSDColon", "MSD Task10_Colon", "CT", "abdomen", structures=_labels("colon tumor")),
    DatasetCard("MeCOVQAGPlus", "MeCOVQA-G+", "", "", notes="Several modalities."),
    DatasetCard("KvasirSEG", "Kvasir-SEG", "endoscope", "colon", structures=_labels("polyp")),
    DatasetCard("CVCClinicDB", "CVC-ClinicDB", "endoscope", "colon", structures=_labels("polyp")),
    DatasetCard("DRIVE", "DRIVE", "fundus", "retinal", structures=_labels("retinal vessel")),
))  # fmt: skip

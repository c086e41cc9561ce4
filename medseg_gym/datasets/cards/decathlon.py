"""The cards of the Medical Segmentation Decathlon's ten tasks; numbers are IBISAgent's Table 11's."""

from __future__ import annotations

from medseg_gym.datasets.cards.record import DatasetCard, Expected, ibisagent, labels

LAYOUT = "nifti-msd"


def _task(
    number: int,
    name: str,
    modality: str,
    region: str,
    structures: tuple[str, ...],
    expected: tuple[Expected, ...] = (),
    notes: str = "",
) -> DatasetCard:
    return DatasetCard(
        f"MSD{name}",
        f"MSD Task{number:02}_{name}",
        modality,
        region,
        layout=LAYOUT,
        structures=labels(*structures),
        expected=expected,
        licence="CC BY-SA 4.0",
        citation="Antonelli et al., The Medical Segmentation Decathlon. Nature Communications 13 (2022), 4128; Simpson "
        "et al., arXiv:1902.09063 (2019)",
        url="http://medicaldecathlon.com",
        access="open download",
        notes=notes,
    )


def _tumor(cases: int, what: str) -> Expected:
    return ibisagent(cases, "note", f"{what}, which the other number leaves out")


CARDS = (
    _task(1, "BrainTumour", "MRI", "brain", ("edema", "non-enhancing tumor", "enhancing tumor"), (ibisagent(1_925),),
          notes="Four volumes a patient: FLAIR, T1, T1 with contrast, T2."),
    _task(2, "Heart", "MRI", "heart", ("left heart atrium",), (ibisagent(812),)),
    _task(3, "Liver", "CT", "abdomen", ("liver", "liver tumor"), (ibisagent(10_034), _tumor(546, "liver tumor"))),
    _task(4, "Hippocampus", "MRI", "brain", ("anterior hippocampus", "posterior hippocampus"), (ibisagent(319),)),
    _task(5, "Prostate", "MRI", "prostate", ("peripheral zone of prostate", "transition zone of prostate"),
          (ibisagent(204),), notes="Two volumes a patient: T2 and ADC."),
    _task(6, "Lung", "CT", "chest", ("lung tumor",), (ibisagent(299),)),
    _task(7, "Pancreas", "CT", "abdomen", ("pancreas", "pancreas tumor"),
          (ibisagent(3_586), _tumor(474, "pancreas tumor"))),
    _task(8, "HepaticVessel", "CT", "abdomen", ("hepatic vessel", "liver tumor"),
          (ibisagent(306), _tumor(53, "hepatic vessel tumor"))),
    _task(9, "Spleen", "CT", "abdomen", ("spleen",), (ibisagent(924),)),
    _task(10, "Colon", "CT", "abdomen", ("colon tumor",), (ibisagent(209),)),
)  # fmt: skip

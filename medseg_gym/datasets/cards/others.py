"""The cards of Phantom, and of datasets that neither paper lists but everyone compares on."""

from __future__ import annotations

from medseg_gym.datasets.cards.record import DatasetCard, Expected, names

PHANTOM = DatasetCard(
    "Phantom", "Phantom", "", "", layout="", licence="Apache-2.0", notes="Procedural; made as it is asked for."
)

CARDS = (
    DatasetCard(
        "KvasirSEG", "Kvasir-SEG", "endoscope", "colon", layout="png-pairs",
        structures=names("polyp"),
        expected=(Expected("its publication", 1_000),),
        licence="research and education only",
        citation="Jha et al., Kvasir-SEG: a segmented polyp dataset. MultiMedia Modeling 2020, 451-462",
        url="https://datasets.simula.no/kvasir-seg/", access="open download",
    ),
    DatasetCard(
        "CVCClinicDB", "CVC-ClinicDB", "endoscope", "colon", layout="png-pairs",
        structures=names("polyp"),
        expected=(Expected("its publication", 612),),
        licence="research and education only",
        citation="Bernal et al., WM-DOVA maps for accurate polyp highlighting in colonoscopy: validation vs. saliency "
                 "maps from physicians. Computerized Medical Imaging and Graphics 43 (2015), 99-111",
        url="https://polyp.grand-challenge.org/CVCClinicDB/",
        notes="Frames of a few video sequences; give --patient a pattern or the splits share sequences.",
    ),
    DatasetCard(
        "DRIVE", "DRIVE", "fundus", "retinal", layout="png-pairs",
        structures=names("retinal vessel"),
        expected=(Expected("its publication", 40),),
        citation="Staal et al., Ridge-based vessel segmentation in color images of the retina. IEEE Transactions on "
                 "Medical Imaging 23 (2004), 501-509",
        url="https://drive.grand-challenge.org", access="grand-challenge account",
    ),
)  # fmt: skip

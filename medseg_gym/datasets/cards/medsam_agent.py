"""The cards of MedSAM-Agent's 21 datasets, in the order of its Table 4, with the table's numbers of cases."""

from __future__ import annotations

from medseg_gym.datasets.cards.record import DatasetCard, ibisagent, labels, medsam_agent, names

_AMOS = labels(
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip
_AMOS_CITED = (
    "Ji et al., AMOS: a large-scale abdominal multi-organ benchmark for versatile medical image segmentation. NeurIPS "
    "35 (2022), 36722-36732"
)
_AMOS_URL = "https://amos22.grand-challenge.org"
_AMOS_NOTE = "Its licence is stated differently in different places; ask the source."
_RADIOGRAPHY = (
    "Chowdhury et al., Can AI help in screening viral and COVID-19 pneumonia? IEEE Access 8 (2020), 132665-132676"
)
_RADIOGRAPHY_URL = "https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database"
_RADIOGRAPHY_GROUP = "Radiography, all four parts"
_VITALE = (
    "Vitale et al., Improving realism in patient-specific abdominal ultrasound simulation using CycleGANs. "
    "International Journal of Computer Assisted Radiology and Surgery 15 (2020), 183-192"
)
_TABLE_CITES = "The citation is the one MedSAM-Agent's table gives."


def _radiography(part: str, title: str, cases: int) -> DatasetCard:
    return DatasetCard(
        f"Radiography{part}", f"Radiography: {title}", "X-Ray", "chest",
        structures=names("lung"),
        expected=(medsam_agent(cases), ibisagent(4156, "note", _RADIOGRAPHY_GROUP)),
        citation=_RADIOGRAPHY, url=_RADIOGRAPHY_URL, access="Kaggle account",
    )  # fmt: skip


CARDS = (
    DatasetCard(
        "FLARE22", "FLARE22", "CT", "abdomen",
        structures=labels(
            "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
            "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
        ),
        expected=(medsam_agent(26_802),),
        citation="Ma et al., Fast and low-GPU-memory abdomen CT organ segmentation: the FLARE challenge. Medical Image "
                 "Analysis 82 (2022), 102616",
        url="https://flare22.grand-challenge.org", access="grand-challenge account",
    ),
    DatasetCard(
        "KiTS", "KiTS", "CT", "abdomen",
        structures=labels("kidney", "kidney tumor", "kidney cyst"),
        expected=(medsam_agent(44_557), ibisagent(1_427, what="kits23")),
        licence="CC BY-NC-SA 4.0",
        citation="Heller et al., The KiTS21 challenge: automatic segmentation of kidneys, renal tumors, and renal "
                 "cysts in corticomedullary-phase CT. arXiv:2307.01984 (2023)",
        url="https://kits-challenge.org/kits23/", access="open download",
    ),
    DatasetCard(
        "LIDCIDRI", "LIDC-IDRI", "CT", "chest",
        structures=names("lung nodule"),
        expected=(medsam_agent(9_122), ibisagent(791)),
        licence="CC BY 3.0",
        citation="Armato III et al., The lung image database consortium (LIDC) and image database resource "
                 "initiative (IDRI): a completed reference database of lung nodules on CT scans. Medical Physics 38 "
                 "(2011), 915-931",
        url="https://www.cancerimagingarchive.net/collection/lidc-idri/", access="open download",
    ),
    DatasetCard(
        "BTCV", "BTCV", "CT", "abdomen",
        layout="imis-bench",
        structures=labels(
            "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
            "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland",
            "left adrenal gland",
        ),
        patient=r"ABD_(?P<patient>\d+)_(?P<slice>\d+)",
        splits={"val": ("025", "026", "027"), "test": ("028", "029", "030", "031", "032")},
        expected=(medsam_agent(12_176),),
        citation="Landman et al., MICCAI multi-atlas labeling beyond the cranial vault - workshop and challenge (2015)",
        url="https://www.synapse.org/#!Synapse:syn3193805", access="Synapse account, terms to be accepted",
        notes="IMIS-Bench's slices lie with the spine on top; the patient's right is on the image's left.",
    ),
    DatasetCard(
        "AMOSCT", "AMOS-CT", "CT", "abdomen",
        structures=_AMOS, expected=(medsam_agent(138_371), ibisagent(3_425, "note", "amos22, CT and MRI")),
        citation=_AMOS_CITED, url=_AMOS_URL, notes=_AMOS_NOTE,
    ),
    DatasetCard(
        "WORD", "WORD", "CT", "abdomen",
        structures=labels(
            "liver", "spleen", "left kidney", "right kidney", "stomach", "gallbladder", "esophagus", "pancreas",
            "duodenum", "colon", "intestine", "adrenal gland", "rectum", "bladder", "left head of femur",
            "right head of femur",
        ),
        expected=(medsam_agent(58_898),),
        citation="Luo et al., WORD: a large scale dataset, benchmark and clinical applicable study for abdominal organ "
                 "segmentation from CT image. Medical Image Analysis 82 (2022), 102642",
        url="https://github.com/HiLab-git/WORD", access="by request to its authors",
    ),
    DatasetCard(
        "ACDC", "ACDC", "MRI", "heart",
        structures=labels("right heart ventricle", "myocardium", "left heart ventricle"),
        expected=(medsam_agent(7_666), ibisagent(1_746)),
        licence="CC BY-NC-SA 4.0",
        citation="Bernard et al., Deep learning techniques for automatic MRI cardiac multi-structures segmentation and "
                 "diagnosis: is the problem solved? IEEE Transactions on Medical Imaging 37 (2018), 2514-2525",
        url="https://www.creatis.insa-lyon.fr/Challenge/acdc/", access="open download",
    ),
    DatasetCard(
        "LGG", "LGG", "MRI", "brain",
        structures=names("lower-grade glioma"),
        expected=(medsam_agent(2_542), ibisagent(910)),
        licence="CC BY-NC-SA 4.0",
        citation="Buda et al., Association of genomic subtypes of lower-grade gliomas with shape features "
                 "automatically extracted by a deep learning algorithm. Computers in Biology and Medicine 109 (2019), "
                 "218-225",
        url="https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation", access="Kaggle account",
    ),
    DatasetCard(
        "AMOSMRI", "AMOS-MRI", "MRI", "abdomen",
        structures=_AMOS, expected=(medsam_agent(52_625), ibisagent(3_425, "note", "amos22, CT and MRI")),
        citation=_AMOS_CITED, url=_AMOS_URL, notes=_AMOS_NOTE,
    ),
    DatasetCard(
        "CXRMask", "CXRMask", "X-Ray", "chest",
        structures=names("left lung", "right lung", "lung"),
        expected=(medsam_agent(1_698), ibisagent(1_509, what="CXR_Masks_and_Labels")),
        citation="Jaeger et al., Two public chest X-ray datasets for computer-aided screening of pulmonary diseases. "
                 "Quantitative Imaging in Medicine and Surgery 4 (2014), 475",
        url="https://www.kaggle.com/datasets/nikhilpandey360/chest-xray-masks-and-labels", access="Kaggle account",
    ),
    _radiography("LungOpacity", "Lung_Opacity", 6_012),
    _radiography("Normal", "Normal", 30_574),
    _radiography("ViralPneumonia", "Viral Pneumonia", 1_345),
    _radiography("COVID", "COVID", 10_844),
    DatasetCard(
        "CDDCESM", "CDD-CESM", "X-Ray", "breast",
        structures=names("breast lesion"),
        expected=(medsam_agent(1_233),),
        licence="CC BY 4.0",
        citation="Khaled et al., Categorized digital database for low energy and subtracted contrast enhanced spectral "
                 "mammography images. The Cancer Imaging Archive (2021)",
        url="https://www.cancerimagingarchive.net/collection/cdd-cesm/", access="open download",
    ),
    DatasetCard(
        "BreastUS", "BreastUS", "ultrasound", "breast",
        expected=(medsam_agent(1_294), ibisagent(596)),
        citation=_VITALE, notes=_TABLE_CITES,
    ),
    DatasetCard(
        "LiverUS", "LiverUS", "ultrasound", "liver",
        expected=(medsam_agent(39), ibisagent(29)),
        citation=_VITALE, notes=_TABLE_CITES,
    ),
    DatasetCard(
        "FHPSAOP", "FH-PS-AOP", "ultrasound", "transperineal",
        structures=labels("pubic symphysis", "fetal head"),
        expected=(medsam_agent(8_000), ibisagent(878)),
        citation="Jieyun and ZhanHong, Pubic symphysis-fetal head segmentation and angle of progression (2024)",
        url="https://ps-fh-aop-2023.grand-challenge.org",
    ),
    DatasetCard(
        "REFUGE", "REFUGE", "fundus", "retinal",
        structures=names("optic cup", "optic disc"),
        expected=(medsam_agent(2_400), ibisagent(207)),
        citation="Orlando et al., REFUGE challenge: a unified framework for evaluating automated methods for glaucoma "
                 "assessment from fundus photographs. Medical Image Analysis 59 (2020), 101570",
        url="https://refuge.grand-challenge.org", access="grand-challenge account",
    ),
    DatasetCard(
        "NeoPolyp", "NeoPolyp", "endoscope", "colon",
        structures=names("neoplastic polyp", "non-neoplastic polyp", "polyp"),
        expected=(medsam_agent(2_050), ibisagent(1_473)),
        citation="Ngoc Lan et al., NeoUNet: towards accurate colon polyp segmentation and neoplasm detection. ISVC "
                 "2021, part II, 15-28",
        url="https://www.kaggle.com/c/bkai-igh-neopolyp", access="Kaggle account",
        notes="Masks of the competition are colour-coded: red neoplastic, green non-neoplastic.",
    ),
    DatasetCard(
        "PolypGen", "PolypGen", "endoscope", "colon",
        structures=names("polyp"),
        expected=(medsam_agent(1_411), ibisagent(958)),
        citation="Ali et al., A multi-centre polyp detection and segmentation dataset for generalisability assessment. "
                 "Scientific Data 10 (2023), 75",
        url="https://doi.org/10.1038/s41597-023-01981-y",
    ),
)  # fmt: skip

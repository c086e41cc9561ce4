"""The cards of IBISAgent's further datasets, without the ten Decathlon tasks; numbers are its Table 11's."""

from __future__ import annotations

from medseg_gym.datasets.cards.record import DatasetCard, ibisagent, labels, names

CARDS = (
    DatasetCard(
        "CAMUS", "CAMUS", "ultrasound", "heart",
        structures=labels("left heart ventricle", "myocardium", "left heart atrium"),
        expected=(ibisagent(1_996),),
        licence="CC BY-NC-SA 4.0",
        citation="Leclerc et al., Deep learning for segmentation using an open large-scale dataset in 2D "
                 "echocardiography. IEEE Transactions on Medical Imaging 38 (2019), 2198-2210",
        url="https://www.creatis.insa-lyon.fr/Challenge/camus/", access="open download",
    ),
    DatasetCard("COVID19CT", "COVID-19_CT", "CT", "chest", expected=(ibisagent(224),)),
    DatasetCard(
        "COVIDQUEx", "COVID-QU-Ex", "X-Ray", "chest",
        expected=(ibisagent(1_854, what="COVID-QU_Ex"),),
        citation="Tahir et al., COVID-19 infection localization and severity grading from chest X-ray images. "
                 "Computers in Biology and Medicine 139 (2021), 105002",
        url="https://www.kaggle.com/datasets/anasmohammedtahir/covidqu", access="Kaggle account",
    ),
    DatasetCard(
        "G1020", "G1020", "fundus", "retinal",
        structures=names("optic cup", "optic disc"),
        expected=(ibisagent(265),),
        citation="Bajwa et al., G1020: a benchmark retinal fundus image dataset for computer-aided glaucoma detection. "
                 "IJCNN 2020",
    ),
    DatasetCard(
        "GlaS", "GlaS", "pathology", "colon",
        expected=(ibisagent(123),),
        licence="research, non-commercial",
        citation="Sirinukunwattana et al., Gland segmentation in colon histology images: the GlaS challenge contest. "
                 "Medical Image Analysis 35 (2017), 489-502",
        url="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/",
    ),
    DatasetCard(
        "ISIC", "ISIC", "dermoscopy", "skin",
        expected=(ibisagent(1_075),),
        url="https://challenge.isic-archive.com",
        notes="The paper does not say which year's challenge.",
    ),
    DatasetCard(
        "MMs", "M&Ms", "MRI", "heart",
        structures=labels("left heart ventricle", "myocardium", "right heart ventricle"),
        expected=(ibisagent(1_743),),
        citation="Campello et al., Multi-centre, multi-vendor and multi-disease cardiac segmentation: the M&Ms "
                 "challenge. IEEE Transactions on Medical Imaging 40 (2021), 3543-3554",
        url="https://www.ub.edu/mnms/", access="by registration",
    ),
    DatasetCard("OCTCME", "OCT-CME", "OCT", "retinal", expected=(ibisagent(205),)),
    DatasetCard(
        "PanNuke", "PanNuke", "pathology", "",
        expected=(ibisagent(1_072),),
        licence="CC BY-NC-SA 4.0",
        citation="Gamper et al., PanNuke: an open pan-cancer histology dataset for nuclei instance segmentation and "
                 "classification. European Congress on Digital Pathology 2019",
        url="https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke",
    ),
    DatasetCard(
        "QaTaCOV19", "QaTa-COV19", "X-Ray", "chest",
        expected=(ibisagent(314),),
        url="https://www.kaggle.com/datasets/aysendegerli/qatacov19-dataset", access="Kaggle account",
    ),
    DatasetCard(
        "UWaterlooSkinCancer", "UWaterlooSkinCancer", "dermoscopy", "skin",
        expected=(ibisagent(227),),
        url="https://uwaterloo.ca/vision-image-processing-lab/research-demos/skin-cancer-detection",
    ),
    DatasetCard(
        "SIIMPneumothorax", "siim-acr-pneumothorax", "X-Ray", "chest",
        structures=names("pneumothorax"),
        expected=(ibisagent(252),),
        url="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation", access="Kaggle account",
    ),
)  # fmt: skip

MECOVQA = DatasetCard(
    "MeCOVQAGPlus", "MeCOVQA-G+", "", "",
    citation="Huang et al., Towards a multimodal large language model with pixel-level insight for biomedicine. AAAI "
             "39 (2025), for MeCoVQA-G; re-annotated and extended as MeCOVQA-G+ with Citrus-V (Wang et al., 2025)",
    notes="Several modalities. IBISAgent's test set: about 3,000 samples of X-ray, CT, MRI, ultrasound and endoscopy.",
)  # fmt: skip

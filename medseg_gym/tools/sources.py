"""Where each tool's weights come from: repository, revision, file, checksum, licence; no address is tried but these."""

from __future__ import annotations

import os
from dataclasses import dataclass

from medseg_gym.errors import WeightsMissingError, unknown
from medseg_gym.tools.cards import TOOLS

HUB = "https://huggingface.co"  # $HF_ENDPOINT names a mirror instead
META = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint file in its authors' own format, at a revision that cannot change."""

    repository: str
    revision: str  # a commit or a record number
    file: str
    size: int  # bytes; 0 where it is not known
    checksum: str  # "sha256:" or "md5:" and hex digits, as published; the file is refused if it has another
    licence: str
    places: tuple[str, ...]  # addresses of the same file, tried in order; empty: it can only be fetched by hand
    note: str = ""

    @property
    def urls(self) -> tuple[str, ...]:
        """The places, with the hub's address or its mirror filled in."""
        return tuple(
            place.replace("{hub}", os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB) for place in self.places
        )


def _hub(repository: str, revision: str, file: str, size: int, sha256: str, licence: str, *also: str) -> Source:
    place = f"{{hub}}/{repository}/resolve/{revision}/{file}"
    return Source(repository, revision, file, size, f"sha256:{sha256}", licence, (place, *also))


def _sam21(size: str, revision: str, file_size: int, sha256: str) -> Source:
    file = f"sam2.1_hiera_{size.replace('-', '_')}.pt"
    also = f"{META}/segment_anything_2/092824/{file}"
    return _hub(f"facebook/sam2.1-hiera-{size}", revision, file, file_size, sha256, "Apache-2.0", also)


def _sam(file: str, size: int, sha256: str) -> Source:
    place = f"{META}/segment_anything/{file}"
    # the authors' server has no revisions; the name ends in the first digits of the file's MD5
    return Source("facebookresearch/segment-anything", "v1", file, size, f"sha256:{sha256}", "Apache-2.0", (place,))


# Checksums are those that projects pinning these files publish independently of one another; the sizes likewise.
SOURCES: dict[str, Source] = {
    "SAM2.1T": _sam21(
        "tiny",
        "de431c4043854a71d8101e17995dfe596bf101a5",
        156008466,
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    ),
    "SAM2.1S": _sam21(
        "small",
        "ee5bba1d82bb8749febdf90f45e84b687142ba03",
        184416285,
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    ),
    "SAM2.1BPlus": _sam21(
        "base-plus",
        "b7320756a13354e7530a63935656d35b2f91a290",
        323606802,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    "SAM2.1L": _sam21(
        "large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        898083611,
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    ),
    "MedSAM2": _hub(
        "wanglab/MedSAM2",
        "e4a6f35edd7e091619cbc0750f462f1574e23955",
        "MedSAM2_latest.pt",
        156040129,
        "c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060",
        "for research and education (its model card; CC-BY-SA-4.0 in the metadata)",
    ),
    "SAMB": _sam(
        "sam_vit_b_01ec64.pth",
        375042383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "SAML": _sam(
        "sam_vit_l_0b3195.pth",
        1249524607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "SAMH": _sam(
        "sam_vit_h_4b8939.pth",
        2564550879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "MedSAM": Source(
        "zenodo.org",
        "10689643",
        "medsam_vit_b.pth",
        0,
        "md5:3bb6db55bd0c9ca30b61248bca72f8d6",  # the record's own; it publishes no sha256
        "CC-BY-4.0",
        ("https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",),
    ),
    "IMISNet": Source(
        "uni-medical/IMIS-Bench",
        "",
        "IMISNet-B.pth",
        0,
        "",
        "as on its authors' page",
        (),
        note="its authors give IMISNet-B.pth through a cloud drive that only a browser can open; the link stands under "
        '"Model Checkpoints" at https://github.com/uni-medical/IMIS-Bench',
    ),
}


def source_of(tool: str) -> Source:
    """Where a tool's weights come from; a tool without weights of its own raises WeightsMissingError."""
    if tool not in TOOLS:
        raise unknown("tool", tool, TOOLS)
    if tool not in SOURCES:
        raise WeightsMissingError(f"{tool} needs no weights from elsewhere; it runs as it is")
    return SOURCES[tool]

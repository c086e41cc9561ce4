"""The catalogue of tools: one card each, cheap to read; nothing heavy is imported until a tool is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCard:
    """One row of the catalogue."""

    id: str  # the tool's part of an env id
    title: str
    factory: str  # "module:callable" whose keywords are the tool's options; empty while there is no runtime yet
    weights: bool  # whether it needs weights on this machine
    summary: str
    licence: str = ""  # of the weights, where they come with the package


_SAM = "medseg_gym.tools.sam"
_SAM2 = "medseg_gym.tools.sam2"

_CARDS = (
    ToolCard("SAM2.1T", "SAM 2.1 tiny", f"{_SAM2}:load_sam21_tiny", True, "SAM 2.1, Hiera-T encoder, 1024x1024"),
    ToolCard("SAM2.1S", "SAM 2.1 small", f"{_SAM2}:load_sam21_small", True, "SAM 2.1, Hiera-S encoder, 1024x1024"),
    ToolCard("SAM2.1BPlus", "SAM 2.1 base+", f"{_SAM2}:load_sam21_base", True, "SAM 2.1, Hiera-B+ encoder, 1024x1024"),
    ToolCard("SAM2.1L", "SAM 2.1 large", f"{_SAM2}:load_sam21_large", True, "SAM 2.1, Hiera-L encoder, 1024x1024"),
    ToolCard("MedSAM2", "MedSAM2", f"{_SAM2}:load_medsam2", True, "SAM 2.1 tiny tuned on medical images, 512x512"),
    ToolCard("SAMB", "SAM ViT-B", f"{_SAM}:load_sam_base", True, "Segment Anything with the ViT-B encoder, 1024x1024"),
    ToolCard("SAML", "SAM ViT-L", f"{_SAM}:load_sam_large", True, "Segment Anything with the ViT-L encoder, 1024x1024"),
    ToolCard("SAMH", "SAM ViT-H", f"{_SAM}:load_sam_huge", True, "Segment Anything with the ViT-H encoder, 1024x1024"),
    ToolCard("MedSAM", "MedSAM", f"{_SAM}:load_medsam", True, "SAM ViT-B tuned on medical images; takes boxes"),
    ToolCard(
        "IMISNet",
        "IMIS-Net",
        "medseg_gym.tools.imisnet:load_imisnet",
        True,
        "SAM ViT-B tuned for interactive medical segmentation, 1024x1024",
    ),
    ToolCard(
        "Nano",
        "Nano",
        "medseg_gym.tools.nano:Nano",
        False,  # they come with the package
        "the embedded default: a promptable model small enough for the wheel",
        licence="weights for non-commercial research only (tools/nano_weights/NANO.md); code Apache-2.0",
    ),
    ToolCard("GrabCut", "GrabCut", "medseg_gym.tools.grabcut:GrabCut", False, "classical graph cuts; no weights"),
    ToolCard("Stub", "Stub", "medseg_gym.tools.stub:Stub", False, "discs and rectangles, checkable by hand; for tests"),
)

TOOLS: dict[str, ToolCard] = {card.id: card for card in _CARDS}

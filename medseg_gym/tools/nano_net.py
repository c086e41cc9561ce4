"""Nano's network: a residual U-Net over one window, from image and prompt maps to mask logits and predicted IoU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg_gym.tools.nano_maps import CHANNELS

WIDTHS = (24, 40, 80, 128)


class NanoNet(nn.Module):
    """(B, CHANNELS, S, S) -> logits (B, S, S) and predicted IoU (B,) in [0, 1]. S is a multiple of 16.

    Encoder at strides 2, 4, 8, 16 with `widths` channels; skips are added, not joined, which keeps the decoder light.
    """

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS, channels: int = CHANNELS) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = _conv_norm(channels, a, 3, 2)
        self.encode1 = Block(a)
        self.down2, self.encode2 = _conv_norm(a, b, 3, 2), nn.Sequential(Block(b), Block(b))
        self.down3, self.encode3 = _conv_norm(b, c, 3, 2), nn.Sequential(Block(c), Block(c))
        self.down4, self.encode4 = _conv_norm(c, d, 3, 2), nn.Sequential(Block(d), Context(d), Block(d))
        self.up3, self.decode3 = nn.Conv2d(d, c, 1), Block(c)
        self.up2, self.decode2 = nn.Conv2d(c, b, 1), Block(b)
        self.up1, self.decode1 = nn.Conv2d(b, a, 1), Block(a)
        self.head = nn.Conv2d(a, 4, 3, padding=1)
        self.quality = nn.Sequential(nn.Linear(d + a, 64), nn.ReLU(), nn.Linear(64, 1))
        nn.init.constant_(self.head.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e1 = self.encode1(self.stem(x))
        e2 = self.encode2(self.down2(e1))
        e3 = self.encode3(self.down3(e2))
        e4 = self.encode4(self.down4(e3))
        y = self.decode3(_upsampled(self.up3(e4)) + e3)
        y = self.decode2(_upsampled(self.up2(y)) + e2)
        y = self.decode1(_upsampled(self.up1(y)) + e1)
        logits = F.pixel_shuffle(self.head(y), 2)[:, 0]
        pooled = torch.cat([e4.mean((2, 3)), y.mean((2, 3))], 1)
        return logits, torch.sigmoid(self.quality(pooled))[:, 0]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv_norm(width, width, 3, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)
        nn.init.zeros_(self.norm.weight)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class Context(nn.Module):
    """Adds to every position what the mean over the window says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.mean((2, 3)))[:, :, None, None]


def _conv_norm(inside: int, outside: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, outside), nn.ReLU(inplace=True))


def _upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

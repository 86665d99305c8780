"""PiDiNet, the edge detector behind T2I-Adapter's sketches (Su et al. 2021): the network of `table5_pidinet.pth`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from masafusion_lab import InputError

KINDS = ("central", "angular", "radial", "plain")
"""The pixel differences of the layers in turn, the first convolution being layer 0: "carv4"."""
PLANES = (60, 120, 240, 240)
"""Channels of the four stages."""
RING = (3, 0, 1, 6, 4, 2, 7, 8, 5)
"""Of 3x3 pixels, row by row: the neighbour on the ring around the middle whose weight is taken from a pixel's."""
OUTER = (0, 2, 4, 10, 14, 20, 22, 24)
INNER = (6, 7, 8, 11, 13, 16, 17, 18)
"""Of 5x5 pixels: both ends of the eight radii, the inner one beside the middle."""


class Block(nn.Module):
    """Depthwise pixel differences, a pointwise convolution, and a shortcut; halves its input if the width changes."""

    def __init__(self, inside: int, outside: int, halve: bool, kernel: int) -> None:
        super().__init__()
        self.halve = halve
        self.conv1 = nn.Conv2d(inside, inside, kernel, padding=kernel // 2, groups=inside, bias=False)
        self.conv2 = nn.Conv2d(inside, outside, 1, bias=False)
        if halve:
            self.shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) to (B, outside, h, w), or half of that height and width."""
        x = F.max_pool2d(x, 2) if self.halve else x
        return self.conv2(self.conv1(x).relu()) + (self.shortcut(x) if self.halve else x)


class Dilations(nn.Module):
    """CDCM: the sum of four dilated convolutions, to see a wider neighbourhood."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1)
        self.conv2_1, self.conv2_2, self.conv2_3, self.conv2_4 = (
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False) for dilation in (5, 7, 9, 11)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) to (B, width, h, w)."""
        x = self.conv1(x.relu())
        return self.conv2_1(x) + self.conv2_2(x) + self.conv2_3(x) + self.conv2_4(x)


class Attention(nn.Module):
    """CSAM: each pixel's features times one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        return x * self.conv2(self.conv1(x.relu())).sigmoid()


class Reduce(nn.Module):
    """The edge map of one scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, 1, h, w)."""
        return self.conv(x)


class PiDiNet(nn.Module):
    """Four stages of four layers, an edge map of each, and their mixture; pixel differences are folded into kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.init_block = nn.Conv2d(3, PLANES[0], 3, padding=1, bias=False)
        width = PLANES[0]
        for layer in range(1, 16):
            stage, place = divmod(layer, 4)
            kernel = 5 if KINDS[place] == "radial" else 3
            self.add_module(_name(layer), Block(width, PLANES[stage], halve=place == 0, kernel=kernel))
            width = PLANES[stage]
        self.dilations = nn.ModuleList(Dilations(width, 24) for width in PLANES)
        self.attentions = nn.ModuleList(Attention(24) for _ in PLANES)
        self.conv_reduces = nn.ModuleList(Reduce(24) for _ in PLANES)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The probability of an edge (B, 1, H, W) at each pixel of RGB pictures (B, 3, H, W) in [0, 1], H, W >= 8."""
        size, edges = x.shape[-2:], []
        x = self.init_block(x)
        for stage in range(4):
            for layer in range(max(1, 4 * stage), 4 * stage + 4):
                x = self.get_submodule(_name(layer))(x)
            edge = self.conv_reduces[stage](self.attentions[stage](self.dilations[stage](x)))
            edges.append(F.interpolate(edge, size, mode="bilinear", align_corners=False))
        return self.classifier(torch.cat(edges, 1)).sigmoid()


def _name(layer: int) -> str:
    """What the checkpoint calls block `layer`, 1 to 15; the first convolution is layer 0 and a third of its stage."""
    stage, place = divmod(layer, 4)
    return f"block{stage + 1}_{place + (stage > 0)}"


def fold(kind: str, w: Tensor) -> Tensor:
    """The kernel (out, in, k, k) whose plain convolution is that of `w` (out, in, 3, 3) over pixel differences."""
    flat = w.flatten(2)
    if kind == "central":  # each pixel less the middle one
        flat = flat.clone()
        flat[:, :, 4] -= w.sum((2, 3))
    elif kind == "angular":  # each pixel less its neighbour on the ring
        flat = flat - flat[:, :, RING]
    elif kind == "radial":  # the outer less the inner end of each radius; the first weight is not used
        flat, radii = flat.new_zeros(*flat.shape[:2], 25), flat[:, :, 1:]
        flat[:, :, OUTER], flat[:, :, INNER] = radii, -radii
    side = int(flat.shape[-1] ** 0.5)
    return flat.unflatten(2, (side, side))


def load(path: Path) -> PiDiNet:
    """The network of a published `table5_pidinet.pth`, read without running code; InputError for any other file."""
    if not path.is_file():
        raise InputError(f"pidinet={path}: no such file; give the table5_pidinet.pth of github.com/zhuoinoulu/pidinet")
    net = PiDiNet()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        for layer in range(16):
            key = f"{_name(layer)}.conv1.weight" if layer else "init_block.weight"
            state[key] = fold(KINDS[layer % 4], state[key])
        net.load_state_dict(state)
    except Exception:
        raise InputError(
            f"pidinet={path}: truncated or of another network; give the published table5_pidinet.pth"
        ) from None
    return net.requires_grad_(False).eval()


def sketch(image: Image.Image, weights: Path | None) -> Image.Image:
    """Outlines, white on black, mode L: PiDiNet's fused map, seen at the area of 512x512 pixels, above one half.

    `weights`: the file table5_pidinet.pth. Raises InputError if it is not given or is another file.
    """
    if weights is None:
        raise InputError(
            "sketch=auto needs the weights of PiDiNet: give pidinet=FILE, the table5_pidinet.pth of "
            "github.com/zhuoinoulu/pidinet, or sketch=FILE; canny=auto needs none"
        )
    net = load(weights)
    scale = 512 / (image.width * image.height) ** 0.5
    width, height = (max(8, round(side * scale / 8) * 8) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    with torch.inference_mode():
        edges = net(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255)
        edges = F.interpolate(edges, image.size[::-1], mode="bilinear", antialias=True)
    return Image.fromarray((edges[0, 0] > 0.5).numpy() * np.uint8(255))

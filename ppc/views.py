"""The target view: a transformed copy of the source view, and the same transformation for maps of the source.

Shapes: N images, C channels, H W input pixels, h w a grid. A transformation is a resize (bilinear, corners aligned), a
mirror, and a rotation with a shift, in this order; each is exact identity when it is off (METHOD 1.1, paper Table 7).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Warp:
    """Mirror, rotation and shift of each image; None where no image has one."""

    flip_N: Tensor | None
    affine_N23: Tensor | None

    def grid_valid(self, h: int, w: int, like: Tensor) -> Tensor | None:
        """Cells of an h x w grid whose source lies inside the source view, (N,h,w) bool; None when all do."""
        if self.affine_N23 is None:
            return None
        theta = self.affine_N23.to(like)
        grid_NHW2 = F.affine_grid(theta, [len(theta), 1, h, w], align_corners=True)
        return grid_NHW2.abs().amax(-1) <= 1 + 1e-6

    def apply(self, x_NCHW: Tensor) -> Tensor:
        """The mirrored, rotated and shifted copy; what comes from outside is 0."""
        if self.flip_N is not None:
            x_NCHW = torch.where(self.flip_N.to(x_NCHW.device)[:, None, None, None], x_NCHW.flip(-1), x_NCHW)
        if self.affine_N23 is not None:
            grid = F.affine_grid(self.affine_N23.to(x_NCHW), list(x_NCHW.shape), align_corners=True)
            x_NCHW = F.grid_sample(x_NCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return x_NCHW


def draw_warp(seeds_N: Sequence[int], *, size_px: int, flip: bool, rotate_deg: float, translate_px: int) -> Warp:
    """Draw each image's mirror, rotation and shift from its own seed alone.

    `size_px` is the side of the target view: shifts are in its pixels.
    """
    flips, thetas = [], []
    for seed in seeds_N:
        rng = random.Random(seed)
        flips.append(rng.random() < 0.5)
        angle = math.radians(rng.uniform(-rotate_deg, rotate_deg))
        shift = [2 * rng.uniform(-translate_px, translate_px) / max(size_px - 1, 1) for _ in range(2)]
        cos, sin = math.cos(angle), math.sin(angle)
        thetas.append([[cos, -sin, shift[0]], [sin, cos, shift[1]]])
    moved = rotate_deg > 0 or translate_px > 0
    return Warp(
        torch.tensor(flips) if flip else None,
        torch.tensor(thetas, dtype=torch.float64) if moved else None,
    )

"""Bilinear resizing with aligned corners, the one kind that the nets and losses use (`resize_ac` in METHOD).

Shapes: N images, C channels, h w and H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x_NChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized to `size`, (H, W); the input itself when its size is already right."""
    if tuple(x_NChw.shape[-2:]) == tuple(size):
        return x_NChw
    return F.interpolate(x_NChw, size, mode="bilinear", align_corners=True)


def resized_mean(x_NChw: Tensor, size: tuple[int, int]) -> Tensor:
    """The spatial mean (N, C) of `resize(x_NChw, size)`, without making it: a weighted mean, resizing being linear."""
    if tuple(x_NChw.shape[-2:]) == tuple(size):
        return x_NChw.mean(dim=(2, 3))
    row_h, column_w = (
        resize(torch.eye(n, dtype=x_NChw.dtype, device=x_NChw.device)[None, None], (pixels, n))[0, 0].mean(dim=0)
        for n, pixels in zip(x_NChw.shape[-2:], size, strict=True)
    )
    return (x_NChw @ column_w) @ row_h

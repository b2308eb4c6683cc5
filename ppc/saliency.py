"""The saliency loss of EPS: maps of classes, put together, have to give the saliency map (METHOD 5).

Shapes: N local images, K foreground classes, C = K+1 channels, H W the size of the saliency map, h w that of the maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PER_PIXEL = 1e-4  # in the overlap's denominator, for each pixel


class SaliencyMaps(NamedTuple):
    """Both halves of the estimated saliency: present classes on salient ground, and what the others leave."""

    fg_Nhw: Tensor
    bg_Nhw: Tensor


def saliency_maps(
    prob_NChw: Tensor,
    saliency_Nhw: Tensor,
    label_NK: Tensor,
    *,
    overlap_from: float,
    bg_channel: int,
    valid_Nhw: Tensor | None = None,
) -> SaliencyMaps:
    """Sum up the classes of either side. A present class is on the salient side when more than `overlap_from` (tau) of
    the pixels where it has more than one half are salient, else on the background's, where the background always is.

    `prob_NChw` is a softmax over the C channels, the saliency is within [0, 1]. Which side a class is on has no
    gradient. Cells that are False in `valid_Nhw` have no say in it.
    """
    C = prob_NChw.shape[1]
    if label_NK.shape[1] != C - 1:
        raise ValueError(f"expected labels of {C - 1} classes for {C} channels, got {label_NK.shape[1]}")
    with torch.no_grad():
        counted_N1hw = 1 if valid_Nhw is None else valid_Nhw.to(prob_NChw)[:, None]
        own_NChw, salient_N1hw = prob_NChw.round(), saliency_Nhw.round()[:, None]
        inside_NC = (own_NChw * salient_N1hw * counted_N1hw).sum(dim=(2, 3))
        overlap_NC = inside_NC / ((own_NChw + PER_PIXEL) * counted_N1hw).sum(dim=(2, 3)).clamp(min=PER_PIXEL)
        fg = [c for c in range(C) if c != bg_channel % C]
        present_NK, salient_NK = label_NK > 0, overlap_NC[:, fg] > overlap_from
        fg_side_NC, bg_side_NC = (torch.zeros_like(overlap_NC) for _ in range(2))
        fg_side_NC[:, fg] = (present_NK & salient_NK).to(overlap_NC)
        bg_side_NC[:, fg] = (present_NK & ~salient_NK).to(overlap_NC)
        bg_side_NC[:, bg_channel] = 1
    fg_Nhw = (prob_NChw * fg_side_NC[:, :, None, None]).sum(dim=1)
    return SaliencyMaps(fg_Nhw, 1 - (prob_NChw * bg_side_NC[:, :, None, None]).sum(dim=1))


def saliency_loss(
    cam_NChw: Tensor,
    saliency_N1HW: Tensor,
    label_NK: Tensor,
    *,
    overlap_from: float,
    fg_weight: float,
    bg_channel: int,
    num_images_global: int,
    valid_Nhw: Tensor | None = None,
) -> Tensor:
    """Mean square gap between the saliency and its estimate, this worker's share of it (METHOD 5).

    `cam_NChw` are the class logits, background among them; the saliency map is brought to their size by its nearest
    pixels. `fg_weight` (lambda) weighs the salient classes' half of the estimate against that of the background's. An
    image's mean is over its cells that are True in `valid_Nhw`.
    """
    saliency_Nhw = F.interpolate(saliency_N1HW, cam_NChw.shape[2:], mode="nearest")[:, 0].to(cam_NChw)
    maps = saliency_maps(
        cam_NChw.softmax(dim=1),
        saliency_Nhw,
        label_NK,
        overlap_from=overlap_from,
        bg_channel=bg_channel,
        valid_Nhw=valid_Nhw,
    )
    estimate_Nhw = fg_weight * maps.fg_Nhw + (1 - fg_weight) * maps.bg_Nhw
    gap_Nhw = (estimate_Nhw - saliency_Nhw).square()
    if valid_Nhw is None:
        return gap_Nhw.mean(dim=(1, 2)).sum() / num_images_global
    weight_Nhw = valid_Nhw.to(gap_Nhw)
    per_image_N = (gap_Nhw * weight_Nhw).sum(dim=(1, 2)) / weight_Nhw.sum(dim=(1, 2)).clamp(min=1)
    return per_image_N.sum() / num_images_global

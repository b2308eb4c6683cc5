"""Classification and SEAM losses: one pure function each, and SEAM's four terms together (METHOD 3, 4.2).

Shapes: N local images, K foreground classes, C = K+1 channels with background, H W pixels, h w the grid of the target
view. Each loss is a sum over the local images divided by `num_images_global`, the images of all workers: the sum over
workers is the value that one worker would get. Maps come in float32 or float64, outside autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppc.cam import fill_background, foreground, max_norm, one_hot_max

MIN_POOL_DIVISOR = 4  # the quarter of the pixels with the lowest response
ECR_TOP_SHARE = 0.2  # the fifth of an image's entries with the largest gap


class ViewMaps(NamedTuple):
    """What SEAM's net returns for one view, at any size: the CAM and its PCM-refined form."""

    cam_NCHW: Tensor
    refined_NCHW: Tensor


def classification_loss(logit_NK: Tensor, label_NK: Tensor, *, num_images_global: int) -> Tensor:
    """Multi-label soft margin: binary cross-entropy of the logits, mean over images and classes (METHOD 3)."""
    total = F.binary_cross_entropy_with_logits(logit_NK, label_NK.to(logit_NK), reduction="sum")
    return total / (num_images_global * logit_NK.shape[1])


def min_pool_loss(refined_NKHW: Tensor, *, num_images_global: int) -> Tensor:
    """Mean response of the quarter of each image's pixels that respond least (METHOD 4.2; only in SEAM's code).

    `refined_NKHW` is the refined CAM without background, times the image labels.
    """
    top_NP = refined_NKHW.amax(dim=1).flatten(1)
    k = top_NP.shape[1] // MIN_POOL_DIVISOR
    return F.relu(top_NP.topk(k, dim=1, largest=False, sorted=False).values).sum() / (k * num_images_global)


def er_loss(source_NKhw: Tensor, target_NKhw: Tensor, *, num_images_global: int, valid_Nhw: Tensor | None) -> Tensor:
    """SEAM's equivariant regularisation: mean gap between the views' foreground maps (METHOD 4.2).

    Cells that are False in `valid_Nhw` take no part: an image's mean is over its valid cells, then over the images.
    """
    gap_Nhw = (source_NKhw - target_NKhw).abs().mean(dim=1)
    if valid_Nhw is None:
        return gap_Nhw.mean(dim=(1, 2)).sum() / num_images_global
    weight_Nhw = valid_Nhw.to(gap_Nhw)
    per_image_N = (gap_Nhw * weight_Nhw).sum(dim=(1, 2)) / weight_Nhw.sum(dim=(1, 2)).clamp(min=1)
    return per_image_N.sum() / num_images_global


def ecr_loss(one_hot_NChw: Tensor, refined_NChw: Tensor, *, num_images_global: int, valid_Nhw: Tensor | None) -> Tensor:
    """SEAM's equivariant cross regularisation, one direction: mean of an image's largest gaps (METHOD 4.2).

    `one_hot_NChw` is one view's CAM, detached; `refined_NChw` the other's refined CAM. The fifth is taken of an image's
    entries in valid cells, and so is its mean; then the mean over the images.
    """
    gap_NChw = (one_hot_NChw - refined_NChw).abs()
    total = gap_NChw.new_zeros(())
    for index, gap_Chw in enumerate(gap_NChw):
        entries = gap_Chw.flatten() if valid_Nhw is None else gap_Chw[:, valid_Nhw[index]].flatten()
        k = int(len(entries) * ECR_TOP_SHARE)
        total = total + entries.topk(k, sorted=False).values.sum() / max(k, 1)  # no valid cell: no part in the loss
    return total / num_images_global


def with_background_label(label_NK: Tensor, *, bg_channel: int = 0) -> Tensor:
    """The image labels (N,C) with the 1 of the background, which every image has."""
    ones_N1 = torch.ones_like(label_NK[:, :1])
    return torch.cat([label_NK[:, :bg_channel], ones_N1, label_NK[:, bg_channel:]], dim=1)


def seam_losses(
    source: ViewMaps,
    target: ViewMaps,
    label_NK: Tensor,
    *,
    to_target: Callable[[Tensor], Tensor],
    num_images_global: int,
    valid_Nhw: Tensor | None,
    bg_channel: int = 0,
    keep_channel: int = 0,
) -> dict[str, Tensor]:
    """SEAM's terms `cls`, `min_pool`, `er` and `ecr`; L_SEAM is their sum (METHOD 4.2).

    `to_target` takes a map of the source view to the target's grid: a resize with aligned corners, then the view's
    transformation. `keep_channel` is the channel that the one-hot leaves alone: the background (see `one_hot_max`).
    """
    y_NC11 = with_background_label(label_NK, bg_channel=bg_channel).to(source.cam_NCHW)[:, :, None, None]

    def view_terms(view: ViewMaps) -> tuple[Tensor, Tensor]:
        logit_NK = foreground(view.cam_NCHW.mean(dim=(2, 3))[..., None], bg_channel=bg_channel)[..., 0]
        cls = classification_loss(logit_NK, label_NK, num_images_global=num_images_global)
        present_NKHW = foreground(view.refined_NCHW * y_NC11, bg_channel=bg_channel)
        return cls, min_pool_loss(present_NKHW, num_images_global=num_images_global)

    def one_hot(cam_NChw: Tensor) -> Tensor:
        return one_hot_max(fill_background(cam_NChw.detach(), bg_channel=bg_channel), keep_channel=keep_channel)

    cls_s, min_pool_s = view_terms(source)
    cls_t, min_pool_t = view_terms(target)
    cam_s, cam_t = to_target(max_norm(source.cam_NCHW)) * y_NC11, max_norm(target.cam_NCHW) * y_NC11
    refined_s, refined_t = to_target(max_norm(source.refined_NCHW)) * y_NC11, max_norm(target.refined_NCHW) * y_NC11
    fg_s, fg_t = foreground(cam_s, bg_channel=bg_channel), foreground(cam_t, bg_channel=bg_channel)
    ecr_s = ecr_loss(one_hot(cam_t), refined_s, num_images_global=num_images_global, valid_Nhw=valid_Nhw)
    ecr_t = ecr_loss(one_hot(cam_s), refined_t, num_images_global=num_images_global, valid_Nhw=valid_Nhw)
    return {
        "cls": (cls_s + cls_t) / 2,
        "min_pool": (min_pool_s + min_pool_t) / 2,
        "er": er_loss(fg_s, fg_t, num_images_global=num_images_global, valid_Nhw=valid_Nhw),
        "ecr": ecr_s + ecr_t,  # a sum, unlike the halves above
    }

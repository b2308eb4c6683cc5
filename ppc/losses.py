"""Classification and SEAM losses: one pure function each, and SEAM's four terms together (METHOD 3, 4.2).

Shapes: N local images, K foreground classes, C = K+1 channels with background, P those of them that images show, H W
pixels, h w a grid. Each loss is a sum over the local images divided by `num_images_global`, the images of all workers:
the sum over workers is the value that one worker would get. Maps come in float32 or float64, outside autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppc.cam import fill_background, foreground, max_norm, one_hot_max
from ppc.resizing import resize, resized_mean

MIN_POOL_DIVISOR = 4  # the quarter of the pixels with the lowest response
ECR_TOP_SHARE = 0.2  # the fifth of an image's entries with the largest gap


class ViewMaps(NamedTuple):
    """What SEAM's net returns for one view, the CAM and its PCM-refined form, and the size that its losses look at."""

    cam_NChw: Tensor
    refined_NChw: Tensor
    size: tuple[int, int]  # (H, W)


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


def er_loss(
    source_NPhw: Tensor, target_NPhw: Tensor, *, num_classes: int, num_images_global: int, valid_Nhw: Tensor | None
) -> Tensor:
    """SEAM's equivariant regularisation: mean gap between the views' foreground maps (METHOD 4.2).

    The mean is over all `num_classes`; classes that are 0 in both views may be left out of the maps. Cells that are
    False in `valid_Nhw` take no part: an image's mean is over its valid cells, then over the images.
    """
    gap_Nhw = (source_NPhw - target_NPhw).abs().sum(dim=1) / num_classes
    if valid_Nhw is None:
        return gap_Nhw.mean(dim=(1, 2)).sum() / num_images_global
    weight_Nhw = valid_Nhw.to(gap_Nhw)
    per_image_N = (gap_Nhw * weight_Nhw).sum(dim=(1, 2)) / weight_Nhw.sum(dim=(1, 2)).clamp(min=1)
    return per_image_N.sum() / num_images_global


def ecr_loss(
    one_hot_NPhw: Tensor, refined_NPhw: Tensor, *, num_channels: int, num_images_global: int, valid_Nhw: Tensor | None
) -> Tensor:
    """SEAM's equivariant cross regularisation, one direction: mean of an image's largest gaps (METHOD 4.2).

    `one_hot_NPhw` is one view's CAM, detached; `refined_NPhw` the other's refined CAM. The fifth is taken of an image's
    entries in valid cells, and so is its mean; then the mean over the images. Entries of all `num_channels` count;
    channels that are 0 in both maps may be left out of them, since a gap of 0 adds nothing.
    """
    gap_NPhw = (one_hot_NPhw - refined_NPhw).abs()
    total = gap_NPhw.new_zeros(())
    for index, gap_Phw in enumerate(gap_NPhw):
        entries_PE = gap_Phw.flatten(1) if valid_Nhw is None else gap_Phw[:, valid_Nhw[index]]
        k = int(num_channels * entries_PE.shape[1] * ECR_TOP_SHARE)
        largest = entries_PE.flatten().topk(min(k, entries_PE.numel()), sorted=False).values
        total = total + largest.sum() / max(k, 1)  # no valid cell: no part in the loss
    return total / num_images_global


def with_background_label(label_NK: Tensor, *, bg_channel: int = 0) -> Tensor:
    """The image labels (N,C) with the 1 of the background, which every image has."""
    ones_N1 = torch.ones_like(label_NK[:, :1])
    return torch.cat([label_NK[:, :bg_channel], ones_N1, label_NK[:, bg_channel:]], dim=1)


def shown_channels(label_NC: Tensor, *, first: Sequence[int], max_tags: int | None = None) -> tuple[Tensor, Tensor]:
    """Channels (N,P) that are not 0 once maps are multiplied by the labels, and their labels (N,P).

    `first` come first, in this order, present or not; then the classes of the image; then, up to the width of the
    batch, classes that it has not. `max_tags` is the most classes of one image: None counts, which makes a GPU wait.
    """
    most = int(label_NC.sum(dim=1).max()) if max_tags is None else max_tags + 1
    priority_NC = label_NC.clone()
    for place, channel in enumerate(first):
        priority_NC[:, channel] = len(first) + 1 - place
    order_NC = priority_NC.argsort(dim=1, descending=True, stable=True)
    channels_NP = order_NC[:, : len(first) + max(most - 1, 1)]
    return channels_NP, label_NC.gather(1, channels_NP)


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
    max_tags: int | None = None,
) -> dict[str, Tensor]:
    """SEAM's terms `cls`, `min_pool`, `er` and `ecr`; L_SEAM is their sum (METHOD 4.2).

    `to_target` takes a map of the source view's size to the target's: a resize with aligned corners, then the view's
    transformation. `keep_channel` is the channel that the one-hot leaves alone: the background (see `one_hot_max`).

    But for `cls` the terms see maps times the image labels, and absent classes are exact zeros in all of them. So maps
    are brought to full size for the background and the classes of each image alone: a few channels of the 21.
    `max_tags` as in `shown_channels`.
    """
    y_NC = with_background_label(label_NK, bg_channel=bg_channel).to(source.cam_NChw)
    first = [bg_channel] if keep_channel == bg_channel else [bg_channel, keep_channel]
    channels_NP, y_NP = shown_channels(y_NC, first=first, max_tags=max_tags)
    y_NP11, keep = y_NP[:, :, None, None], len(first) - 1  # from here on background is channel 0

    def cls(view: ViewMaps) -> Tensor:
        logit_NK = foreground(resized_mean(view.cam_NChw, view.size)[..., None], bg_channel=bg_channel)[..., 0]
        return classification_loss(logit_NK, label_NK, num_images_global=num_images_global)

    def shown(map_NChw: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(map_NChw.take_along_dim(channels_NP[:, :, None, None], dim=1), size)

    def min_pool(refined_NPHW: Tensor) -> Tensor:
        return min_pool_loss(foreground(refined_NPHW * y_NP11), num_images_global=num_images_global)

    def ecr(cam_NPhw: Tensor, refined_NPhw: Tensor) -> Tensor:
        one_hot_NPhw = one_hot_max(fill_background(cam_NPhw.detach()), keep_channel=keep)
        return ecr_loss(
            one_hot_NPhw, refined_NPhw, num_channels=y_NC.shape[1], num_images_global=num_images_global,
            valid_Nhw=valid_Nhw,
        )  # fmt: skip

    raw_s, raw_t = shown(source.refined_NChw, source.size), shown(target.refined_NChw, target.size)
    cam_s = to_target(max_norm(shown(source.cam_NChw, source.size))) * y_NP11
    cam_t = max_norm(shown(target.cam_NChw, target.size)) * y_NP11
    refined_s, refined_t = to_target(max_norm(raw_s)) * y_NP11, max_norm(raw_t) * y_NP11
    er = er_loss(
        foreground(cam_s), foreground(cam_t), num_classes=label_NK.shape[1], num_images_global=num_images_global,
        valid_Nhw=valid_Nhw,
    )  # fmt: skip
    return {
        "cls": (cls(source) + cls(target)) / 2,
        "min_pool": (min_pool(raw_s) + min_pool(raw_t)) / 2,
        "er": er,
        "ecr": ecr(cam_t, refined_s) + ecr(cam_s, refined_t),  # a sum, unlike the halves above
    }

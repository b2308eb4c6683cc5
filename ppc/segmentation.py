"""Loss and multi-scale prediction of a segmentation net (METHOD 11).  N images, C classes, H W pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def segmentation_loss(logit_NChw: Tensor, label_NHW: Tensor, *, num_pixels_global: Tensor) -> Tensor:
    """Cross-entropy of the logits brought to the labels' size (bilinear, corners aligned); 255 takes no part.

    A sum over the local pixels divided by `num_pixels_global`, the labelled pixels of all workers: the sum over workers
    is the mean that one worker would get. 0 where none is labelled.
    """
    logit_NCHW = F.interpolate(logit_NChw, label_NHW.shape[1:], mode="bilinear", align_corners=True)
    total = F.cross_entropy(logit_NCHW, label_NHW.long(), ignore_index=IGNORE, reduction="sum")
    return total / num_pixels_global.clamp(min=1)


def merge_logits(logits_CHW: Sequence[Tensor], *, size: tuple[int, int]) -> Tensor:
    """Class probabilities (C, H, W): softmax of the mean of logits, each brought to `size` (H, W)."""
    resized = [F.interpolate(x[None], size, mode="bilinear", align_corners=True)[0] for x in logits_CHW]
    return torch.stack(resized).mean(0).softmax(0)

"""Class activation maps: normalisation, the PCM, the merging of scales and mirrors, and the seed of a CAM.

Shapes: N images, K foreground classes, C = K+1 channels with background, h w a grid, H W pixels, D feature channels.
Background is channel 0 unless `bg_channel` says otherwise (EPS has it last, METHOD 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # the official code's one constant for every denominator and floor
NormRule = Literal["minmax", "max", "irn"]
PCM_BLOCK = 2**24  # entries of an image's similarities at a time, 64 MiB; a grid up to 64 x 64 is one block
IRN_CELL = 16  # pixels: the stride of IRN's CAM net


def _is_channel(map_NChw: Tensor, channel: int) -> Tensor:
    """A (C,1,1) mask that is true on one channel."""
    return (torch.arange(map_NChw.shape[1], device=map_NChw.device) == channel)[:, None, None]


def foreground(map_NCHW: Tensor, *, bg_channel: int = 0) -> Tensor:
    """The map without its background channel, (N,K,...); a view when background is first or last."""
    parts = [part for part in (map_NCHW[:, :bg_channel], map_NCHW[:, bg_channel + 1 :]) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def fill_background(map_NChw: Tensor, *, bg_channel: int = 0) -> Tensor:
    """A copy whose background channel is 1 - the highest foreground value (METHOD 4.1, 4.2)."""
    top_N1hw = foreground(map_NChw, bg_channel=bg_channel).amax(dim=1, keepdim=True)
    return torch.where(_is_channel(map_NChw, bg_channel), 1 - top_N1hw, map_NChw)


def one_hot_max(map_NChw: Tensor, *, keep_channel: int = 0) -> Tensor:
    """A copy with 0 for all entries below their pixel's maximum over the channels other than `keep_channel`.

    `keep_channel` itself stays as it is, and a tie keeps all of its members (METHOD 4.1). It is the background channel,
    except in the official EPS code, which puts background last and still keeps channel 0 (METHOD 7).
    """
    kept = _is_channel(map_NChw, keep_channel)
    top_N1hw = foreground(map_NChw, bg_channel=keep_channel).amax(dim=1, keepdim=True)
    return torch.where(kept | (map_NChw == top_N1hw), map_NChw, torch.zeros_like(map_NChw))


def max_norm(map_NCHW: Tensor) -> Tensor:
    """Each channel's ReLU scaled to [0, 1) by its spatial minimum and maximum, with gradient (METHOD 4.2)."""
    positive = F.relu(map_NCHW)
    low, high = positive.amin(dim=(-2, -1), keepdim=True), positive.amax(dim=(-2, -1), keepdim=True)
    return F.relu(positive - low - EPS) / (high - low + EPS)


@torch.no_grad()
def minmax_norm(map_KHW: Tensor) -> Tensor:
    """Each channel's ReLU scaled by its spatial minimum and maximum; its lowest pixels end below 0 (METHOD 4.3, 6.2).

    Pixels within 1e-5 of the minimum are set to 0 first, so the shift takes them to about -min/max, and a map that is
    0 everywhere becomes -1. The official code's seeds and pseudo labels rest on it. Leading dimensions are free.
    """
    positive = F.relu(map_KHW)
    low, high = positive.amin(dim=(-2, -1), keepdim=True), positive.amax(dim=(-2, -1), keepdim=True)
    floored = torch.where(positive < low + EPS, torch.zeros_like(positive), positive)
    return (floored - low - EPS) / (high - low + EPS)


@torch.no_grad()
def pcm_input(cam_NChw: Tensor, *, bg_channel: int = 0) -> Tensor:
    """The constant map that the PCM spreads: scaled to [0, 1], background filled, one-hot-like (METHOD 4.1)."""
    positive = F.relu(cam_NChw)
    scaled = F.relu(positive - EPS) / (positive.amax(dim=(-2, -1), keepdim=True) + EPS)
    return one_hot_max(fill_background(scaled, bg_channel=bg_channel), keep_channel=bg_channel)


def pcm(cam_NChw: Tensor, feature_NDhw: Tensor) -> Tensor:
    """SEAM's pixel correlation module: the map spread by the features' ReLU cosine similarity (METHOD 4.1).

    Dividing the product by the column sums equals dividing the (hw,hw) matrix first, without its second copy. Columns
    are independent: where no gradient needs the matrix again, they come in blocks of at most PCM_BLOCK of its entries.
    With gradient they are not cut at all: a cut adds the gradient up in another order, which is another training.
    """
    q_NDP = feature_NDhw.flatten(2)
    q_NDP = q_NDP / (torch.linalg.vector_norm(q_NDP, dim=1, keepdim=True) + EPS)
    cam_NCP, num_cells = cam_NChw.flatten(2), q_NDP.shape[2]
    if q_NDP.requires_grad:
        return _spread(cam_NCP, q_NDP, q_NDP).view_as(cam_NChw)
    step = max(1, PCM_BLOCK // num_cells)
    spread = [_spread(cam_NCP, q_NDP, q_NDP[..., i : i + step]) for i in range(0, num_cells, step)]
    return torch.cat(spread, dim=2).view_as(cam_NChw)


def _spread(cam_NCP: Tensor, q_NDP: Tensor, to_NDB: Tensor) -> Tensor:
    """The map (N,C,B) at some cells, whose unit features are `to_NDB`, from all cells."""
    similarity_NPB = (q_NDP.transpose(1, 2) @ to_NDB).relu_()
    return (cam_NCP @ similarity_NPB) / (similarity_NPB.sum(dim=1, keepdim=True) + EPS)


@torch.no_grad()
def merge_scales(maps: Sequence[Tensor], *, size: tuple[int, int], rule: NormRule) -> Tensor:
    """One image's CAM (K,H,W) in float32 from the maps of all scales and their mirrors.

    `maps` holds the (K,h,w) maps of the image's present classes in the order scale, scale mirrored, next scale, ...;
    `size` is the image's (H, W). `minmax` is SEAM's and PPC's rule (METHOD 4.3), `max` is PSA's (METHOD 3). `irn` is
    `max` over maps that are brought to whole cells of 16 pixels and then cut to the image (METHOD 10).
    """
    assert len(maps) % 2 == 0 and maps, "maps come in pairs: a scale and its mirror"
    if maps[0].shape[0] == 0:  # an image without a foreground label; interpolate refuses it
        return torch.zeros((0, *size), device=maps[0].device)
    total_KHW = torch.zeros((maps[0].shape[0], *size), device=maps[0].device)
    step = IRN_CELL if rule == "irn" else 1
    covered = size[0] + -size[0] % step, size[1] + -size[1] % step
    for index, map_Khw in enumerate(maps):
        full_KHW = F.interpolate(map_Khw[None].float(), covered, mode="bilinear", align_corners=False)[0]
        full_KHW = full_KHW.flip(-1) if index % 2 else full_KHW
        total_KHW = total_KHW + full_KHW[:, : size[0], : size[1]]
    if rule == "minmax":
        return minmax_norm(total_KHW)
    return total_KHW / (total_KHW.amax(dim=(-2, -1), keepdim=True) + EPS)


def strongest_class(
    cam_KHW: npt.ArrayLike, keys: npt.ArrayLike
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Each pixel's highest value and its label (key + 1), ties to the lowest; -inf and 0 for an image without classes.

    Raises ValueError for values that are not finite and for keys that do not fit the maps.
    """
    values_KHW, label_K = np.asarray(cam_KHW, dtype=np.float32), np.asarray(keys, dtype=np.int64) + 1
    if values_KHW.ndim != 3 or label_K.shape != values_KHW.shape[:1]:
        raise ValueError(f"expected a (K,H,W) CAM with K keys, got {values_KHW.shape} with keys of {label_K.shape}")
    if not np.isfinite(values_KHW).all():
        raise ValueError("the CAM holds NaN or infinite values: its net diverged; lower train.learning_rate")
    if len(label_K) == 0:
        return np.full(values_KHW.shape[1:], -np.inf, np.float32), np.zeros(values_KHW.shape[1:], np.int64)
    value_HW = values_KHW.max(axis=0)
    label_HW = np.empty(value_HW.shape, np.int64)
    for k in np.argsort(-label_K):  # the lowest of a tie comes last; argmax over the first axis is four times as slow
        label_HW[values_KHW[k] == value_HW] = label_K[k]
    return value_HW, label_HW


def seed_from_cam(cam_KHW: npt.ArrayLike, keys: npt.ArrayLike, *, bg_score: float) -> npt.NDArray[np.uint8]:
    """The label map of a CAM: 0 where nothing exceeds `bg_score`, else key + 1 of the highest class (METHOD 3, 12).

    `keys` are the foreground indices of the K maps. The comparison is in float32 and background wins ties, as in the
    official code's argmax over a float32 stack whose channel 0 is the score.
    """
    value_HW, label_HW = strongest_class(cam_KHW, keys)
    return np.where(value_HW > np.float32(bg_score), label_HW, 0).astype(np.uint8)

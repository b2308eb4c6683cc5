"""From class maps to pseudo labels and prototypes, as statistics of the batch over all workers (METHOD 6.2, 6.3).

Shapes: V views, N images, C classes with the background, D channels, H W the grid, P = N*H*W pixels of this worker in
(image, row, column) order, K pixels a prototype, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppc.mining import needed

MapNorm = Literal["minmax", "max"]
TieRule = Literal["first_index", "random"]
PrototypeFeatures = Literal["raw", "unit"]
BgPrototypeWeight = Literal["constant", "one_minus_fg"]
Gather = Callable[[Tensor], Tensor]

EPS = 1e-5  # of the map normalisation (METHOD 6.2)
NORM_EPS = 1e-12  # least length of a feature (METHOD 6.4)


@dataclass(frozen=True)
class Workers:
    """This worker's place: `gather` concatenates equal-shaped tensors of all workers along dim 0 in rank order."""

    rank: int
    gather: Gather


ALONE = Workers(rank=0, gather=lambda x: x)


def normalise_map(
    map_NCHW: Tensor, valid_NHW: Tensor | None, *, map_norm: MapNorm, bg_score: float, bg_index: int
) -> Tensor:
    """Scale each image's class map and put `bg_score` in the background channel (METHOD 6.2).

    `minmax`: as the official code, values a little below 0 for former minima, -1 everywhere for a map without any
    score. `max`: ReLU(map) / (maximum + 1e-5), in [0, 1]. Extrema are those of the valid pixels.
    """
    map_NCHW = map_NCHW.detach().relu()
    outside = None if valid_NHW is None else ~valid_NHW[:, None]
    high = (map_NCHW if outside is None else map_NCHW.masked_fill(outside, 0.0)).amax((2, 3), keepdim=True)
    if map_norm == "minmax":
        low = (map_NCHW if outside is None else torch.where(outside, high, map_NCHW)).amin((2, 3), keepdim=True)
        map_NCHW = (map_NCHW.masked_fill(map_NCHW < low + EPS, 0.0) - (low + EPS)) / (high - low + EPS)
    else:
        map_NCHW = map_NCHW / (high + EPS)
    map_NCHW[:, bg_index] = bg_score
    return map_NCHW


def pseudo_label(map_NCHW: Tensor, image_label_NC: Tensor) -> Tensor:
    """Each pixel's class (N,H,W): argmax of the normalised map over the classes of its image (METHOD 6.2).

    `image_label_NC` is nonzero for the classes of the image and for the background.
    """
    return map_NCHW.masked_fill(image_label_NC[:, :, None, None] == 0, -torch.inf).max(1).indices


def prototype_weight(
    map_NCHW: Tensor, image_label_NC: Tensor, *, bg_prototype_weight: BgPrototypeWeight, bg_index: int
) -> Tensor:
    """Weight of each pixel in each class's prototype: the normalised map, its background channel as told.

    `constant` leaves the background score. `one_minus_fg` is 1 - max(0, map of the image's own classes) (METHOD 6.7):
    maps of other classes are noise that the normalisation stretched to 1.
    """
    if bg_prototype_weight == "constant":
        return map_NCHW
    own_NC = image_label_NC != 0
    own_NC[:, bg_index] = False
    weight_NCHW = map_NCHW.clone()
    weight_NCHW[:, bg_index] = 1 - map_NCHW.masked_fill(~own_NC[:, :, None, None], 0.0).amax(1)
    return weight_NCHW


def top_k_mask(
    value_VCP: Tensor, tie_key_VP: Tensor | None, *, top_k: int, tie_rule: TieRule, workers: Workers
) -> Tensor:
    """Which of this worker's pixels are among the K largest of the global batch, per view and class (V,C,P) bool.

    -inf marks a pixel that may not be chosen. Ties at the boundary go to the lowest global index, or to the smallest
    key (one key a pixel, so classes that tie over the same pixels choose the same). Only K values a class travel.
    """
    if top_k < 1:
        raise ValueError(f"prototype_top_k is {top_k}: a prototype needs at least one pixel")
    value_VCP = value_VCP.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a NaN must reach the loss
    num_local = min(top_k, value_VCP.shape[2])
    all_WVCK = workers.gather(value_VCP.topk(num_local).values[None])
    all_VCM = all_WVCK.movedim(0, 2).flatten(2)
    num_chosen = min(top_k, all_VCM.shape[2])
    bound_VC1 = all_VCM.topk(num_chosen).values[..., -1:]
    places_VC1 = num_chosen - (all_VCM > bound_VC1).sum(2, keepdim=True)  # for the tied, at least one
    tied_VCP = value_VCP == bound_VC1
    if tie_rule == "first_index":
        before_VC1 = (all_WVCK[: workers.rank] == bound_VC1).sum((0, 3))[..., None]  # tied pixels of earlier workers
        wins_VCP = tied_VCP.cumsum(2) <= places_VC1 - before_VC1
    else:
        key_VCP = needed(tie_key_VP, "tie_rule: random").to(value_VCP.device)[:, None]
        key_VCP = torch.where(tied_VCP, key_VCP, torch.inf)
        key_WVCK = workers.gather(key_VCP.topk(num_local, largest=False).values[None])
        wins_VCP = key_VCP <= key_WVCK.movedim(0, 2).flatten(2).sort().values.gather(2, places_VC1 - 1)
    return ((value_VCP > bound_VC1) | (tied_VCP & wins_VCP)) & (value_VCP > -torch.inf)


def weighted_prototypes(
    features: Sequence[Tensor], weight_VCP: Tensor, *, prototype_features: PrototypeFeatures, workers: Workers
) -> tuple[Tensor, Tensor]:
    """Weighted means of each view's features over the global batch, L2-normalised, no gradient (paper Eq. 5).

    Returns prototypes (V,C,D), zero where the weights add up to nothing, and which classes have one (V,C).
    """
    num_images = len(features[0])
    sums = []
    for feature_NDHW, weight_CP in zip(features, weight_VCP, strict=True):
        feature_NDX = feature_NDHW.detach().flatten(2)
        weight_NCX = weight_CP.view(len(weight_CP), num_images, -1).transpose(0, 1)
        scale_NCX = weight_NCX if prototype_features == "raw" else weight_NCX / feature_length(feature_NDX)
        sums.append(torch.cat([scale_NCX @ feature_NDX.transpose(1, 2), weight_NCX.sum(2, keepdim=True)], 2))
    # Images travel one by one and are added in one order, so that prototypes are the same to the last bit however the
    # images are split: silent classes have nearly equal ones, and a rank must not hang on a rounding.
    sum_VCE = workers.gather(torch.stack(sums, 1)).sum(0, dtype=torch.float64)
    sum_VCD, total_VC1 = sum_VCE[..., :-1], sum_VCE[..., -1:]
    proto_VCD = F.normalize(sum_VCD / torch.where(total_VC1 == 0, 1.0, total_VC1), dim=2, eps=NORM_EPS)
    return proto_VCD.to(features[0].dtype), total_VC1[..., 0] != 0


def feature_length(feature_NDX: Tensor) -> Tensor:
    """L2 norm of each pixel's feature (N,1,X), at least 1e-12."""
    return feature_NDX.square().sum(1, keepdim=True).sqrt().clamp(min=NORM_EPS)


class _Similarity(torch.autograd.Function):
    """Divides lengths out of the products, C numbers a pixel instead of D, and keeps no copy of the features."""

    @staticmethod
    def forward(ctx: Any, feature_NDX: Tensor, proto_CD: Tensor) -> Tensor:
        length_N1X = feature_length(feature_NDX)
        similarity_NCX = (proto_CD @ feature_NDX).div_(length_N1X)
        ctx.save_for_backward(feature_NDX, proto_CD, length_N1X, similarity_NCX)
        return similarity_NCX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # s = p.v / |v|, hence ds/dv = (p - s v / |v|) / |v|
        feature_NDX, proto_CD, length_N1X, similarity_NCX = ctx.saved_tensors
        along_N1X = (grads[0] * similarity_NCX).sum(1, keepdim=True) / length_N1X.square()
        grad_NDX = proto_CD.T @ (grads[0] / length_N1X)
        return grad_NDX.addcmul_(feature_NDX, along_N1X, value=-1), None


def similarity(feature_NDHW: Tensor, proto_CD: Tensor) -> Tensor:
    """Dot products of L2-normalised features with prototypes, (P,C); no gradient to the prototypes."""
    similarity_NCX: Tensor = _Similarity.apply(feature_NDHW.flatten(2), proto_CD.detach())
    return similarity_NCX.transpose(1, 2).flatten(0, 1)

"""Pixel-to-prototype contrast between two views of a batch (METHOD 6; paper Eq. 5-9).

Shapes: V = 2 views (0 source, 1 target), T = 2 cross terms, N images, C classes with the background, D channels, H W
the common grid, P = N*H*W pixels of this worker in (image, row, column) order, G those of the global batch.
Statistics are those of the global batch: prototypes, ranks, counts and means run over the pixels of all workers. Each
worker holds a contiguous block of images, equally many on each, and returns its share: losses and gradients of all
workers add up to those of one worker with the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ppc.mining import HardPixels, IntraMean, Keys, Negatives, denominator_counts, hard_pixel_weights, whole_counts
from ppc.prototypes import (
    BgPrototypeWeight,
    MapNorm,
    PrototypeFeatures,
    TieRule,
    Workers,
    normalise_map,
    prototype_weight,
    pseudo_label,
    similarity,
    top_k_mask,
    weighted_prototypes,
)

PrototypePixels = Literal["all", "assigned"]
AbsentClasses = Literal["keep", "drop"]
ViewReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class View:
    """One view on the common grid; pixels that are not valid take no part in anything."""

    feature_NDHW: Tensor  # projected, after ReLU, not L2-normalised
    map_NCHW: Tensor  # class scores as the network gives them (METHOD 6.6 #13: PCM-refined), with a background channel
    valid_NHW: Tensor | None = None
    keys: Keys | None = None  # needed by the random rules alone: random ties, random negatives, sampled hard pixels


@dataclass(frozen=True)
class PreparedViews:
    """What the three terms need of the two views. Gradients flow through the features alone."""

    features: tuple[Tensor, Tensor]  # (N,D,H,W) each
    label_VP: Tensor
    valid_VP: Tensor | None  # None: all are
    proto_VCD: Tensor
    exists_VC: Tensor  # the class has a prototype
    kept_VC: Tensor | None  # the class is in the denominators; None: each is
    assigned_VC: Tensor  # pixels of this worker with that pseudo label
    fires_VC: Tensor  # pixels of this worker where the class has any score
    keys: tuple[Keys, Keys] | None


def prototype_nce(similarity_PC: Tensor, label_P: Tensor, *, temperature: float, count_PC: Tensor | None) -> Tensor:
    """Each pixel's contrast with the prototypes (...,P): -log exp(s_y/t) / sum_c count_c exp(s_c/t) (paper Eq. 6).

    `similarity_PC` (...,P,C) is of unit features and unit prototypes. Counts are whole numbers, at least 1 for the
    pixel's own class; None: each class once.
    """
    logit_PC = similarity_PC / temperature
    if count_PC is None:
        return -logit_PC.log_softmax(-1).gather(-1, label_P[..., None])[..., 0]
    log_count_PC = count_PC.clamp(min=1).log().masked_fill(count_PC == 0, -torch.inf)  # log(0) itself is slow
    log_share_PC = (logit_PC + log_count_PC).log_softmax(-1)
    return (log_count_PC - log_share_PC).gather(-1, label_P[..., None])[..., 0]


def prepare_views(
    source: View,
    target: View,
    image_label_NC: Tensor,
    *,
    map_norm: MapNorm,
    bg_score: float,
    bg_index: int,
    top_k: int,
    tie_rule: TieRule,
    prototype_pixels: PrototypePixels,
    prototype_features: PrototypeFeatures,
    bg_prototype_weight: BgPrototypeWeight,
    absent_classes: AbsentClasses,
    workers: Workers,
) -> PreparedViews:
    """Pseudo labels and prototypes of the two views (METHOD 6.2, 6.3).

    `prototype_pixels`: a class's K pixels are those of largest weight in the batch, or of those assigned to it.
    `absent_classes`: a class to which no pixel of the global batch is assigned stays in the denominators, or leaves
    them (METHOD 6.6 #2, 6.7). A class without a prototype that stays is a zero vector, of similarity 0. A pixel
    labelled with a class that left, or that has no prototype, has no loss.
    """
    views, valids = (source, target), (source.valid_NHW, target.valid_NHW)
    own_MC = image_label_NC.repeat(2, 1)  # M = V*N
    raw_MCHW = torch.cat([view.map_NCHW.detach() for view in views])
    valid_MHW = None
    if any(valid is not None for valid in valids):
        full_NHW = torch.ones_like(source.map_NCHW[:, 0], dtype=torch.bool)
        valid_MHW = torch.cat([full_NHW if valid is None else valid for valid in valids])
        raw_MCHW = raw_MCHW.masked_fill(~valid_MHW[:, None], 0.0)
    map_MCHW = normalise_map(raw_MCHW, valid_MHW, map_norm=map_norm, bg_score=bg_score, bg_index=bg_index)
    weight_MCHW = prototype_weight(map_MCHW, own_MC, bg_prototype_weight=bg_prototype_weight, bg_index=bg_index)
    weight_VCP = weight_MCHW.view(2, -1, *map_MCHW.shape[1:]).transpose(1, 2).flatten(2)
    label_VP = pseudo_label(map_MCHW, own_MC).view(2, -1)
    valid_VP = None if valid_MHW is None else valid_MHW.view(2, -1)

    assigned_VCP = label_VP[:, None] == torch.arange(weight_VCP.shape[1], device=label_VP.device)[:, None]
    if valid_VP is not None:
        assigned_VCP = assigned_VCP & valid_VP[:, None]
    value_VCP = weight_VCP
    if prototype_pixels == "assigned":
        value_VCP = weight_VCP.masked_fill(~assigned_VCP, -torch.inf)
    elif valid_VP is not None:
        value_VCP = weight_VCP.masked_fill(~valid_VP[:, None], -torch.inf)
    keys = None if source.keys is None or target.keys is None else (source.keys, target.keys)
    tie_key_VP = torch.stack([k.tie_NHW.flatten() for k in keys]) if keys and tie_rule == "random" else None
    chosen_VCP = top_k_mask(value_VCP, tie_key_VP, top_k=top_k, tie_rule=tie_rule, workers=workers)
    features = (source.feature_NDHW, target.feature_NDHW)
    proto_VCD, exists_VC = weighted_prototypes(
        features, torch.where(chosen_VCP, weight_VCP, 0.0), prototype_features=prototype_features, workers=workers
    )
    kept_VC, assigned_VC = None, assigned_VCP.sum(2)
    if absent_classes == "drop":
        kept_VC = workers.gather(assigned_VC[None]).sum(0) > 0  # each of them has a prototype
    return PreparedViews(
        features=features,
        label_VP=label_VP,
        valid_VP=valid_VP,
        proto_VCD=proto_VCD,
        exists_VC=exists_VC,
        kept_VC=kept_VC,
        assigned_VC=assigned_VC,
        fires_VC=(raw_MCHW > 0).sum((2, 3)).view(2, *image_label_NC.shape).sum(1),
        keys=keys,
    )


def contrast_terms(
    views: PreparedViews,
    *,
    temperature: float,
    negatives: Negatives,
    rank_start: int,
    rank_end: int,
    pool_fraction: float,
    sample_fraction: float,
    hard_pixels: HardPixels,
    hard_pool_fraction: float,
    intra_mean: IntraMean,
    workers: Workers,
) -> dict[str, Tensor]:
    """The three terms of each view (V,), unweighted: this worker's share (METHOD 6.4, paper Eq. 6-9).

    cross_prototype: own pixels, own labels, prototypes of the other view; mean over all pixels.
    cross_cam: own pixels, labels of the other view, own prototypes; mean over all pixels.
    intra_view: all three of the same view, with mined negatives; mean over hard pixels.
    """
    proto_VCD, label_VP, kept_VC = views.proto_VCD, views.label_VP, views.kept_VC
    valid_VP = torch.ones_like(label_VP, dtype=torch.bool) if views.valid_VP is None else views.valid_VP
    positive_VC = views.exists_VC if kept_VC is None else kept_VC
    to_own_and_other_VPE = torch.stack(
        [similarity(views.features[v], torch.cat([proto_VCD[v], proto_VCD[1 - v]])) for v in range(2)]
    )
    to_own_VPC, to_other_VPC = to_own_and_other_VPE.chunk(2, dim=2)

    label_TVP = torch.stack([label_VP, label_VP.flip(0)])
    included_TVP = torch.stack([valid_VP, valid_VP & valid_VP.flip(0)])
    included_TVP = included_TVP & torch.stack([positive_VC.flip(0), positive_VC]).gather(2, label_TVP)
    number_TV = workers.gather(included_TVP.sum(2)[None]).sum(0).clamp(min=1)
    kept_TV1C = None if kept_VC is None else torch.stack([kept_VC.flip(0), kept_VC])[:, :, None]
    cross_TVP = prototype_nce(
        torch.stack([to_other_VPC, to_own_VPC]),
        label_TVP,
        temperature=temperature,
        count_PC=None if kept_TV1C is None else whole_counts(label_TVP, kept_TV1C).to(to_own_VPC.dtype),
    )
    cross_TV = (cross_TVP * included_TVP).sum(2) / number_TV

    keys, draws = views.keys, negatives == "random_half"
    count_VPC = denominator_counts(
        to_own_VPC,
        label_VP,
        None if kept_VC is None else kept_VC[:, None],
        torch.stack([k.negative_NHWC.flatten(0, 2) for k in keys]) if keys and draws else None,
        negatives=negatives,
        rank_start=rank_start,
        rank_end=rank_end,
        pool_fraction=pool_fraction,
        sample_fraction=sample_fraction,
    )
    intra_VP = prototype_nce(to_own_VPC, label_VP, temperature=temperature, count_PC=count_VPC)
    weight_VP = _global_hard_pixel_weights(
        to_own_VPC.detach().gather(2, label_VP[..., None])[..., 0],
        torch.where(valid_VP & positive_VC.gather(1, label_VP), label_VP, to_own_VPC.shape[2]),
        torch.stack([k.hard_NHW.flatten() for k in keys]) if keys else None,
        num_classes=to_own_VPC.shape[2],
        hard_pixels=hard_pixels,
        hard_pool_fraction=hard_pool_fraction,
        intra_mean=intra_mean,
        workers=workers,
    )
    return {"cross_prototype": cross_TV[0], "cross_cam": cross_TV[1], "intra_view": (intra_VP * weight_VP).sum(1)}


def _global_hard_pixel_weights(
    similarity_VP: Tensor,
    label_VP: Tensor,
    key_VP: Tensor | None,
    *,
    num_classes: int,
    hard_pixels: HardPixels,
    hard_pool_fraction: float,
    intra_mean: IntraMean,
    workers: Workers,
) -> Tensor:
    """`hard_pixel_weights` of both views over the global batch; this worker's part of it (V,P)."""
    columns = [similarity_VP, label_VP] + ([] if key_VP is None else [key_VP.to(label_VP.device)])
    local_JVP = torch.stack([column.double() for column in columns])  # float64 holds each of them exactly
    all_JVG = workers.gather(local_JVP[None]).movedim(0, 2).flatten(2)
    weight_VG = hard_pixel_weights(
        all_JVG[0],
        all_JVG[1].long(),
        None if key_VP is None else all_JVG[2],
        num_classes=num_classes,
        hard_pixels=hard_pixels,
        hard_pool_fraction=hard_pool_fraction,
        intra_mean=intra_mean,
    )
    return weight_VG.view(2, -1, label_VP.shape[1])[:, workers.rank].to(similarity_VP.dtype)


def contrast_losses(
    source: View,
    target: View,
    image_label_NC: Tensor,
    *,
    map_norm: MapNorm,
    bg_score: float,
    bg_index: int,
    top_k: int,
    tie_rule: TieRule,
    prototype_pixels: PrototypePixels,
    prototype_features: PrototypeFeatures,
    bg_prototype_weight: BgPrototypeWeight,
    absent_classes: AbsentClasses,
    temperature: float,
    negatives: Negatives,
    rank_start: int,
    rank_end: int,
    pool_fraction: float,
    sample_fraction: float,
    hard_pixels: HardPixels,
    hard_pool_fraction: float,
    intra_mean: IntraMean,
    view_reduction: ViewReduction,
    workers: Workers,
) -> dict[str, Tensor]:
    """All contrast terms of two views, unweighted, and three diagnostics; each adds up over the workers.

    `silent_share`: foreground classes whose map fires nowhere in the global batch; `bg_share`: pixels labelled
    background. Both in [0, 1], means over the views. `prototype_similarity`: mean cosine of the prototypes of two
    classes that have pixels in the global batch, in [-1, 1], over the views' pairs; 0 where there is no pair.

    Args:
        image_label_NC: nonzero for the classes of each image and for the background.
    """
    source, target = _full_precision(source), _full_precision(target)
    with torch.autocast(source.feature_NDHW.device.type, enabled=False):
        views = prepare_views(
            source,
            target,
            image_label_NC,
            map_norm=map_norm,
            bg_score=bg_score,
            bg_index=bg_index,
            top_k=top_k,
            tie_rule=tie_rule,
            prototype_pixels=prototype_pixels,
            prototype_features=prototype_features,
            bg_prototype_weight=bg_prototype_weight,
            absent_classes=absent_classes,
            workers=workers,
        )
        terms = contrast_terms(
            views,
            temperature=temperature,
            negatives=negatives,
            rank_start=rank_start,
            rank_end=rank_end,
            pool_fraction=pool_fraction,
            sample_fraction=sample_fraction,
            hard_pixels=hard_pixels,
            hard_pool_fraction=hard_pool_fraction,
            intra_mean=intra_mean,
            workers=workers,
        )
        reduce = torch.mean if view_reduction == "mean" else torch.sum
        return {name: reduce(loss_V) for name, loss_V in terms.items()} | _diagnostics(views, bg_index, workers)


def _diagnostics(views: PreparedViews, bg_index: int, workers: Workers) -> dict[str, Tensor]:
    valid_VP = torch.ones_like(views.label_VP, dtype=torch.bool) if views.valid_VP is None else views.valid_VP
    counts_VE = torch.cat([views.fires_VC, views.assigned_VC, valid_VP.sum(1, keepdim=True)], 1)
    all_WVE = workers.gather(counts_VE[None])
    num_classes = views.fires_VC.shape[1]
    fires_VC, assigned_VC, valid_V1 = torch.split(all_WVE.sum(0), [num_classes, num_classes, 1], 1)
    silent_VC = fires_VC == 0
    silent_VC[:, bg_index] = False
    is_bg_V = ((views.label_VP == bg_index % num_classes) & valid_VP).sum(1)
    present_VC1 = (assigned_VC > 0)[..., None]
    cosine_VCC = views.proto_VCD.double() @ views.proto_VCD.double().transpose(1, 2)
    pair_VCC = (present_VC1 & present_VC1.transpose(1, 2)).triu(1)
    return {
        "silent_share": silent_VC.sum().double() / (2 * (num_classes - 1) * len(all_WVE)),
        "bg_share": (is_bg_V.double() / valid_V1[:, 0].clamp(min=1)).mean(),
        "prototype_similarity": (cosine_VCC * pair_VCC).sum() / (pair_VCC.sum().clamp(min=1) * len(all_WVE)),
    }


def _full_precision(view: View) -> View:
    """Half precision has too few digits for ranks and for the least length of a feature."""
    if view.feature_NDHW.dtype in (torch.float16, torch.bfloat16):
        return replace(view, feature_NDHW=view.feature_NDHW.float(), map_NCHW=view.map_NCHW.float())
    return view

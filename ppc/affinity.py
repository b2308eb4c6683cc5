"""Affinity between neighbouring pixels, its labels and loss, and the random walk over it: PSA's refinement (METHOD 8).

Shapes: N images, K foreground classes, C = K+1 channels with the background first, D feature channels, H W pixels, h w
the grid (pixels / 8), E displacements of a radius, y x the "from" pixels of the pairs, O = 2E+1 neighbours of a pixel.

Only rows 0..h-r and columns r-1..w-r of the grid are "from" pixels (radius r), so that each displacement stays inside.
Pixels at the border are in fewer pairs than others, as in the official code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppc.prototypes import Workers

STRIDE = 8  # pixels a grid cell
IGNORE = 255  # a label that takes part in no pair
EPS = 1e-5  # inside logarithms, of the counts, and the least score of a labelled pixel (METHOD 8)
POWER_TOLERANCE = 1e-13  # of x^n between -1 and 1, see `power_coefficients`
LOSS_WEIGHTS = {"bg": 1 / 4, "fg": 1 / 4, "neg": 1 / 2}

Displacement = tuple[int, int]  # rows, columns


class PairLabels(NamedTuple):
    """Which pairs (N,E,y,x) count as both background, as the same class, and as two classes; bool."""

    bg: Tensor
    fg: Tensor
    neg: Tensor


class Transition(NamedTuple):
    """The walk's transition matrix: pixel q receives `weight_Ohw[o, q]` of the pixel at q + `offsets[o]`."""

    offsets: tuple[Displacement, ...]
    weight_Ohw: Tensor


def displacements(radius: int) -> tuple[Displacement, ...]:
    """The (rows, columns) from a pixel to its partners: half of the open disk, since pairs are symmetric (METHOD 8)."""
    same_row = [(0, dx) for dx in range(1, radius)]
    below = [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius) if dy**2 + dx**2 < radius**2]
    return tuple(same_row + below)


def fit_radius(h: int, w: int, *, radius: int) -> int:
    """The radius that SEAM and PPC use on a grid of h x w: a smaller one below 2*radius+1 cells (METHOD 8)."""
    side = min(h, w)
    return radius if side > 2 * radius else max(1, min(radius, (side - 1) // 2))


def window(x: Tensor, radius: int, shift: Displacement = (0, 0)) -> Tensor:
    """A view (...,y,x) of what lies at `shift` from each "from" pixel of the grid (...,h,w)."""
    h, w, reach, (dy, dx) = *x.shape[-2:], radius - 1, shift
    if h <= reach or w <= 2 * reach:
        raise ValueError(f"a grid of {h} x {w} cells has no pairs of radius {radius}: use a smaller radius")
    return x[..., dy : h - reach + dy, reach + dx : w - reach + dx]


# --- labels ---


def affinity_label(low_CHW: Tensor, high_CHW: Tensor) -> Tensor:
    """One image's labels at 1/8, (h,w) uint8: 0 background, 255 unsure, else the channel of the class (METHOD 8).

    The scores are those of [background, present classes] after the low and the high background power; H and W are
    multiples of 8. The low power makes background strong, so foreground that wins there is sure; and the other way.
    """
    low_Chw, high_Chw = F.avg_pool2d(low_CHW, STRIDE), F.avg_pool2d(high_CHW, STRIDE)
    label_hw = low_Chw.argmax(0)
    label_hw = torch.where(label_hw == 0, IGNORE, label_hw)
    label_hw = torch.where(high_Chw.argmax(0) == 0, 0, label_hw)
    unscored_hw = torch.cat([low_Chw, high_Chw]).amax(0) < EPS  # padding of a crop
    return torch.where(unscored_hw, IGNORE, label_hw).to(torch.uint8)


def pair_labels(label_Nhw: Tensor, *, radius: int) -> PairLabels:
    """Sort the pairs by the labels of their two pixels; pairs with a 255 are in none of the three (METHOD 8)."""
    label_N1hw = label_Nhw[:, None]
    source_N1yx = window(label_N1hw, radius)
    target_NEyx = torch.cat([window(label_N1hw, radius, shift) for shift in displacements(radius)], dim=1)
    known = (source_N1yx != IGNORE) & (target_NEyx != IGNORE)
    same = known & (source_N1yx == target_NEyx)
    return PairLabels(bg=same & (source_N1yx == 0), fg=same & (source_N1yx != 0), neg=known & ~same)


# --- affinity and its loss ---


class _PairAffinity(torch.autograd.Function):
    """Holds one displacement's differences at a time; autograd would keep those of all E for the backward pass."""

    @staticmethod
    def forward(ctx: Any, feature_NDhw: Tensor, radius: int) -> Tensor:
        source_NDyx, shifts = window(feature_NDhw, radius), displacements(radius)
        num_images, _, *sides = source_NDyx.shape
        affinity_NEyx = feature_NDhw.new_empty((num_images, len(shifts), *sides))
        for index, shift in enumerate(shifts):
            distance_Nyx = (source_NDyx - window(feature_NDhw, radius, shift)).abs_().mean(dim=1)
            affinity_NEyx[:, index] = distance_Nyx.neg_().exp_()
        ctx.radius = radius
        ctx.save_for_backward(feature_NDhw, affinity_NEyx)
        return affinity_NEyx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # a = exp(-mean|f_i - f_j|), hence da/df_i = -a sign(f_i - f_j) / D = -da/df_j
        feature_NDhw, affinity_NEyx = ctx.saved_tensors
        scale_NEyx = grads[0] * affinity_NEyx / -feature_NDhw.shape[1]
        grad_NDhw = torch.zeros_like(feature_NDhw)
        source_NDyx = window(feature_NDhw, ctx.radius)
        for index, shift in enumerate(displacements(ctx.radius)):
            flow_NDyx = (source_NDyx - window(feature_NDhw, ctx.radius, shift)).sign_()
            flow_NDyx *= scale_NEyx[:, index, None]
            window(grad_NDhw, ctx.radius).add_(flow_NDyx)
            window(grad_NDhw, ctx.radius, shift).sub_(flow_NDyx)
        return grad_NDhw, None


def pair_affinity(feature_NDhw: Tensor, *, radius: int) -> Tensor:
    """a_ij = exp(-mean over channels |f_i - f_j|) of each pair, (N,E,y,x) in (0, 1] (METHOD 8).

    Features are float32 or float64. Memory: E values a pixel and a few copies of the features; keeping all differences
    until the backward pass takes E copies (1.2 GB for 8 images of 448 pixels, D = 448, E = 34).
    """
    affinity_NEyx: Tensor = _PairAffinity.apply(feature_NDhw, radius)
    return affinity_NEyx


def affinity_losses(affinity_NEyx: Tensor, labels: PairLabels, *, workers: Workers) -> dict[str, Tensor]:
    """The balanced cross-entropy's terms `bg`, `fg` and `neg`, already weighted: the loss is their sum (METHOD 8).

    Each term is a mean over the pairs of its kind in the global batch; this is the share of the local images, so the
    sum over workers is the value that one worker would get. All workers must call it: the counts travel.
    """
    count_3 = torch.stack([kind.sum() for kind in labels])
    total_3 = workers.gather(count_3[None]).sum(0).to(affinity_NEyx.dtype) + EPS
    like = -torch.log(affinity_NEyx + EPS)
    unlike = -torch.log(1 + EPS - affinity_NEyx)
    nll = {"bg": like, "fg": like, "neg": unlike}
    sums = {kind: (nll[kind] * mask).sum() for kind, mask in labels._asdict().items()}
    return {kind: LOSS_WEIGHTS[kind] * sums[kind] / total for kind, total in zip(sums, total_3, strict=True)}


# --- the random walk ---


def transition(affinity_Ehw: Tensor, pairs: Sequence[Displacement], *, beta: float) -> Transition:
    """The column-normalised, symmetric A = affinity^beta with ones on its diagonal, in float64 (METHOD 8).

    `affinity_Ehw` is 0 where no pair starts; a pair must end inside the grid. Memory: O float64 a cell, 1.6 MB for an
    image of 375 x 500 at radius 5, where the dense matrix takes 70 MB.
    """
    weight_Ehw = affinity_Ehw.detach().double()
    weight_Ehw = torch.where(weight_Ehw > 0, weight_Ehw**beta, 0.0)
    h, w = weight_Ehw.shape[1:]
    back_Ehw = torch.zeros_like(weight_Ehw)
    for back_hw, forth_hw, (dy, dx) in zip(back_Ehw, weight_Ehw, pairs, strict=True):
        left, right = max(0, -dx), max(0, dx)
        back_hw[dy:, right : w - left] = forth_hw[: h - dy, left : w - right]
    weight_Ohw = torch.cat([weight_Ehw.new_ones((1, h, w)), weight_Ehw, back_Ehw])
    offsets = ((0, 0), *pairs, *((-dy, -dx) for dy, dx in pairs))
    return Transition(offsets, weight_Ohw / weight_Ohw.sum(0))


def affinity_transition(affinity_Eyx: Tensor, *, radius: int, beta: float) -> Transition:
    """`transition` for one image's `pair_affinity`."""
    reach = radius - 1
    return transition(F.pad(affinity_Eyx, (reach, reach, 0, reach)), displacements(radius), beta=beta)


def _matrix(step: Transition) -> Tensor:
    """The transition as a sparse matrix (h*w, h*w), which takes maps (h*w, C) one step on."""
    _, h, w = step.weight_Ohw.shape
    order = sorted(range(len(step.offsets)), key=lambda o: step.offsets[o])  # columns of a row have to rise
    weight_PO = step.weight_Ohw[order].permute(1, 2, 0).flatten(0, 1)
    reach_O = torch.tensor([dy * w + dx for dy, dx in sorted(step.offsets)], device=weight_PO.device)
    linked_PO = weight_PO > 0  # a pair that leaves the grid has none
    column_PO = torch.arange(h * w, device=weight_PO.device)[:, None] + reach_O
    starts = F.pad(linked_PO.sum(1).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(
            starts.int(), column_PO[linked_PO].int(), weight_PO[linked_PO], (h * w, h * w), check_invariants=True
        )


@cache
def power_coefficients(steps: int) -> tuple[float, ...]:
    """Coefficients of x^steps in Chebyshev polynomials of rising degree, cut where those left sum to POWER_TOLERANCE.

    x^n is the sum over k = n, n-2, ... of 2^(1-n) binomial(n, (n-k)/2) T_k(x), that of T_0 halved.
    """
    k = steps % 2
    value = math.comb(steps, steps // 2) / 2 ** (steps - k)  # integers, so n may be large
    found = [0.0] * k
    left = 1.0
    while True:
        found.append(value)
        left -= value
        if k >= steps or left < POWER_TOLERANCE:
            return tuple(found)
        found.append(0.0)
        value *= (steps - k) / (steps + k + 2) * (2 if k == 0 else 1)
        k += 2


@torch.no_grad()
def random_walk(map_Chw: Tensor, step: Transition, *, log2_steps: int) -> Tensor:
    """The map after 2^log2_steps transitions, (C,h,w) float64; maps do not mix, and a constant stays (METHOD 8).

    The official code squares a dense matrix instead; in float32 that, and many steps too, is off by 1e-5. Here a sparse
    matrix takes the maps, in float64. Many steps need few products: the transition is a symmetric matrix in other
    coordinates, with eigenvalues in [-1, 1], where x^256 is a polynomial of degree 116 but for POWER_TOLERANCE. In a
    walked map of 3000 cells that is at most 5e-11 of its largest value, and 1e-13 as measured (bench/walks.py).
    """
    matrix = _matrix(step)
    before_PC, steps = map_Chw.double().flatten(1).T.contiguous(), 2**log2_steps
    weights = power_coefficients(steps)
    now_PC = matrix @ before_PC
    if 2 * (len(weights) - 1) > steps:  # it would not save half of them
        for _ in range(steps - 1):
            now_PC = matrix @ now_PC
        return now_PC.T.reshape(map_Chw.shape)
    walked_PC = weights[0] * before_PC + weights[1] * now_PC
    for weight in weights[2:]:
        before_PC, now_PC = now_PC, (matrix @ now_PC).mul_(2).sub_(before_PC)
        walked_PC.add_(now_PC, alpha=weight)
    return walked_PC.T.reshape(map_Chw.shape)


# --- one image, from its CAM to its mask ---


def power_background(cam_KHW: Tensor, *, bg_power: float) -> Tensor:
    """The CAM (C,H,W) with the background (1 - highest class)^bg_power in front: PSA's and SEAM's rule (METHOD 8)."""
    if len(cam_KHW) == 0:
        return cam_KHW.new_ones((1, *cam_KHW.shape[1:]))
    return torch.cat([(1 - cam_KHW.amax(0, keepdim=True)) ** bg_power, cam_KHW])


def constant_background(cam_KHW: Tensor, *, bg_score: float) -> Tensor:
    """The CAM (C,H,W) with a constant background in front: PPC's rule (METHOD 8)."""
    return torch.cat([cam_KHW.new_full((1, *cam_KHW.shape[1:]), bg_score), cam_KHW])


def pad_to_grid(x_CHW: Tensor) -> Tensor:
    """An image or its maps with zeros to the right and below, up to multiples of 8 (METHOD 8)."""
    height, width = x_CHW.shape[1:]
    return F.pad(x_CHW, (0, -width % STRIDE, 0, -height % STRIDE))


@torch.no_grad()
def walk_scores(score_CHW: Tensor, feature_Dhw: Tensor, *, radius: int, beta: float, log2_steps: int) -> Tensor:
    """Spread one image's scores along its affinities: pooled to the grid, walked, resized; (C,H,W) float64 (METHOD 8).

    `score_CHW` holds [background, present classes] at the image's size; `feature_Dhw` is AffinityNet's output for the
    image under `pad_to_grid`. `radius` is used as it is: see `fit_radius`.
    """
    padded_CHW = pad_to_grid(score_CHW.double())
    grid_Chw = F.avg_pool2d(padded_CHW, STRIDE)
    if grid_Chw.shape[1:] != feature_Dhw.shape[1:]:
        sizes = f"{tuple(feature_Dhw.shape[1:])} for scores of {tuple(score_CHW.shape[1:])} pixels"
        raise ValueError(f"features of {sizes}: expected {tuple(grid_Chw.shape[1:])}; pad the image by pad_to_grid")
    affinity_Eyx = pair_affinity(feature_Dhw[None], radius=radius)[0]
    step = affinity_transition(affinity_Eyx, radius=radius, beta=beta)
    walked_Chw = random_walk(grid_Chw, step, log2_steps=log2_steps)
    size = (padded_CHW.shape[1], padded_CHW.shape[2])
    up_CHW = F.interpolate(walked_Chw[None], size, mode="bilinear", align_corners=False)[0]
    return up_CHW[:, : score_CHW.shape[1], : score_CHW.shape[2]]


def mask_from_scores(score_CHW: Tensor, keys: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """The label map (H,W) of scores [background, classes of `keys`]: 0 or key + 1, ties to the lowest (METHOD 8)."""
    label_C = np.concatenate([[0], np.asarray(keys, dtype=np.int64) + 1])
    if score_CHW.ndim != 3 or label_C.shape != score_CHW.shape[:1]:
        raise ValueError(f"expected scores of the background and {len(label_C) - 1} keys, got {tuple(score_CHW.shape)}")
    order = np.argsort(label_C)
    best_HW = score_CHW.detach().cpu().numpy()[order].argmax(axis=0)  # argmax takes the first of a tie
    labels_HW: npt.NDArray[np.uint8] = label_C[order][best_HW].astype(np.uint8)
    return labels_HW

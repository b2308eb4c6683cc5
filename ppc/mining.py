"""Which negatives and which pixels enter the intra-view contrast, and the random keys that decide (METHOD 6.4, 6.7).

Shapes: V views, N images, C classes with the background, H W the grid, P pixels of this worker, G those of the global
batch in (image, row, column) order; `...` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Negatives = Literal["all", "ranks", "random_half"]
HardPixels = Literal["all", "official", "paper"]
IntraMean = Literal["class", "pixel"]


@dataclass(frozen=True)
class Keys:
    """Uniform float64 numbers that decide all draws of one view; the smallest win."""

    hard_NHW: Tensor  # the random half of a class's pixels
    tie_NHW: Tensor  # who enters a tied top-K
    negative_NHWC: Tensor  # which negatives of the pool are taken


def pixel_keys(
    generator: torch.Generator,
    *,
    num_images_global: int,
    first_image: int,
    num_images_local: int,
    num_classes: int,
    height: int,
    width: int,
) -> Keys:
    """Draw the keys of one view for the global batch and cut out this worker's images.

    Everything is drawn whatever the rules are, so variants that share a seed share their draws.

    Args:
        generator: on the CPU, seeded from (seed, step, view), hence in the same state on all workers.
    """
    shape = (num_images_global, height, width, num_classes + 2)
    local = torch.rand(shape, generator=generator, dtype=torch.float64)[first_image : first_image + num_images_local]
    return Keys(hard_NHW=local[..., 0], tie_NHW=local[..., 1], negative_NHWC=local[..., 2:])


def whole_counts(label_P: Tensor, kept_C: Tensor) -> Tensor:
    """Every kept class and each pixel's own once, bool (...,P,C)."""
    return _one_hot(label_P, kept_C.shape[-1]) | kept_C


def denominator_counts(
    similarity_PC: Tensor,
    label_P: Tensor,
    kept_C: Tensor | None,
    key_PC: Tensor | None,
    *,
    negatives: Negatives,
    rank_start: int,
    rank_end: int,
    pool_fraction: float,
    sample_fraction: float,
) -> Tensor:
    """How often each prototype stands in each pixel's denominator (...,P,C); a pixel's own class at least once.

    `all`: every kept class. `ranks`: own class, and the classes of rank [rank_start, rank_end) by similarity, own class
    among them: it counts twice if it has such a rank (METHOD 6.4). Where classes are left out, the ranks are those of
    the kept ones, and the window is the same share of them (rounded, and one rank at least). `random_half`: own class,
    and of the others the hardest ceil(pool_fraction * number), of which ceil(sample_fraction * pool) are drawn (METHOD
    6.7).

    Args:
        label_P: (...,P).
        kept_C: (...,1,C) bool, None: each class is kept.
        key_PC: uniform numbers (...,P,C), needed by `random_half`.
    """
    similarity_PC = similarity_PC.detach()
    every = kept_C is None
    if kept_C is None:
        kept_C = torch.ones_like(similarity_PC[..., :1, :], dtype=torch.bool)
    if negatives == "all":
        return whole_counts(label_P, kept_C).to(similarity_PC.dtype)
    own_PC = _one_hot(label_P, similarity_PC.shape[-1])
    kept_PC = kept_C.expand_as(own_PC)
    if negatives == "ranks":
        # The nearest may be the pixel's true class, pseudo labels being noisy: hence a first rank above 0.
        # Who wins a tie matters for a dead pixel alone (similarity 0 to all), whose gradient the ReLU before stops.
        candidates_PC, num_classes = similarity_PC.masked_fill(~kept_PC, -torch.inf), similarity_PC.shape[-1]
        order_PR = candidates_PC.topk(min(rank_end, num_classes)).indices
        if every:
            order_PR = order_PR[..., rank_start:]
            ranked_PR = torch.ones_like(order_PR, dtype=similarity_PC.dtype)
        else:  # the same share of those that are left
            num_kept_P1 = kept_C.sum(-1, keepdim=True).double()
            start_P1 = torch.minimum((num_kept_P1 * rank_start / num_classes).round(), num_kept_P1 - 1)
            end_P1 = torch.maximum((num_kept_P1 * rank_end / num_classes).round(), start_P1 + 1)
            place_R = torch.arange(order_PR.shape[-1], device=order_PR.device)
            in_window_PR = (place_R >= start_P1) & (place_R < end_P1)
            ranked_PR = (in_window_PR & kept_PC.gather(-1, order_PR)).to(similarity_PC.dtype)
        return own_PC.to(similarity_PC.dtype).scatter_add(-1, order_PR, ranked_PR)
    other_PC = kept_PC & ~own_PC
    pool_P1 = _ceil(pool_fraction * other_PC.sum(-1, keepdim=True).double())
    order_PC = similarity_PC.masked_fill(~other_PC, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    pool_PC = other_PC & (_places(order_PC) < pool_P1)
    key_PC = needed(key_PC, "negatives: random_half").to(similarity_PC.device).masked_fill(~pool_PC, torch.inf)
    drawn_PC = _places(key_PC.argsort(dim=-1, stable=True)) < _ceil(sample_fraction * pool_P1)
    return (own_PC | (pool_PC & drawn_PC)).to(similarity_PC.dtype)


def hard_pixel_weights(
    similarity_VG: Tensor,
    label_VG: Tensor,
    key_VG: Tensor | None,
    *,
    num_classes: int,
    hard_pixels: HardPixels,
    hard_pool_fraction: float,
    intra_mean: IntraMean,
) -> Tensor:
    """Weight of each pixel's loss (V,G) float64: hard pixel sampling and the mean of a view in one (METHOD 6.4, 6.7).

    Of a class's L pixels, h = floor(L/2): `all` takes every one, `official` h at random and the last h of the first
    int(hard_pool_fraction * L) by ascending similarity, `paper` h at random and the h least similar; a pixel taken
    twice counts twice. `intra_mean`: over the pixels taken; or per class and then over the classes that have a pixel,
    a class of which none is taken adding 0 (METHOD 6.6 #10).

    Args:
        similarity_VG: of each pixel to its own class's prototype.
        label_VG: class of each pixel; `num_classes` for a pixel without loss.
        key_VG: uniform numbers, None for `all`; the random half are the h smallest of a class.
    """
    num_views, num_bins = len(label_VG), num_classes + 1  # a bin a view and class; the last of a view has no loss
    bin_VG = label_VG + num_bins * torch.arange(num_views, device=label_VG.device)[:, None]
    size_B = torch.zeros(num_views * num_bins, dtype=torch.long, device=label_VG.device)
    size_B = size_B.scatter_add(0, bin_VG.flatten(), torch.ones_like(bin_VG).flatten())
    taken_VG = torch.ones_like(label_VG)
    if hard_pixels != "all":
        key_VG = needed(key_VG, f"hard_pixels: {hard_pixels}")
        half_B = size_B // 2
        end_B = half_B if hard_pixels == "paper" else (hard_pool_fraction * size_B.double()).long()
        half_VG, end_VG = half_B[bin_VG], end_B[bin_VG]
        rank_VG = _rank_in_bin(similarity_VG, bin_VG, size_B)
        hard_VG = (rank_VG >= end_VG - half_VG) & (rank_VG < end_VG)
        taken_VG = (_rank_in_bin(key_VG, bin_VG, size_B) < half_VG).long() + hard_VG
    taken_VG = taken_VG * (label_VG < num_classes)
    if intra_mean == "pixel":
        return taken_VG / taken_VG.sum(1, keepdim=True).clamp(min=1).double()
    taken_B = torch.zeros_like(size_B).scatter_add(0, bin_VG.flatten(), taken_VG.flatten())
    num_present_V1 = (size_B.view(num_views, num_bins)[:, :-1] > 0).sum(1, keepdim=True)
    return taken_VG / (taken_B[bin_VG] * num_present_V1).clamp(min=1).double()


def needed(key: Tensor | None, rule: str) -> Tensor:
    """The key, or a ValueError that says which rule wants it."""
    if key is None:
        raise ValueError(f"{rule} draws at random: give both views their keys (View.keys, made by pixel_keys)")
    return key


def _one_hot(label_P: Tensor, num_classes: int) -> Tensor:
    return label_P[..., None] == torch.arange(num_classes, device=label_P.device)


def _ceil(x: Tensor) -> Tensor:
    return (x - 1e-9).ceil()  # a whole number stays it, whatever the last bit of the product


def _places(order_PC: Tensor) -> Tensor:
    """Inverse of the permutation in each row."""
    place_PC = torch.arange(order_PC.shape[-1], device=order_PC.device).expand_as(order_PC)
    return torch.empty_like(order_PC).scatter_(-1, order_PC, place_PC)


def _rank_in_bin(value_VG: Tensor, bin_VG: Tensor, size_B: Tensor) -> Tensor:
    """Place of each pixel among those of its bin by rising value; equal ones in order of index."""
    value_M, bin_M = value_VG.flatten(), bin_VG.flatten()
    order_M = value_M.argsort(stable=True)
    order_M = order_M[bin_M[order_M].argsort(stable=True)]
    start_B = size_B.cumsum(0) - size_B
    place_M = torch.arange(len(order_M), device=order_M.device) - start_B[bin_M[order_M]]
    return torch.empty_like(order_M).scatter_(0, order_M, place_M).view_as(bin_VG)

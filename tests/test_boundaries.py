"""IRN's affinity, losses and walk against the official values, and split over workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from torch import Tensor

from ppc.affinity import PairLabels, affinity_losses, displacements, pair_labels, random_walk
from ppc.boundaries import (
    boundary_affinity,
    boundary_transition,
    confident_labels,
    displacement_losses,
    enlarge,
    path,
)
from ppc.cam import seed_from_cam
from ppc.prototypes import ALONE, Workers

LOSSES = sorted(file.stem for file in GOLDEN.glob("irn_loss_*.npz"))
WALKS = sorted(file.stem for file in GOLDEN.glob("irn_rw_*.npz"))
F64_GRADIENT = 2e-7  # computed in float64, stored in float32


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def in_our_order(g: dict[str, np.ndarray], values: np.ndarray, radius: int) -> np.ndarray:
    """Recorded values (..., pairs, P) with the displacements in the order of `displacements`, on the "from" grid."""
    recorded = [tuple(int(v) for v in row) for row in g["search_dst"]]
    order = [recorded.index(shift) for shift in displacements(radius)]
    h, w = g["label_map"].shape[1:]
    return values[..., order, :].reshape(*values.shape[:-2], len(order), h - radius + 1, w - 2 * radius + 2)


@pytest.mark.parametrize("name", LOSSES)
def test_paths_are_the_official_ones(name: str) -> None:
    g = golden(name)
    recorded = {}
    for key in (key for key in g if key.startswith("paths_group")):
        for pixels in g[key]:
            found = {tuple(int(v) for v in pixel) for pixel in pixels}
            recorded[tuple(int(v) for v in pixels[0])] = found
    ours = {shift: set(path(shift)) for shift in displacements(int(g["meta_radius"]))}
    assert ours == recorded


def inputs(g: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[Tensor, Tensor, PairLabels, int]:
    radius = int(g["meta_radius"])
    edge = torch.from_numpy(g["edge_logit"]).to(dtype).requires_grad_()
    place = torch.from_numpy(g["dp"]).to(dtype).requires_grad_()
    return edge, place, pair_labels(torch.from_numpy(g["label_map"].astype(np.int64)), radius=radius), radius


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float64, "_f64", 1e-9), (torch.float32, "", 2e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_official_ones(
    name: str, dtype: torch.dtype, suffix: str, tolerance: float
) -> None:
    g = golden(name)
    edge, place, labels, radius = inputs(g, dtype)
    for kind, recorded in (("bg", "bg_pos"), ("fg", "fg_pos"), ("neg", "neg")):
        wanted = in_our_order(g, g[f"{recorded}_label"], radius)
        np.testing.assert_array_equal(getattr(labels, kind).numpy(), wanted > 0)
    affinity = boundary_affinity(edge, radius=radius)
    close(affinity, in_our_order(g, g["affinity"], radius), 2e-5)
    terms = affinity_losses(affinity, labels, workers=ALONE)
    moved = displacement_losses(place, labels, radius=radius, workers=ALONE)
    close(4 * terms["bg"], g[f"bg_pos_aff_loss{suffix}"], tolerance)
    close(4 * terms["fg"], g[f"fg_pos_aff_loss{suffix}"], tolerance)
    close(2 * terms["neg"], g[f"neg_aff_loss{suffix}"], tolerance)
    close(2 * moved["fg"], g[f"dp_fg_loss{suffix}"], tolerance)
    close(2 * moved["bg"], g[f"dp_bg_loss{suffix}"], tolerance)
    total = sum(terms.values()) + sum(moved.values())
    close(total, g[f"total_loss{suffix}"], tolerance)
    for found, what in zip(torch.autograd.grad(total, [edge, place]), ("edge", "dp"), strict=True):
        close(found, g[f"grad_{what}{suffix}"], F64_GRADIENT if suffix else 1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if "_n2_" in name])
def test_shares_of_the_workers_add_up(name: str) -> None:
    g = golden(name)
    _, place, labels, radius = inputs(g, torch.float64)
    whole = displacement_losses(place, labels, radius=radius, workers=ALONE)
    counts = [torch.stack([labels.fg[i].sum(), labels.bg[i].sum()])[None] for i in range(2)]
    shares = []
    for i in range(2):
        mine = PairLabels(*(kind[i : i + 1] for kind in labels))
        both = Workers(i, lambda x: torch.cat(counts))
        shares.append(displacement_losses(place[i : i + 1], mine, radius=radius, workers=both))
    for term, value in whole.items():
        torch.testing.assert_close(shares[0][term] + shares[1][term], value, rtol=1e-12, atol=0)


def test_pixels_that_lie_as_they_should_cost_nothing() -> None:
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    place = -torch.stack([rows, columns])[None]  # each points at (0, 0)
    labels = pair_labels(torch.ones(1, 9, 12, dtype=torch.int64), radius=4)
    assert displacement_losses(place, labels, radius=4, workers=ALONE)["fg"] == 0


@pytest.mark.parametrize("name", WALKS)
def test_walk_and_mask_are_the_official_ones(name: str) -> None:
    g = golden(name)
    edge, cam = torch.from_numpy(g["edge"]).double(), torch.from_numpy(g["cam"]).double()
    step = boundary_transition(edge[0], radius=int(g["meta_radius"]), beta=float(g["meta_beta"]))
    walked = random_walk(cam * (1 - edge), step, log2_steps=int(g["meta_exp_times"]))
    close(walked, g["rw_f64"][:, 0], 1e-5)
    full = enlarge(walked, size=tuple(int(v) for v in g["image_hw"]), stride=4)
    close(full, g["rw_up_normalised"], 3e-5)  # recorded of the float32 run, which squares a dense matrix 8 times
    np.testing.assert_array_equal(seed_from_cam(full.numpy(), g["keys"], bg_score=float(g["meta_bg"])), g["label_f64"])


def test_walk_does_not_cross_a_sure_edge() -> None:
    edge, cam = torch.zeros(9, 12, dtype=torch.float64), torch.zeros(1, 9, 12, dtype=torch.float64)
    edge[:, 6], cam[:, :, :6] = 1, 1
    walked = random_walk(cam, boundary_transition(edge, radius=4, beta=10), log2_steps=5)
    assert walked[:, :, 7:].abs().max() == 0 and walked[:, :, :6].min() > 0.999


def test_labels_of_two_thresholds() -> None:
    g = golden("irn_label_60x70")
    by = [
        torch.from_numpy(seed_from_cam(g["high_res"].astype(np.float32), g["keys"], bg_score=float(g[f"meta_{which}"])))
        for which in ("fg", "bg")
    ]
    np.testing.assert_array_equal(confident_labels(by[0].long(), by[1].long()).numpy(), g["conf"])

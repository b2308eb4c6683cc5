"""The saliency loss of EPS against the official values and gradients, and split over workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from torch import Tensor

from ppc.saliency import saliency_loss, saliency_maps

GOLDENS = sorted(path.stem for path in GOLDEN.glob("eps_sal_*.npz"))


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def loss_of(g: dict[str, np.ndarray], cam: Tensor, part: slice = slice(None), bg_channel: int = -1) -> Tensor:
    return saliency_loss(
        cam[part],
        torch.from_numpy(g["saliency"]).to(cam.dtype)[part],
        torch.from_numpy(g["label"])[part],
        overlap_from=float(g["meta_tau"]),
        fg_weight=float(g["meta_lam"]),
        bg_channel=bg_channel,
        num_images_global=len(cam),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, dtype: torch.dtype) -> None:
    g = golden(name)
    suffix, tolerance = ("_f64", 1e-9) if dtype == torch.float64 else ("", 2e-5)
    cam = torch.from_numpy(g["cam"]).to(dtype).requires_grad_()
    saliency = F.interpolate(torch.from_numpy(g["saliency"]).to(dtype), cam.shape[2:], mode="nearest")[:, 0]
    maps = saliency_maps(
        cam.softmax(1), saliency, torch.from_numpy(g["label"]), overlap_from=float(g["meta_tau"]), bg_channel=-1
    )
    close(maps.fg_Nhw, g["fg_map"][:, 0], 2e-5)
    close(maps.bg_Nhw, g["bg_map"][:, 0], 2e-5)
    weight = float(g["meta_lam"])
    close(weight * maps.fg_Nhw + (1 - weight) * maps.bg_Nhw, g["sal_pred"][:, 0], 2e-5)
    loss = loss_of(g, cam)
    close(loss, g[f"loss{suffix}"], tolerance)
    (gradient,) = torch.autograd.grad(loss, cam)
    close(gradient, g[f"grad_cam{suffix}"], tolerance)


def test_both_sides_occur_in_the_official_values() -> None:
    sides = [np.abs(golden(name)["fg_map"]).max() > 0 for name in GOLDENS]
    assert any(sides) and len(GOLDENS) == 4


@pytest.mark.parametrize("name", GOLDENS)
def test_shares_of_workers_add_up(name: str) -> None:
    g = golden(name)
    cam = torch.from_numpy(g["cam"]).double()
    parts = [loss_of(g, cam, slice(i, i + 1)) for i in range(len(cam))]
    torch.testing.assert_close(torch.stack(parts).sum(), loss_of(g, cam), rtol=1e-12, atol=0)


def test_cells_that_are_not_valid_have_no_say() -> None:
    gen = torch.Generator().manual_seed(0)
    cam = torch.randn(2, 4, 6, 7, generator=gen, dtype=torch.float64) * 3
    saliency = torch.rand(2, 1, 6, 7, generator=gen, dtype=torch.float64)
    valid = torch.rand(2, 6, 7, generator=gen) < 0.6
    label = torch.tensor([[1.0, 0, 1], [0, 1, 1]])

    def loss(cam: torch.Tensor, saliency: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        return saliency_loss(
            cam, saliency, label, overlap_from=0.4, fg_weight=0.5, bg_channel=-1, num_images_global=2, valid_Nhw=valid
        )

    out = ~valid[:, None]
    wanted = loss(cam, saliency, valid)
    torch.testing.assert_close(
        loss(cam.masked_fill(out, 9.0), saliency.masked_fill(out, 1.0), valid), wanted, rtol=1e-12, atol=0
    )
    assert wanted != loss(cam, saliency, None)
    torch.testing.assert_close(
        loss(cam, saliency, torch.ones_like(valid)), loss(cam, saliency, None), rtol=1e-12, atol=0
    )


def test_the_background_may_be_any_channel() -> None:
    g = golden(GOLDENS[0])
    cam = torch.from_numpy(g["cam"]).double()
    first = torch.cat([cam[:, -1:], cam[:, :-1]], dim=1)
    torch.testing.assert_close(loss_of(g, first, bg_channel=0), loss_of(g, cam), rtol=1e-12, atol=0)


def test_a_present_class_off_the_salient_ground_counts_as_background() -> None:
    prob = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    prob[:, 0, :2], prob[:, 1, 2:] = 1, 1
    saliency = torch.zeros(1, 4, 4, dtype=torch.float64)
    saliency[:, :2] = 1
    maps = saliency_maps(prob, saliency, torch.ones(1, 2), overlap_from=0.4, bg_channel=-1)
    assert torch.equal(maps.fg_Nhw, prob[:, 0]) and torch.equal(maps.bg_Nhw, 1 - prob[:, 1])
    maps = saliency_maps(prob, saliency, torch.tensor([[0.0, 1.0]]), overlap_from=0.4, bg_channel=-1)
    assert not maps.fg_Nhw.any(), "a class without a tag is on no side"


def test_labels_of_another_class_list_are_refused() -> None:
    with pytest.raises(ValueError, match="labels of 2 classes for 3 channels, got 3"):
        saliency_maps(torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 3), overlap_from=0.4, bg_channel=-1)

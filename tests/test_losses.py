"""SEAM's losses against the official values and gradients, slow loops, and split over workers."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from torch import Tensor

from ppc.cam import fill_background, foreground, max_norm, one_hot_max
from ppc.losses import (
    ViewMaps,
    classification_loss,
    ecr_loss,
    er_loss,
    min_pool_loss,
    seam_losses,
    shown_channels,
    with_background_label,
)

GOLDENS = [
    "seam_loss_n1_64", "seam_loss_n2_40", "seam_loss_n3_c11_30x24", "ppc_seam_loss_n2_42", "ppc_seam_loss_n3_c15",
]  # fmt: skip
INPUTS = ("cam1", "rv1", "cam2", "rv2")
F64_GRADIENT = 2e-7  # computed in float64, stored in float32


def close(actual: Tensor, expected: np.ndarray, rtol: float) -> None:
    """Relative to the element, or to the array's largest where the element is nearly 0."""
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def inputs(data: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, tuple[int, int]]:
    names = {"cam1": "cam1", "rv1": "cam_rv1", "cam2": "cam2", "rv2": "cam_rv2"}
    leaves = {k: torch.from_numpy(data[v]).to(dtype).requires_grad_() for k, v in names.items()}
    h, w = data["meta_hw2"].tolist()
    return leaves, torch.from_numpy(data["label"]), (h, w)


def resize_to(size: tuple[int, int]):
    return lambda x: F.interpolate(x, size, mode="bilinear", align_corners=True)


def view_maps(t: dict[str, Tensor]) -> list[ViewMaps]:
    """Maps that have the size of their view already."""
    return [ViewMaps(t[f"cam{v}"], t[f"rv{v}"], tuple(t[f"cam{v}"].shape[2:])) for v in "12"]


def losses(t: dict[str, Tensor], label: Tensor, size: tuple[int, int], total: int, valid=None) -> dict[str, Tensor]:
    return seam_losses(
        *view_maps(t), label,
        to_target=resize_to(size), num_images_global=total, valid_Nhw=valid,
    )  # fmt: skip


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, [leaves[k] for k in INPUTS], retain_graph=True, allow_unused=True)
    return {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(INPUTS, found, strict=True)}


@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-9)])
@pytest.mark.parametrize("name", GOLDENS)
def test_seam_losses_are_the_official_ones(name, dtype, suffix, rtol):
    data = golden(name)
    t, label, size = inputs(data, dtype)
    terms = losses(t, label, size, len(label))
    official = {
        "loss_cls": terms["cls"] + terms["min_pool"],  # the official script adds these two
        "loss_er": terms["er"],
        "loss_ecr": terms["ecr"],
        "loss": sum(terms.values()),
    }
    for key, value in official.items():
        close(value, data[key + suffix], rtol)
    halves = {k: (data[f"loss_{k}1{suffix}"] + data[f"loss_{k}2{suffix}"]) / 2 for k in ("cls", "rvmin")}
    close(terms["cls"], halves["cls"], rtol)
    close(terms["min_pool"], halves["rvmin"], rtol)
    if suffix:
        for key, value in official.items():
            for leaf, gradient in gradients(value, t).items():
                if f"grad_{key}_{leaf}_f64" in data:
                    close(gradient, data[f"grad_{key}_{leaf}_f64"], F64_GRADIENT)
                else:
                    assert not gradient.any(), f"{key} has no gradient to {leaf}"


@pytest.mark.parametrize("name", GOLDENS)
def test_each_part_is_the_official_one(name):
    data = golden(name)
    t, label, size = inputs(data, torch.float32)
    n, y = len(label), with_background_label(label)[:, :, None, None]
    close(t["cam1"].mean((2, 3)), data["pred1"], 1e-5)
    close(t["cam2"].mean((2, 3)), data["pred2"], 1e-5)
    for view in "12":
        logit = t[f"cam{view}"].mean((2, 3))[:, 1:]
        close(classification_loss(logit, label, num_images_global=n), data[f"loss_cls{view}"], 1e-5)
        present = (t[f"rv{view}"] * y)[:, 1:]
        close(min_pool_loss(present, num_images_global=n), data[f"loss_rvmin{view}"], 1e-5)
    close(min_pool_loss(t["rv1"][:, 1:], num_images_global=n), data["min_pool_of_rv1_fg"], 1e-5)
    c1, c2 = resize_to(size)(max_norm(t["cam1"])) * y, max_norm(t["cam2"]) * y
    r1, r2 = resize_to(size)(max_norm(t["rv1"])) * y, max_norm(t["rv2"]) * y
    hot1, hot2 = one_hot_max(fill_background(c1)), one_hot_max(fill_background(c2))
    close(hot1, data["cam1_norm_down_bg"], 1e-5)
    close(hot2, data["cam2_norm_bg"], 1e-5)
    close(r1, data["cam_rv1_norm_down"], 1e-5)
    close(r2, data["cam_rv2_norm"], 1e-5)
    for hot, refined, key in ((hot2, r1, "loss_ecr1"), (hot1, r2, "loss_ecr2")):
        ecr = ecr_loss(hot, refined, num_channels=hot.shape[1], num_images_global=n, valid_Nhw=None)
        close(ecr, data[key], 1e-5)


def drawn(seed: int, n: int = 3, c: int = 5, hw: tuple[int, int] = (6, 7)) -> tuple[dict[str, Tensor], Tensor]:
    gen = torch.Generator().manual_seed(seed)
    sizes = {"cam1": (12, 13), "rv1": (12, 13), "cam2": hw, "rv2": hw}
    t = {k: torch.randn(n, c, *s, generator=gen, dtype=torch.float64).requires_grad_() for k, s in sizes.items()}
    return t, torch.randint(0, 2, (n, c - 1), generator=gen)


@pytest.mark.parametrize("shares", [(1, 3), (2, 2), (1, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_workers_add_up_to_one(shares, masked):
    t, label = drawn(0, n=4)
    valid = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(5)) < 0.6 if masked else None
    whole = losses(t, label, (6, 7), 4, valid)
    parts, first = [], 0
    for share in shares:
        at = slice(first, first + share)
        part = None if valid is None else valid[at]
        parts.append(losses({k: v[at] for k, v in t.items()}, label[at], (6, 7), 4, part))
        first += share
    for key, value in whole.items():
        together = sum(part[key] for part in parts)
        torch.testing.assert_close(together, value, rtol=1e-12, atol=0)
        for leaf, gradient in gradients(value, t).items():
            torch.testing.assert_close(gradients(together, t)[leaf], gradient, rtol=1e-9, atol=1e-15)


def slow_min_pool(maps: Tensor) -> float:
    out = 0.0
    for image in maps:
        tops = sorted(max(pixel) for pixel in image.flatten(1).T.tolist())
        k = len(tops) // 4
        out += sum(max(v, 0) for v in tops[:k]) / k
    return out / len(maps)


def slow_gaps(a: Tensor, b: Tensor, valid: Tensor, share: float) -> float:
    out = 0.0
    for n in range(len(a)):
        cells = [(i, j) for i, j in np.ndindex(*valid.shape[1:]) if valid[n, i, j]]
        gaps = sorted(
            (abs(float(a[n, c, i, j] - b[n, c, i, j])) for i, j in cells for c in range(a.shape[1])), reverse=True
        )
        top = gaps[: int(len(gaps) * share)]
        out += sum(top) / len(top) if top else 0.0
    return out / len(a)


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_their_loops(seed):
    gen = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(3, 4, 5, 6, generator=gen, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(3, 5, 6, generator=gen) < 0.5
    for mask in (valid, None):
        cells = torch.ones_like(valid) if mask is None else mask
        er = er_loss(a, b, num_classes=4, num_images_global=3, valid_Nhw=mask)
        ecr = ecr_loss(a, b, num_channels=4, num_images_global=3, valid_Nhw=mask)
        assert float(er) == pytest.approx(slow_gaps(a, b, cells, 1.0), rel=1e-12)
        assert float(ecr) == pytest.approx(slow_gaps(a, b, cells, 0.2), rel=1e-12)
    assert float(min_pool_loss(a, num_images_global=3)) == pytest.approx(slow_min_pool(a), rel=1e-12)
    label = torch.randint(0, 2, (3, 4), generator=gen)
    logit = a.mean((2, 3))
    pairs = zip(logit.flatten().tolist(), label.flatten().tolist(), strict=True)
    slow = sum(math.log1p(math.exp(-x)) if y else math.log1p(math.exp(x)) for x, y in pairs) / 12
    assert float(classification_loss(logit, label, num_images_global=3)) == pytest.approx(slow, rel=1e-12)


def test_a_full_mask_changes_nothing_and_masked_cells_do_not_matter():
    t, label = drawn(1)
    full = torch.ones(3, 6, 7, dtype=torch.bool)
    for key, value in losses(t, label, (6, 7), 3).items():
        torch.testing.assert_close(losses(t, label, (6, 7), 3, full)[key], value, rtol=1e-12, atol=0)
    a, b = t["cam2"].detach(), t["rv2"].detach()
    valid = full.clone()
    valid[0, 2:4], valid[1] = False, False  # a part of an image, and a whole one
    other = torch.where(valid[:, None], a, a + 100)
    for loss in (partial(er_loss, num_classes=5), partial(ecr_loss, num_channels=5)):
        value = loss(a, b, num_images_global=3, valid_Nhw=valid)
        assert torch.isfinite(value)
        assert value == loss(other, b, num_images_global=3, valid_Nhw=valid)
        assert value != loss(other, b, num_images_global=3, valid_Nhw=None)


def test_no_gradient_where_seam_has_none():
    t, label = drawn(2)
    terms = losses(t, label, (6, 7), 3)
    for leaf, reached in {"cls": "cam", "er": "cam", "min_pool": "rv", "ecr": "rv"}.items():
        for name, gradient in gradients(terms[leaf], t).items():
            assert bool(gradient.any()) == name.startswith(reached), (leaf, name)
    assert not gradients(terms["cls"] + terms["er"], t)["cam1"][:, 0].any(), "background is not classified"


def test_background_last_is_a_permutation():
    t, label = drawn(3)
    last = {k: torch.cat([v[:, 1:], v[:, :1]], 1) for k, v in t.items()}
    terms = seam_losses(
        *view_maps(last), label,
        to_target=resize_to((6, 7)), num_images_global=3, valid_Nhw=None, bg_channel=4, keep_channel=4,
    )  # fmt: skip
    for key, value in losses(t, label, (6, 7), 3).items():
        torch.testing.assert_close(terms[key], value, rtol=1e-12, atol=0)


def test_inputs_stay_as_they_are():
    t, label = drawn(4)
    before = {k: v.detach().clone() for k, v in t.items()}, label.clone()
    losses(t, label, (6, 7), 3, torch.rand(3, 6, 7) < 0.5)
    assert all(torch.equal(t[k], v) for k, v in before[0].items()) and torch.equal(label, before[1])


def seam_on_all_channels(t, label, sizes, *, bg: int, keep: int) -> dict[str, Tensor]:
    """METHOD 4.2 as it is written: every channel at full size, absent ones times their label of 0."""
    y = with_background_label(label, bg_channel=bg).to(t["cam1"])[:, :, None, None]
    full = {k: resize_to(sizes[int(k[-1]) - 1])(v) for k, v in t.items()}
    at = {k: (resize_to(sizes[1])(max_norm(v)) if k[-1] == "1" else max_norm(v)) * y for k, v in full.items()}
    fg = {k: foreground(v, bg_channel=bg) for k, v in at.items()}
    hot = {k: one_hot_max(fill_background(at[k], bg_channel=bg), keep_channel=keep).detach() for k in ("cam1", "cam2")}
    n, channels = len(label), y.shape[1]
    pooled = [min_pool_loss(foreground(full[f"rv{v}"] * y, bg_channel=bg), num_images_global=n) for v in "12"]
    logits = [foreground(full[f"cam{v}"], bg_channel=bg).mean((2, 3)) for v in "12"]
    ecr = partial(ecr_loss, num_channels=channels, num_images_global=n, valid_Nhw=None)
    return {
        "cls": sum(classification_loss(x, label, num_images_global=n) for x in logits) / 2,
        "min_pool": sum(pooled) / 2,
        "er": (fg["cam1"] - fg["cam2"]).abs().mean(),
        "ecr": ecr(hot["cam2"], at["rv1"]) + ecr(hot["cam1"], at["rv2"]),
    }


@pytest.mark.parametrize(("bg", "keep"), [(0, 0), (8, 8), (0, 1), (8, 0)])
def test_leaving_absent_classes_out_changes_nothing(bg, keep):
    """Values and gradients; images with all classes, one, some and none; maps below the size of their view."""
    gen = torch.Generator().manual_seed(6)
    grids = {"cam1": (5, 6), "rv1": (5, 6), "cam2": (3, 4), "rv2": (3, 4)}
    t = {k: torch.randn(4, 9, *grid, generator=gen, dtype=torch.float64) for k, grid in grids.items()}
    t = {k: (v.relu() if k.startswith("rv") else v).requires_grad_() for k, v in t.items()}
    label = torch.zeros(4, 8, dtype=torch.int64)
    label[0], label[1, 3], label[2, [0, 2, 7]] = 1, 1, 1
    sizes = (13, 11), (7, 6)
    whole = seam_on_all_channels(t, label, sizes, bg=bg, keep=keep)
    for max_tags in (None, 8):
        terms = seam_losses(
            *(ViewMaps(t[f"cam{v}"], t[f"rv{v}"], size) for v, size in zip("12", sizes, strict=True)), label,
            to_target=resize_to(sizes[1]), num_images_global=4, valid_Nhw=None, bg_channel=bg, keep_channel=keep,
            max_tags=max_tags,
        )  # fmt: skip
        for key, value in whole.items():
            torch.testing.assert_close(terms[key], value, rtol=1e-12, atol=0)
            for leaf, gradient in gradients(value, t).items():
                torch.testing.assert_close(gradients(terms[key], t)[leaf], gradient, rtol=1e-9, atol=1e-15)


def test_images_without_any_class_have_their_losses():
    t, label = drawn(7)
    terms = losses(t, torch.zeros_like(label), (6, 7), 3)
    assert terms["er"].item() == 0 and all(torch.isfinite(v) for v in terms.values())


def test_shown_channels_are_the_background_and_the_classes_of_an_image():
    label = torch.tensor([[1, 0, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    channels, shown = shown_channels(label, first=[0])
    assert channels.tolist() == [[0, 3, 4], [0, 1, 2], [0, 1, 2]] and shown.tolist() == [
        [1, 1, 1],
        [1, 0, 0],
        [1, 1, 0],
    ]
    assert torch.equal(shown_channels(label, first=[0], max_tags=2)[0], channels)
    assert shown_channels(label[1:2], first=[0, 4])[0].tolist() == [[0, 4, 1]]

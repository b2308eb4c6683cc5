"""Contrast: golden values of the official code, a slow oracle from the formulas, properties, one worker = many."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import GOLDEN, golden
from torch import Tensor

from ppc.contrast import PreparedViews, View, contrast_losses, contrast_terms, prepare_views
from ppc.mining import Keys, pixel_keys
from ppc.prototypes import ALONE, Gather, Workers, normalise_map, pseudo_label, top_k_mask, weighted_prototypes

TERMS = {"cross_prototype": "cp", "cross_cam": "cc", "intra_view": "intra"}
PREPARE: dict[str, Any] = {
    "map_norm": "minmax",
    "bg_score": 0.2,
    "bg_index": 0,
    "top_k": 5,
    "tie_rule": "first_index",
    "prototype_pixels": "all",
    "prototype_features": "raw",
    "bg_prototype_weight": "constant",
    "absent_classes": "keep",
}
MINE: dict[str, Any] = {
    "temperature": 0.1,
    "negatives": "ranks",
    "rank_start": 1,
    "rank_end": 4,
    "pool_fraction": 0.6,
    "sample_fraction": 0.5,
    "hard_pixels": "official",
    "hard_pool_fraction": 0.6,
    "intra_mean": "class",
}
OFFICIAL = PREPARE | MINE | {"view_reduction": "mean"}
PAPER = OFFICIAL | {
    "prototype_pixels": "assigned",
    "bg_prototype_weight": "one_minus_fg",
    "absent_classes": "drop",
    "negatives": "random_half",
    "hard_pixels": "paper",
    "intra_mean": "pixel",
    "view_reduction": "sum",
}
CHOICES: dict[str, list[Any]] = {
    "map_norm": ["minmax", "max"],
    "bg_index": [0, 5],
    "bg_score": [0.45],
    "top_k": [1, 1000],
    "tie_rule": ["first_index", "random"],
    "prototype_pixels": ["all", "assigned"],
    "prototype_features": ["raw", "unit"],
    "bg_prototype_weight": ["constant", "one_minus_fg"],
    "absent_classes": ["keep", "drop"],
    "temperature": [0.01, 0.5],
    "negatives": ["all", "ranks", "random_half"],
    "rank_end": [6],
    "pool_fraction": [0.3],
    "sample_fraction": [1.0],
    "hard_pixels": ["all", "official", "paper"],
    "hard_pool_fraction": [0.8, 0.3],
    "intra_mean": ["class", "pixel"],
    "view_reduction": ["mean", "sum"],
}
VARIANTS: dict[str, dict[str, Any]] = {"official": OFFICIAL, "paper": PAPER} | {
    f"{name}-{knob}={value}": base | {knob: value}
    for name, base in (("official", OFFICIAL), ("paper", PAPER))
    for knob, values in CHOICES.items()
    for value in values
    if base[knob] != value
}


@dataclass
class Batch:
    source: View
    target: View
    image_label_NC: Tensor


def make_batch(
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    images: slice = slice(None),
    shape: tuple[int, int, int, int, int] = (4, 6, 5, 4, 5),
    bg_index: int = 0,
    warped: bool = False,
    silent: float = 0.2,
) -> Batch:
    """Random views of N images, C classes, D channels on an H x W grid, with silent maps, ties and dead features."""
    num_images, num_classes, dim, height, width = shape
    g = torch.Generator().manual_seed(seed)
    label_NC = torch.rand(num_images, num_classes, generator=g) < 0.4
    label_NC[:, bg_index] = True
    silent_C = torch.rand(num_classes, generator=g) < silent
    views = []
    for _ in range(2):
        feature = torch.rand(num_images, dim, height, width, generator=g, dtype=torch.float64) ** 2
        feature[:, :, 0, 1] = 0
        cam = torch.randn(num_images, num_classes, height, width, generator=g, dtype=torch.float64) + 0.3
        cam[0] = cam[0].abs() + 0.2
        cam[:, silent_C] = -1.0
        valid = torch.rand(num_images, height, width, generator=g) < 0.8 if warped else None
        local = range(num_images)[images]
        keys = pixel_keys(
            g,
            num_images_global=num_images,
            first_image=local.start,
            num_images_local=len(local),
            num_classes=num_classes,
            height=height,
            width=width,
        )
        leaf = feature[images].to(dtype).requires_grad_()
        views.append(View(leaf, cam[images].to(dtype), None if valid is None else valid[images], keys))
    return Batch(views[0], views[1], label_NC[images].to(dtype))


def run(batch: Batch, knobs: dict[str, Any], workers: Workers = ALONE) -> dict[str, Tensor]:
    """Losses, diagnostics and the gradient of an uneven sum of the terms."""
    losses = contrast_losses(batch.source, batch.target, batch.image_label_NC, workers=workers, **knobs)
    total = losses["cross_prototype"] + 0.7 * losses["cross_cam"] + 1.3 * losses["intra_view"]
    source, target = torch.autograd.grad(total, (batch.source.feature_NDHW, batch.target.feature_NDHW))
    return {name: loss.detach() for name, loss in losses.items()} | {"source": source, "target": target}


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Relative to the value, and to the largest value of the array: entries of a gradient cancel to nearly nothing."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=0), err_msg=what
    )


# ---- golden: the official code's numbers (tests/golden/README.md): draws and tied indices are fed

GOLDENS = sorted(path.stem for path in GOLDEN.glob("contrast_*.npz"))


def golden_views(g: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[list[Tensor], list[View], dict[str, Any]]:
    """The recorded inputs as leaves and as views on the grid, and the recorded constants."""
    grid = tuple(int(side) for side in g["meta_grid"])
    leaves, views = [], []
    for v in "12":
        leaf = torch.from_numpy(g[f"f_proj{v}"]).to(dtype).requires_grad_()
        cam = torch.from_numpy(g[f"cam_rv{v}"]).to(dtype)
        on_grid = [F.interpolate(x, grid, mode="bilinear", align_corners=True) for x in (leaf, cam)]
        label_P, hard_P = g[f"pseudo_label{v}"].ravel(), np.ones(g[f"pseudo_label{v}"].size)
        for name in g:
            if name.startswith(f"draw{v}_class"):
                hard_P[np.flatnonzero(label_P == int(name[-2:]))[g[name]]] = 0.0
        hard = torch.from_numpy(hard_P).view(len(leaf), *grid)
        leaves.append(leaf)
        views.append(View(on_grid[0], on_grid[1], None, Keys(hard, hard, hard[..., None])))
    knobs = OFFICIAL | {
        "bg_score": float(g["meta_bg"]),
        "top_k": int(g["meta_K"]),
        "temperature": float(g["meta_tau"]),
        "rank_start": int(g["meta_neg_skip"]),
        "rank_end": int(g["meta_neg_topk"]),
    }
    return leaves, views, knobs


def recorded_mask(g: dict[str, np.ndarray], num_pixels: int, suffix: str) -> Tensor:
    indices = torch.stack([torch.from_numpy(g[f"top_indices{v}{suffix}"]).long() for v in "12"])
    return torch.zeros(*indices.shape[:2], num_pixels, dtype=torch.bool).scatter(2, indices, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, dtype: torch.dtype) -> None:
    g = golden(name)
    tolerance, suffix = (1e-9, "_f64") if dtype == torch.float64 else (1e-5, "")
    leaves, views, knobs = golden_views(g, dtype)
    label_NC = torch.from_numpy(g["label"])
    num_pixels = g["pseudo_label1"].size
    thin = (..., slice(None, None, 2), slice(None, None, 2)) if g.get("meta_thinned", 0) else (...,)

    values = []
    for view, v in zip(views, "12", strict=True):
        cam = normalise_map(view.map_NCHW, None, map_norm="minmax", bg_score=knobs["bg_score"], bg_index=0)
        assert_close(cam[thin], g[f"norm_cam{v}"], 1e-5, "normalised map")
        np.testing.assert_array_equal(pseudo_label(cam, label_NC), g[f"pseudo_label{v}"])
        values.append(cam.transpose(0, 1).flatten(1))
    weight_VCP, recorded_VCP = torch.stack(values), recorded_mask(g, num_pixels, suffix)
    chosen_VCP = top_k_mask(weight_VCP, None, top_k=knobs["top_k"], tie_rule="first_index", workers=ALONE)
    untied_VC = torch.from_numpy(np.stack([g["tie_at_boundary1"], g["tie_at_boundary2"]])) == 0
    assert untied_VC.any()
    assert torch.equal(chosen_VCP[untied_VC], recorded_VCP[untied_VC])
    top_values = weight_VCP.masked_fill(~chosen_VCP, -torch.inf).sort(dim=2, descending=True).values
    assert_close(top_values[..., : knobs["top_k"]], np.stack([g["top_values1"], g["top_values2"]]), 1e-5)

    features = [view.feature_NDHW for view in views]
    fed_VCP = torch.where(recorded_VCP, weight_VCP, 0.0)
    proto_VCD, exists_VC = weighted_prototypes(features, fed_VCP, prototype_features="raw", workers=ALONE)
    assert exists_VC.all()
    assert_close(proto_VCD, np.stack([g[f"prototypes1{suffix}"], g[f"prototypes2{suffix}"]]), tolerance, "prototypes")

    prepare = {knob: knobs[knob] for knob in PREPARE}
    views_ = prepare_views(views[0], views[1], label_NC, workers=ALONE, **prepare)
    own_VC1 = untied_VC[..., None]
    assert_close(views_.proto_VCD.where(own_VC1, 0.0), proto_VCD.where(own_VC1, 0.0), tolerance, "own prototypes")
    views_ = replace(views_, proto_VCD=proto_VCD)
    losses = contrast_terms(views_, workers=ALONE, **{knob: knobs[knob] for knob in MINE})
    weights = {"cp": float(g["meta_alpha"]), "cc": float(g["meta_alpha"]), "intra": float(g["meta_beta"])}
    terms: dict[str, Tensor] = {}
    for name_, short in TERMS.items():
        official = np.stack([g[f"loss_{short}{v}{suffix}"] for v in "12"])
        assert_close(losses[name_].detach(), official, tolerance, short)
        terms[short] = weights[short] * losses[name_].mean()
    terms["total"] = terms["cp"] + terms["cc"] + terms["intra"]
    checked = 0
    for short, term in terms.items():
        assert_close(term.detach(), g[f"term_{short}{suffix}"], tolerance, short)
        grads = torch.autograd.grad(term, leaves, retain_graph=True)
        for i, grad in enumerate(grads):
            what = f"grad_{short}_f{i + 1}{suffix}"
            if what in g:
                assert_close(grad[thin], g[what], tolerance, what)
                checked += 1
    assert checked >= 2 or (suffix and "meta_thinned" in g)


# ---- oracle: plain loops from METHOD 6.2-6.7; classes are numbers, pixels are (image, row, column)

Pixel = tuple[int, int, int]


class SlowView:
    """One view, said slowly."""

    def __init__(self, view: View, label_NC: Tensor, k: dict[str, Any]) -> None:
        self.k, self.num_classes = k, label_NC.shape[1]
        assert view.keys is not None
        feature, cam, keys = view.feature_NDHW.detach().tolist(), view.map_NCHW.tolist(), view.keys
        num_images, _, height, width = view.map_NCHW.shape
        self.pixels = [(n, r, c) for n in range(num_images) for r in range(height) for c in range(width)]
        self.valid = {p: view.valid_NHW is None or bool(view.valid_NHW[p]) for p in self.pixels}
        self.feature = {(n, r, c): [plane[r][c] for plane in feature[n]] for n, r, c in self.pixels}
        self.hard_key = {p: float(keys.hard_NHW[p]) for p in self.pixels}
        self.tie_key = {p: float(keys.tie_NHW[p]) for p in self.pixels}
        self.negative_key = {p: keys.negative_NHWC[p].tolist() for p in self.pixels}
        own = [[c for c in range(self.num_classes) if row[c] > 0] for row in label_NC.tolist()]
        self.score = {(c, p): self.normalised(cam, c, p) for c in range(self.num_classes) for p in self.pixels}
        self.label = {p: max(own[p[0]], key=lambda c: self.score[c, p]) for p in self.pixels}  # noqa: B023
        self.weight = dict(self.score)
        if k["bg_prototype_weight"] == "one_minus_fg":
            for p in self.pixels:
                self.weight[k["bg_index"], p] = 1 - max(
                    [0.0] + [self.score[c, p] for c in own[p[0]] if c != k["bg_index"]]
                )
        self.proto = {c: self.prototype(c) for c in range(self.num_classes)}
        self.assigned = {self.label[p] for p in self.pixels if self.valid[p]}
        exists = {c for c in self.proto if self.proto[c] is not None}
        self.positive = exists & self.assigned if k["absent_classes"] == "drop" else exists
        self.kept = self.positive if k["absent_classes"] == "drop" else set(self.proto)

    def normalised(self, cam: Any, c: int, pixel: Pixel) -> float:
        n = pixel[0]
        if c == self.k["bg_index"]:
            return float(self.k["bg_score"])
        values = [max(cam[n][c][p[1]][p[2]], 0.0) for p in self.pixels if p[0] == n and self.valid[p]]
        high, low = max(values, default=0.0), min(values, default=0.0)
        value: float = max(cam[n][c][pixel[1]][pixel[2]], 0.0)
        if self.k["map_norm"] == "max":
            return value / (high + 1e-5)
        return ((0.0 if value < low + 1e-5 else value) - (low + 1e-5)) / (high - low + 1e-5)

    def prototype(self, c: int) -> list[float] | None:
        usable = [p for p in self.pixels if self.valid[p]]
        if self.k["prototype_pixels"] == "assigned":
            usable = [p for p in usable if self.label[p] == c]
        tie = self.tie_key if self.k["tie_rule"] == "random" else {p: i for i, p in enumerate(self.pixels)}
        chosen = sorted(usable, key=lambda p: (-self.weight[c, p], tie[p]))[: self.k["top_k"]]
        total = sum(self.weight[c, p] for p in chosen)
        if total == 0:
            return None
        average = [0.0] * len(self.feature[self.pixels[0]])
        for p in chosen:
            v = unit(self.feature[p]) if self.k["prototype_features"] == "unit" else self.feature[p]
            average = [a + self.weight[c, p] * x / total for a, x in zip(average, v, strict=True)]
        return unit(average)

    def similarity(self, p: Pixel, c: int, protos: SlowView) -> float:
        proto = protos.proto[c]
        return 0.0 if proto is None else sum(a * b for a, b in zip(unit(self.feature[p]), proto, strict=True))

    def nce(self, p: Pixel, y: int, protos: SlowView, others: list[int]) -> float:
        """-log of the share of the positive among itself and `others`."""
        s, t = self.similarity, self.k["temperature"]
        return math.log1p(sum(math.exp((s(p, c, protos) - s(p, y, protos)) / t) for c in others))

    def negatives(self, p: Pixel) -> list[int]:
        y = self.label[p]
        others = [c for c in self.kept if c != y]
        if self.k["negatives"] == "all":
            return others
        if self.k["negatives"] == "ranks":
            ranked = sorted(self.kept, key=lambda c: -self.similarity(p, c, self))
            kept, num_classes = len(ranked), len(self.proto)  # the window is a share of the classes that are left
            start = min(round(kept * self.k["rank_start"] / num_classes), kept - 1)
            return ranked[start : max(round(kept * self.k["rank_end"] / num_classes), start + 1)]
        pool = sorted(others, key=lambda c: -self.similarity(p, c, self))
        pool = pool[: math.ceil(self.k["pool_fraction"] * len(others) - 1e-9)]
        take = math.ceil(self.k["sample_fraction"] * len(pool) - 1e-9)
        return sorted(pool, key=lambda c: self.negative_key[p][c])[:take]

    def hard(self, members: list[Pixel]) -> list[Pixel]:
        half = len(members) // 2
        drawn = sorted(members, key=lambda p: self.hard_key[p])[:half]
        rising = sorted(members, key=lambda p: self.similarity(p, self.label[p], self))
        if self.k["hard_pixels"] == "all":
            return members
        if self.k["hard_pixels"] == "paper":
            return drawn + rising[:half]
        pool = rising[: int(self.k["hard_pool_fraction"] * len(members))]
        return drawn + pool[-half:] if half else []

    def intra(self) -> float:
        pixels = [p for p in self.pixels if self.valid[p] and self.label[p] in self.positive]
        per_class = [
            self.hard([p for p in pixels if self.label[p] == c]) for c in sorted({self.label[p] for p in pixels})
        ]
        losses = [[self.nce(p, self.label[p], self, self.negatives(p)) for p in taken] for taken in per_class]
        if self.k["intra_mean"] == "pixel":
            return mean([x for some in losses for x in some])
        return mean([mean(some) for some in losses])

    def cross(self, labels: SlowView, protos: SlowView) -> float:
        losses = []
        for p in self.pixels:
            y = labels.label[p]
            if self.valid[p] and labels.valid[p] and y in protos.positive:
                losses.append(self.nce(p, y, protos, [c for c in protos.kept if c != y]))
        return mean(losses)


def unit(v: list[float]) -> list[float]:
    length = max(math.sqrt(sum(x * x for x in v)), 1e-12)
    return [x / length for x in v]


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def slow_losses(batch: Batch, k: dict[str, Any]) -> dict[str, float]:
    s, t = (SlowView(view, batch.image_label_NC, k) for view in (batch.source, batch.target))
    share = 0.5 if k["view_reduction"] == "mean" else 1.0
    return {
        "cross_prototype": share * (s.cross(s, t) + t.cross(t, s)),
        "cross_cam": share * (s.cross(t, s) + t.cross(s, t)),
        "intra_view": share * (s.intra() + t.intra()),
    }


def without_dead(batch: Batch) -> Batch:
    """No pixel whose features are all 0: it ties with every prototype, and who wins is not defined."""
    for view in (batch.source, batch.target):
        view.feature_NDHW.data[:, :, 0, 1] = view.feature_NDHW.data[:, :, 1, 0].flip(1)
    return batch


@pytest.mark.parametrize("warped", [False, True], ids=["full", "warped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle(variant: str, warped: bool) -> None:
    knobs = VARIANTS[variant]
    # silent classes that stay have one prototype, and which of them is in a pool of negatives is then not defined
    silent = 0.0 if variant == "official-negatives=random_half" else 0.2
    batch = without_dead(make_batch(len(variant), warped=warped, bg_index=knobs["bg_index"], silent=silent))
    losses = contrast_losses(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **knobs)
    for term, expected in slow_losses(batch, knobs).items():
        assert expected > 0
        assert_close(losses[term].detach(), expected, 1e-10, term)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(1, 2, 3, 3, 3), (2, 3, 8, 2, 4), (3, 21, 4, 4, 3), (2, 81, 4, 3, 3)])
@pytest.mark.parametrize("base", [OFFICIAL, OFFICIAL | {"absent_classes": "drop"}, PAPER])
def test_oracle_of_other_sizes(base: dict[str, Any], shape: tuple[int, int, int, int, int], seed: int) -> None:
    num_classes = shape[1]
    knobs = base | {"rank_start": num_classes // 7, "rank_end": max(1, round(num_classes * 13 / 21)), "top_k": 1 + seed}
    knobs |= {"bg_index": num_classes - 1, "temperature": 0.05 * (1 + seed)}
    batch = without_dead(make_batch(seed, shape=shape, bg_index=num_classes - 1))
    losses = contrast_losses(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **knobs)
    for term, expected in slow_losses(batch, knobs).items():
        assert_close(losses[term].detach(), expected, 1e-10, term)


# ---- properties


def test_swapped_views_give_the_same_terms() -> None:
    for knobs in (OFFICIAL, PAPER):
        batch = make_batch(3, warped=True)
        there = run(batch, knobs)
        back = run(Batch(batch.target, batch.source, batch.image_label_NC), knobs)
        for name in TERMS:
            assert_close(back[name], there[name], 1e-12, name)
        assert_close(back["source"], there["target"], 1e-12)


def test_background_may_be_counted_from_the_end() -> None:
    for knobs in (OFFICIAL, PAPER):
        first, second = (run(make_batch(3, bg_index=5), knobs | {"bg_index": bg_index}) for bg_index in (5, -1))
        assert all(torch.equal(first[name], second[name]) for name in first) and first["bg_share"] > 0


def test_order_of_pixels_does_not_matter() -> None:
    """Tied pixels are told apart by their keys, which move with them."""
    knobs = PAPER | {"tie_rule": "random", "prototype_pixels": "all", "bg_prototype_weight": "constant"}
    batch = without_dead(make_batch(5))
    order = torch.randperm(4 * 5, generator=torch.Generator().manual_seed(0))

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(-2)[..., order].view_as(x)

    def shuffled(view: View) -> View:
        assert view.keys is not None
        keys = Keys(
            shuffle(view.keys.hard_NHW),
            shuffle(view.keys.tie_NHW),
            shuffle(view.keys.negative_NHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        )
        leaf = shuffle(view.feature_NDHW.detach()).requires_grad_()
        return replace(view, feature_NDHW=leaf, map_NCHW=shuffle(view.map_NCHW), keys=keys)

    straight = run(batch, knobs)
    mixed = run(Batch(shuffled(batch.source), shuffled(batch.target), batch.image_label_NC), knobs)
    for name in TERMS:
        assert_close(mixed[name], straight[name], 1e-12, name)
    assert_close(mixed["source"], shuffle(straight["source"]), 1e-12)


@pytest.mark.parametrize("base", [OFFICIAL, PAPER], ids=["official", "paper"])
def test_gradient_is_that_of_the_value(base: dict[str, Any]) -> None:
    """Labels, prototypes and draws are held: no gradient is said to flow through them."""
    batch = without_dead(make_batch(7, shape=(2, 4, 3, 2, 3), warped=True))
    prepare = {knob: base[knob] for knob in PREPARE}
    views = prepare_views(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **prepare)

    def total(source: Tensor, target: Tensor) -> Tensor:
        held: PreparedViews = replace(views, features=(source, target))
        mine = {knob: base[knob] for knob in MINE}
        return torch.stack(list(contrast_terms(held, workers=ALONE, **mine).values())).sum(1)

    inputs = (batch.source.feature_NDHW, batch.target.feature_NDHW)
    assert torch.autograd.gradcheck(total, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("base", [OFFICIAL, PAPER], ids=["official", "paper"])
def test_cold_temperature_stays_finite_in_float32(base: dict[str, Any]) -> None:
    result = run(without_dead(make_batch(2, torch.float32)), base | {"temperature": 0.01})
    assert all(torch.isfinite(value).all() for value in result.values())
    exact = run(without_dead(make_batch(2)), base | {"temperature": 0.01})
    assert_close(result["intra_view"], exact["intra_view"], 1e-4)


def test_half_precision_features_are_computed_in_float32() -> None:
    batch = without_dead(make_batch(4, torch.bfloat16))

    def in_float32(view: View) -> View:
        leaf = view.feature_NDHW.detach().float().requires_grad_()
        return replace(view, feature_NDHW=leaf, map_NCHW=view.map_NCHW.float())

    full = Batch(in_float32(batch.source), in_float32(batch.target), batch.image_label_NC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, single = run(batch, OFFICIAL), run(full, OFFICIAL)
    for name in TERMS:
        assert half[name].dtype == torch.float32 and half[name] == single[name]


def test_inputs_are_not_changed_and_maps_get_no_gradient() -> None:
    for knobs in (OFFICIAL, PAPER):
        batch = make_batch(6, warped=True)
        batch.source.map_NCHW.requires_grad_()
        before = [x.detach().clone() for x in (batch.source.map_NCHW, batch.source.feature_NDHW, batch.image_label_NC)]
        run(batch, knobs)
        after = (batch.source.map_NCHW, batch.source.feature_NDHW, batch.image_label_NC)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert batch.source.map_NCHW.grad is None


def test_excluded_pixels_decide_nothing() -> None:
    for knobs in (OFFICIAL, PAPER, OFFICIAL | {"map_norm": "max"}):
        batch = make_batch(8, warped=True)
        plain = run(batch, knobs)
        for view in (batch.source, batch.target):
            assert view.valid_NHW is not None
            outside = ~view.valid_NHW[:, None]
            view.map_NCHW.masked_fill_(outside, 50.0)
            view.feature_NDHW.data.masked_fill_(outside, 3.0)
        other = run(batch, knobs)
        for name in plain:
            assert_close(other[name], plain[name], 1e-12, name)
        assert batch.source.valid_NHW is not None
        assert not other["source"].masked_select(~batch.source.valid_NHW[:, None]).any()


def test_nothing_valid_is_a_loss_of_zero() -> None:
    for knobs in (OFFICIAL, PAPER):
        batch = make_batch(1)
        nothing = torch.zeros(4, 4, 5, dtype=torch.bool)
        source, target = replace(batch.source, valid_NHW=nothing), replace(batch.target, valid_NHW=nothing)
        result = run(Batch(source, target, batch.image_label_NC), knobs)
        assert all(result[name] == 0 for name in TERMS) and not result["source"].any()


def test_nan_in_a_map_reaches_the_loss() -> None:
    batch = make_batch(1)
    batch.source.map_NCHW[0, 0:2, 0, 0] = torch.nan
    losses = contrast_losses(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **OFFICIAL)
    assert losses["cross_prototype"].isnan()


def test_a_random_rule_without_keys_says_so() -> None:
    batch = make_batch(1)
    source, target = replace(batch.source, keys=None), replace(batch.target, keys=None)
    calm = OFFICIAL | {"hard_pixels": "all"}
    contrast_losses(source, target, batch.image_label_NC, workers=ALONE, **calm)
    for knob, value in (("hard_pixels", "paper"), ("tie_rule", "random"), ("negatives", "random_half")):
        with pytest.raises(ValueError, match=f"{knob}: {value}"):
            contrast_losses(source, target, batch.image_label_NC, workers=ALONE, **(calm | {knob: value}))
    with pytest.raises(ValueError, match="prototype_top_k"):
        contrast_losses(source, target, batch.image_label_NC, workers=ALONE, **(calm | {"top_k": 0}))


def test_silent_classes_share_the_official_background_prototype() -> None:
    """METHOD 6.3: a class that fires nowhere ties over all pixels as the background does."""
    batch = make_batch(9)
    for view in (batch.source, batch.target):
        view.map_NCHW[:, 2] = -1.0
    prepare = {knob: OFFICIAL[knob] for knob in PREPARE}
    views = prepare_views(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **prepare)
    assert_close(views.proto_VCD[:, 2], views.proto_VCD[:, 0], 1e-12)
    diagnostics = contrast_losses(batch.source, batch.target, batch.image_label_NC, workers=ALONE, **OFFICIAL)
    fires = torch.stack([(v.map_NCHW[:, 1:] > 0).any(3).any(2).any(0) for v in (batch.source, batch.target)])
    assert_close(diagnostics["silent_share"], (~fires).double().mean(), 1e-6)
    assert_close(diagnostics["bg_share"], (views.label_VP == 0).double().mean(), 1e-6)
    pairs = [
        [views.proto_VCD[v, a] @ views.proto_VCD[v, b] for a, b in combinations(views.label_VP[v].unique().tolist(), 2)]
        for v in range(2)
    ]
    assert min(map(len, pairs)) > 0
    assert_close(diagnostics["prototype_similarity"], torch.stack(pairs[0] + pairs[1]).mean(), 1e-6)


# ---- workers


def test_keys_do_not_depend_on_how_images_are_split() -> None:
    sizes = {"num_images_global": 6, "num_classes": 3, "height": 2, "width": 5}
    whole = pixel_keys(torch.Generator().manual_seed(1), first_image=0, num_images_local=6, **sizes)
    part = pixel_keys(torch.Generator().manual_seed(1), first_image=2, num_images_local=2, **sizes)
    for field in fields(Keys):
        assert torch.equal(getattr(part, field.name), getattr(whole, field.name)[2:4])
    assert whole.negative_NHWC.shape == (6, 2, 5, 3) and len(set(whole.hard_NHW.flatten().tolist())) == 60


Case = tuple[str, torch.dtype, bool]
Results = list[dict[str, Tensor]]
CASES: list[Case] = [(variant, torch.float64, i % 2 == 0) for i, variant in enumerate(VARIANTS)]
CASES += [(variant, torch.float32, warped) for variant in ("official", "paper") for warped in (False, True)]
GLOO_CASES = [case for case in CASES if case[0] in ("official", "paper", "official-tie_rule=random")]


def run_share(case: Case, rank: int, size: int, gather: Gather) -> dict[str, Tensor]:
    """What a worker gets of a case; it holds its own images alone."""
    variant, dtype, warped = case
    images = slice(rank * 4 // size, (rank + 1) * 4 // size)
    bg_index = VARIANTS[variant]["bg_index"]
    batch = make_batch(len(variant), dtype, images=images, bg_index=bg_index, warped=warped)
    return run(batch, VARIANTS[variant], Workers(rank, gather))


def assert_adds_up(parts: Results, case: Case) -> None:
    """Shares of the workers are together what one worker gets of the whole batch."""
    tolerance = 1e-10 if case[1] == torch.float64 else 1e-5
    for name, expected in run_share(case, 0, 1, ALONE.gather).items():
        values = [part[name] for part in parts]
        actual = torch.cat(values) if name in ("source", "target") else torch.stack(values).sum(0)
        assert torch.isfinite(expected).all()
        assert_close(actual, expected, tolerance, f"{case} {name}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{str(case[1])[-7:]}")
def test_many_workers_are_one_worker(case: Case, size: int) -> None:
    """Every value of every knob; threads stand for workers."""
    slots: list[Tensor] = [torch.empty(0)] * size
    barrier = threading.Barrier(size, timeout=60)

    def work(rank: int) -> dict[str, Tensor]:
        def gather(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            gathered = torch.cat(slots)
            barrier.wait()
            return gathered

        return run_share(case, rank, size, gather)

    with ThreadPoolExecutor(size) as pool:
        assert_adds_up(list(pool.map(work, range(size))), case)


def gloo_worker(rank: int, folder: str) -> None:
    """One of 4 processes: the cases on all 4, then on the first 2 of them; results to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    results = {}
    for size, group in ((4, dist.group.WORLD), (2, pair)):
        if rank >= size:
            continue

        def gather(x: Tensor, group: Any = group, size: int = size) -> Tensor:
            parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
            dist.all_gather(parts, x.contiguous(), group=group)
            return torch.cat(parts)

        for i, case in enumerate(GLOO_CASES):
            results[size, i] = run_share(case, rank, size, gather)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gloo_processes_are_one_worker(tmp_path: Path) -> None:
    mp.spawn(gloo_worker, args=(str(tmp_path),), nprocs=4)  # type: ignore[attr-defined, no-untyped-call]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for size in (2, 4):
        for i, case in enumerate(GLOO_CASES):
            assert_adds_up([results[rank][size, i] for rank in range(size)], case)

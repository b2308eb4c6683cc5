"""The contrast loss, forward and backward: ours against the formulas of METHOD 6 taken word for word.

    python bench/contrast.py [--repeats 15]

The reference loops over classes for prototypes and hard pixels, and multiplies every pixel with every prototype in full
(P,C,D). Both sides take the same maps, features and draws, with the settings of the official code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import cpu_ms, head, peak_mib, row, start
from torch import Tensor

from ppc.config import ContrastConfig
from ppc.methods import CONTRAST_TERMS, Step, contrast_terms_of
from ppc.mining import pixel_keys
from ppc.nets import CamOutput
from ppc.prototypes import ALONE
from ppc.seeding import derive_seed
from ppc.views import Warp

EPS = 1e-5
SIZES = ((8, 16, 12, 20), (16, 32, 80, 120))  # images, side of the grid, target ms, target MiB


@dataclass(frozen=True)
class Case:
    """Two views of N images on a grid, C = 21 classes, D = 128 channels; features are leaves."""

    cfg: ContrastConfig
    feature_VNDHW: list[Tensor]
    map_VNCHW: list[Tensor]
    label_NK: Tensor


def make_case(num_images: int, side: int, *, num_fg: int = 20, dim: int = 128) -> Case:
    """Random maps of which two classes an image stand out, and features that follow them a little."""
    gen = torch.Generator().manual_seed(0)
    label_NK = torch.zeros(num_images, num_fg)
    label_NK.scatter_(1, torch.rand(num_images, num_fg, generator=gen).topk(2).indices, 1)
    centre_CD = torch.rand(num_fg + 1, dim, generator=gen)
    features, maps = [], []
    for _ in range(2):
        noise = torch.randn(num_images, num_fg + 1, side, side, generator=gen)
        maps.append(noise - 1 + 2 * torch.cat([torch.zeros(num_images, 1), label_NK], 1)[:, :, None, None])
        mixed = torch.einsum("nchw,cd->ndhw", maps[-1].relu(), centre_CD)
        # einsum gives channels last; a convolution on a CPU does not
        features.append((mixed + torch.randn(mixed.shape, generator=gen)).relu().contiguous().requires_grad_())
    return Case(ContrastConfig(prototype_top_k=side * side // 8), features, maps, label_NK)


def weights(cfg: ContrastConfig) -> list[float]:
    """Of the three terms."""
    return [getattr(cfg, f"{name}_weight") for name in CONTRAST_TERMS]


def ours(case: Case) -> Tensor:
    """The weighted sum of the terms, as a training step has it."""
    outs = [CamOutput(map_, map_, feature) for map_, feature in zip(case.map_VNCHW, case.feature_VNDHW, strict=True)]
    size, num_images = tuple(outs[0].cam.shape[2:]), len(case.label_NK)
    step = Step(outs[0], outs[1], size, size, Warp(None, None), case.label_NK, num_images)
    terms = contrast_terms_of(step, case.cfg, 0, 0, ALONE)
    return torch.stack([w * terms[name] for w, name in zip(weights(case.cfg), CONTRAST_TERMS, strict=True)]).sum()


def draws(case: Case) -> list[Tensor]:
    """Numbers (P,) of each view that decide the random half of hard pixels: those that `ours` draws."""
    N, C, h, w = case.map_VNCHW[0].shape
    sizes = {"num_images_global": N, "first_image": 0, "num_images_local": N, "num_classes": C, "height": h, "width": w}
    seeds = (derive_seed("contrast", 0, 0, name) for name in ("source", "target"))
    return [pixel_keys(torch.Generator().manual_seed(s), **sizes).hard_NHW.flatten() for s in seeds]


def reference(case: Case, draw_VP: list[Tensor]) -> Tensor:
    """METHOD 6.2 to 6.4, class by class."""
    cfg = case.cfg
    image_label_NC = torch.cat([torch.ones(len(case.label_NK), 1), case.label_NK], 1)
    C = image_label_NC.shape[1]
    unit, label, proto = [], [], []
    for map_NCHW, feature_NDHW in zip(case.map_VNCHW, case.feature_VNDHW, strict=True):
        feature_PD = feature_NDHW.permute(0, 2, 3, 1).reshape(-1, feature_NDHW.shape[1])
        with torch.no_grad():
            m = map_NCHW.relu()
            high, low = m.amax((2, 3), keepdim=True), m.amin((2, 3), keepdim=True)
            m = (torch.where(m < low + EPS, 0, m) - low - EPS) / (high - low + EPS)
            m[:, 0] = cfg.bg_score
            label.append((m * image_label_NC[:, :, None, None]).softmax(1).argmax(1).flatten())
            rows = []
            for c in range(C):
                value, index = m[:, c].flatten().sort(descending=True, stable=True)
                share_K1 = value[: cfg.prototype_top_k, None]
                mean_D = (share_K1 * feature_PD[index[: cfg.prototype_top_k]]).sum(0) / share_K1.sum()
                rows.append(mean_D / mean_D.norm())
            proto.append(torch.stack(rows))
        unit.append(feature_PD / feature_PD.norm(dim=1, keepdim=True).clamp(min=1e-12))
    alpha_cp, alpha_cc, beta = weights(cfg)
    total = torch.zeros(())
    for v in range(2):
        other = 1 - v
        total = total + alpha_cp / 2 * full_nce(unit[v], label[v], proto[other], cfg.temperature).mean()
        total = total + alpha_cc / 2 * full_nce(unit[v], label[other], proto[v], cfg.temperature).mean()
        total = total + beta / 2 * mined_nce(unit[v], label[v], proto[v], draw_VP[v], cfg)
    return total


def exp_similarity(unit_PD: Tensor, proto_CD: Tensor, temperature: float) -> Tensor:
    """exp(u.p/t) of all pixels and prototypes (P,C), multiplied out in (P,C,D)."""
    return ((unit_PD[:, None] * proto_CD[None]).sum(2) / temperature).exp()


def full_nce(unit_PD: Tensor, label_P: Tensor, proto_CD: Tensor, temperature: float) -> Tensor:
    """Each pixel's loss (P,) against all prototypes."""
    e_PC = exp_similarity(unit_PD, proto_CD, temperature)
    return -(e_PC.gather(1, label_P[:, None])[:, 0] / e_PC.sum(1)).log()


def mined_nce(unit_PD: Tensor, label_P: Tensor, proto_CD: Tensor, draw_P: Tensor, cfg: ContrastConfig) -> Tensor:
    """Denominators of middle ranks, and the mean over each class's random and hard halves, then over classes."""
    e_PC = exp_similarity(unit_PD, proto_CD, cfg.temperature)
    first, end = (round(share * len(proto_CD)) for share in (cfg.negative_rank_from, cfg.negative_rank_to))
    negative_P = e_PC.sort(1, descending=True).values[:, first:end].sum(1)
    positive_P = e_PC.gather(1, label_P[:, None])[:, 0]
    loss_P = -(positive_P / (positive_P + negative_P)).log()
    present = label_P.unique().tolist()
    total = torch.zeros(())
    for c in present:
        own = (label_P == c).nonzero()[:, 0]
        half = len(own) // 2
        if half == 0:
            continue
        hard = own[positive_P[own].argsort()][: int(cfg.hard_pool * len(own))][-half:]
        drawn = own[draw_P[own].argsort()[:half]]
        total = total + torch.cat([loss_P[drawn], loss_P[hard]]).mean()
    return total / len(present)


def make_step(side_of: str, num_images: int, side: int) -> Callable[[], None]:
    """A forward and backward of `ours` or of the `reference`."""
    case = make_case(num_images, side)
    draw_VP = draws(case)

    def step() -> None:
        for feature in case.feature_VNDHW:
            feature.grad = None
        loss = ours(case) if side_of == "ours" else reference(case, draw_VP)
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    start("Contrast loss, forward and backward, D = 128, C = 21")
    head("images, grid", "loops, ms", "ours, ms", "ratio", "target, ms", "loops, MiB", "ours, MiB", "target, MiB")
    for num_images, side, target_ms, target_mib in SIZES:
        both = [make_step(which, num_images, side) for which in ("reference", "ours")]
        loops_ms, ours_ms = cpu_ms(both, repeats)
        held = [peak_mib(make_step, which, num_images, side) for which in ("reference", "ours")]
        row(f"{num_images}, {side} x {side}", loops_ms, ours_ms, loops_ms / ours_ms, target_ms, *held, target_mib)


if __name__ == "__main__":
    main()

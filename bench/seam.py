"""SEAM's losses, forward and backward: ours against the formulas of METHOD 4.2 on all channels at full size.

    python bench/seam.py [--repeats 5]

21 channels, two classes an image. The reference brings every channel to the size of the view and multiplies those of
absent classes by their label of 0 there; ours leaves them out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import cpu_ms, head, peak_mib, row, start
from torch import Tensor

from ppc.losses import ViewMaps, seam_losses
from ppc.resizing import resize

EPS = 1e-5
SIZES = ((8, 224, 112, 16), (8, 448, 128, 8))  # images, view 1, view 2, stride: pixels. The second is the paper's


@dataclass(frozen=True)
class Case:
    """CAM and refined CAM of both views (N,21,h,w), leaves; sizes of the views; labels (N,20)."""

    cam: list[Tensor]
    refined: list[Tensor]
    sizes: list[tuple[int, int]]
    label_NK: Tensor


def make_case(num_images: int, source_px: int, target_px: int, stride: int, *, num_fg: int = 20) -> Case:
    """Random maps."""
    gen = torch.Generator().manual_seed(0)
    label_NK = torch.zeros(num_images, num_fg)
    label_NK.scatter_(1, torch.rand(num_images, num_fg, generator=gen).topk(2).indices, 1)
    cam, refined = [], []
    for pixels in (source_px, target_px):
        grid = (num_images, num_fg + 1, -(-pixels // stride), -(-pixels // stride))
        cam.append(torch.randn(grid, generator=gen).requires_grad_())
        refined.append(torch.randn(grid, generator=gen).relu().requires_grad_())
    return Case(cam, refined, [(source_px, source_px), (target_px, target_px)], label_NK)


def ours(case: Case) -> Tensor:
    """The sum of the terms, as a training step has it."""
    views = [ViewMaps(*maps) for maps in zip(case.cam, case.refined, case.sizes, strict=True)]
    terms = seam_losses(
        *views,
        case.label_NK,
        to_target=lambda x: resize(x, case.sizes[1]),
        num_images_global=len(case.label_NK),
        valid_Nhw=None,
    )
    return torch.stack(list(terms.values())).sum()


def reference(case: Case) -> Tensor:
    """METHOD 4.2, all channels at full size."""
    num_images = len(case.label_NK)
    y = torch.cat([torch.ones(num_images, 1), case.label_NK], 1)[:, :, None, None]
    cls = min_pool = torch.zeros(())
    scaled: list[list[Tensor]] = []
    for maps, size in zip(zip(case.cam, case.refined, strict=True), case.sizes, strict=True):
        cam, refined = (F.interpolate(x, size, mode="bilinear", align_corners=True) for x in maps)
        cls = cls + F.multilabel_soft_margin_loss(cam.mean((2, 3))[:, 1:], case.label_NK) / 2
        top = (refined * y)[:, 1:].amax(1).flatten(1)
        quarter = top.shape[1] // 4
        lowest = top.topk(quarter, dim=1, largest=False).values
        min_pool = min_pool + lowest.relu().sum() / (quarter * num_images) / 2
        scaled.append([scale_to_one(x) for x in (cam, refined)])
    first = [F.interpolate(x, case.sizes[1], mode="bilinear", align_corners=True) * y for x in scaled[0]]
    second = [x * y for x in scaled[1]]
    er = (first[0] - second[0])[:, 1:].abs().mean()
    ecr = torch.zeros(())
    for cam, refined in ((second[0], first[1]), (first[0], second[1])):
        gap = (highest_alone(cam.detach()) - refined).abs().flatten(1)
        ecr = ecr + gap.topk(int(gap.shape[1] * 0.2), dim=1).values.mean()
    return cls + min_pool + er + ecr


def scale_to_one(map_NCHW: Tensor) -> Tensor:
    """max_norm of METHOD 4.2."""
    p = map_NCHW.relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    return (p - low - EPS).relu() / (high - low + EPS)


def highest_alone(map_NChw: Tensor) -> Tensor:
    """Background, and of the foreground what no other class exceeds."""
    top = map_NChw[:, 1:].amax(1, keepdim=True)
    return torch.cat([1 - top, torch.where(map_NChw[:, 1:] == top, map_NChw[:, 1:], 0)], 1)


def make_step(which: str, *sizes: int) -> Callable[[], None]:
    """A forward and backward of one side."""
    case = make_case(*sizes)

    def step() -> None:
        for leaf in (*case.cam, *case.refined):
            leaf.grad = None
        loss = ours(case) if which == "ours" else reference(case)
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    start("SEAM's losses, forward and backward, C = 21")
    head("images, views, stride", "all channels, ms", "ours, ms", "ratio", "all channels, MiB", "ours, MiB", "ratio")
    for sizes in SIZES:
        whole_ms, ours_ms = cpu_ms([make_step(which, *sizes) for which in ("reference", "ours")], repeats)
        whole_mib, ours_mib = (peak_mib(make_step, which, *sizes) for which in ("reference", "ours"))
        name = f"{sizes[0]}, {sizes[1]} and {sizes[2]} px, {sizes[3]}"
        row(name, whole_ms, ours_ms, whole_ms / ours_ms, whole_mib, ours_mib, whole_mib / ours_mib)


if __name__ == "__main__":
    main()

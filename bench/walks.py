"""The random walks of PSA and IRN: ours against squaring a dense matrix, in time, memory and value.

    python bench/walks.py [--size 375 500] [--maps 3] [--repeats 5]

Both sides take the same affinities and end with the same walked maps, on one thread, in CPU time (what else the
machine does counts little). The dense side is the one that METHOD 8 describes, in float32: the whole matrix, as many
squarings as log2 of the steps, one product with the maps. IRN's grid of 4 pixels a cell is too large for that here: its
time there is that of a smaller grid times the cube of the ratio of the cells, its memory times the square, both marked
with ~, and values are compared on the smaller grid.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import MIB, waves
from torch import Tensor

from ppc.affinity import Transition, affinity_transition, pair_affinity, random_walk
from ppc.boundaries import boundary_transition


@dataclass(frozen=True)
class Case:
    """A walk on a grid: what makes its transition, and on how large a part of the image the dense side is run."""

    name: str
    stride: int  # pixels a cell
    log2_steps: int
    step: Callable[[int, int], Transition]
    dense_share: float  # of both sides of the grid


def psa_step(h: int, w: int) -> Transition:
    """PSA's transition: 34 pairs a cell, beta 8."""
    return affinity_transition(pair_affinity(waves(32, h, w)[None], radius=5)[0], radius=5, beta=8)


def irn_step(h: int, w: int) -> Transition:
    """IRN's transition over thin edges: 34 pairs a cell, beta 10."""
    edge_hw = (waves(1, h, w)[0] - 0.5).abs().mul(-12).exp()
    return boundary_transition(edge_hw, radius=5, beta=10)


CASES = (
    Case("PSA, 2^8 steps", 8, 8, psa_step, 1.0),
    Case("SEAM, PPC, 2^6 steps", 8, 6, psa_step, 1.0),
    Case("IRN, 2^8 steps", 4, 8, irn_step, 0.4),
)


def dense_walk(map_Chw: Tensor, step: Transition, *, log2_steps: int) -> tuple[Tensor, int]:
    """The maps after 2^log2_steps steps by squaring the whole matrix, and the bytes of the matrices it holds."""
    _, h, w = step.weight_Ohw.shape
    matrix = torch.zeros(h * w, h * w)
    cell_hw = torch.arange(h * w).reshape(h, w)
    for (dy, dx), weight_hw in zip(step.offsets, step.weight_Ohw, strict=True):
        rows = slice(max(0, -dy), min(h, h - dy))
        columns = slice(max(0, -dx), min(w, w - dx))
        to = cell_hw[rows, columns]
        matrix[to + dy * w + dx, to] = weight_hw[rows, columns].float()
    for _ in range(log2_steps):
        matrix = matrix @ matrix
    walked_Chw = (map_Chw.float().flatten(1) @ matrix).reshape(map_Chw.shape)
    return walked_Chw, 2 * matrix.nbytes


def cpu_s(call: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds of a call, after one to warm up where there are several."""
    spent = []
    for _ in range(repeats + (repeats > 1)):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return min(spent)


def row(case: Case, size: tuple[int, int], maps: int, repeats: int) -> list[str]:
    """One line of the table."""
    h, w = (-(-side // case.stride) for side in size)
    map_Chw, step = waves(maps, h, w), case.step(h, w)
    ours_s = cpu_s(lambda: random_walk(map_Chw, step, log2_steps=case.log2_steps), repeats)
    linked = int((step.weight_Ohw > 0).sum())
    ours = step.weight_Ohw.nbytes + linked * (8 + 4) + 4 * map_Chw.numel() * 8  # stencil, sparse matrix, maps
    small_h, small_w = round(h * case.dense_share), round(w * case.dense_share)
    small_map, small_step = waves(maps, small_h, small_w), case.step(small_h, small_w)
    ratio = h * w / (small_h * small_w)
    kept: list[tuple[Tensor, int]] = []
    dense_s = ratio**3 * cpu_s(lambda: kept.append(dense_walk(small_map, small_step, log2_steps=case.log2_steps)), 1)
    walked, held = kept[-1]
    dense = ratio**2 * held
    gap = (random_walk(small_map, small_step, log2_steps=case.log2_steps) - walked).abs().max().item()
    about = "" if ratio == 1 else "~"
    return [
        case.name, f"{h} x {w}", f"{about}{1000 * dense_s:,.0f}", f"{1000 * ours_s:.0f}",
        f"{about}{dense_s / ours_s:,.0f}", f"{about}{dense / MIB:,.0f}", f"{ours / MIB:.1f}",
        f"{about}{dense / ours:,.0f}", f"{gap:.0e}" if ratio == 1 else f"{gap:.0e} on {small_h} x {small_w}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), help="height and width of the image")
    parser.add_argument("--maps", type=int, default=3, help="background and classes")
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the dense walk runs once")
    given = parser.parse_args()
    torch.set_num_threads(1)
    F.relu(torch.zeros(1))  # what torch loads at its first call is no part of a walk
    size = f"image {given.size[0]} x {given.size[1]}, {given.maps} maps"
    print(f"{size}, one thread; torch {torch.__version__}, {platform.machine()}\n")
    print("| walk | grid | dense, ms | ours, ms | ratio | dense, MiB | ours, MiB | ratio | largest difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        print(f"| {' | '.join(row(case, tuple(given.size), given.maps, given.repeats))} |", flush=True)


if __name__ == "__main__":
    main()

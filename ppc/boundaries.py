"""Class boundaries and displacements: IRN's affinity, its losses and its walk (METHOD 10).

Shapes: N images, C maps, h w the grid, E displacements of a radius, y x the "from" pixels of the pairs (as in
`affinity`, whose labels and losses are used here). An edge is a probability; its logit comes from the net.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ppc.affinity import Displacement, PairLabels, Transition, displacements, random_walk, transition, window
from ppc.prototypes import Workers

EPS = 1e-5  # of the counts (METHOD 10)


@cache
def path(shift: Displacement) -> tuple[Displacement, ...]:
    """The pixels between (0, 0) and `shift`, both included: those of the bounding box whose distance to the line
    through both is less than 1."""
    dy, dx = shift
    rows, columns = range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1)
    return tuple((y, x) for y in rows for x in columns if (dy * x - dx * y) ** 2 < dy**2 + dx**2)


def boundary_affinity(edge_logit_N1hw: Tensor, *, radius: int) -> Tensor:
    """a_ij = 1 - the largest edge on the path between the pixels of each pair, (N,E,y,x) in [0, 1]."""
    edge_Nhw = edge_logit_N1hw[:, 0].sigmoid()
    pairs = []
    for shift in displacements(radius):
        on_path_LNyx = torch.stack([window(edge_Nhw, radius, place) for place in path(shift)])
        pairs.append(1 - on_path_LNyx.amax(dim=0))
    return torch.stack(pairs, dim=1)


def displacement_losses(
    displacement_N2hw: Tensor, labels: PairLabels, *, radius: int, workers: Workers
) -> dict[str, Tensor]:
    """Mean gaps `fg` and `bg` between a pair's displacement and its due, halved: the loss is their sum (METHOD 10).

    Two pixels of one class should differ by where they lie to each other, so that both point at the same centroid; two
    of the background by nothing. This is the share of the local images: counts are those of all workers.
    """
    count_2 = torch.stack([labels.fg.sum(), labels.bg.sum()])
    total_2 = 2 * workers.gather(count_2[None]).sum(0).to(displacement_N2hw.dtype) + EPS
    source_N2yx = window(displacement_N2hw, radius)
    gap_fg = gap_bg = displacement_N2hw.new_zeros(())
    for index, shift in enumerate(displacements(radius)):
        found_N2yx = source_N2yx - window(displacement_N2hw, radius, shift)
        due_2 = found_N2yx.new_tensor(shift)[:, None, None]
        gap_fg = gap_fg + ((found_N2yx - due_2).abs() * labels.fg[:, index, None]).sum()
        gap_bg = gap_bg + (found_N2yx.abs() * labels.bg[:, index, None]).sum()
    return {"fg": gap_fg / total_2[0] / 2, "bg": gap_bg / total_2[1] / 2}


def boundary_transition(edge_hw: Tensor, *, radius: int, beta: float) -> Transition:
    """The walk's transition over edges: a pair's affinity is 1 minus the largest edge on its path, and 0 to the
    outside."""
    h, w = edge_hw.shape
    pairs = [shift for shift in displacements(radius) if shift[0] < h and abs(shift[1]) < w]
    affinity_Ehw = edge_hw.new_zeros((len(pairs), h, w))
    for affinity_hw, shift in zip(affinity_Ehw, pairs, strict=True):
        dy, dx = shift
        left, right = max(0, -dx), w - max(0, dx)
        between = [edge_hw[y : h - dy + y, left + x : right + x] for y, x in path(shift)]
        affinity_hw[: h - dy, left:right] = 1 - torch.stack(between).amax(dim=0)
    return transition(affinity_Ehw, pairs, beta=beta)


def confident_labels(fg_label_HW: Tensor, bg_label_HW: Tensor, *, ignore: int = 255) -> Tensor:
    """IR labels of an image from its labels at the high and at the low threshold: the class where the high one says so,
    background where both do, else unsure."""
    unsure_HW = torch.where(bg_label_HW == 0, 0, ignore)
    return torch.where(fg_label_HW == 0, unsure_HW, fg_label_HW)


def enlarge(walked_Chw: Tensor, *, size: tuple[int, int], stride: int) -> Tensor:
    """Maps at `stride` to the image's size (H, W), over their largest value of all (METHOD 10); 0 if they are empty."""
    full_CHW = F.interpolate(walked_Chw[None], scale_factor=stride, mode="bilinear", align_corners=False)[0]
    full_CHW = full_CHW[:, : size[0], : size[1]]
    top = full_CHW.max()
    return full_CHW / top if top > 0 else torch.zeros_like(full_CHW)


@torch.no_grad()
def walk_cam(cam_KHW: Tensor, edge_hw: Tensor, *, stride: int, radius: int, beta: float, log2_steps: int) -> Tensor:
    """Spread an image's CAM over its boundary probabilities, (K,H,W) float64 with 1 as the largest value (METHOD 10).

    The CAM's negative values count as 0. It comes to the grid, (H,W) over `stride` rounded up, without smoothing: it
    has come from a coarser one. All 0 where no class has a pixel off the boundaries.
    """
    size = (cam_KHW.shape[1], cam_KHW.shape[2])
    if tuple(edge_hw.shape) != tuple(-(-side // stride) for side in size):
        raise ValueError(f"an edge map of {tuple(edge_hw.shape)} for a CAM of {size} pixels at stride {stride}")
    if len(cam_KHW) == 0:
        return torch.zeros_like(cam_KHW, dtype=torch.float64)
    edge_hw = edge_hw.double()
    grid_Khw = F.interpolate(cam_KHW.double()[None], edge_hw.shape, mode="bilinear", align_corners=False)[0]
    step = boundary_transition(edge_hw, radius=radius, beta=beta)
    walked_Khw = random_walk(grid_Khw.clamp(min=0) * (1 - edge_hw), step, log2_steps=log2_steps)
    return enlarge(walked_Khw, size=size, stride=stride)

"""IRNet: where classes meet, and where each pixel's centroid lies, from the levels of a backbone (METHOD 10).

N images, H W image size, h w the grid at stride 4, D channels. The backbone is a fixed feature extractor: eval mode, no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppc.backbones import Backbone, Level, seeded_init
from ppc.seeding import derive_seed

STRIDE = 4  # pixels a cell of the edge map
EDGE_WIDTH, EDGE_GROUPS = 32, 4  # of every level in the edge branch
FINE_WIDTHS, COARSE_WIDTH = (64, 128), 256  # of levels at stride 4, and of all others, in the displacement branch
GROUP_WIDTH, MAX_GROUPS = 8, 16  # of the displacement branch's GroupNorms: 8 channels a group, at most 16 groups


class IrnOutput(NamedTuple):
    """Both at stride 4: ceil(H/4) x ceil(W/4)."""

    edge: Tensor  # (N, 1, h, w) logit of a class boundary
    displacement: Tensor  # (N, 2, h, w) rows and columns to the centroid, cells


class MeanShift(nn.Module):
    """In eval mode, the displacements less their mean over a dataset, which is 0 unless a checkpoint brings it.

    The official code measures it after training, for instances; no class label depends on it.
    """

    running_mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x_NDhw: Tensor) -> Tensor:
        return x_NDhw if self.training else x_NDhw - self.running_mean[:, None, None]


class IrnNet(nn.Module):
    """IRNet over any backbone with levels at stride 4; its heads bear the official names where there are five levels.

    fc_edge1..L and fc_dp1..L read the L levels, finest first; the next ones join them. Layers initialise from
    (seed, layer name). ValueError for a backbone without a level at stride 4, or without a coarser one.
    """

    def __init__(self, backbone: Backbone, *, seed: int) -> None:
        super().__init__()
        if (problem := levels_problem(backbone.level_info)) is not None:
            raise ValueError(f"irn.backbone.name: {backbone.name} {problem}")
        self.backbone = backbone.requires_grad_(False)
        self.strides = [level.stride for level in backbone.level_info]
        self.num_fine = self.strides.count(STRIDE)
        widths = [
            FINE_WIDTHS[min(place, len(FINE_WIDTHS) - 1)] if place < self.num_fine else COARSE_WIDTH
            for place in range(len(self.strides))
        ]
        fine, coarse = sum(widths[: self.num_fine]), sum(widths[self.num_fine :])
        edge, dp = dict[str, nn.Module](), dict[str, nn.Module]()
        for number, (level, width) in enumerate(zip(backbone.level_info, widths, strict=True), start=1):
            edge[f"fc_edge{number}"] = _reduced(level.channels, EDGE_WIDTH, EDGE_GROUPS, f"edge{number}", seed)
            dp[f"fc_dp{number}"] = _reduced(level.channels, width, _groups(width), f"dp{number}", seed)
        count = len(widths)
        with seeded_init(derive_seed(seed, "edge")):
            edge[f"fc_edge{count + 1}"] = nn.Conv2d(EDGE_WIDTH * count, 1, 1)
        dp[f"fc_dp{count + 1}"] = _reduced(coarse, COARSE_WIDTH, _groups(COARSE_WIDTH), "dp_coarse", seed)
        last = _reduced(fine + COARSE_WIDTH, COARSE_WIDTH, _groups(COARSE_WIDTH), "dp_fine", seed)
        with seeded_init(derive_seed(seed, "dp")):
            out = nn.Conv2d(COARSE_WIDTH, 2, 1, bias=False)
        dp[f"fc_dp{count + 2}"] = nn.Sequential(*last, nn.ReLU(), out, MeanShift(2))  # here the ReLU has a number
        for name, layer in (edge | dp).items():
            self.add_module(name, layer)
        self.edge_names, self.dp_names = tuple(edge), tuple(dp)

    def train(self, mode: bool = True) -> IrnNet:
        """Training mode for the heads alone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, image_N3HW: Tensor) -> IrnOutput:
        """Normalised images to edge logits and displacements."""
        with torch.no_grad():
            levels = self.backbone.levels(image_N3HW)
        return IrnOutput(self._edges(levels), self._displacements(levels))

    def _edges(self, levels: Sequence[Tensor]) -> Tensor:
        h, w = levels[0].shape[2:]
        *branches, joined = (self.get_submodule(name) for name in self.edge_names)
        parts = [
            F.relu(_enlarged(branch(level), stride // STRIDE, (h, w)))
            for branch, level, stride in zip(branches, levels, self.strides, strict=True)
        ]
        edge_N1hw: Tensor = joined(torch.cat(parts, dim=1))
        return edge_N1hw

    def _displacements(self, levels: Sequence[Tensor]) -> Tensor:
        """Coarse levels meet at the finest of their strides, and then the fine ones at stride 4."""
        *branches, coarse, fine = (self.get_submodule(name) for name in self.dp_names)
        meet = self.strides[self.num_fine]
        size, meet_size = levels[0].shape[2:], levels[self.num_fine].shape[2:]
        found = [branch(level) for branch, level in zip(branches, levels, strict=True)]
        fine_parts = [F.relu(x) for x in found[: self.num_fine]]
        coarse_parts = [
            F.relu(_enlarged(x, stride // meet, (meet_size[0], meet_size[1])))
            for x, stride in zip(found[self.num_fine :], self.strides[self.num_fine :], strict=True)
        ]
        joined = F.relu(_enlarged(coarse(torch.cat(coarse_parts, dim=1)), meet // STRIDE, (size[0], size[1])))
        displacement_N2hw: Tensor = fine(torch.cat([*fine_parts, joined], dim=1))
        return displacement_N2hw


def levels_problem(levels: Sequence[Level]) -> str | None:
    """Why IRNet cannot read these levels; None if it can."""
    strides = [level.stride for level in levels]
    if strides[:1] != [STRIDE] or strides[-1] == STRIDE:
        return f"has feature maps at strides {strides}: IRNet needs one at stride {STRIDE}, and a coarser one"
    return None


def head_groups(
    net: IrnNet, *, weight_decay: float, displacement_lr_mult: float, bias_lr_mult: float
) -> list[dict[str, object]]:
    """Parameter groups of the edge and the displacement branch, weights and the rest, all with decay (METHOD 1.2).

    The rest are biases and GroupNorm's. The official code has two groups, which these are with `bias_lr_mult` 1.
    """
    groups: list[dict[str, object]] = []
    for branch, names, mult in (("edge", net.edge_names, 1.0), ("displacement", net.dp_names, displacement_lr_mult)):
        found = [p for name in names for p in net.get_submodule(name).parameters()]
        for kind, bias in (("weight", False), ("bias", True)):
            groups.append(
                {
                    "params": [p for p in found if (p.ndim <= 1) == bias],
                    "name": f"{branch}_{kind}",
                    "lr_mult": mult * (bias_lr_mult if bias else 1.0),
                    "weight_decay": weight_decay,
                }
            )
    return groups


@torch.inference_mode()
def edges(net: IrnNet, image_3HW: Tensor, *, canvas_px: int) -> Tensor:
    """An image's boundary probability (h,w) at stride 4: the mean logit of it and its mirror (METHOD 10).

    The normalised image lies at the top left of a canvas of zeros, as in training: GroupNorm sees that too. It has
    `canvas_px` a side, or the image's own side, up to a multiple of 16, where that is longer: nothing is cut off.
    """
    height, width = image_3HW.shape[1:]
    pair_N3HW = torch.stack([image_3HW, image_3HW.flip(-1)])
    right, below = (max(canvas_px, side + -side % 16) - side for side in (width, height))
    logit_Nhw: Tensor = net(F.pad(pair_N3HW, (0, right, 0, below))).edge[:, 0]
    logit_Nhw = logit_Nhw[:, : -(-height // STRIDE), : -(-width // STRIDE)]
    return ((logit_Nhw[0] + logit_Nhw[1].flip(-1)) / 2).sigmoid()


def _groups(width: int) -> int:
    return min(MAX_GROUPS, width // GROUP_WIDTH)


def _reduced(in_ch: int, out_ch: int, groups: int, name: str, seed: int) -> nn.Sequential:
    """1x1 conv without bias, then GroupNorm; the ReLU follows where the map has its size."""
    with seeded_init(derive_seed(seed, name)):
        return nn.Sequential(nn.Conv2d(in_ch, out_ch, 1, bias=False), nn.GroupNorm(groups, out_ch))


def _enlarged(x_NDhw: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """A map times `factor`, without what is beyond `size`: its last cells may have been half outside the image."""
    if factor > 1:
        x_NDhw = F.interpolate(x_NDhw, scale_factor=factor, mode="bilinear", align_corners=False)
    return x_NDhw[:, :, : size[0], : size[1]]

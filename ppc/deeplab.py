"""Segmentation nets: a head over any backbone (METHOD 11).  N images, C classes with background, H W image, h w grid.

To add a head: a module from features to logits, (N, F, h, w) to (N, C, h, w), and a line in SEG_HEADS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppc.backbones import Backbone, seeded_init
from ppc.batchnorm import train_batch_norm
from ppc.dropout import SeededDropout

BatchNormMode = Literal["frozen", "statistics", "trained"]


def _conv(in_ch: int, out_ch: int, kernel: int, *, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_ch, out_ch, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)


class LargeFov(nn.Module):
    """DeepLab-v1's head: 3x3 of dilation 12, 1x1, dropout, 1x1; names are those of the official checkpoints."""

    WIDTH = 512

    def __init__(self, in_ch: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.conv_fov = _conv(in_ch, self.WIDTH, 3, dilation=12)
        self.bn_fov = nn.BatchNorm2d(self.WIDTH)
        self.conv_fov2 = _conv(self.WIDTH, self.WIDTH, 1)
        self.bn_fov2 = nn.BatchNorm2d(self.WIDTH)
        self.dropout = SeededDropout(dropout)
        self.cls_conv = nn.Conv2d(self.WIDTH, num_classes, 1)
        _init_convs(self)

    def forward(self, x_NFhw: Tensor) -> Tensor:
        x_NFhw = F.relu(self.bn_fov(self.conv_fov(x_NFhw)))
        x_NFhw = F.relu(self.bn_fov2(self.conv_fov2(x_NFhw)))
        logit_NChw: Tensor = self.cls_conv(self.dropout(x_NFhw))
        return logit_NChw


class Aspp(nn.Module):
    """Four dilated 3x3 branches and one of the global mean, joined by a 1x1; as the official code has it, with BN.

    The DeepLab-v2 paper sums four branches without BatchNorm: this is closer to its third version.
    """

    DILATIONS = (6, 12, 18, 24)

    def __init__(self, in_ch: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.branch1, self.branch2, self.branch3, self.branch4 = (
            nn.Sequential(_conv(in_ch, width, 3, dilation=dilation), nn.BatchNorm2d(width), nn.ReLU())
            for dilation in self.DILATIONS
        )
        self.branch5_conv = _conv(in_ch, width, 1)
        self.branch5_bn = nn.BatchNorm2d(width)
        joined = _conv(width * (len(self.DILATIONS) + 1), width, 1)
        self.conv_cat = nn.Sequential(joined, nn.BatchNorm2d(width), nn.ReLU(), SeededDropout(dropout))

    def forward(self, x_NFhw: Tensor) -> Tensor:
        branches = [branch(x_NFhw) for branch in (self.branch1, self.branch2, self.branch3, self.branch4)]
        whole_NF11 = F.relu(self.branch5_bn(self.branch5_conv(x_NFhw.mean((2, 3), keepdim=True))))
        joined: Tensor = self.conv_cat(torch.cat([*branches, whole_NF11.expand_as(branches[0])], dim=1))
        return joined


class AsppHead(nn.Module):
    """DeepLab-v2's head in the official code: ASPP, dropout (a second one), 1x1."""

    WIDTH = 256

    def __init__(self, in_ch: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.aspp = Aspp(in_ch, self.WIDTH, dropout=dropout)
        self.dropout = SeededDropout(dropout)
        self.cls_conv = nn.Conv2d(self.WIDTH, num_classes, 1)
        _init_convs(self)

    def forward(self, x_NFhw: Tensor) -> Tensor:
        logit_NChw: Tensor = self.cls_conv(self.dropout(self.aspp(x_NFhw)))
        return logit_NChw


def _init_convs(head: nn.Module) -> None:
    """Kaiming-normal and no bias: METHOD 11 says nothing, and BatchNorm takes the scale of all but the last."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _torchvision_head(name: str) -> Callable[..., nn.Module]:
    """torchvision's head of that segmentation net, its dropouts seeded and of our rate."""

    def build(in_ch: int, num_classes: int, *, dropout: float) -> nn.Module:
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.fcn import FCNHead

        head: nn.Module = {"deeplabv3": DeepLabHead, "fcn": FCNHead}[name](in_ch, num_classes)
        for module in list(head.modules()):
            for child_name, child in module.named_children():
                if isinstance(child, nn.Dropout):  # torch's draws from the global RNG
                    setattr(module, child_name, SeededDropout(dropout))
        return head

    return build


SEG_HEADS: dict[str, Callable[..., nn.Module]] = {
    "largefov": LargeFov,  # DeepLab-v1, the official recipe's
    "aspp": AsppHead,
    "deeplabv3": _torchvision_head("deeplabv3"),
    "fcn": _torchvision_head("fcn"),
}


def official_momentum(backbone: str, part: Literal["backbone", "head"]) -> float:
    """Momentum of BatchNorm's stored statistics in the official recipe (METHOD 11)."""
    return 0.1 if part == "backbone" and backbone == "resnet101s" else 3e-4


class SegNet(nn.Module):
    """Logits of C classes at the size of the features; the head initialises from `seed`.

    All convs of the backbone are trained, also those that the CAM net freezes. batch_norm: `frozen`, the backbone runs
    on its stored statistics; `statistics`, on those of the global batch, and its affine parameters stay as they are;
    `trained`, these are trained too. The head has no statistics stored, so with `frozen` it is as with `statistics`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        head: str,
        dropout: float,
        batch_norm: BatchNormMode,
        momentum_backbone: float,
        momentum_head: float,
        seed: int,
    ) -> None:
        super().__init__()
        if head not in SEG_HEADS:
            raise ValueError(f"segmentation.head: no head {head!r}; there are {', '.join(SEG_HEADS)}")
        self.backbone = backbone
        with seeded_init(seed):
            self.head = SEG_HEADS[head](backbone.channels[-1], num_classes, dropout=dropout)
        batch_norms = (m for m in backbone.modules() if isinstance(m, _BatchNorm))
        affine = {id(p) for m in batch_norms for p in m.parameters(recurse=False)}
        for parameter in backbone.parameters():
            parameter.requires_grad_(id(parameter) not in affine)
        affine_trained = batch_norm == "trained"
        if batch_norm != "frozen":
            train_batch_norm(backbone, momentum=momentum_backbone, affine_trained=affine_trained)
        train_batch_norm(self.head, momentum=momentum_head, affine_trained=affine_trained)
        self.train()

    def forward(self, image_N3HW: Tensor) -> Tensor:
        """Normalised images to logits (N, C, h, w). In training: `set_dropout_seeds` first."""
        features: Any = self.backbone(image_N3HW)
        logit_NChw: Tensor = self.head(features.conv6)
        return logit_NChw

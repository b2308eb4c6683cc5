"""AffinityNet: features whose differences say how alike neighbouring cells are (METHOD 8).

N images, D = 448 feature channels, H W the image, h w the grid of 8 pixels a cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppc.affinity import STRIDE
from ppc.backbones import Backbone
from ppc.nets import head_layer

WIDTHS = (64, 128, 256)  # channels taken from conv4, conv5 and conv6


class AffinityNet(nn.Module):
    """Three taps, reduced and joined: ELU(f8_3), ELU(f8_4), ELU(f8_5), then ELU(f9). No tap is detached.

    ValueError for a backbone of another stride than 8. Layers initialise from (seed, layer name): METHOD names no rule
    for AffinityNet, so they take that of SEAM's layers of the same names (METHOD 4.1).
    """

    def __init__(self, backbone: Backbone, *, seed: int) -> None:
        super().__init__()
        if backbone.output_stride != STRIDE:
            raise ValueError(f"AffinityNet needs a backbone of stride {STRIDE}, got {backbone.output_stride}")
        ch4, ch5, ch6 = backbone.channels
        self.backbone = backbone
        self.f8_3 = head_layer("f8_3", ch4, WIDTHS[0], seed)
        self.f8_4 = head_layer("f8_4", ch5, WIDTHS[1], seed)
        self.f8_5 = head_layer("f8_5", ch6, WIDTHS[2], seed)
        self.f9 = head_layer("f9", sum(WIDTHS), sum(WIDTHS), seed)

    def forward(self, image_N3HW: Tensor) -> Tensor:
        """Normalised images to features (N,D,h,w), h = ceil(H/8). In training: `set_dropout_seeds` first."""
        size = [-(-side // STRIDE) for side in image_N3HW.shape[2:]]
        layers = (self.f8_3, self.f8_4, self.f8_5)
        mid = [F.elu(layer(tap)) for layer, tap in zip(layers, self.backbone(image_N3HW), strict=True)]
        feature_NDhw: Tensor = F.elu(self.f9(torch.cat(mid, dim=1)))
        if list(feature_NDhw.shape[2:]) != size:  # a backbone that pads less: its maps are a cell smaller
            feature_NDhw = F.interpolate(feature_NDhw, size, mode="bilinear", align_corners=True)
        return feature_NDhw

"""CAM nets: a backbone, the CAM layer, and optionally SEAM's PCM and the projector (METHOD.md 3, 4.1, 6.1).

N images, K fg classes, C = K+1, D projected channels, h w the feature grid, H W the image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppc.backbones import Backbone, seeded_init
from ppc.cam import pcm, pcm_input
from ppc.dropout import SeededDropout2d
from ppc.seeding import derive_seed

PCM_WIDTHS = (64, 128)  # channels that PCM takes from conv4 and conv5


class CamOutput(NamedTuple):
    """All at feature resolution."""

    cam: Tensor  # (N, C, h, w), or (N, K, h, w) without background channel; before any ReLU
    refined: Tensor | None  # (N, C, h, w) the PCM-refined CAM
    projected: Tensor | None  # (N, D, h, w) after ReLU, not normalised


class CamNet(nn.Module):
    """CAM net over any backbone; the image's logits are the spatial mean of `cam`, fc8 being linear.

    background: channel 0 is a background channel; pcm: SEAM's pixel correlation module, which needs it;
    projector_dim: D, or 0 for no projector; dropout: of conv6's channels, the same mask for CAM and projector.
    Layers initialise from (seed, layer name), so a net with one layer more has the others equal.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_fg: int,
        background: bool,
        pcm: bool,
        projector_dim: int,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__()
        if pcm and not background:
            raise ValueError("the PCM needs the background channel: background=True")
        ch4, ch5, ch6 = backbone.channels
        num_pcm = sum(PCM_WIDTHS)
        self.backbone = backbone
        self.pcm = pcm
        self.dropout = SeededDropout2d(dropout)
        self.fc8 = head_layer("fc8", ch6, num_fg + background, seed)
        self.fc_proj = head_layer("fc_proj", ch6, projector_dim, seed) if projector_dim else None
        self.f8_3 = head_layer("f8_3", ch4, PCM_WIDTHS[0], seed) if pcm else None
        self.f8_4 = head_layer("f8_4", ch5, PCM_WIDTHS[1], seed) if pcm else None
        self.f9 = head_layer("f9", 3 + num_pcm, num_pcm, seed) if pcm else None

    def forward(self, image_N3HW: Tensor) -> CamOutput:
        """Normalised images to CAM, refined CAM and projected features. In training: `set_dropout_seeds` first."""
        conv4, conv5, conv6 = self.backbone(image_N3HW)
        dropped = self.dropout(conv6)
        cam_NCHW = self.fc8(dropped)
        projected = None if self.fc_proj is None else F.relu(self.fc_proj(dropped))
        refined = self._refine(image_N3HW, conv4, conv5, cam_NCHW) if self.pcm else None
        return CamOutput(cam_NCHW, refined, projected)

    def _refine(self, image_N3HW: Tensor, conv4: Tensor, conv5: Tensor, cam_NCHW: Tensor) -> Tensor:
        """SEAM's PCM (METHOD 4.1); gradients reach f8_3, f8_4 and f9 only."""
        assert self.f8_3 is not None and self.f8_4 is not None and self.f9 is not None
        size = cam_NCHW.shape[2:]
        image_N3hw = F.interpolate(image_N3HW, size, mode="bilinear", align_corners=True)
        mid = F.relu(self.f8_3(conv4.detach())), F.relu(self.f8_4(conv5.detach()))
        feature_NDHW = self.f9(torch.cat([image_N3hw, *mid], dim=1))
        with torch.no_grad():
            source_NCHW = pcm_input(cam_NCHW)
        refined_NCHW: Tensor = pcm(source_NCHW, feature_NDHW)
        return refined_NCHW


def head_layer(name: str, in_ch: int, out_ch: int, seed: int) -> nn.Conv2d:
    """1x1 conv without bias: Kaiming-normal for f8_*, else Xavier-uniform, with gain 4 for f9 (METHOD 4.1)."""
    with seeded_init(derive_seed(seed, name)):
        layer = nn.Conv2d(in_ch, out_ch, 1, bias=False)
        if name.startswith("f8_"):
            nn.init.kaiming_normal_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight, gain=4.0 if name == "f9" else 1.0)
    return layer

"""ResNet38d: the wide pre-activation residual net of PSA and its heirs, stride 8 (METHOD.md section 2).

Module and parameter names are those of the official checkpoints, so these load by name.  N images, H W image size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ppc.dropout import SeededDropout2d


def _conv(in_ch: int, out_ch: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_ch, out_ch, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)


class ResBlock(nn.Module):
    """BN-ReLU-conv3x3, twice; a 1x1 shortcut from the first activation where the shape changes, else the raw input."""

    def __init__(self, in_ch: int, mid_ch: int, out_ch: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_ch)
        self.conv_branch2a = _conv(in_ch, mid_ch, 3, stride=stride, dilation=dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(mid_ch)
        self.conv_branch2b1 = _conv(mid_ch, out_ch, 3, dilation=dilations[1])
        same_shape = in_ch == out_ch and stride == 1
        self.conv_branch1 = None if same_shape else _conv(in_ch, out_ch, 1, stride=stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and its first activation: the tap."""
        tap = F.relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(tap)
        branch = self.conv_branch2a(tap)
        branch = self.conv_branch2b1(F.relu(self.bn_branch2b1(branch)))
        return shortcut + branch, tap


class BottleneckBlock(nn.Module):
    """1x1, 3x3 of dilation 4, 1x1, channel dropout after the second and third activation; always a 1x1 shortcut."""

    def __init__(self, in_ch: int, out_ch: int, *, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_ch)
        self.conv_branch2a = _conv(in_ch, out_ch // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(out_ch // 4)
        self.dropout_2b1 = SeededDropout2d(dropout)
        self.conv_branch2b1 = _conv(out_ch // 4, out_ch // 2, 3, dilation=4)
        self.bn_branch2b2 = nn.BatchNorm2d(out_ch // 2)
        self.dropout_2b2 = SeededDropout2d(dropout)
        self.conv_branch2b2 = _conv(out_ch // 2, out_ch, 1)
        self.conv_branch1 = _conv(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and its first activation: the tap."""
        tap = F.relu(self.bn_branch2a(x))
        branch = self.conv_branch2a(tap)
        branch = self.conv_branch2b1(self.dropout_2b1(F.relu(self.bn_branch2b1(branch))))
        branch = self.conv_branch2b2(self.dropout_2b2(F.relu(self.bn_branch2b2(branch))))
        return self.conv_branch1(tap) + branch, tap


class ResNet38d(nn.Module):
    """image_N3HW -> conv4 (512), conv5 (1024), conv6 (4096), each ceil(H/8) x ceil(W/8)."""

    CHANNELS = (512, 1024, 4096)
    FROZEN = ("conv1a.", "b2.", "b2_1.", "b2_2.")  # the stem, never trained (METHOD 1.2)

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = _conv(3, 64, 3)
        self.b2 = ResBlock(64, 128, 128, stride=2)
        self.b2_1 = ResBlock(128, 128, 128)
        self.b2_2 = ResBlock(128, 128, 128)
        self.b3 = ResBlock(128, 256, 256, stride=2)
        self.b3_1 = ResBlock(256, 256, 256)
        self.b3_2 = ResBlock(256, 256, 256)
        self.b4 = ResBlock(256, 512, 512, stride=2)
        self.b4_1 = ResBlock(512, 512, 512)
        self.b4_2 = ResBlock(512, 512, 512)
        self.b4_3 = ResBlock(512, 512, 512)
        self.b4_4 = ResBlock(512, 512, 512)
        self.b4_5 = ResBlock(512, 512, 512)
        self.b5 = ResBlock(512, 512, 1024, dilations=(1, 2))
        self.b5_1 = ResBlock(1024, 512, 1024, dilations=(2, 2))
        self.b5_2 = ResBlock(1024, 512, 1024, dilations=(2, 2))
        self.b6 = BottleneckBlock(1024, 2048, dropout=0.3)
        self.b7 = BottleneckBlock(2048, 4096, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, image_N3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conv4, conv5, conv6 = self.levels(image_N3HW, ("conv4", "conv5", "conv6"))
        return conv4, conv5, conv6

    def levels(self, image_N3HW: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """The maps of these names among conv3 (256 channels, stride 4), conv4, conv5 and conv6 (stride 8)."""
        x = self.conv1a(image_N3HW)
        for block in (self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2):
            x, _ = block(x)
        found = {}
        for block in (self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5):
            x, tap = block(x)
            if block is self.b4 and "conv3" in names:
                found["conv3"] = tap
        x, found["conv4"] = self.b5(x)
        for block in (self.b5_1, self.b5_2):
            x, _ = block(x)
        x, found["conv5"] = self.b6(x)
        x, _ = self.b7(x)
        found["conv6"] = F.relu(self.bn7(x))
        return tuple(found[name] for name in names)

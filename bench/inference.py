"""Multi-scale CAM inference of an image: ours against eight forwards, one by one.

    python bench/inference.py [--repeats 1]

SEAM's net with random weights on two backbones, scales 0.5, 1, 1.5 and 2, each with its mirror, two classes. The
reference is METHOD 4.3 as the official code goes through it: a forward for each of the eight views, and all maps merged
at the end. Images a second are those of one core, in CPU seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import cpu_ms, head, row, scene, start
from torch import Tensor

from ppc.cam import EPS
from ppc.config import TrialConfig
from ppc.methods import build_net, class_maps, net_normalisation
from ppc.nets import CamNet
from ppc.stages.make_seeds import infer_cam, scaled

WIDTHS = {"tiny": 240, "resnet38d": 120}  # of the image, pixels: what a CPU can do in seconds; its height is 3/4 of it
KEYS = [3, 11]
CPU = torch.device("cpu")


def make_case(backbone: str, width: int) -> tuple[CamNet, list[Tensor], tuple[int, int]]:
    """A net, the normalised image (3,h,w) at each scale, and its size."""
    cfg = TrialConfig.model_validate({"backbone": {"name": backbone}})
    net = build_net(cfg, 20, pretrained=False).eval()
    image, _ = scene(3, width)
    normalise = net_normalisation(net).apply
    return net, [normalise(view) for view in scaled(image, cfg.seeds.scales)], image.shape[:2]


def ours(net: CamNet, views: Sequence[Tensor], size: tuple[int, int]) -> Any:
    """The CAM (2,h,w) as stage make_seeds makes it: a forward a scale, of the image and its mirror."""
    return infer_cam(net, views, KEYS, size, class_maps("seam"), CPU, rule="minmax")


@torch.inference_mode()
def reference(net: CamNet, views: Sequence[Tensor], size: tuple[int, int]) -> Any:
    """The same in eight forwards."""
    total_KHW = torch.zeros(len(KEYS), *size)
    for view in views:
        for mirrored in (False, True):
            image_13HW = (view.flip(-1) if mirrored else view)[None]
            refined = net(image_13HW).refined
            assert refined is not None
            refined_1Khw = F.interpolate(refined, image_13HW.shape[2:], mode="bilinear", align_corners=True)[:, 1:]
            map_1KHW = F.interpolate(refined_1Khw, size, mode="bilinear", align_corners=False)[:, KEYS]
            total_KHW += (map_1KHW.flip(-1) if mirrored else map_1KHW)[0]
    positive = total_KHW.relu()
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    return ((torch.where(positive < low + EPS, 0, positive) - low - EPS) / (high - low + EPS)).numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    start("Multi-scale CAM of an image, SEAM")
    head("backbone", "image", "one by one, images/s", "ours, images/s", "ratio", "target", "largest difference")
    for backbone, width in WIDTHS.items():
        net, views, size = make_case(backbone, width)
        sides = [partial(side, net, views, size) for side in (reference, ours)]
        single_ms, ours_ms = cpu_ms(sides, repeats)
        gap = np.abs(sides[0]() - sides[1]()).max()
        rates = 1000 / single_ms, 1000 / ours_ms
        row(backbone, f"{size[0]} x {size[1]}", *rates, single_ms / ours_ms, "1.5", f"{gap:.0e}")


if __name__ == "__main__":
    main()

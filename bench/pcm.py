"""The PCM of a large image: ours against the whole matrix of METHOD 4.1, in memory, time and value.

    python bench/pcm.py [--size 750 1000] [--repeats 5]

Grid of stride 8, 21 maps and 192 channels of an image and its mirror (ours, as stage make_seeds gives them) or of one
image (the reference, as the official code does). The reference holds the similarities, their ReLU and their columns
divided by the sums. Times are of the same work: a pair by ours, two single images by the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import cpu_ms, head, peak_mib, row, start, waves
from torch import Tensor

from ppc.cam import EPS, pcm, pcm_input

Inputs = tuple[Tensor, Tensor]


def make_inputs(h: int, w: int) -> Inputs:
    """The PCM's map (2,21,h,w) and features (2,192,h,w) of an image and its mirror."""
    cam_Chw = pcm_input(waves(21, h, w)[None] - 0.3)[0]
    gen = torch.Generator().manual_seed(0)
    feature_Dhw = waves(192, h, w) - 0.5 + 0.3 * torch.randn(192, h, w, generator=gen)
    return torch.stack([cam_Chw, cam_Chw.flip(-1)]), torch.stack([feature_Dhw, feature_Dhw.flip(-1)])


def reference(cam_Chw: Tensor, feature_Dhw: Tensor) -> Tensor:
    """One image's refined map by the whole matrix."""
    q_DP = feature_Dhw.flatten(1)
    q_DP = q_DP / (q_DP.norm(dim=0, keepdim=True) + EPS)
    similarity_PP = torch.relu(q_DP.T @ q_DP)
    return (cam_Chw.flatten(1) @ (similarity_PP / (similarity_PP.sum(0, keepdim=True) + EPS))).view_as(cam_Chw)


@torch.inference_mode()
def both_images(cam_NChw: Tensor, feature_NDhw: Tensor) -> Tensor:
    """The reference on each image of a pair."""
    return torch.stack([reference(cam, feature) for cam, feature in zip(cam_NChw, feature_NDhw, strict=True)])


def make_call(which: str, h: int, w: int) -> Callable[[], Tensor]:
    """One side, for a process of its own."""
    cam_NChw, feature_NDhw = make_inputs(h, w)
    if which == "ours":
        return torch.inference_mode()(lambda: pcm(cam_NChw, feature_NDhw))
    return torch.inference_mode()(lambda: reference(cam_NChw[0], feature_NDhw[0]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(750, 1000), help="height and width of the image")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    h, w = (-(-side // 8) for side in given.size)
    start(f"PCM, image {given.size[0]} x {given.size[1]}, grid {h} x {w}")
    inputs = make_inputs(h, w)
    ours = torch.inference_mode()(lambda: pcm(*inputs))
    whole_ms, ours_ms = cpu_ms([lambda: both_images(*inputs), ours], given.repeats)
    gap = (both_images(*inputs) - ours()).abs().max().item()
    whole_mib, ours_mib = (peak_mib(make_call, which, h, w) for which in ("reference", "ours"))
    head("PCM", "peak, MiB", "ratio", "target, MiB", "image and mirror, ms", "ratio", "largest difference")
    row("whole matrix", whole_mib, "1", "", whole_ms, "1", "")
    row("blocks of columns", ours_mib, whole_mib / ours_mib, "300", ours_ms, whole_ms / ours_ms, f"{gap:.0e}")


if __name__ == "__main__":
    main()

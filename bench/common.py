"""What the benchmarks share: CPU times, peak memory, generated inputs of VOC's size, tables."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppc.data.scene_draw import draw_scene
from ppc.data.voc import VocLayout
from ppc.runtime import prepare_process

MIB = 2**20
VOC_WIDTH = 500  # pixels


def waves(num: int, h: int, w: int) -> Tensor:
    """Smooth maps (num,h,w) in [0, 1] with a few edges, from no generator."""
    n, y, x = torch.arange(num)[:, None, None], torch.arange(h)[None, :, None], torch.arange(w)[None, None]
    smooth = torch.sin(0.05 * (n + 1) * x + 0.9 * n) * torch.cos(0.07 * (n + 2) * y - 0.4 * n)
    steps = ((x + 2 * y + 7 * n) // 20 % 2).float()
    return (0.35 * smooth + 0.3 * steps + 0.35).clamp(0, 1)


def scene(number: int, width: int = VOC_WIDTH) -> tuple[Any, Any]:
    """A generated image (h,w,3) and its mask (h,w), uint8, h being 3/4 of w: 375 x 500 pixels is VOC's usual size."""
    drawn = draw_scene(np.random.default_rng(number), num_classes=12, image_px=width, first_class=number % 12)
    upright = drawn.mask_HW.shape[0] > drawn.mask_HW.shape[1]
    image, mask = (x.swapaxes(0, 1) if upright else x for x in (drawn.image_HW3, drawn.mask_HW))
    return np.ascontiguousarray(image[: width * 3 // 4]), np.ascontiguousarray(mask[: width * 3 // 4])


def write_voc(root: Path, num_images: int, width: int = VOC_WIDTH) -> VocLayout:
    """A dataset of such scenes in the VOC layout; split `train`."""
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClass"):
        folder.mkdir(parents=True)
    names = [f"2007_{number:06d}" for number in range(num_images)]
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names))
    tags = {}
    for number, name in enumerate(names):
        image, mask = scene(number, width)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
        tags[name] = np.isin(np.arange(1, 21), mask).astype(np.float32)
    np.save(root / "cls_labels.npy", np.array(tags, dtype=object))
    return VocLayout(root)


def cpu_ms(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median CPU milliseconds of each call, after one to warm up; they take turns, so that what else runs hits all."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, times in zip(calls, spent, strict=True):
            start = time.process_time()
            call()
            if turn or not repeats:
                times.append(1000 * (time.process_time() - start))
    return [statistics.median(times) for times in spent]


def peak_mib(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MiB that a call of `make(*arguments)` adds to the resident memory of a fresh process, at its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make, arguments))


def _peak_here(make: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> float:
    torch.set_num_threads(1)
    call = make(*arguments)
    _warm_up()
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    call()
    return _resident_mib("VmHWM") - before


def _warm_up() -> None:
    """Load what the first products, losses and gradients load."""
    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).log_softmax(1).sort(1).values.sum().backward()  # type: ignore[no-untyped-call]


def _resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def start(what: str) -> None:
    """One thread, memory as in a worker, and the first line of a benchmark's output."""
    prepare_process(1)
    print(f"{what}; one thread, torch {torch.__version__}, {platform.machine()}\n", flush=True)


def head(*columns: str) -> None:
    """The head of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: str | float) -> None:
    """One line of it; numbers with three digits."""
    print(f"| {' | '.join(cell if isinstance(cell, str) else digits(cell) for cell in cells)} |", flush=True)


def digits(number: float) -> str:
    """Three digits that count, and thousands apart."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"

"""Images a second of a training step on a GPU, as a ratio to the official recipe's step on the same card.

    python bench/training_step.py experiments/scenes_seam_ppc.yaml --set backbone.name=resnet38d --set train.crop_px=448

The reference is the step as the official recipe runs it: float32 (with TF32 convolutions, PyTorch's default), NCHW, two
forwards a step, not compiled. Each other variant changes one thing more. Batches lie on the device: no input pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppc.config import TrialConfig
from ppc.loading import load_trial
from ppc.methods import Losses, build_net
from ppc.optim import effective_momentum, make_sgd, param_groups
from ppc.prototypes import ALONE

REFERENCE = "fp32"
VARIANTS: dict[str, set[str]] = {
    REFERENCE: set(),
    "bf16": {"bf16"},
    "bf16 channels_last": {"bf16", "channels_last"},
    "bf16 channels_last fused": {"bf16", "channels_last", "fused"},
    "bf16 channels_last fused compiled": {"bf16", "channels_last", "fused", "compile"},
}


def make_step(cfg: TrialConfig, num_fg: int, options: set[str]) -> Callable[[int], None]:
    """One training step on a fixed random batch."""
    device = torch.device("cuda")
    net = build_net(cfg, num_fg, pretrained=False).to(device).train()
    if "channels_last" in options:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "compile" in options:
        net.backbone.compile(dynamic=False)
    groups = param_groups(
        net, weight_decay=5e-4, new_layer_lr_mult=cfg.train.new_layer_lr_mult, bias_lr_mult=cfg.train.bias_lr_mult
    )
    optimizer = make_sgd(groups, lr=1e-4, momentum=effective_momentum("official", 5e-4))
    for group in optimizer.param_groups:
        group["fused"] = "fused" in options
    generator = torch.Generator().manual_seed(0)
    size, batch_size = cfg.train.crop_px, cfg.train.batch_size
    batch = {
        "image_N3HW": torch.randn(batch_size, 3, size, size, generator=generator).to(device),
        "label_NK": (torch.rand(batch_size, num_fg, generator=generator) < 0.1).float().to(device),
        "sample_seed_N": torch.arange(batch_size),
    }
    losses = Losses(cfg, ALONE, 1)
    half = torch.autocast("cuda", torch.bfloat16) if "bf16" in options else contextlib.nullcontext()

    def step(number: int) -> None:
        with half:
            loss, _ = losses(net, batch, number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(step: Callable[[int], None], *, warm_up: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step by CUDA events, and peak memory in MiB."""
    for number in range(warm_up):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for number, mark in enumerate(marks):
        mark.record()
        if number < steps:
            step(warm_up + number)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return {"step_ms": statistics.median(times), "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device on this machine")
    cfg = load_trial(arguments.config, overrides=arguments.sets)
    rows: list[dict[str, Any]] = []
    for name in arguments.variant or list(VARIANTS):
        torch.compiler.reset()
        step = make_step(cfg, arguments.classes, VARIANTS[name])
        row = {"variant": name, **measure(step, warm_up=arguments.warm_up, steps=arguments.steps)}
        row["images_per_s"] = cfg.train.batch_size / row["step_ms"] * 1000
        rows.append(row)
        first = rows[0]["images_per_s"]
        print(json.dumps({**row, "ratio": round(row["images_per_s"] / first, 2)}), flush=True)
        del step
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "config": cfg.backbone.name}))


if __name__ == "__main__":
    main()

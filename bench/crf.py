"""The dense CRF of a seed: all 21 labels, against those that occur and one for all the others; and over two processes.

    python bench/crf.py [--images 24] [--repeats 3]

The first table is one image of 375 x 500 with two classes, 10 iterations of PPC's setting. `occurring and one` is what
stage refine_crf runs (the argument is in RESULTS.md), `occurring alone` leaves the others out. The second table is that
stage's work over GENERATED images in one process and in two, in wall seconds; a process is busy while it runs or waits
for a core that something else holds, so that its share says what the stage leaves idle and not what the machine does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import VOC_WIDTH, cpu_ms, head, row, scene, start, write_voc
from curve import write_cams

from ppc.artifacts import Storage
from ppc.config import CrfConfig, RuntimeConfig
from ppc.crf import LABEL_GT_PROB, PRESETS, CrfParams, Floats, crf_labels, crf_soft
from ppc.metrics import IGNORE
from ppc.runtime import LocalRuntime
from ppc.stages.refine_crf import Shared, refine_chunk

PRESET = PRESETS["ppc_seed"]
NUM_LABELS = 21


def make_case(width: int = VOC_WIDTH) -> tuple[Any, Any]:
    """A scene (h,w,3) and a seed (h,w) of background and two classes, from its mask moved a little."""
    image, mask_HW = scene(3, width)
    seed_HW = np.roll(np.where(mask_HW == IGNORE, 0, mask_HW), width // 50, axis=(0, 1)).astype(np.int64)
    names = np.unique(seed_HW)
    return image, np.where(np.isin(seed_HW, names[:3]), seed_HW, 0)


def all_labels(image: Any, seed_HW: Any, params: CrfParams = PRESET) -> Floats:
    """Marginals (21,h,w) of a CRF that runs every label."""
    prob_CHW = np.full((NUM_LABELS, *seed_HW.shape), (1 - LABEL_GT_PROB) / (NUM_LABELS - 1), np.float32)
    np.put_along_axis(prob_CHW, seed_HW[None], LABEL_GT_PROB, axis=0)
    return crf_soft(image, prob_CHW, params=params)


def ours(image: Any, seed_HW: Any, params: CrfParams = PRESET) -> Floats:
    """The same, the labels that do not occur run as one."""
    return crf_labels(image, seed_HW, num_labels=NUM_LABELS, gt_prob=LABEL_GT_PROB, params=params)


def occurring_alone(image: Any, seed_HW: Any, params: CrfParams = PRESET) -> Floats:
    """Marginals (21,h,w) of a CRF of the labels that occur, the others 0."""
    present_L, local_HW = np.unique(seed_HW, return_inverse=True)
    q_CHW = np.zeros((NUM_LABELS, *seed_HW.shape), np.float32)
    q_CHW[present_L] = crf_labels(image, local_HW, num_labels=len(present_L), gt_prob=LABEL_GT_PROB, params=params)
    return q_CHW


@dataclass(frozen=True)
class Spent:
    """One image: whose process, when it began and ended, and how long that ran or waited for a core, seconds."""

    process: int
    began: float
    ended: float
    ran: float
    waited: float


def timed_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> Spent:
    """`refine_chunk`, timed."""
    began, ran, waited = time.time(), *_scheduled_s()
    refine_chunk(shared, ids, device)
    ran_after, waited_after = _scheduled_s()
    return Spent(os.getpid(), began, time.time(), ran_after - ran, waited_after - waited)


def _scheduled_s() -> tuple[float, float]:
    ran, waited, _ = Path("/proc/self/schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


def throughput(shared: Shared, ids: Sequence[str], processes: int) -> tuple[float, float, float]:
    """Images a second once all processes work, CPU milliseconds an image, and the share of time they are busy."""
    done: list[Spent] = []
    cfg = RuntimeConfig(images_per_task=1)
    LocalRuntime(processes).map(timed_chunk, shared, ids, cfg, lambda _, spent: done.append(spent))
    rate = wall_s = 0.0
    for process in {one.process for one in done}:
        own = [one for one in done if one.process == process]
        span_s = max(one.ended for one in own) - min(one.began for one in own)
        rate, wall_s = rate + len(own) / span_s, wall_s + span_s
    ran_s = sum(one.ran for one in done)
    return rate, 1000 * ran_s / len(done), (ran_s + sum(one.waited for one in done)) / wall_s


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="of the second table")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    start("CRF of one seed, 375 x 500, 21 labels, 10 iterations")
    case = make_case()
    sides = {"all 21": all_labels, "occurring and one": ours, "occurring alone": occurring_alone}
    times = cpu_ms([lambda side=side: side(*case) for side in sides.values()], given.repeats)  # type: ignore[misc]
    q = [side(*case) for side in sides.values()]
    head("labels that run", "an image, ms", "ratio", "largest difference", "pixels that change")
    for name, spent_ms, q_CHW in zip(sides, times, q, strict=True):
        changed = (q_CHW.argmax(0) != q[0].argmax(0)).mean()
        row(name, spent_ms, times[0] / spent_ms, f"{np.abs(q_CHW - q[0]).max():.0e}", f"{100 * changed:.2f} %")
    print()
    head("refine_crf, processes", "images/s", "ratio", "CPU an image, ms", "busy")
    rates = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory(prefix="ppc-bench-") as folder:
            root, storage = Path(folder) / "voc", Storage(Path(folder) / "storage")
            dataset, seeds = write_voc(root, given.images), storage.stage("make_seeds", "bench")
            write_cams(Path(str(seeds.path)), dataset.ids("train"))
            shared = Shared(CrfConfig(), storage.stage("refine_crf", "bench"), seeds, dataset, 0.26)
            rate, cpu, busy = throughput(shared, dataset.ids("train"), processes)
        rates.append(rate)
        row(str(processes), rate, rate / rates[0], cpu, f"{100 * busy:.1f} %")


if __name__ == "__main__":
    main()

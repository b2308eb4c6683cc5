"""The whole background-score curve from CAM files: ours in one pass against one pass a score.

    python bench/curve.py [--images 200]

Both sides read GENERATED CAM files of two classes and masks. The reference is METHOD 12 word for word: for each of 60
scores, each file is read, stacked into 21 maps with the score as background, and its argmax counted class by class. It
runs on a hundredth of the files; the times of both are those of an image times 1,464, hence ~.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import VOC_WIDTH, cpu_ms, head, peak_mib, row, start, waves, write_voc

from ppc.data import Dataset
from ppc.data.voc import VocLayout
from ppc.metrics import IGNORE, OFFICIAL_THRESHOLDS, Floats, curve_counts, curve_miou
from ppc.stages.make_seeds import read_cam

TRAIN_IMAGES = 1464  # VOC 2012's train split
C = 21


def write_cams(folder: Path, ids: Sequence[str], width: int = VOC_WIDTH) -> None:
    """`cams/ID.npz` of every image: two smooth maps of classes that go round."""
    (folder / "cams").mkdir(parents=True)
    for number, image_id in enumerate(ids):
        cam_KHW = waves(2, width * 3 // 4, width).roll(31 * number, -1).numpy()
        np.savez(folder / "cams" / f"{image_id}.npz", keys=np.array([number % 12, 12 + number % 8]), cam=cam_KHW)


def ours(root: Path, dataset: Dataset, ids: Sequence[str]) -> Floats:
    """The mIoU (60,) at each score, as stage make_seeds counts it."""
    counts = np.zeros((len(OFFICIAL_THRESHOLDS) + 1, C, C), np.int64)
    for image_id in ids:
        loaded = read_cam(root / "cams" / f"{image_id}.npz")
        assert loaded is not None
        keys, cam_KHW = loaded
        mask_HW = dataset.mask(image_id, split="train")
        counts += curve_counts(cam_KHW, keys, mask_HW, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=C)
    return curve_miou(counts, absent="zero")


def reference(root: Path, dataset: Dataset, ids: Sequence[str]) -> Floats:
    """The same, score by score."""
    miou_T = []
    for score in OFFICIAL_THRESHOLDS:
        hit, found, truth = (np.zeros(C, np.int64) for _ in range(3))
        for image_id in ids:
            with np.load(root / "cams" / f"{image_id}.npz") as stored:
                keys, cam_KHW = stored["keys"], stored["cam"]
            stack_CHW = np.zeros((C, *cam_KHW.shape[1:]), np.float32)
            stack_CHW[keys + 1] = cam_KHW
            stack_CHW[0] = score
            seed_HW, mask_HW = stack_CHW.argmax(0), dataset.mask(image_id, split="train")
            counted_HW = mask_HW != IGNORE
            for c in range(C):
                is_seed, is_truth = (seed_HW == c) & counted_HW, (mask_HW == c) & counted_HW
                hit[c] += (is_seed & is_truth).sum()
                found[c] += is_seed.sum()
                truth[c] += is_truth.sum()
        miou_T.append((hit / np.maximum(found + truth - hit, 1)).mean())
    return np.array(miou_T)


def make_ours(root: Path, num_images: int) -> Callable[[], Floats]:
    """A pass over some images, for a process of its own."""
    dataset = VocLayout(root)
    ids = dataset.ids("train")
    ours(root, dataset, ids[:2])
    return lambda: ours(root, dataset, ids[:num_images])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    start(f"Background-score curve, {given.images} CAM files of 375 x 500, 60 scores")
    with tempfile.TemporaryDirectory(prefix="ppc-bench-") as folder:
        root = Path(folder) / "voc"
        dataset = write_voc(root, given.images)
        write_cams(root, dataset.ids("train"))
        ids, few = dataset.ids("train"), dataset.ids("train")[: max(1, given.images // 100)]
        ours_ms = cpu_ms([lambda: ours(root, dataset, ids)], 3)[0] / len(ids)
        loop_ms = cpu_ms([lambda: reference(root, dataset, few)], 0)[0] / len(few)
        gap = np.abs(ours(root, dataset, few) - reference(root, dataset, few)).max()
        peaks = [peak_mib(make_ours, root, number) for number in (len(ids) // 4, len(ids))]
    head("scores", f"{TRAIN_IMAGES:,} images, s", "an image, ms", "ratio", "largest difference of the mIoU")
    row("one by one", f"~{loop_ms * TRAIN_IMAGES / 1000:,.0f}", loop_ms, "1", "")
    row("all in one pass", f"~{ours_ms * TRAIN_IMAGES / 1000:.1f}", ours_ms, loop_ms / ours_ms, f"{gap:.0e}")
    print(f"\nMemory of our pass: {peaks[0]:.1f} MiB for {len(ids) // 4} images, {peaks[1]:.1f} MiB for {len(ids)}.")


if __name__ == "__main__":
    main()

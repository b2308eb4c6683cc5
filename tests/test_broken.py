"""Five thousand images of which twenty are broken: named by the check, an error or left out of a trial."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import SCENES, curve, scenes_root, tiny_config
from tiny_study import QUIET, make_study
from typer.testing import CliRunner

from ppc.artifacts import Storage
from ppc.cli import app
from ppc.config import TrialConfig
from ppc.data import make_scenes
from ppc.launch import Where, run_study
from ppc.ledger import read_rows
from ppc.planning import Planner
from ppc.report import build_report
from ppc.run_record import result_points, trial_tags
from ppc.runtime import LocalRuntime
from ppc.trial import run_trial

PX, CLASSES = 40, 3
KINDS = (
    "truncated",
    "empty",
    "text",
    "no_image",
    "no_mask",
    "mask_size",
    "mask_class",
    "mask_rgb",
    "mask_text",
    "half",
)
BROKEN = {f"im_{37 + 211 * i:05d}": KINDS[i % len(KINDS)] for i in range(20)}


def break_image(root: Path, image_id: str, kind: str) -> None:
    image, mask = root / f"JPEGImages/{image_id}.jpg", root / f"SegmentationClass/{image_id}.png"
    whole = {path: path.read_bytes() for path in (image, mask)}
    for path in whole:  # the files are links to a few: only this one may change
        path.unlink()
        path.write_bytes(whole[path])
    if kind == "truncated":
        image.write_bytes(whole[image][:-200])
    elif kind == "half":
        mask.write_bytes(whole[mask][: len(whole[mask]) // 2])
    elif kind == "empty":
        image.write_bytes(b"")
    elif kind in ("text", "mask_text"):
        (image if kind == "text" else mask).write_text("<html>404 Not Found</html>")
    elif kind in ("no_image", "no_mask"):
        (image if kind == "no_image" else mask).unlink()
    elif kind == "mask_size":
        Image.fromarray(np.zeros((PX, PX + 1), np.uint8)).save(mask)
    elif kind == "mask_class":
        Image.fromarray(np.full((PX, PX), CLASSES + 1, np.uint8)).save(mask)
    elif kind == "mask_rgb":
        Image.fromarray(np.zeros((PX, PX, 3), np.uint8)).save(mask)


def make_folder(root: Path) -> Path:
    """Splits `train` of 5,000 images, `few` of the 20 broken ones and 20 more, and `good` of these 20."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nbee\ncow\n")
    rng, kinds = np.random.default_rng(0), 6
    for k in range(kinds):
        mask = np.zeros((PX, PX), np.uint8)
        mask[8:30, 8:30] = k % CLASSES + 1
        image = np.clip(rng.normal(90, 30, (PX, PX, 3)) + 100 * (mask == np.array([1, 2, 3])[:, None, None]).T, 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(root / f"{k}.jpg", quality=95)
        Image.fromarray(mask).save(root / f"{k}.png")
    ids, labels = [f"im_{i:05d}" for i in range(5000)], {}
    for i, image_id in enumerate(ids):
        os.link(root / f"{i % kinds}.jpg", root / f"JPEGImages/{image_id}.jpg")
        os.link(root / f"{i % kinds}.png", root / f"SegmentationClass/{image_id}.png")
        labels[image_id] = np.eye(CLASSES, dtype=np.float32)[i % CLASSES]
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))
    for image_id, kind in BROKEN.items():
        break_image(root, image_id, kind)
    good = ids[:20]
    for split, listed in {"train": ids, "few": sorted([*BROKEN, *good]), "good": good}.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(listed) + "\n")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("broken") / "set")


def train_only(root: Path, batch_size: int = 250, **data: Any) -> TrialConfig:
    raw = {
        "data": {"name": "voc", "root": str(root), **data}, "stages": ["train_cam"], "method": {"name": "cam"},
        "contrast": {"prototype_top_k": 0}, "views": {"target_px": 32},
        "seeds": {"splits": [data.get("train_split", "train")]},
        "train": {"epochs": 1, "batch_size": batch_size, "crop_px": 32,
                  "resize_long_px": [32, 40], "color_jitter": False},
    }  # fmt: skip
    return TrialConfig.model_validate(raw)


def test_the_check_names_exactly_the_broken_images(root: Path) -> None:
    started = time.monotonic()
    ran = CliRunner().invoke(app, ["data", "check", str(root), "--split", "train"])
    lines = ran.output.splitlines()
    assert ran.exit_code == 1 and "train 5000 images; 20 problem(s)" in lines[-1]
    assert sorted(Path(line.partition(": ")[0]).stem for line in lines[:-1]) == sorted(BROKEN)
    assert time.monotonic() - started < 120, "a check of small files takes seconds, on a busy machine too"


def test_stop_is_one_error_that_names_the_file(root: Path, tmp_path: Path) -> None:
    storage, whole = Storage(tmp_path / "storage"), tmp_path / "copy"
    with pytest.raises(ValueError, match=r"(JPEGImages|SegmentationClass).im_\d+\.\w+: missing; .*on_broken=skip"):
        Planner(storage).plan(train_only(root))
    shutil.copytree(root, whole)
    missing = [image_id for image_id, kind in BROKEN.items() if kind in ("no_image", "no_mask")]
    for folder, end in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        for image_id in missing:
            shutil.copy(whole / folder / f"im_00000.{end}", whole / folder / f"{image_id}.{end}")
    plan = Planner(storage).plan(train_only(whole))
    with pytest.raises(ValueError, match=r"im_\d+\.jpg: not readable as an image"):
        run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    told = storage.trial(plan.key).error()
    assert told is not None and "data.on_broken=skip" in told["message"]
    assert any(image_id in told["message"] for image_id in BROKEN) and "\n" not in told["message"]


def test_skip_trains_on_the_others_and_reports_the_count(root: Path, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    plan = Planner(storage).plan(train_only(root, on_broken="skip"))
    result = run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    assert result["skipped"] == {"train": {"ids": sorted(BROKEN), "listed": 5000}}
    assert result["counts"] == {"train": 4980}


def test_files_that_changed_since_the_plan_stop_a_trial_that_skips(tmp_path: Path) -> None:
    """What it would train on are not the images that its key is made of."""
    root, storage = scenes_root(tmp_path), Storage(tmp_path / "storage")
    cfg = train_only(root, batch_size=2, on_broken="skip")
    plan = Planner(storage).plan(cfg)
    path = min((root / "JPEGImages").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="split train are not those that the trial was planned with; launch or resume"):
        run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    assert Planner(storage).plan(cfg).key != plan.key
    path.write_bytes(whole)
    result = run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    assert "skipped" not in result or not result["skipped"]


def few(storage: Storage, root: Path, split: str, **tiny: Any) -> dict[str, Any]:
    """A study of one trial, all stages, on a split of this folder; one task a stage, so that no process is started."""
    voc = {"data.name": "voc", "data.root": str(root), "data.train_split": split, "seeds.splits": [split],
           "train.batch_size": 4, "train.epochs": 1,
           "runtime.images_per_task": 64, **tiny}  # fmt: skip
    return make_study(storage, k=[0], seeds=[0], tiny=voc, metric=f"mask_miou_{split}")


def test_skip_holds_in_all_stages_and_is_told(root: Path, tmp_path: Path) -> None:
    storage, here = Storage(tmp_path), Where(local=True, tracking="none")
    study = few(storage, root, "few", **{"data.on_broken": "skip"})
    assert run_study(storage, "k", here, QUIET) == 0
    (row,) = read_rows(storage, study)
    assert row.result is not None and row.result["skipped"]["few"] == {"ids": sorted(BROKEN), "listed": 40}
    assert row.result["counts"]["few"] == 20, "every mIoU counts what it was made of"
    assert dict(build_report(storage, "k").header)["skipped"].startswith("few: 20 of 40 images skipped")
    assert trial_tags(row, study, None)["ppc.skipped.few"] == "20 of 40 images"
    points = {point.name: point.value for point in result_points(row.result, study["metric"], {})}
    assert points["data/skipped_few"] == 20
    status = CliRunner().invoke(app, ["study", "status", "k", "--storage", str(tmp_path)])
    assert "few: 20 of 40 images skipped" in status.output
    clean = few(Storage(tmp_path / "clean"), root, "good")
    assert run_study(Storage(tmp_path / "clean"), "k", here, QUIET) == 0
    (other,) = read_rows(Storage(tmp_path / "clean"), clean)
    assert other.result is not None
    assert other.result["confusion"]["mask_good"] == row.result["confusion"]["mask_few"], (
        "the broken ones leave no trace"
    )


def test_the_choice_is_in_the_key_and_changes_no_other(root: Path, tmp_path: Path) -> None:
    stop = train_only(root, train_split="good")
    assert stop.decisive("data") == {"train_split": "good"}, "as before there was a choice"
    planner = Planner(Storage(tmp_path))
    keys = [planner.plan(train_only(root, 4, train_split="good", on_broken=rule)).key for rule in ("stop", "skip")]
    assert keys[0] != keys[1]
    assert planner.plan(train_only(root, 4, train_split="few", on_broken="skip")).key not in keys


def small(root: Path, storage: Storage, changes: dict[str, Any]) -> tuple[list[Any], dict[str, float]]:
    """Loss curve and metrics of a tiny trial."""
    stages = ["train_cam", "make_seeds", "evaluate"]
    cfg = tiny_config({"data.name": "voc", "stages": stages, "train.batch_size": 2, **changes}, root)
    plan = Planner(storage).plan(cfg)
    result = run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    return curve(storage.stage(*plan.stages[0])), result["metrics"]


def test_skip_has_the_numbers_of_a_folder_without_the_broken_images_whatever_the_workers(tmp_path: Path) -> None:
    broken, clean = (make_scenes(tmp_path / name, **SCENES) for name in ("broken", "clean"))
    listed = broken / "ImageSets/Segmentation/train.txt"
    ids = listed.read_text().split()
    gone = [ids[1], ids[5]]
    (broken / f"JPEGImages/{gone[0]}.jpg").write_bytes(b"no image")
    (broken / f"SegmentationClass/{gone[1]}.png").unlink()
    (clean / "ImageSets/Segmentation/train.txt").write_text("\n".join(i for i in ids if i not in gone) + "\n")
    skip = {"data.on_broken": "skip"}
    wanted = small(clean, Storage(tmp_path / "1"), {})
    assert small(broken, Storage(tmp_path / "2"), skip) == wanted
    points, metrics = small(broken, Storage(tmp_path / "3"), {**skip, "runtime.workers": 2})
    assert [step for step, _ in points] == [step for step, _ in wanted[0]]
    for (_, mine), (_, theirs) in zip(points, wanted[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert metrics == pytest.approx(wanted[1], abs=1e-3)  # a pixel or two at the score's edge
    with pytest.raises(ValueError, match="train.batch_size: 8 is more than the 6 images of train"):
        small(broken, Storage(tmp_path / "4"), {**skip, "train.batch_size": 8})

"""experiments/voc320: its lists, and the script that makes the set from VOC 2012."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppc.data.check import check_dataset
from ppc.data.voc import VocLayout

HERE = Path(__file__).parents[1] / "experiments" / "voc320"


def test_the_lists_are_what_the_readme_says() -> None:
    train, val, third = ((HERE / f"{name}.txt").read_text().split() for name in ("train", "val", "third"))
    assert (len(set(train)), len(set(val)), third) == (952, 400, train[::3]) and not set(train) & set(val)


@pytest.mark.parametrize("tags", ["annotations", "cls_labels.npy"])
def test_the_set_is_made_from_voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: str) -> None:
    voc, out, script = tmp_path / "VOC2012", tmp_path / "out", tmp_path / "make.py"
    shutil.copy(HERE / "make.py", script)
    for name, ids in (("train", "2007_000001 2007_000002"), ("val", "2007_000003"), ("third", "2007_000001")):
        (tmp_path / f"{name}.txt").write_text("\n".join(ids.split()) + "\n")
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (voc / folder).mkdir(parents=True)
    sizes = {"2007_000001": (500, 281), "2007_000002": (334, 500), "2007_000003": (160, 100)}
    for image_id, (width, height) in sizes.items():
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, : width // 2] = 3
        mask[: height // 8] = 255
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(voc / "JPEGImages" / f"{image_id}.jpg")
        Image.fromarray(mask).save(voc / "SegmentationClass" / f"{image_id}.png")
        xml = "<annotation><object><name>bird</name></object></annotation>"
        (voc / "Annotations" / f"{image_id}.xml").write_text(xml)
    if tags == "cls_labels.npy":
        np.save(voc / tags, np.array({name: np.eye(20, dtype=np.float32)[2] for name in sizes}, dtype=object))
    monkeypatch.setattr(sys, "argv", ["make.py", str(voc), str(out)])
    runpy.run_path(str(script), run_name="__main__")
    made = VocLayout(out)
    assert [made.ids(split) for split in ("train", "val", "third")] == [
        ["2007_000001", "2007_000002"], ["2007_000003"], ["2007_000001"],
    ]  # fmt: skip
    assert [made.mask(i, split="train").shape for i in sizes] == [(180, 320), (320, 214), (200, 320)]
    assert set(np.unique(made.mask("2007_000001", split="train"))) == {0, 3, 255}
    assert (out / "cls_labels.npy").is_file() == (tags == "cls_labels.npy")
    assert check_dataset(made, ["train", "val", "third"]) == []

"""Exports: other code reads what the trial made, an interrupted export goes on, and no folder of another is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_study import QUIET, make_study
from typer.testing import CliRunner

import ppc.export
from ppc.artifacts import Storage, write_json
from ppc.cli import app
from ppc.data import VocLayout
from ppc.export import export_cams, export_masks
from ppc.figures import VOC_PALETTE
from ppc.launch import Where, run_study
from ppc.ledger import TrialRow, read_rows
from ppc.metrics import confusion, miou


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A tiny study of one variant and two seeds, run."""
    storage = Storage(tmp_path_factory.mktemp("storage"))
    make_study(storage, k=[4], seeds=[0, 1])
    assert run_study(storage, "k", Where(local=True, tracking="none"), QUIET) == 0
    return storage


def rows_of(storage: Storage) -> list[TrialRow]:
    return read_rows(storage, storage.study("k").definition())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return found


def test_masks_are_a_dataset_with_the_miou_that_their_record_names(ran: Storage, tmp_path: Path) -> None:
    said = export_masks(ran, "k", tmp_path, seed=1)
    row = rows_of(ran)[1]
    assert row.result is not None
    record = told(tmp_path)
    assert said == f"{tmp_path}: mask of {row.label}, {record['splits']['train']['images']} images of train"
    value = row.result["metrics"]["mask_miou_train"]
    assert record["splits"] == {"train": {"images": row.result["counts"]["train"], "miou": value}}
    assert (record["trial_key"], record["study"], record["seed"], record["complete"]) == (row.key, "k", 1, True)
    assert record["code"] == ran.study("k").definition()["code"] and record["data"]["generated"] is True
    assert record["data"]["fingerprint"] == ran.study("k").definition()["trials"][1]["fingerprint"]
    words = (tmp_path / "README.txt").read_text()
    assert f"{100 * value:.2f} %" in words and "Generated data." in words and row.variant in words

    source = next((Path(ran.root) / "data").iterdir())
    (tmp_path / "JPEGImages").symlink_to(source / "JPEGImages")
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text(
        (tmp_path / "ImageSets/Segmentation/train.txt").read_text()
    )
    read, truth = VocLayout(tmp_path), VocLayout(source)
    assert read.class_names == truth.class_names and read.ids("train") == truth.ids("train")
    size = truth.num_classes + 1
    total = np.zeros((size, size), np.int64)
    for image_id in read.ids("train"):
        total += confusion(read.mask(image_id, split="train_aug"), truth.mask(image_id, split="train"), size)
        with Image.open(tmp_path / "SegmentationClassAug" / f"{image_id}.png") as image:
            assert image.mode == "P" and np.array_equal(
                np.asarray(image.convert("RGB")), VOC_PALETTE[np.asarray(image)]
            )
    assert miou(total, absent="zero") == pytest.approx(value, abs=1e-12)


def test_seeds_differ_from_masks_and_a_product_that_is_not_there_is_named(ran: Storage, tmp_path: Path) -> None:
    export_masks(ran, "k", tmp_path / "mask", seed=0)
    export_masks(ran, "k", tmp_path / "seed", seed=0, product="seed")
    assert told(tmp_path / "seed")["product"] == "seed"
    mask, seed = contents(tmp_path / "mask"), contents(tmp_path / "seed")
    assert mask.keys() == seed.keys() and any(mask[name] != seed[name] for name in mask if name.endswith(".png"))
    with pytest.raises(ValueError, match="product irn_mask: trial prototype_top_k=4 s=0 makes seed, mask"):
        export_masks(ran, "k", tmp_path / "irn", seed=0, product="irn_mask")
    with pytest.raises(ValueError, match="--split val: mask of trial .* is made of train"):
        export_masks(ran, "k", tmp_path / "irn", splits=["train", "val"])
    with pytest.raises(ValueError, match="no finished trial of variant full; finished: prototype_top_k=4 s=0"):
        export_masks(ran, "k", tmp_path / "irn", variant="full")
    assert not (tmp_path / "irn").exists()


def test_cams_are_read_without_pickles(ran: Storage, tmp_path: Path) -> None:
    export_cams(ran, "k", tmp_path, seed=0)
    key = next(stage["key"] for stage in rows_of(ran)[0].stages if stage["name"] == "make_seeds")
    ids = (tmp_path / "ImageSets/Segmentation/train.txt").read_text().split()
    assert {f"{image_id}.npz" for image_id in ids} == {path.name for path in (tmp_path / "cams").iterdir()}
    for image_id in ids:
        with np.load(tmp_path / "cams" / f"{image_id}.npz", allow_pickle=False) as mine:
            with np.load(ran.stage("make_seeds", key) / "cams" / f"{image_id}.npz") as theirs:
                assert np.array_equal(mine["keys"], theirs["keys"]) and np.array_equal(mine["cam"], theirs["cam"])
            assert mine["cam"].shape[0] == len(mine["keys"])


def test_an_interrupted_export_goes_on_and_ends_as_an_undisturbed_one(
    ran: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_masks(ran, "k", tmp_path / "calm", seed=0)
    out, copied, read = tmp_path / "out", [0], ppc.export.read_bytes

    def stops(path: Any) -> bytes:
        copied[0] += 1
        if copied[0] > 3:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(ppc.export, "read_bytes", stops)
    with pytest.raises(KeyboardInterrupt):
        export_masks(ran, "k", out, seed=0)
    monkeypatch.undo()
    assert told(out)["complete"] is False
    pngs = sorted((out / "SegmentationClassAug").iterdir())
    assert len(pngs) == 3
    (out / "SegmentationClassAug" / ".x.png.abc.part").write_bytes(b"half")
    pngs[1].write_bytes(b"half")  # as a machine that lost power may leave it
    before = pngs[0].stat().st_mtime_ns
    assert export_masks(ran, "k", out, seed=0).endswith(", 2 were there")
    assert pngs[0].stat().st_mtime_ns == before, "what is there is not written again"
    mine, calm = contents(out), contents(tmp_path / "calm")
    assert {n: v for n, v in mine.items() if n != "provenance.json"} == {
        n: v for n, v in calm.items() if n != "provenance.json"
    }
    assert {**told(out), "exported_ms": 0} == {**told(tmp_path / "calm"), "exported_ms": 0}


def test_a_folder_of_something_else_is_left_as_it_is(ran: Storage, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    export_masks(ran, "k", mine, seed=0)
    before = contents(mine)
    for other in ({"seed": 1}, {"seed": 0, "product": "seed"}):
        with pytest.raises(ValueError, match=r"holds another export \(mask of prototype_top_k=4 s=0, study k, splits"):
            export_masks(ran, "k", mine, **other)
    assert contents(mine) == before
    theirs = tmp_path / "theirs"
    write_json(theirs / "provenance.json", {"made_by": "somebody"})
    for folder in (theirs, Path(os.path.dirname(theirs))):
        with pytest.raises(ValueError, match="is not empty and no earlier export: name a new folder"):
            export_masks(ran, "k", folder, seed=0)
    assert list(contents(theirs)) == ["provenance.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        export_masks(ran, "k", tmp_path / "file", seed=0)


def test_a_label_map_that_is_gone_is_named(ran: Storage, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "copy")
    shutil.copytree(ran.root, storage.root)
    path = sorted(Path(storage.root).glob("stages/refine_crf/*/masks/*.png"))[0]
    path.unlink()
    seed = next(row.seed for row in rows_of(storage) if path.parent.parent.name in [s["key"] for s in row.stages])
    with pytest.raises(ValueError, match=f"{path} is missing.*, then resume the study"):
        export_masks(storage, "k", tmp_path / "out", seed=seed)
    assert told(tmp_path / "out")["complete"] is False


def test_the_commands(ran: Storage, tmp_path: Path) -> None:
    storage = ["--storage", str(ran.root)]
    words = ["export", "masks", "k", str(tmp_path / "a"), "--product", "seed", "--split", "train", "--seed", "1"]
    done = CliRunner().invoke(app, [*words, *storage])
    assert done.exit_code == 0 and "seed of prototype_top_k=4 s=1" in done.output
    done = CliRunner().invoke(app, ["export", "cams", "k", str(tmp_path / "b"), *storage])
    assert done.exit_code == 0 and "cam of prototype_top_k=4 s=0" in done.output
    done = CliRunner().invoke(app, ["export", "masks", "absent", str(tmp_path / "c"), *storage])
    assert isinstance(done.exception, ValueError) and "no study 'absent'" in str(done.exception)


@pytest.mark.parametrize(("stage", "folder"), [("refine_crf", "masks"), ("make_seeds", "cams")])
def test_a_damaged_file_is_not_handed_on(stage: str, folder: str, ran: Storage, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "copy")
    shutil.copytree(ran.root, storage.root)
    row = rows_of(storage)[0]
    key = next(one["key"] for one in row.stages if one["name"] == stage)
    damaged = max((Path(storage.root) / "stages" / stage / key / folder).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-30])
    export = export_masks if folder == "masks" else export_cams
    with pytest.raises(ValueError, match=f"{damaged} is .*; delete {damaged.parents[1]}"):
        export(storage, "k", tmp_path / "out", seed=0)
    assert told(tmp_path / "out")["complete"] is False

"""Whole trials on data that is not VOC: generated COCO of 80 classes, a folder, and the reader of the guide."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_data import HEIGHT, VAL, WIDTH, make_coco, make_folder
from PIL import Image
from tiny_run import tiny_config
from typer.testing import CliRunner

from ppc import data as data_module
from ppc.artifacts import Storage, write_json
from ppc.cli import app
from ppc.data import DATASETS, Dataset, coco_index, open_dataset
from ppc.data.check import broken_images, check_dataset, fingerprint
from ppc.figures import read_palette_png
from ppc.ledger import FAILED
from ppc.planning import Planner, TrialPlan
from ppc.run_record import image_name
from ppc.runtime import LocalRuntime
from ppc.trial import run_trial

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.setattr(coco_index, "HERE", folder)


def planned(storage: Storage, root: Path, name: str, **changes: Any) -> TrialPlan:
    values = {"data.name": name, "train.epochs": 1, "seeds.splits": ["train"], **changes}
    return Planner(storage).plan(tiny_config(values, root))


class Sent(LocalRuntime):
    """All here, with what workers are sent as they get it: a copy."""

    def train(self, worker: Any, payload: Any, cfg: Any) -> None:
        super().train(worker, pickle.loads(pickle.dumps(payload)), cfg)

    def map(self, function: Any, shared: Any, *rest: Any, **options: Any) -> None:
        super().map(function, pickle.loads(pickle.dumps(shared)), *rest, **options)


def run(storage: Storage, plan: TrialPlan) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, Sent())


def label_maps(storage: Storage, plan: TrialPlan, stage: str, folder: str) -> dict[str, Any]:
    place = storage.stage(stage, dict(plan.stages)[stage]) / folder
    return {path.stem: read_palette_png(path) for path in Path(str(place)).iterdir()}


def test_a_trial_on_coco_of_80_classes(tmp_path: Path) -> None:
    root, storage = make_coco(tmp_path / "coco"), Storage(tmp_path / "storage")
    changes = {"seeds.splits": ["train2014", "val"], "data.train_split": "train2014"}  # one image has no class at all
    plan = planned(storage, root, "coco", **changes)
    result = run(storage, plan)
    assert result["counts"] == {"train2014": 9, "val": 3}
    assert {"seed_miou_val", "mask_miou_train2014"} <= set(result["metrics"])
    assert len(result["per_class_iou"]["mask_val"]) == 81 and np.shape(result["confusion"]["mask_val"]) == (81, 81)
    masks = label_maps(storage, plan, "refine_crf", "masks")
    assert len(masks) == 12 and not masks["COCO_train2014_000000000017"].any()
    allowed = {0, *(np.flatnonzero(open_coco(root).image_label("COCO_val2014_000000000501")) + 1)}
    assert set(masks["COCO_val2014_000000000501"].flat) <= allowed


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Storage]:
    """One COCO and one storage, so that a trial finds the CAM that another has trained."""
    folder = tmp_path_factory.mktemp("shared")
    return make_coco(folder / "coco"), Storage(folder / "storage")


LATER = {
    "psa_mask": (["train_psa", "refine_psa"], {"psa.train.crop_px": 48}),
    "irn_mask": (["train_irn", "refine_irn"], {"irn.train.crop_px": 96}),
    "seg": (["refine_crf", "train_seg", "predict_seg"], {"segmentation.train.crop_px": 48}),
}


@pytest.mark.parametrize("product", LATER)
def test_the_nets_after_the_cam_with_80_classes(product: str, shared: tuple[Path, Storage]) -> None:
    root, storage = shared
    stages, changes = LATER[product]
    section = next(iter(changes)).partition(".")[0]
    changes = {**changes, f"{section}.train.epochs": 1, f"{section}.train.batch_size": 4}
    all_stages = ["train_cam", "make_seeds", *stages, "evaluate"]
    plan = planned(storage, root, "coco", **{**changes, "stages": all_stages, "seeds.splits": ["train", "val"]})
    result = run(storage, plan)
    assert f"{product}_miou_val" in result["metrics"] and len(result["per_class_iou"][f"{product}_val"]) == 81


def open_coco(root: Path) -> Dataset:
    return data_module.open_dataset("coco", root)


@pytest.mark.parametrize("method", ["eps", "eps_seam"])
def test_saliency_methods_on_coco_and_folder(method: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    for name, make in (("coco", make_coco), ("folder", make_folder)):
        plan = planned(storage, make(tmp_path / name), name, **{"method.name": method, "stages": ["train_cam"]})
        assert run(storage, plan)["class_names"][0] == "background"


def test_a_trial_on_a_folder_whatever_its_images_are_called(tmp_path: Path) -> None:
    root, storage = make_folder(tmp_path / "mine"), Storage(tmp_path / "storage")
    table = root / "tags.csv"
    table.write_text(table.read_text(encoding="utf-8") + "gone,plum,train\n", encoding="utf-8")
    plan = planned(storage, root, "folder", **{"seeds.splits": ["train", "val"], "data.on_broken": "skip"})
    result = run(storage, plan)
    assert result["counts"] == {"train": 6, "val": 2} and result["skipped"]["train"]["ids"] == ["gone"]
    assert set(label_maps(storage, plan, "refine_crf", "masks")) >= {"two words", "日本", "a.jpg", *VAL}
    (storage.root / "tags.csv").write_text("")
    with pytest.raises(ValueError, match=r"tags.csv: line 10: no image `gone` in images/; .*data.on_broken=skip"):
        planned(storage, root, "folder")


def test_one_class_and_254_classes(tmp_path: Path) -> None:
    """The least and the most that a mask of bytes can hold."""
    for number in (1, 254):
        root, storage = tmp_path / str(number), Storage(tmp_path / f"storage{number}")
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        (root / "classes.txt").write_text("\n".join(f"c{k}" for k in range(1, number + 1)))
        for k in range(4):
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * k, np.uint8)).save(root / f"images/{k}.png")
            Image.fromarray(np.full((HEIGHT, WIDTH), number, np.uint8)).save(root / f"masks/{k}.png")
        (root / "tags.csv").write_text("image,classes\n" + "".join(f"{k},c{number}\n" for k in range(4)))
        plan = planned(storage, root, "folder", **{"contrast.prototype_top_k": 2})
        result = run(storage, plan)
        assert len(result["per_class_iou"]["mask_train"]) == number + 1
        assert all(set(one.flat) <= {0, number} for one in label_maps(storage, plan, "make_seeds", "seeds").values())


def test_cams_of_another_class_list_are_never_taken(tmp_path: Path) -> None:
    root, storage = make_folder(tmp_path / "mine"), Storage(tmp_path / "storage")
    before = dict(planned(storage, root, "folder").stages)
    for file in ("classes.txt", "tags.csv"):
        path = root / file
        path.write_text(path.read_text(encoding="utf-8").replace("plum", "prune"), encoding="utf-8")
    after = dict(planned(storage, root, "folder").stages)
    assert set(before) == set(after) and not set(before.values()) & set(after.values()), "names are in every key"


def test_what_a_method_needs_is_asked_of_the_layout(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "mine")
    for path in (root / "saliency").iterdir():
        path.unlink()
    (root / "saliency").rmdir()
    with pytest.raises(ValueError, match=r"eps needs saliency maps: a folder saliency in .*mine"):
        planned(Storage(tmp_path / "s"), root, "folder", **{"method.name": "eps"})


def test_saliency_maps_of_0_and_1_are_told_before_they_are_taken_for_empty(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "mine")
    maps = sorted((root / "saliency").iterdir())
    for path in maps:
        with Image.open(path) as image:
            Image.fromarray((np.asarray(image.convert("L")) > 127).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"method.name.*mine: .* 0 and 1 alone, of 255; store 1 as 255"):
        planned(Storage(tmp_path / "s"), root, "folder", **{"method.name": "eps"})
    ran = CliRunner().invoke(app, ["data", "check", str(root), "--name", "folder"])
    assert ran.exit_code == 1 and "store 1 as 255" in " ".join(ran.output.split())
    Image.new("L", (48, 36), 200).save(root / "saliency/plain.png")
    planned(Storage(tmp_path / "s"), root, "folder", **{"method.name": "eps"})


def test_a_saliency_map_of_another_size_ends_the_trial_with_both_names(tmp_path: Path) -> None:
    root, storage = make_folder(tmp_path / "mine"), Storage(tmp_path / "storage")
    Image.new("L", (5, 6)).save(root / "saliency/plain.png")
    plan = planned(storage, root, "folder", **{"method.name": "eps", "train.batch_size": 6})
    with pytest.raises(ValueError, match=r"saliency/plain.png: 5x6 pixels but its image has 48x36; .*plain.jpg"):
        run(storage, plan)
    assert storage.trial(plan.key).state()["state"] == FAILED


def test_the_command_that_checks(tmp_path: Path) -> None:
    for name, make, sizes in (("coco", make_coco, "train 8, val 3"), ("folder", make_folder, "train 6, val 2")):
        ran = CliRunner().invoke(app, ["data", "check", str(make(tmp_path / name)), "--name", name])
        assert ran.exit_code == 0 and f"{sizes} images; 0 problem(s)" in " ".join(ran.output.split()), ran.output
    (tmp_path / "folder/saliency/plain.png").unlink()
    words = ["data", "check", str(tmp_path / "folder"), "--name", "folder"]
    assert CliRunner().invoke(app, words).exit_code == 0
    ran = CliRunner().invoke(app, [*words, "--saliency"])
    assert ran.exit_code == 1 and "saliency/plain.png: missing; a method with saliency needs one map" in ran.output
    (tmp_path / "folder/images/zz.png").unlink()
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 1 and "tags.csv: line 9: no image `zz`" in ran.output


def test_the_check_takes_train_and_val_as_there_are(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "mine")
    table = (root / "tags.csv").read_text(encoding="utf-8").splitlines()
    (root / "tags.csv").write_text("\n".join(line.rpartition(",")[0] for line in table) + "\n", encoding="utf-8")
    ran = CliRunner().invoke(app, ["data", "check", str(root), "--name", "folder"])
    assert ran.exit_code == 0 and "train 8 images; 0 problem(s)" in " ".join(ran.output.split()), ran.output
    ran = CliRunner().invoke(app, ["data", "check", str(root), "--name", "folder", "--split", "val"])
    assert ran.exit_code == 1 and ran.output.count("no split `val`") == 1 and "no images" in ran.output


def test_pictures_of_images_with_like_names_have_names_of_their_own() -> None:
    assert image_name("2007_000032") == "2007_000032"
    names = [image_name(name) for name in ("käse 1", "köse 1", "k_se_1")]
    assert len(set(names)) == 3 and all(re.fullmatch(r"[\w\-.]+", name, re.ASCII) for name in names)


# -- the guide


def guide_code() -> str:
    text = GUIDE.read_text(encoding="utf-8").partition("## Add a dataset in an afternoon")[2]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


def test_the_example_of_the_guide_runs_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/pairs_of_the_guide.py").write_text(guide_code(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    reader = import_module("pairs_of_the_guide").PairsLayout
    root = tmp_path / "pairs"
    (root / "photos").mkdir(parents=True)
    for number, name in enumerate(("cat-1", "dog-2", "cat-3")):
        picture = np.full((HEIGHT, WIDTH, 3), 60 * number, np.uint8)
        Image.fromarray(picture).save(root / f"photos/{name}.jpg")
        Image.fromarray(np.full((HEIGHT, WIDTH), 1 + name.startswith("dog"), np.uint8)).save(
            root / f"photos/{name}.png"
        )
    monkeypatch.setitem(DATASETS, "voc", lambda root, labels, scenes: reader(root))
    data = reader(root)
    assert data.ids("train") == ["cat-1", "cat-3", "dog-2"] and check_dataset(data, ["train"]) == []
    assert data.image_label("dog-2").tolist() == [0, 1] and broken_images(data, "train") == {}
    assert len(fingerprint(data, ["train"], with_masks=True, with_saliency=False)) == 64
    storage = Storage(tmp_path / "storage")
    plan = planned(storage, root, "voc", **{"train.batch_size": 3, "method.name": "cam", "contrast.prototype_top_k": 0})
    assert run(storage, plan)["counts"] == {"train": 3}


def test_a_list_that_names_an_image_twice_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "mine")
    ids = open_dataset("folder", root).ids("train")
    (root / "own.txt").write_text("".join(f"{name}\n" for name in [*ids, ids[1]]), encoding="utf-8")
    changes = {"data.train_split": "own", "seeds.splits": ["own"]}
    with pytest.raises(ValueError, match=rf"data.train_split: {root}/own.txt lists {ids[1]} more than once") as error:
        planned(Storage(tmp_path / "s"), root, "folder", **changes)
    assert str(error.value).count("more than once") == 1


@pytest.fixture
def maskless(tmp_path: Path) -> tuple[list[str], Path]:
    """A study of two seeds on a folder without masks: its words for the command line, its file."""
    root = make_folder(tmp_path / "mine")
    shutil.rmtree(root / "masks")
    base = f"{{data: {{name: folder, root: {root}}}, seeds: {{splits: [train], protocol: fixed}}}}"
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nbase: {base}\ndesign: {{kind: list, variants: [{{name: one}}]}}\n")
    return ["study", "launch", str(file), "--local", "--storage", str(tmp_path / "s")], root


@pytest.mark.parametrize("metric", ["mask_miou_train", "silent_maps_train", "mask_miou_tain"])
def test_a_study_of_data_without_masks_is_told_what_it_lacks(metric: str, maskless: tuple[list[str], Path]) -> None:
    words, _ = maskless
    ran = CliRunner().invoke(app, [*words, "--set", f"metric={metric}", "--set", "train.batch_size=4"])
    told = str(ran.exception)
    assert isinstance(ran.exception, ValueError) and "no mIoU can be measured: the data has no masks of train" in told
    assert "add masks of a few images" in told and "ppc run FILE" in told and "did you mean" not in told


def test_masks_of_val_alone_are_enough_for_a_study(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "mine")
    for path in (root / "masks").iterdir():
        if path.stem not in VAL:
            path.unlink()
    changes = {"seeds.splits": ["train", "val"], "seeds.protocol": "val_subset"}
    plan = planned(Storage(tmp_path / "s"), root, "folder", **changes)
    ious = [name for name in plan.metrics if "miou" in name]
    assert ious == ["seed_miou_val", "mask_miou_val"]
    metrics = run(Storage(tmp_path / "s"), plan)["metrics"]
    assert set(ious) <= set(metrics) and not any(name.endswith("miou_train") for name in metrics)


def test_one_trial_on_data_without_masks_has_no_best(maskless: tuple[list[str], Path], tmp_path: Path) -> None:
    words, root = maskless
    ran = CliRunner().invoke(app, ["data", "check", str(root), "--name", "folder"])
    assert ran.exit_code == 0 and "train 6 (no masks), val 2 (no masks) images; 0 problem(s)" in " ".join(
        ran.output.split()
    )
    plan = planned(Storage(tmp_path / "s"), root, "folder", **{"seeds.protocol": "fixed"})
    write_json(tmp_path / "one.yaml", plan.config.model_dump(mode="json"))
    ran = CliRunner().invoke(app, ["run", str(tmp_path / "one.yaml"), *words[3:]])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert "silent_maps_train" in ran.output and "best" not in ran.output
    listed = CliRunner().invoke(app, ["study", "list", "--json", *words[4:]])
    assert json.loads(listed.output)[0]["best_variant"] is None

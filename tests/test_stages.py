"""Stages: what they write is what the equations say, and a half-done stage ends like one that was never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import layout, manifest_result, products, scenes_root, tiny_config

from ppc.artifacts import StageDir, Storage
from ppc.cam import seed_from_cam
from ppc.config import TrialConfig
from ppc.crf import PRESETS, refine_scores, refine_seed
from ppc.data.labels import DataError, read_label_file
from ppc.data.voc import VocLayout
from ppc.figures import read_palette_png
from ppc.methods import METHODS, build_net, class_maps
from ppc.metrics import OFFICIAL_THRESHOLDS, curve_counts
from ppc.normalisation import NORMALISATIONS
from ppc.planning import Planner, TrialPlan
from ppc.runtime import LocalRuntime
from ppc.stages import STAGES, needs_of, plan_stages
from ppc.stages.make_seeds import (
    chosen_score,
    images_of,
    infer_cam,
    read_cam,
    refuse_two_tag_sets,
    scaled,
    val_subset,
)
from ppc.stages.train_cam import load_net
from ppc.trial import run_trial

CPU = torch.device("cpu")
THRESHOLDS = [i / 100 for i in range(60)]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One root for all tests here: they share what is trained."""
    return Storage(tmp_path_factory.mktemp("stages"))


def run(storage: Storage, cfg: TrialConfig) -> tuple[dict[str, Any], dict[str, StageDir]]:
    """The result of a trial and its stage folders."""
    plan = Planner(storage).plan(cfg)
    return run_plan(storage, plan), folders_of(storage, plan)


def run_plan(storage: Storage, plan: TrialPlan) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())


def folders_of(storage: Storage, plan: TrialPlan) -> dict[str, StageDir]:
    return {name: storage.stage(name, key) for name, key in plan.stages}


def slow_miou(pairs: Sequence[tuple[Any, Any]], num_classes: int) -> float:
    """One confusion matrix over all pixels of all images, 255 ignored, an absent class counting as 0."""
    ious = []
    for c in range(num_classes):
        hit = sum(int(((p == c) & (t == c)).sum()) for p, t in pairs)
        union = sum(int((((p == c) | (t == c)) & (t != 255)).sum()) for p, t in pairs)
        ious.append(hit / union if union else 0.0)
    return sum(ious) / num_classes


def slow_seed(keys: Any, cam: Any, score: float, num_classes: int) -> Any:
    stack = np.zeros((num_classes, *cam.shape[1:]), np.float32)
    stack[0] = score
    for key, map_HW in zip(keys, cam, strict=True):
        stack[key + 1] = map_HW
    return stack.argmax(0)


# -- products


def test_every_image_gets_its_cam_seed_and_mask(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config(root=scenes))
    data = layout(scenes)
    names = {
        folder: {path.stem for path in (folders[stage] / folder).iterdir()}
        for stage, folder in (("make_seeds", "cams"), ("make_seeds", "seeds"), ("refine_crf", "masks"))
    }
    assert names["cams"] == names["seeds"] == names["masks"] == set(data.ids("train"))
    score = result["metrics"]["bg_score"]
    for image_id in data.ids("train"):
        keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
        assert keys.tolist() == np.flatnonzero(data.image_label(image_id)).tolist()
        assert cam.dtype == np.float32 and cam.shape == (len(keys), *data.image_size(image_id))
        seed = read_palette_png(folders["make_seeds"] / "seeds" / f"{image_id}.png")
        assert (seed == slow_seed(keys, cam, score, 4)).all()
        mask = read_palette_png(folders["refine_crf"] / "masks" / f"{image_id}.png")
        wanted = refine_seed(
            data.image(image_id), cam, keys, background=score, num_classes=4, params=PRESETS["ppc_seed"]
        )
        assert (mask == wanted).all()
    drawn = sorted(path.stem for path in (folders["make_seeds"] / "overlays").iterdir())
    assert drawn == manifest_result(folders["make_seeds"])["overlays"] and len(drawn) == 2


def test_the_curve_is_that_of_a_slow_loop_over_its_scores(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config(root=scenes))
    data = layout(scenes)
    loaded = [(read_cam(folders["make_seeds"] / "cams" / f"{i}.npz"), data.mask(i)) for i in data.ids("train")]
    slow = [slow_miou([(slow_seed(*kc, t, 4), mask) for kc, mask in loaded], 4) for t in THRESHOLDS]
    curve = result["curves"]["train"]
    assert curve["thresholds"] == THRESHOLDS
    np.testing.assert_allclose(curve["miou"], slow, rtol=1e-12)
    assert result["metrics"]["bg_score"] == THRESHOLDS[int(np.argmax(slow))], "the first of the best"
    assert result["metrics"]["seed_miou_train"] == pytest.approx(max(slow), rel=1e-12)
    assert len(set(slow)) > 5
    silent = [(cam_HW <= 0).all() for (_, cam_KHW), _ in loaded for cam_HW in cam_KHW]
    assert result["metrics"]["silent_maps_train"] == np.mean(silent)


def test_scores_are_those_of_the_pngs(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config(root=scenes))
    data = layout(scenes)
    for product, folder in (("seed", folders["make_seeds"] / "seeds"), ("mask", folders["refine_crf"] / "masks")):
        pairs = [(read_palette_png(folder / f"{i}.png"), data.mask(i)) for i in data.ids("train")]
        assert result["metrics"][f"{product}_miou_train"] == pytest.approx(slow_miou(pairs, 4), rel=1e-12)
        per_class = result["per_class_iou"][f"{product}_train"]
        assert sum(per_class) / 4 == pytest.approx(slow_miou(pairs, 4), rel=1e-12)
        confusion = np.array(result["confusion"][f"{product}_train"])
        assert confusion.sum() == sum(int((mask != 255).sum()) for _, mask in pairs)
        assert confusion[2, 1] == sum(int(((t == 2) & (p == 1)).sum()) for p, t in pairs)
    assert result["counts"] == {"train": 8}
    assert result["class_names"] == ["background", *data.class_names]


def test_what_comes_back_of_the_images_does_not_grow_with_their_number(
    storage: Storage, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Planner(storage).plan(
        tiny_config({"seeds.protocol": "val_subset", "seeds.splits": ["train", "val"]}, scenes)
    )
    results: list[Any] = []
    whole = LocalRuntime.map

    def watched(self: Any, function: Any, shared: Any, items: Any, cfg: Any, done: Any, **options: Any) -> None:
        def take(number: int, result: Any) -> None:
            results.append((function.__name__, result))
            done(number, result)

        whole(self, function, shared, items, cfg, take, **options)

    monkeypatch.setattr(LocalRuntime, "map", watched)
    for size in (1, 100):
        results.clear()
        for name in ("make_seeds", "evaluate"):
            shutil.rmtree(folders_of(storage, plan)[name].path, ignore_errors=True)
        (storage.trial(plan.key).path / "result.json").unlink(missing_ok=True)
        runtime = plan.config.runtime.model_copy(update={"images_per_task": size})
        cfg = plan.config.model_copy(update={"runtime": runtime})
        result = run_trial(cfg, plan.key, plan.stages, storage, LocalRuntime())
        curves = [r for name, r in results if name == "infer_chunk"]
        counts = [r for name, r in results if name == "count_chunk"]
        assert len(curves) == (12 if size == 1 else 1) and len(counts) == (24 if size == 1 else 4)
        assert all(r.shape == (4, 4) and r.dtype == np.int64 for r in counts)
        assert all(c.shape in ((61, 4, 4), (2,)) and c.dtype == np.int64 for r in curves for c in r.values())
        total = {name: sum(r[name] for r in curves if name in r) for r in curves for name in r}
        assert total.keys() == {"train", "val", "val_subset images", "silent_maps_train", "silent_maps_val"}
        masks = [layout(scenes).mask(i, split="val") for _, i in val_subset(plan.config, layout(scenes))]
        assert total["val_subset images"].sum() == sum(int((mask != 255).sum()) for mask in masks)
        if size == 1:
            wanted = result
    for name in ("metrics", "curves", "confusion"):
        assert result[name] == wanted[name]


# -- a stage that was stopped half-way


@pytest.mark.parametrize(
    ("stage", "lost"),
    [
        ("make_seeds", ["cams/train_00001.npz", "seeds/*.png", "overlays/*.png"]),
        ("make_seeds", ["cams/*.npz"]),
        ("make_seeds", ["seeds/train_00003.png"]),
        ("refine_crf", ["masks/train_00000.png", "masks/train_00005.png"]),
        ("evaluate", []),
        ("train_cam", ["weights.pt"]),
        ("train_cam", []),
    ],
)
def test_a_stage_begun_by_another_process_ends_the_same(
    storage: Storage, scenes: Path, tmp_path: Path, stage: str, lost: list[str]
) -> None:
    cfg = tiny_config(root=scenes)
    wanted, _ = run(storage, cfg)
    own = Storage(tmp_path / "root")
    shutil.copytree(storage.root, own.root)
    plan = Planner(own).plan(cfg)
    before = {name: products(folder.path) for name, folder in folders_of(own, plan).items()}
    folder = folders_of(own, plan)[stage]
    (folder / "manifest.json").unlink()
    for pattern in lost:
        found = list(folder.path.glob(pattern))
        assert found
        for path in found:
            path.unlink()
    (own.trial(plan.key).path / "result.json").unlink()
    got = run_plan(own, plan)
    assert {name: products(f.path) for name, f in folders_of(own, plan).items()} == before
    for name in ("metrics", "curves", "per_class_iou", "confusion", "counts", "overlays"):
        assert got[name] == wanted[name]
    assert [s["name"] for s in got["stages"] if not s["reused"]] == [stage]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_cam_is_made_again(storage: Storage, scenes: Path, tmp_path: Path, keep: float) -> None:
    cfg = tiny_config(root=scenes)
    run(storage, cfg)
    own = Storage(tmp_path / "root")
    shutil.copytree(storage.root, own.root)
    plan = Planner(own).plan(cfg)
    folder = folders_of(own, plan)["make_seeds"]
    before = products(folder.path)
    path = folder / "cams" / "train_00002.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert read_cam(path) is None
    (folder / "manifest.json").unlink()
    (own.trial(plan.key).path / "result.json").unlink()
    run_plan(own, plan)
    assert products(folder.path) == before


def test_what_is_damaged_under_a_finished_stage_is_named(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    run(storage, tiny_config(root=scenes))
    own = Storage(tmp_path / "root")
    shutil.copytree(storage.root, own.root)
    plan = Planner(own).plan(tiny_config({"crf.preset": "irn_label"}, scenes))
    (folders_of(own, plan)["make_seeds"] / "cams" / "train_00002.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="has no whole CAM of train_00002; delete"):
        run_plan(own, plan)
    weights = folders_of(own, plan)["train_cam"] / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    other = Planner(own).plan(tiny_config({"seeds.scales": [1.0, 1.5]}, scenes))
    with pytest.raises(ValueError, match=r"weights.pt is damaged .*; delete its folder"):
        run_plan(own, other)
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights.pt is missing, though its stage is done; delete its folder"):
        run_plan(own, other)


# -- protocols and splits


def test_protocol_fixed_takes_the_score_as_given(storage: Storage, scenes: Path) -> None:
    result, _ = run(storage, tiny_config({"seeds.protocol": "fixed", "seeds.bg_score": 0.31}, scenes))
    assert result["metrics"]["bg_score"] == 0.31 and result["protocol"] == "fixed"
    curve = result["curves"]["train"]["miou"]
    assert result["metrics"]["seed_miou_train"] == pytest.approx(curve[31], rel=1e-12)


def test_protocol_val_subset_looks_at_its_own_images(storage: Storage, scenes: Path) -> None:
    cfg = tiny_config({"seeds.protocol": "val_subset"}, scenes)
    result, folders = run(storage, cfg)
    data = layout(scenes)
    chosen = val_subset(cfg, data)
    assert len(chosen) == len(set(chosen)) == 3 and {split for split, _ in chosen} == {"val"}
    assert chosen == val_subset(tiny_config({"seeds.protocol": "val_subset", "seed": 5}, scenes), data)
    loaded = [(read_cam(folders["make_seeds"] / "cams" / f"{i}.npz"), data.mask(i, split="val")) for _, i in chosen]
    slow = [slow_miou([(slow_seed(*kc, t, 4), mask) for kc, mask in loaded], 4) for t in THRESHOLDS]
    assert result["metrics"]["bg_score"] == THRESHOLDS[int(np.argmax(slow))]
    assert "seed_miou_train" in result["metrics"] and "seed_miou_val" not in result["metrics"]
    assert {p.stem for p in (folders["make_seeds"] / "cams").iterdir()} == {
        *data.ids("train"),
        *dict(map(reversed, chosen)),
    }


def test_an_image_whose_splits_disagree_on_its_tags_gets_no_cam_of_either(scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "two-truths"
    shutil.copytree(scenes, root)
    lists = root / "ImageSets" / "Segmentation"
    shutil.copy(lists / "train.txt", lists / "train_aug.txt")
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    cfg = tiny_config({"data.labels": "masks", "seeds.splits": ["train", "train_aug"]}, root)
    data = VocLayout(root, labels="masks")
    refuse_two_tag_sets(images_of(cfg, data), data)
    image_id = data.ids("train")[2]
    path = root / "SegmentationClassAug" / f"{image_id}.png"
    Image.fromarray(np.full_like(read_palette_png(path), 2)).save(path)
    with pytest.raises(DataError, match=rf"two-truths: {image_id} has other tags in each split \(train: .*train_aug: "):
        run(Storage(tmp_path / "storage"), cfg)


def test_several_splits_are_scored_each_on_its_own(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config({"seeds.splits": ["train", "val"]}, scenes))
    alone, _ = run(storage, tiny_config(root=scenes))
    data = layout(scenes)
    for split in ("train", "val"):
        for product, folder in (("seed", folders["make_seeds"] / "seeds"), ("mask", folders["refine_crf"] / "masks")):
            pairs = [(read_palette_png(folder / f"{i}.png"), data.mask(i, split=split)) for i in data.ids(split)]
            assert result["metrics"][f"{product}_miou_{split}"] == pytest.approx(slow_miou(pairs, 4), rel=1e-12)
    assert result["counts"] == {"train": 8, "val": 4}
    assert result["metrics"]["bg_score"] == alone["metrics"]["bg_score"], "the first split's masks choose"
    assert result["metrics"]["seed_miou_train"] == alone["metrics"]["seed_miou_train"]


def voc_copy(scenes: Path, root: Path, *, without_masks_of: str = "") -> Path:
    """The tiny dataset as somebody's own folder, perhaps without the masks of a split."""
    shutil.copytree(scenes, root)
    (root / "dataset.json").unlink()
    for path in (root / "SegmentationClass").glob(f"{without_masks_of}_*.png"):
        path.unlink()
    return root


def test_a_split_without_masks_gets_masks_and_no_score(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    root = voc_copy(scenes, tmp_path / "voc", without_masks_of="train")
    changes = {"data.name": "voc", "seeds.protocol": "fixed", "seeds.overlays": 0}
    result, folders = run(storage, tiny_config(changes, root))
    assert result["metrics"].keys() == {"bg_score", "silent_maps_train"} and result["metrics"]["bg_score"] == 0.26
    assert result["curves"] == {} and result["counts"] == {"train": 8}
    assert len(list((folders["refine_crf"] / "masks").iterdir())) == 8
    assert not (folders["make_seeds"] / "overlays").exists()
    both, _ = run(storage, tiny_config({**changes, "seeds.splits": ["train", "val"]}, root))
    silent = {"silent_maps_train", "silent_maps_val"}
    assert both["metrics"].keys() == {"bg_score", "seed_miou_val", "mask_miou_val"} | silent
    with pytest.raises(ValueError, match="best_on_train needs masks of split train; use seeds.protocol fixed"):
        run(storage, tiny_config({"data.name": "voc"}, root))


def test_images_without_any_class_are_background(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    root = voc_copy(scenes, tmp_path / "voc")
    labels = read_label_file(root / "cls_labels.npy", 3)
    empty = ["train_00000", "train_00004"]
    for image_id in empty:
        labels[image_id] = np.zeros(3, np.float32)
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))
    for preset in ("ppc_seed", "psa_soft", "irn_label"):
        _, folders = run(storage, tiny_config({"data.name": "voc", "crf.preset": preset}, root))
        for image_id in empty:
            keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
            assert len(keys) == 0 and cam.shape == (0, *layout(root).image_size(image_id))
            assert not read_palette_png(folders["make_seeds"] / "seeds" / f"{image_id}.png").any()
            assert not read_palette_png(folders["refine_crf"] / "masks" / f"{image_id}.png").any()
    assert (folders["make_seeds"] / "overlays" / "train_00000.png").exists()


# -- CRF


@pytest.mark.parametrize("preset", ["psa_soft", "irn_label", "seam_aff", "ppc_aff"])
def test_crf_presets_keep_to_their_labels(storage: Storage, scenes: Path, preset: str) -> None:
    result, folders = run(storage, tiny_config({"crf.preset": preset}, scenes))
    data = layout(scenes)
    for image_id in data.ids("train"):
        mask = read_palette_png(folders["refine_crf"] / "masks" / f"{image_id}.png")
        assert mask.shape == data.image_size(image_id)
        allowed = {0, *(np.flatnonzero(data.image_label(image_id)) + 1)}
        assert PRESETS[preset].classes == "all" or set(np.unique(mask)) <= allowed
    assert [s["reused"] for s in result["stages"]][:2] == [True, True]
    assert 0 < result["metrics"]["mask_miou_train"] < 1


def test_the_crf_can_start_from_a_score_of_its_own(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config({"crf.bg_score": 0.45}, scenes))
    assert result["crf_bg_score"] == 0.45 != result["metrics"]["bg_score"]
    plain, _ = run(storage, tiny_config(root=scenes))
    assert plain["crf_bg_score"] == plain["metrics"]["bg_score"]
    data, image_id = layout(scenes), "train_00001"
    keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
    wanted = refine_seed(data.image(image_id), cam, keys, background=0.45, num_classes=4, params=PRESETS["ppc_seed"])
    assert (read_palette_png(folders["refine_crf"] / "masks" / f"{image_id}.png") == wanted).all()


def test_the_crf_can_start_from_a_background_that_is_a_power_of_the_cam(storage: Storage, scenes: Path) -> None:
    """METHOD 7: PPC-EPS's masks are a soft CRF of the CAM and (1 - highest class)^8."""
    changes = {"crf.preset": "eps_soft", "crf.bg_power": 1.0}
    result, folders = run(storage, tiny_config(changes, scenes))
    assert "crf_bg_score" not in result and result["metrics"]["mask_miou_train"] > 0
    data, shares = layout(scenes), []
    for image_id in data.ids("train"):
        keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
        score_CHW = np.concatenate([1 - cam.max(0, keepdims=True), cam])
        q_CHW = refine_scores(data.image(image_id), score_CHW, keys, num_classes=4, params=PRESETS["eps_soft"])
        mask = read_palette_png(folders["refine_crf"] / "masks" / f"{image_id}.png")
        assert (mask == np.array([0, *(keys + 1)])[q_CHW.argmax(0)]).all()
        shares.append((mask > 0).mean())
    assert any(0 < share < 1 for share in shares)
    keys_of = [dict(plan_stages(tiny_config({**changes, **own}, scenes), {}))["refine_crf"] for own in
               ({}, {"crf.bg_score": 0.4}, {"crf.bg_power": 8.0}, {"crf.bg_power": None})]  # fmt: skip
    assert keys_of[0] == keys_of[1] and len(set(keys_of)) == 3
    assert (seed_from_cam(cam, keys, bg_score=0.45) != seed_from_cam(cam, keys, bg_score=0.2)).any()


# -- inference


def test_the_plain_cam_of_seams_net_is_that_of_a_cam_net_with_its_weights() -> None:
    """Read out before the PCM, by `seeds.map`; it is one more key where it is another map, and none where it is not."""
    seam = build_net(tiny_config({"method.name": "seam"}), 3, pretrained=False).eval()
    cam = build_net(tiny_config({"method.name": "cam"}), 3, pretrained=False).eval()
    cam.backbone.load_state_dict(seam.backbone.state_dict())
    cam.fc8.weight.data = seam.fc8.weight.data[1:].clone()
    image_N3HW = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        plain, refined = (class_maps("seam", plain=p)(seam(image_N3HW), (64, 48)) for p in (True, False))
        torch.testing.assert_close(plain, class_maps("cam")(cam(image_N3HW), (64, 48)))
    assert refined.shape[2:] == (64, 48) and plain.shape[2:] != refined.shape[2:]
    for method, differs in (("seam", True), ("cam", False)):
        keys = [tiny_config({"method.name": method, "seeds.map": m}).decisive("seeds") for m in ("method", "cam")]
        assert (keys[0] != keys[1]) is differs and "map" not in keys[0]


def test_scaled_views_have_rounded_sides() -> None:
    image = np.arange(7 * 11 * 3, dtype=np.uint8).reshape(7, 11, 3)
    sizes = [view.shape for view in scaled(image, (0.5, 1.0, 1.5, 2.0))]
    assert sizes == [(4, 6, 3), (7, 11, 3), (10, 16, 3), (14, 22, 3)]
    assert scaled(image, (1.0,))[0] is image


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_cam_of_a_mirrored_image_is_the_mirrored_cam(scenes: Path, method: str, plain: bool) -> None:
    """The mirror is one of the views, and maps come back the right way round and in the order of the keys."""
    net = build_net(tiny_config({"method.name": method}), 3, pretrained=False).eval()
    image = layout(scenes).image("train_00000")

    def cam(image_HW3: Any, keys: list[int]) -> Any:
        views = [NORMALISATIONS["imagenet"].apply(np.ascontiguousarray(v)) for v in scaled(image_HW3, (0.5, 1.0, 1.5))]
        rule, maps = METHODS[method].merge_rule, class_maps(method, plain=plain)
        return infer_cam(net, views, np.array(keys, np.int64), image_HW3.shape[:2], maps, CPU, rule=rule)

    straight, mirrored = cam(image, [0, 2]), cam(image[:, ::-1], [0, 2])
    assert straight.shape == (2, *image.shape[:2])
    np.testing.assert_allclose(mirrored[:, :, ::-1], straight, atol=1e-4)
    np.testing.assert_allclose(cam(image, [2, 0]), straight[::-1], atol=1e-6)
    assert np.abs(straight - straight[:, :, ::-1]).max() > 0.1
    assert cam(image, []).shape == (0, *image.shape[:2])


def test_a_trained_net_comes_with_its_normalisation(storage: Storage, scenes: Path) -> None:
    cfg = tiny_config({"backbone.normalisation": "half", "stages": ["train_cam"]}, scenes)
    result, folders = run(storage, cfg)
    net, normalisation = load_net(cfg.model_dump_json(), 3, folders["train_cam"] / "weights.pt", CPU)
    assert normalisation == NORMALISATIONS["half"] and not net.training
    assert result["metrics"] == {} and result["label_source"] == "cls_labels"
    assert not (folders["train_cam"] / "checkpoints").exists()
    with pytest.raises(ValueError, match="does not hold this trial's net"):
        load_net(cfg.model_dump_json(), 4, folders["train_cam"] / "weights.pt", CPU)


def test_a_training_killed_before_its_manifest_keeps_its_checkpoints(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StageDir, "finish", killed)
    own = Storage(tmp_path / "root")
    plan = Planner(own).plan(tiny_config({"stages": ["train_cam"]}, scenes))
    with pytest.raises(KeyboardInterrupt):
        run_plan(own, plan)
    folder = folders_of(own, plan)["train_cam"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"epoch-00001.pt", "epoch-00002.pt"}


def test_a_stage_says_which_pretrained_tensors_it_loaded(
    storage: Storage, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config({"stages": ["train_cam"]}, scenes)
    state = build_net(cfg, 3, pretrained=False).backbone.net.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    result, _ = run(
        storage, tiny_config({"stages": ["train_cam"], "backbone.weights": str(tmp_path / "weights.pth")}, scenes)
    )
    report = result["weights_report"]
    assert report["loaded"] == len(state) and report["missing"] == report["left_over"] == []
    assert report["path"] == str(tmp_path / "weights.pth") and len(report["sha256"]) == 64
    assert capfd.readouterr().out.count(f"{len(state)} tensors loaded from") == 1
    assert "weights_report" not in run(storage, cfg)[0]


# -- the plan


def test_stages_name_each_other() -> None:
    for name, stage in STAGES.items():
        assert {*needs_of(name, tiny_config()), *stage.uses} <= STAGES.keys() - {name}
        sections = {section.partition(".")[0] for section in stage.reads} - {"evaluate"}  # psa.walk is one of psa
        assert sections <= TrialConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["train_cam", "make_seed"], "no stage 'make_seed'; there are train_cam"),
        (["make_seeds", "train_cam"], "make_seeds needs train_cam before it"),
        (["train_cam", "train_cam"], "train_cam twice"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(stages: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(tiny_config({"stages": stages}), {})


def test_a_trial_without_crf_scores_its_seeds(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config({"stages": ["train_cam", "make_seeds", "evaluate"]}, scenes))
    assert result["metrics"].keys() == {"bg_score", "silent_maps_train", "seed_miou_train"}
    with_crf, other = run(storage, tiny_config(root=scenes))
    assert with_crf["metrics"]["seed_miou_train"] == result["metrics"]["seed_miou_train"]
    assert folders["make_seeds"] == other["make_seeds"] and folders["evaluate"] != other["evaluate"]


def test_overlays_are_pictures_of_their_images(storage: Storage, scenes: Path) -> None:
    _, folders = run(storage, tiny_config(root=scenes))
    for path in (folders["make_seeds"] / "overlays").iterdir():
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and picture.size[::-1] == layout(scenes).image_size(path.stem)


def test_best_on_train_looks_at_the_training_split_wherever_it_stands() -> None:
    """One image a split: its CAM is 0.9 on the object and `low` on the background, which a score above `low` cuts."""
    truth = np.array([[0, 1], [0, 1]])

    def counts(low: float) -> Any:
        cam = np.where(truth == 1, 0.9, low).astype(np.float32)[None]
        return curve_counts(cam, np.array([0]), truth, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=2)

    data: Any = SimpleNamespace(has_masks=lambda split: True, ids=lambda split: ["image"])
    found = {"val": counts(0.1), "train": counts(0.4)}
    for splits in (["val", "train"], ["train", "val"]):
        cfg = tiny_config({"seeds.splits": splits})
        assert 0.39 < chosen_score(cfg, data, found) < 0.45

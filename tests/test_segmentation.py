"""The segmentation stages: loss and prediction from the equations, whole trials, what is refused, any interruption."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from PIL import Image
from tiny_run import curve, layout, manifest_result, products, scenes_root, tiny_config, weights_of

from ppc.artifacts import StageDir, Storage
from ppc.checks import check_data, check_trial
from ppc.config import RuntimeConfig, TrialConfig
from ppc.crf import PRESETS, crf_soft
from ppc.figures import palette_png, read_palette_png
from ppc.net_config import SegmentationConfig
from ppc.planning import Planner, TrialPlan
from ppc.report import segmentation_lines
from ppc.runtime import LocalRuntime
from ppc.segmentation import merge_logits, segmentation_loss
from ppc.stages.predict_seg import label_of, predict
from ppc.stages.train_seg import SegTrainSet, build_seg_net, load_seg_net, make_job
from ppc.stages.training import Payload
from ppc.train import checkpoints, fit, rank, sum_over_workers
from ppc.trial import run_trial
from ppc.weights import KNOWN_ORIGINS, initialisation

CPU = torch.device("cpu")
TRUTH: dict[str, Any] = {"stages": ["train_seg", "predict_seg", "evaluate"], "segmentation.masks": "truth"}
SEED: dict[str, Any] = {
    "stages": ["train_cam", "make_seeds", "train_seg", "predict_seg", "evaluate"],
    "segmentation.masks": "seed", "train.epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(tmp_path_factory.mktemp("seg"))


def run_plan(storage: Storage, plan: TrialPlan) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())


def run(storage: Storage, cfg: TrialConfig) -> tuple[dict[str, Any], dict[str, StageDir]]:
    plan = Planner(storage).plan(cfg)
    return run_plan(storage, plan), {name: storage.stage(name, key) for name, key in plan.stages}


# -- loss and prediction


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    """In plain loops, at the size of the logits; shares of two workers add up; nothing labelled is 0."""
    logit = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = (torch.arange(3 * 5 * 6).view(3, 5, 6) * 5 % 7).clamp(max=4)
    label[label == 4] = 255
    terms = []
    for n, y, x in np.argwhere(label.numpy() != 255):
        p = np.exp(logit[n, :, y, x].numpy())
        terms.append(-np.log(p[label[n, y, x]] / p.sum()))
    count = torch.tensor(len(terms))
    assert segmentation_loss(logit, label, num_pixels_global=count).item() == pytest.approx(np.mean(terms), rel=1e-12)
    parts = [segmentation_loss(logit[part], label[part], num_pixels_global=count) for part in (slice(1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(np.mean(terms), rel=1e-12)
    none = torch.full_like(label, 255)
    assert segmentation_loss(logit, none, num_pixels_global=torch.tensor(0)).item() == 0


def test_logits_are_brought_to_the_crop_with_corners_aligned() -> None:
    logit = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(1, 13, 13, dtype=torch.uint8)
    wide = F.interpolate(logit, (13, 13), mode="bilinear", align_corners=True)
    expected = -wide.log_softmax(1)[0, 0].mean()
    torch.testing.assert_close(segmentation_loss(logit, label, num_pixels_global=torch.tensor(169)), expected)


def test_merge_of_scales_is_the_official_one() -> None:
    g = golden("seg_merge_24x20")
    logits = [torch.from_numpy(g[f"logits_{i:02d}"].astype(np.float32)) for i in range(12)]
    merged = merge_logits([x.flip(-1) if i % 2 else x for i, x in enumerate(logits)], size=tuple(g["size"].tolist()))
    np.testing.assert_array_equal(merged.argmax(0).numpy(), g["result"])
    torch.testing.assert_close(merged.sum(0), torch.ones(24, 20))


def test_prediction_follows_the_recipe(scenes: Path) -> None:
    """Normalise, then resize, cubic; both mirrors; mean of the logits."""
    cfg = tiny_config({"segmentation.head": "aspp"}, scenes)
    net = build_seg_net(cfg, 3, pretrained=False).eval()
    image = layout(scenes).image(layout(scenes).ids("val")[0])
    norm = net.backbone.normalisation
    prob = predict(net, norm, image, scales=(1.0, 0.5), flip=True, device=CPU)
    x = norm.apply(image).permute(1, 2, 0).numpy()
    total = torch.zeros(4, *image.shape[:2])
    for view in (x, cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)):
        for mirrored in (False, True):
            fed = torch.from_numpy(view[:, ::-1].copy() if mirrored else view).permute(2, 0, 1)[None]
            with torch.no_grad():
                logit = net(fed)
            logit = logit.flip(-1) if mirrored else logit
            total += F.interpolate(logit, image.shape[:2], mode="bilinear", align_corners=True)[0]
    np.testing.assert_allclose(prob, (total / 4).softmax(0).numpy(), rtol=1e-4, atol=1e-6)
    one = predict(net, norm, image, scales=(1.0, 0.5), flip=False, device=CPU)
    assert not np.allclose(one, prob)
    soft = crf_soft(image, prob, params=PRESETS["deeplab_test"]).argmax(0)
    np.testing.assert_array_equal(label_of(image, prob, PRESETS["deeplab_test"]), soft)
    np.testing.assert_array_equal(label_of(image, prob, None), prob.argmax(0))
    assert label_of(image, prob, PRESETS["ppc_seed"]).shape == image.shape[:2]


# -- config


def test_presets_fill_batch_norm_and_what_is_given_wins() -> None:
    official, corrected = SegmentationConfig(), SegmentationConfig(preset="corrected")
    assert official.batch_norm == "statistics" and corrected.batch_norm == "trained"
    assert SegmentationConfig(preset="corrected", batch_norm="frozen").batch_norm == "frozen"
    own = official.train
    assert (own.learning_rate, own.momentum, own.weight_decay, own.batch_size, own.crop_px) == (
        1e-3,
        0.9,
        5e-4,
        10,
        448,
    )
    assert official.test.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    explicit = TrialConfig(segmentation=SegmentationConfig(batch_norm="trained"))
    assert explicit.decisive("segmentation") == TrialConfig(segmentation=corrected).decisive("segmentation")


def test_how_it_is_tested_is_not_in_the_key_of_the_training(storage: Storage, scenes: Path) -> None:
    planner = Planner(storage)
    base = dict(planner.plan(tiny_config(TRUTH, scenes)).stages)

    def changed(**changes: Any) -> set[str]:
        plan = dict(planner.plan(tiny_config({**TRUTH, **changes}, scenes)).stages)
        return {name for name in plan if plan[name] != base[name]}

    assert changed(**{"segmentation.test.crf": None}) == {"predict_seg", "evaluate"}
    assert changed(**{"segmentation.hsv": False}) == {"train_seg", "predict_seg", "evaluate"}
    assert changed(**{"train.epochs": 1, "segmentation.preset": "official"}) == set()
    frozen = {"segmentation.batch_norm": "frozen"}
    a, b = (planner.plan(tiny_config({**TRUTH, **frozen, **more}, scenes)).key
            for more in ({}, {"segmentation.bn_momentum_backbone": 0.5}))  # fmt: skip
    assert a == b


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"segmentation.head": "psp"}, "segmentation.head", "no head 'psp'; there are largefov"),
        ({"segmentation.test.crf": "x"}, "segmentation.test.crf", "no preset 'x'"),
        ({"segmentation.test.crf": "irn_label"}, "segmentation.test.crf", "which predictions have not: take one of"),
        ({**SEED, "seeds.splits": ["val"], "seeds.protocol": "fixed"}, "segmentation.masks",
         "seed is made for seeds.splits [val], but the net trains on data.train_split train"),
        ({**TRUTH, "segmentation.masks": "mask"}, "stages", "train_seg needs refine_crf before it"),
        ({"stages": ["predict_seg"]}, "stages", "predict_seg needs train_seg before it"),
    ],
)  # fmt: skip
def test_a_wrong_config_names_field_and_remedy(changes: dict[str, Any], field: str, words: str, scenes: Path) -> None:
    assert any(at == field and words in text for at, text in check_trial(tiny_config(changes, scenes)))


def test_truth_needs_masks_of_the_training_split(tmp_path: Path, scenes: Path) -> None:
    root = shutil.copytree(scenes, tmp_path / "bare")
    shutil.rmtree(root / "SegmentationClass")
    found = dict(check_data(tiny_config({**TRUTH, "data.train_split": "train"}, root), layout(root)))
    assert "needs masks of split train, and it has none" in found["segmentation.masks"]


# -- the training set


def train_set(root: Path, masks: Path | None, **changes: Any) -> SegTrainSet:
    knobs: dict[str, Any] = {"scale": (1.0, 1.0), "hsv": False, "crop_px": 96, "seed": 0}
    norm = build_seg_net(tiny_config(root=root), 3, pretrained=False).backbone.normalisation
    return SegTrainSet(layout(root), "train", masks=masks, normalise=norm.apply, **(knobs | changes))


def test_image_and_mask_stay_together_and_padding_is_ignored(scenes: Path) -> None:
    data = train_set(scenes, None)
    image_id = data.ids[0]
    sample = data.sample(0, image_id)
    inside = sample["label_HW"] != 255
    whole = layout(scenes).mask(image_id, split="train")
    assert inside.sum() == (whole != 255).sum() and sorted(sample["label_HW"][inside]) == sorted(whole[whole != 255])
    padding = (sample["image_3HW"] == 0).all(0)
    assert (sample["label_HW"][padding] == 255).all() and padding.sum() >= 96 * 96 - whole.size
    ys, xs = np.nonzero(~padding.numpy())
    shown = sample["label_HW"][ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].numpy()
    assert any(np.array_equal(shown, side) for side in (whole, whole[:, ::-1]))
    again, other = data.sample(0, image_id), data.sample(1, image_id)
    assert torch.equal(sample["image_3HW"], again["image_3HW"]) and not torch.equal(
        sample["image_3HW"], other["image_3HW"]
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path, mask: path.unlink(), r"no pseudo mask of {id}, an image of data.train_split train.*seeds.splits"),
        (lambda path, mask: palette_png(mask * 0 + 9, path), r"class 9, but the dataset .* has the classes 0 to 3"),
        (lambda path, mask: palette_png(mask[1:], path), r"48x\d+ pixels, but its image in .* has 48x\d+"),
        (lambda path, mask: Image.fromarray(np.stack([mask] * 3, 2)).save(path), r"mode P or L, this is RGB"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_error_with_both_sides(
    spoil: Any, words: str, tmp_path: Path, scenes: Path
) -> None:
    data = train_set(scenes, tmp_path)
    image_id = data.ids[0]
    mask = layout(scenes).mask(image_id, split="train")
    path = tmp_path / f"{image_id}.png"
    palette_png(mask, path)
    np.testing.assert_array_equal(data.label(image_id), mask)
    spoil(path, mask)
    with pytest.raises(ValueError, match=str(path) + ".*" + words.format(id=image_id)):
        data.label(image_id)


# -- workers


@dataclass(frozen=True)
class Step:
    """What a worker is sent."""

    cfg: TrialConfig
    root: Path
    folder: Path


def one_step(payload: Step, device: torch.device) -> None:
    """The first loss of the training in float64, with its gradients, summed over the workers."""
    sent = Payload(payload.cfg, StageDir(payload.folder, "train_seg", "k"), {}, layout(payload.root), make_job)
    job = make_job(sent, device)
    net = job.net.double().train()
    batch = dict(next(iter(job.batches(0))))
    batch["image_N3HW"] = batch["image_N3HW"].double()
    loss, _ = job.losses(net, batch, 0)
    loss.backward()
    found = {"loss": loss.detach(), **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}
    sum_over_workers(list(found.values()))
    if rank() == 0:
        torch.save({"shares": found, "buffers": dict(net.named_buffers())}, payload.folder / "step.pt")


def test_two_workers_are_one(tmp_path: Path, scenes: Path) -> None:
    """Loss, gradients and BatchNorm's statistics; masks are labelled unevenly by the crop's padding."""
    cfg = tiny_config({**TRUTH, "segmentation.batch_norm": "trained"}, scenes)
    steps = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        LocalRuntime().train(one_step, Step(cfg, scenes, folder), RuntimeConfig(workers=number))
        steps.append(torch.load(folder / "step.pt"))
    one, two = steps
    assert one["shares"].keys() == two["shares"].keys() and "head.bn_fov.weight" in one["shares"]
    for name, value in {**one["shares"], **one["buffers"]}.items():
        actual = {**two["shares"], **two["buffers"]}[name]
        scale = value.abs().max().item()
        torch.testing.assert_close(
            actual, value, rtol=1e-9, atol=1e-10 * scale, msg=lambda t, name=name: f"{name}: {t}"
        )


# -- whole trials


def test_a_trial_on_its_own_seeds(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, tiny_config(SEED, scenes))
    assert {"seg_miou_val", "seed_miou_train", "bg_score"} <= result["metrics"].keys()
    told = {"initialisation": "random", "masks": "seed", "crf": "deeplab_test"}
    assert result["segmentation"] == told and result["counts"] == {"train": 8, "val": 4}
    for image_id in layout(scenes).ids("val"):
        label = read_palette_png(folders["predict_seg"] / "masks" / f"{image_id}.png")
        assert label.shape == layout(scenes).image_size(image_id) and label.max() <= 3
    row: Any = type("Row", (), {"result": result})
    assert segmentation_lines([row, row]) == ["trained on seed, initialised from random, CRF deeplab_test at test"]
    assert {"segmentation/loss", "segmentation/cross_entropy"} <= curve(folders["train_seg"])[0][1].keys()


def test_a_net_learns_from_the_masks_of_the_dataset(storage: Storage, scenes: Path) -> None:
    changes = {"segmentation.train.epochs": 12, "segmentation.bn_momentum_head": 0.1, "segmentation.test.crf": None,
               "segmentation.train.learning_rate": 0.01, "segmentation.test.splits": ["train"]}  # fmt: skip
    result, folders = run(storage, tiny_config({**TRUTH, **changes}, scenes))
    losses = [m["segmentation/loss"] for _, m in curve(folders["train_seg"])]
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert list(result["metrics"]) == ["seg_miou_train"] and result["metrics"]["seg_miou_train"] > 0.3


class StopError(Exception):
    """Stands for a kill."""


def stopped_after_an_epoch(cfg: TrialConfig, folder: StageDir, root: Path) -> None:
    """A training that died in its second epoch."""
    job = make_job(Payload(cfg, folder, {}, layout(root), make_job), CPU)

    def batches(epoch: int) -> Any:
        if epoch == 1:
            raise StopError
        return job.batches(epoch)

    with pytest.raises(StopError):
        fit(replace(job, batches=batches), folder, cfg.runtime, CPU)


def test_a_half_done_trial_ends_as_one_that_was_never_stopped(tmp_path: Path, scenes: Path) -> None:
    """A training that died in its second epoch, and a prediction that lost half of its maps."""
    cfg = tiny_config(TRUTH, scenes)
    whole, again = Storage(tmp_path / "whole"), Storage(tmp_path / "again")
    expected, folders = run(whole, cfg)
    plan = Planner(again).plan(cfg)
    mine = {name: again.stage(name, key) for name, key in plan.stages}
    (mine["train_seg"] / "checkpoints").mkdir(parents=True)
    stopped_after_an_epoch(plan.config, mine["train_seg"], scenes)
    assert [path.name for path in checkpoints(mine["train_seg"])] == ["epoch-00001.pt"]
    kept = mine["predict_seg"] / "masks" / f"{layout(scenes).ids('val')[0]}.png"
    kept.parent.mkdir(parents=True)
    shutil.copy(folders["predict_seg"] / "masks" / kept.name, kept)
    when = kept.stat().st_mtime_ns
    assert run_plan(again, plan)["metrics"] == expected["metrics"]
    for name, value in weights_of(folders["train_seg"]).items():
        assert torch.equal(value, weights_of(mine["train_seg"])[name]), name
    assert curve(mine["train_seg"]) == curve(folders["train_seg"])
    assert products(mine["predict_seg"].path) == products(folders["predict_seg"].path)
    assert kept.stat().st_mtime_ns == when, "what is there is not made again"


def test_the_checkpoint_of_another_net_is_refused(storage: Storage, scenes: Path) -> None:
    cfg = tiny_config(TRUTH, scenes)
    _, folders = run(storage, cfg)
    other = tiny_config({**TRUTH, "segmentation.head": "aspp"}, scenes)
    with pytest.raises(ValueError, match=r"(?s)weights.pt does not hold this trial's net .*head.aspp.*head.conv_fov"):
        load_seg_net(other.model_dump_json(), 3, folders["train_seg"] / "weights.pt", CPU)


def test_the_result_names_the_weights_it_began_with(storage: Storage, tmp_path: Path, scenes: Path) -> None:
    body = build_seg_net(tiny_config(root=scenes), 3, pretrained=False).backbone.net
    torch.save(body.state_dict(), tmp_path / "coco.pth")
    changes = {"segmentation.backbone.name": "tiny", "segmentation.backbone.weights": str(tmp_path / "coco.pth")}
    _, folders = run(storage, tiny_config({**TRUTH, "stages": ["train_seg"], **changes}, scenes))
    told = manifest_result(folders["train_seg"])["segmentation"]
    sha = told["weights_report"]["sha256"]
    assert told["initialisation"] == f"coco.pth (sha256 {sha[:12]})"
    known = next(iter(KNOWN_ORIGINS))
    assert initialisation({"path": "/a/b.pth", "sha256": known}).startswith("ImageNet (squeezenet1_1")

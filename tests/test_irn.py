"""The IRN stages: labels, training and masks of a tiny trial, resumed, split over workers, and told off."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from tiny_run import layout, products, scenes_root, tiny_config, weights_of
from torch import Tensor

from ppc.affinity import displacements
from ppc.artifacts import StageDir, Storage, read_journal
from ppc.boundaries import path as path_between
from ppc.boundaries import walk_cam
from ppc.cam import seed_from_cam
from ppc.config import TrialConfig
from ppc.crf import PRESETS, refine_seed
from ppc.data.irn import IrnTrainSet
from ppc.figures import palette_png, read_palette_png
from ppc.irn_net import edges
from ppc.loading import tiny, validate_trial
from ppc.net_config import IrnConfig
from ppc.normalisation import NORMALISATIONS
from ppc.planning import Planner
from ppc.prototypes import ALONE, Workers
from ppc.runtime import LocalRuntime
from ppc.stages import plan_stages
from ppc.stages.make_seeds import read_cam
from ppc.stages.train_irn import IrnLosses, build_irn_net, load_irn_net
from ppc.trial import run_trial

CPU = torch.device("cpu")
STAGES = ("train_cam", "make_seeds", "train_irn", "refine_irn", "evaluate")
IRN: dict[str, Any] = {
    "stages": STAGES, "method.name": "cam", "contrast.prototype_top_k": 0, "train.epochs": 1, "irn.radius": 4,
    "irn.train.crop_px": 64, "irn.train.batch_size": 4, "irn.train.epochs": 2, "irn.walk.log2_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(tmp_path_factory.mktemp("irn"))


def config(root: Path | None, changes: dict[str, Any] | None = None) -> TrialConfig:
    return tiny_config({**IRN, **(changes or {})}, root)


def run(storage: Storage, cfg: TrialConfig) -> tuple[dict[str, Any], dict[str, StageDir]]:
    plan = Planner(storage).plan(cfg)
    result = run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    return result, {name: storage.stage(name, key) for name, key in plan.stages}


def copy_of(storage: Storage, folder: Path) -> Storage:
    own = Storage(folder / "root")
    shutil.copytree(storage.root, own.root)
    return own


# -- what a trial makes


def test_a_trial_ends_with_the_score_of_its_masks(storage: Storage, scenes: Path) -> None:
    result, folders = run(storage, config(scenes))
    assert 0 < result["metrics"]["irn_mask_miou_train"] < 1
    ids = set(layout(scenes).ids("train"))
    assert {p.stem for p in (folders["train_irn"] / "labels").iterdir()} == ids
    assert {p.stem for p in (folders["refine_irn"] / "masks").iterdir()} == ids
    points, _ = read_journal(folders["train_irn"] / "journal.jsonl")
    terms = [
        f"irn/{kind}" for kind in ("boundary_bg", "boundary_fg", "boundary_neg", "displacement_fg", "displacement_bg")
    ]
    for point in points:
        assert point["m"]["irn/loss"] == pytest.approx(sum(point["m"][name] for name in terms), rel=1e-5)
    assert [p["step"] for p in points] == [1, 2, 3, 4]


def test_labels_are_where_both_scores_are_sure(storage: Storage, scenes: Path) -> None:
    _, folders = run(storage, config(scenes))
    data, seen = layout(scenes), set()
    for image_id in data.ids("train"):
        keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
        high, low = (
            refine_seed(data.image(image_id), cam, keys, background=s, num_classes=4, params=PRESETS["irn_label"])
            for s in (0.3, 0.05)
        )
        label = read_palette_png(folders["train_irn"] / "labels" / f"{image_id}.png")
        for found, fg, bg in zip(label.flat, high.flat, low.flat, strict=True):
            assert found == (fg if fg else 255 if bg else 0)
        seen |= set(np.unique(label).tolist())
    assert 255 in seen and 0 in seen and len(seen) > 2


def slow_walk(cam: np.ndarray, edge: np.ndarray, radius: int, beta: float, steps: int) -> np.ndarray:
    """The walk by a dense matrix that is filled pair by pair."""
    h, w = edge.shape
    matrix = np.eye(h * w)
    for y in range(h):
        for x in range(w):
            for dy, dx in displacements(radius):
                if y + dy < h and 0 <= x + dx < w:
                    worst = max(edge[y + b, x + a] for b, a in path_between((dy, dx)))
                    i, j = y * w + x, (y + dy) * w + x + dx
                    matrix[i, j] = matrix[j, i] = (1 - worst) ** beta
    matrix = np.linalg.matrix_power(matrix / matrix.sum(0), steps)
    return ((cam * (1 - edge)).reshape(len(cam), -1) @ matrix).reshape(cam.shape)


def test_masks_are_those_of_a_dense_walk(storage: Storage, scenes: Path) -> None:
    cfg = config(scenes, {"irn.walk.radius": 4, "irn.walk.beta": 7, "irn.walk.bg_score": 0.6})
    _, folders = run(storage, cfg)
    net, normalisation = load_irn_net(cfg.model_dump_json(), folders["train_irn"] / "weights.pt", CPU)
    data = layout(scenes)
    for image_id in data.ids("train")[:2]:
        keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
        edge = edges(net, normalisation.apply(data.image(image_id)), canvas_px=64).double()
        grid = torch.nn.functional.interpolate(
            torch.from_numpy(cam)[None].double(), edge.shape, mode="bilinear", align_corners=False
        )[0]
        walked = torch.from_numpy(slow_walk(grid.numpy(), edge.numpy(), radius=4, beta=7, steps=16))
        full = torch.nn.functional.interpolate(walked[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
        full = full[:, : cam.shape[1], : cam.shape[2]]
        wanted = seed_from_cam((full / full.max()).numpy(), keys, bg_score=0.6)
        mask = read_palette_png(folders["refine_irn"] / "masks" / f"{image_id}.png")
        assert (mask != wanted).mean() < 1e-3, "but for ties"
        assert len(np.unique(mask)) > 1


def test_maps_that_are_wiped_out_are_background() -> None:
    cam, none = torch.rand(2, 13, 18, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 5)
    options = {"stride": 4, "radius": 3, "beta": 10.0, "log2_steps": 2}
    assert walk_cam(cam, none, **options).max() == 1
    for wiped in (
        walk_cam(cam, none + 1, **options),
        walk_cam(-cam, none, **options),
        walk_cam(cam * 0, none, **options),
    ):
        assert wiped.shape == cam.shape and (wiped == 0).all()
    assert walk_cam(cam[:0], none, **options).shape == (0, 13, 18)
    with pytest.raises(ValueError, match=r"an edge map of \(3, 5\) for a CAM of \(13, 18\) pixels at stride 4"):
        walk_cam(cam, none[1:], **options)


# -- stopped half-way


def test_training_and_masks_that_were_stopped_end_the_same(
    storage: Storage, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(scenes)
    wanted, done = run(storage, cfg)
    own = copy_of(storage, tmp_path)
    plan = Planner(own).plan(cfg)
    folders = {name: own.stage(name, key) for name, key in plan.stages}
    (folders["refine_irn"] / "manifest.json").unlink()
    (folders["refine_irn"] / "masks" / "train_00003.png").unlink()
    kept = (folders["train_irn"] / "labels" / "train_00000.png").read_bytes()
    shutil.rmtree(folders["train_irn"].path)
    (folders["train_irn"] / "labels").mkdir(parents=True)
    (folders["train_irn"] / "labels" / "train_00000.png").write_bytes(kept)
    (own.trial(plan.key).path / "result.json").unlink()

    whole, steps = IrnLosses.__call__, list[int]()

    def dying(self: IrnLosses, net: Any, batch: Any, step: int) -> Any:
        steps.append(step)
        if steps == [0, 1, 2]:  # the first of the second epoch
            raise RuntimeError("killed")
        return whole(self, net, batch, step)

    monkeypatch.setattr(IrnLosses, "__call__", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(own, cfg)
    got, _ = run(own, cfg)
    assert steps == [0, 1, 2, 2, 3], "it went on from the checkpoint"
    assert got["metrics"] == wanted["metrics"]
    for stage in ("train_irn", "refine_irn"):
        before, after = (
            {name: data for name, data in products(f[stage].path).items() if not name.endswith(".pt")}
            for f in (done, folders)
        )
        assert before == after and len(after) == 8
    weights, resumed = weights_of(done["train_irn"]), weights_of(folders["train_irn"])
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


# -- training


def float64_batch(num_images: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (num_images, 16, 16), generator=generator)
    label[0, :4] = 255
    return {
        "image_N3HW": torch.randn(num_images, 3, 64, 64, generator=generator, dtype=torch.float64),
        "label_Nhw": label,
        "ids": [str(i) for i in range(num_images)],
    }


def test_two_workers_have_the_loss_and_gradient_of_one() -> None:
    net = build_irn_net(config(None), pretrained=False).double().train()
    batch = float64_batch(4)
    parts = [{name: value[2 * r : 2 * r + 2] for name, value in batch.items()} for r in range(2)]

    def step(part: dict[str, Any], workers: Workers) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        loss, terms = IrnLosses(4, workers)(net, part, 0)
        heads = [p for p in net.parameters() if p.requires_grad]
        return loss, terms, list(torch.autograd.grad(loss, heads, allow_unused=True))

    sent: list[list[Tensor]] = [[], []]
    for r, part in enumerate(parts):
        step(part, Workers(r, lambda x, r=r: (sent[r].append(x), x)[1]))
    shares = []
    for r, part in enumerate(parts):
        both = iter(zip(*sent, strict=True))
        shares.append(step(part, Workers(r, lambda x, both=both: torch.cat(next(both)))))
    loss, terms, grads = step(batch, ALONE)
    torch.testing.assert_close(shares[0][0] + shares[1][0], loss, rtol=1e-12, atol=0)
    for name, term in terms.items():
        assert term > 0
        torch.testing.assert_close(shares[0][1][name] + shares[1][1][name], term, rtol=1e-12, atol=0)
    for one, first, second in zip(grads, shares[0][2], shares[1][2], strict=True):
        torch.testing.assert_close(first + second, one, rtol=1e-9, atol=1e-12)


def train_set(root: Path, labels: Path, **changes: Any) -> IrnTrainSet:
    options = {"crop_px": 64, "scale": (1.0, 1.0), "normalise": NORMALISATIONS["unit"].apply, "seed": 0, **changes}
    return IrnTrainSet(layout(root), "train", labels, **options)


def test_labels_move_with_the_image(scenes: Path, tmp_path: Path) -> None:
    """The label of a cell is that of the pixel in its middle, wherever scale, mirror and crop took it."""
    data = layout(scenes)
    for image_id in data.ids("train"):
        palette_png((data.image(image_id)[..., 0] > 99) + 1, tmp_path / f"{image_id}.png")
    moved = set()
    for crop_px in (64, 32):
        samples = train_set(scenes, tmp_path, crop_px=crop_px)
        for epoch in range(3):
            for image_id in data.ids("train")[:3]:
                sample = samples.sample(epoch, image_id)
                red_HW = sample["image_3HW"][0] * 255
                wanted = (red_HW > 99).long()[2::4, 2::4] + 1
                label = sample["label_hw"]
                assert label.shape == (crop_px // 4,) * 2 and label.dtype == torch.int64
                assert (label[label != 255] == wanted[label != 255]).all()
                outside = sample["image_3HW"].sum(0)[2::4, 2::4] == 0
                assert outside[label == 255].all() and (label != 255).any()
                moved.add(float(red_HW.sum()))
    assert len(moved) > 6
    large = train_set(scenes, tmp_path, scale=(2.0, 2.0), crop_px=96).sample(0, data.ids("train")[0])
    assert (large["label_hw"] != 255).float().mean() == 0.75, "48 x 36 pixels, twice as large"
    again = train_set(scenes, tmp_path, scale=(0.5, 1.5)).sample(1, data.ids("train")[0])
    assert torch.equal(
        again["image_3HW"], train_set(scenes, tmp_path, scale=(0.5, 1.5)).sample(1, again["id"])["image_3HW"]
    )


def test_the_golden_scale_is_a_quarter_by_nearest(tmp_path: Path) -> None:
    """128 x 128 labels of a 512 crop are those of pixels 2, 6, 10, ...: what PIL takes for the nearest."""
    from ppc.data.transforms import rescale

    label = golden("augment_50x36")["label"][:48, :36]
    assert (rescale(label, 0.25, nearest=True) == label[2::4, 2::4]).all()


# -- config and keys


def keys(changes: dict[str, Any] | None = None) -> dict[str, str]:
    return dict(plan_stages(config(None, changes), {}))


def test_keys_follow_what_is_read() -> None:
    plain = keys()
    walk = keys({"irn.walk.beta": 8.0})
    assert [name for name in plain if plain[name] != walk[name]] == ["refine_irn", "evaluate"]
    for change in ({"irn.radius": 5}, {"irn.labels.fg_score": 0.4}, {"irn.train.bias_lr_mult": 2.0}, {"seed": 1}):
        assert keys(change)["train_irn"] != plain["train_irn"]
    assert keys({"irn.radius": 5})["make_seeds"] == plain["make_seeds"]
    paper = keys({"irn.preset": "paper"})
    assert paper == keys({"irn.train.momentum": 0.9}) != plain
    assert keys({"irn.preset": "paper", "irn.train.momentum": "official"}) == plain
    assert keys({"seeds.merge": "irn"})["make_seeds"] != plain["make_seeds"]
    assert keys({"irn.backbone.name": "squeezenet1_1"})["train_irn"] != plain["train_irn"]


def test_defaults_are_the_official_ones() -> None:
    irn = IrnConfig()
    assert (irn.train.learning_rate, irn.train.weight_decay, irn.train.momentum) == (0.1, 1e-4, "official")
    assert (irn.train.batch_size, irn.train.epochs, irn.train.crop_px, irn.radius) == (32, 3, 512, 10)
    assert (irn.labels.fg_score, irn.labels.bg_score, irn.scale) == (0.3, 0.05, (0.5, 1.5))
    assert irn.walk.model_dump() == {"radius": 5, "beta": 10, "log2_steps": 8, "bg_score": 0.25}


def test_the_tiny_twin_is_valid() -> None:
    raw = {
        "stages": list(STAGES),
        "irn": {"backbone": {"name": "irn_resnet50", "output_stride": 16, "weights": "w.pth"}},
    }
    cfg = validate_trial(tiny(raw), "tiny")
    assert cfg.backbone_of("irn") is cfg.backbone and cfg.irn.train.crop_px == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"irn.train.crop_px": 72}, r"irn\.train\.crop_px: 72 is not a multiple of 16"),
        ({"irn.radius": 10}, r"irn\.train\.crop_px: 64 pixels are 16 cells.* irn\.radius 10: more than 72"),
        ({"irn.labels.crf_preset": "no"}, r"irn\.labels\.crf_preset: no preset 'no'"),
        (
            {"seeds.splits": ["val"], "seeds.protocol": "fixed"},
            r"seeds\.splits: the seeds are of \[val\].*add train",
        ),
        ({"stages": ["train_cam", "train_irn"]}, "stages: train_irn needs make_seeds before it"),
        ({"irn.train.batch_size": 9}, r"irn\.train\.batch_size: 9 is more than the 8 images"),
        ({"irn.backbone.name": "irn_resnet50"}, r"irn\.backbone\.output_stride: irn_resnet50 can have \(16,\), got 8"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(
    storage: Storage, scenes: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Planner(storage).plan(config(scenes, changes))


@pytest.mark.parametrize("field", ["scale", "labels"])
def test_ranges_are_checked(field: str) -> None:
    bad = {"scale": (1.5, 0.5), "labels": {"fg_score": 0.1, "bg_score": 0.2}}[field]
    with pytest.raises(ValueError, match="expected 0 < low <= high|no pixel would be unsure"):
        IrnConfig.model_validate({field: bad})


def test_a_checkpoint_of_another_backbone_is_refused(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes)
    run(storage, cfg)
    own = copy_of(storage, tmp_path)
    plan = Planner(own).plan(config(scenes, {"irn.walk.beta": 7.0}))
    folder = {name: own.stage(name, key) for name, key in plan.stages}["train_irn"]
    other = build_irn_net(config(None, {"irn.backbone.name": "squeezenet1_1"}), pretrained=False)
    state = {"net": other.state_dict(), "normalisation": NORMALISATIONS["unit"].to_dict()}
    torch.save(state, folder.path / "weights.pt")
    with pytest.raises(ValueError, match=r"(?s)weights\.pt does not hold this trial's net .*delete its folder"):
        run_trial(plan.config, plan.key, plan.stages, own, LocalRuntime())


def test_a_damaged_cam_is_named(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    run(storage, config(scenes))
    own = copy_of(storage, tmp_path)
    plan = Planner(own).plan(config(scenes, {"irn.labels.fg_score": 0.31}))
    seeds = {name: own.stage(name, key) for name, key in plan.stages}["make_seeds"]
    (seeds / "cams" / "train_00002.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="has no whole CAM of train_00002; delete"):
        run_trial(plan.config, plan.key, plan.stages, own, LocalRuntime())

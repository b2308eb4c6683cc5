"""PSA's stages: labels and masks against slow oracles, half-done stages, workers, presets, errors (METHOD 8)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import curve, layout, products, scenes_root, tiny_config, weights_of

from ppc.affinity import displacements
from ppc.artifacts import StageDir, Storage
from ppc.checks import check_trial
from ppc.config import RuntimeConfig, TrialConfig
from ppc.crf import PRESETS, crf_labels, crf_soft
from ppc.data.labels import read_label_file
from ppc.data.transforms import augment_affinity, draw_crop, draw_flip
from ppc.figures import read_palette_png
from ppc.loading import parse, tiny, validate_trial
from ppc.net_config import PSA_PRESETS, PsaConfig, PsaWalkConfig
from ppc.normalisation import NORMALISATIONS
from ppc.planning import Planner, TrialPlan
from ppc.prototypes import ALONE
from ppc.runtime import LocalRuntime
from ppc.seeding import derive_rng
from ppc.stages.make_seeds import read_cam
from ppc.stages.refine_psa import with_background
from ppc.stages.train_psa import AffinityLoss, AffinitySet, build_net, load_net, make_job, read_scores
from ppc.stages.training import Payload
from ppc.train import fit, rank, sum_over_workers
from ppc.trial import run_trial

CPU = torch.device("cpu")
ALL = {"stages": ["train_cam", "make_seeds", "train_psa", "refine_psa", "evaluate"]}
PSA = {**ALL, "psa.preset": "psa", "psa.walk.fit_radius": True}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One root for all tests here: they share what is trained."""
    return Storage(tmp_path_factory.mktemp("psa"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_plan(storage: Storage, plan: TrialPlan) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())


def folders_of(storage: Storage, plan: TrialPlan) -> dict[str, StageDir]:
    return {name: storage.stage(name, key) for name, key in plan.stages}


def run(storage: Storage, cfg: TrialConfig) -> tuple[dict[str, Any], dict[str, StageDir]]:
    """The result of a trial and its stage folders."""
    plan = Planner(storage).plan(cfg)
    return run_plan(storage, plan), folders_of(storage, plan)


# -- labels


@pytest.mark.parametrize(("changes", "powers"), [(PSA, (4, 32)), (ALL, (4, 24))], ids=["psa", "ppc"])
def test_label_scores_are_those_of_the_crf(
    storage: Storage, scenes: Path, changes: dict[str, Any], powers: tuple[int, int]
) -> None:
    cfg = tiny_config(changes, scenes)
    _, folders = run(storage, cfg)
    data = layout(scenes)
    assert {path.stem for path in (folders["train_psa"] / "labels").iterdir()} == set(data.ids("train"))
    image_id = next(i for i in data.ids("train") if data.image_label(i).sum() > 1)
    keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
    for found, power in zip(read_scores(folders["train_psa"] / "labels" / f"{image_id}.npz"), powers, strict=True):
        score = np.concatenate([(1 - cam.max(0, keepdims=True)) ** power, cam]).astype(np.float32)
        if cfg.psa.preset == "psa":  # soft, present classes alone
            wanted = crf_soft(data.image(image_id), score, params=PRESETS["psa_soft"])
        else:  # from labels, among all classes
            full = np.zeros((4, *cam.shape[1:]), np.float32)
            full[[0, *(keys + 1)]] = score
            q = crf_labels(data.image(image_id), full.argmax(0), num_labels=4, gt_prob=0.7, params=PRESETS["ppc_aff"])
            wanted = q[[0, *(keys + 1)]]
            assert (q.argmax(0) == np.array([0, *(keys + 1)])[wanted.argmax(0)]).all(), "absent classes win nowhere"
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def slow_label(low: Any, high: Any) -> list[list[int]]:
    """METHOD 8, cell by cell."""

    def cell(scores: Any, y: int, x: int) -> list[float]:
        return [float(s[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean(dtype=np.float64)) for s in scores]

    rows = []
    for y in range(low.shape[1] // 8):
        row = []
        for x in range(low.shape[2] // 8):
            la, ha = cell(low, y, x), cell(high, y, x)
            label = la.index(max(la)) or 255
            label = 0 if ha.index(max(ha)) == 0 else label
            row.append(255 if max(la + ha) < 1e-5 else label)
        rows.append(row)
    return rows


@pytest.mark.parametrize("crop_px", [32, 72])
def test_samples_are_cropped_mirrored_and_labelled_jointly(storage: Storage, scenes: Path, crop_px: int) -> None:
    """A crop smaller than the images, and one that has to be padded."""
    _, folders = run(storage, tiny_config(PSA, scenes))
    data, labels = layout(scenes), folders["train_psa"] / "labels"
    normalise = NORMALISATIONS["imagenet"].apply
    samples = AffinitySet(
        data, "train", labels=labels, crop_px=crop_px, color_jitter=False, normalise=normalise, seed=3
    )
    seen = set()
    for image_id in data.ids("train")[:4]:
        for epoch in range(2):
            sample = samples.sample(epoch, image_id)
            image = data.image(image_id)
            rng = derive_rng("augment", 3, epoch, image_id)
            box = draw_crop(rng, height=image.shape[0], width=image.shape[1], crop_px=crop_px)
            mirrored = draw_flip(rng)
            inside = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
            place = (slice(box.to_top, box.to_top + box.height), slice(box.to_left, box.to_left + box.width))
            square = np.zeros((crop_px, crop_px, 3), np.uint8)
            square[place] = image[inside]
            low, high = (
                np.zeros((len(s), crop_px, crop_px), np.float32) for s in read_scores(labels / f"{image_id}.npz")
            )
            for part, whole in zip((low, high), read_scores(labels / f"{image_id}.npz"), strict=True):
                part[:, *place] = whole[:, *inside]
            if mirrored:
                square, low, high = square[:, ::-1], low[..., ::-1], high[..., ::-1]
            seen.add(mirrored)
            assert torch.equal(sample["image_3HW"], normalise(square)), "padding is normalised too"
            assert sample["label_hw"].tolist() == slow_label(low, high)
    assert seen == {True, False}


def test_colour_jitter_leaves_the_scores_and_where_they_lie() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    score = np.arange(2 * 20 * 30, dtype=np.float32).reshape(2, 20, 30)
    jittered, kept = augment_affinity(image, score, crop_px=40, color_jitter=True, rng=derive_rng("a"))
    assert not any((jittered == c).all() for c in (0, 255))
    assert (kept > 0).sum() == 2 * 20 * 30 - 1 and set(kept.flat) == set(score.flat)
    assert ((jittered.sum(2) > 0) <= (kept[1] > 0)).all(), "colours lie where the scores lie"


# -- the trial


@pytest.mark.parametrize("changes", [PSA, ALL, {**ALL, "psa.preset": "seam", "psa.walk.crf": "seam_aff"}])
def test_a_trial_gives_a_mask_of_every_image_and_its_score(
    storage: Storage, scenes: Path, changes: dict[str, Any]
) -> None:
    result, folders = run(storage, tiny_config(changes, scenes))
    data = layout(scenes)
    assert result["metrics"].keys() == {"bg_score", "silent_maps_train", "seed_miou_train", "psa_mask_miou_train"}
    assert 0 < result["metrics"]["psa_mask_miou_train"] < 1
    for image_id in data.ids("train"):
        mask = read_palette_png(folders["refine_psa"] / "masks" / f"{image_id}.png")
        assert mask.shape == data.image_size(image_id)
        assert set(np.unique(mask)) <= {0, *(np.flatnonzero(data.image_label(image_id)) + 1)}
    steps = curve(folders["train_psa"])
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    for _, metrics in steps:
        parts = [metrics[f"psa/{kind}"] for kind in ("bg", "fg", "neg")]
        assert metrics["psa/loss"] == pytest.approx(sum(parts), rel=1e-5) and max(parts) > 0


def test_masks_are_those_of_a_dense_walk(storage: Storage, scenes: Path) -> None:
    cfg = tiny_config(PSA, scenes)
    _, folders = run(storage, cfg)
    data, image_id = layout(scenes), "train_00002"
    net, normalisation = load_net(cfg.model_dump_json(), folders["train_psa"] / "weights.pt", CPU)
    keys, cam = read_cam(folders["make_seeds"] / "cams" / f"{image_id}.npz")
    image = data.image(image_id)
    H, W = image.shape[:2]
    h, w = -(-H // 8), -(-W // 8)
    padded = torch.zeros(1, 3, 8 * h, 8 * w)
    padded[0, :, :H, :W] = normalisation.apply(image)
    with torch.no_grad():
        feature = net(padded)[0].double().numpy()
    score = np.zeros((len(keys) + 1, 8 * h, 8 * w))
    score[:, :H, :W] = np.concatenate([(1 - cam.max(0, keepdims=True)) ** 16, cam])
    grid = score.reshape(len(score), h, 8, w, 8).mean((2, 4)).reshape(len(score), -1)
    radius = 3 if min(h, w) > 6 else (min(h, w) - 1) // 2
    matrix = np.eye(h * w)
    for y in range(h - radius + 1):
        for x in range(radius - 1, w - radius + 1):
            for dy, dx in displacements(radius):
                gap = np.abs(feature[:, y, x] - feature[:, y + dy, x + dx]).mean()
                p, q = w * y + x, w * (y + dy) + x + dx
                matrix[p, q] = matrix[q, p] = math.exp(-gap) ** 8
    walked = grid @ np.linalg.matrix_power(matrix / matrix.sum(0), 256)
    up = F.interpolate(
        torch.from_numpy(walked).reshape(1, -1, h, w), (8 * h, 8 * w), mode="bilinear", align_corners=False
    )
    wanted = np.array([0, *(keys + 1)])[up[0, :, :H, :W].argmax(0).numpy()]
    mask = read_palette_png(folders["refine_psa"] / "masks" / f"{image_id}.png")
    assert (mask == wanted).all() and len(np.unique(mask)) > 1


def test_backgrounds_of_the_walk() -> None:
    cam = torch.tensor([[[0.5, 0.75]]])
    walk = PsaWalkConfig(background="power", bg_power=2)
    assert with_background(cam, walk).tolist() == [[[0.25, 0.0625]], [[0.5, 0.75]]]
    walk = PsaWalkConfig(background="constant", bg_score=0.25)
    assert with_background(cam, walk).tolist() == [[[0.25, 0.25]], [[0.5, 0.75]]]


def test_an_image_without_any_class_is_background(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    shutil.copytree(scenes, root)
    (root / "dataset.json").unlink()
    labels = read_label_file(root / "cls_labels.npy", 3)
    labels["train_00000"] = np.zeros(3, np.float32)
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))
    _, folders = run(storage, tiny_config({**PSA, "data.name": "voc", "psa.walk.crf": "seam_aff"}, root))
    assert not read_palette_png(folders["refine_psa"] / "masks" / "train_00000.png").any()
    low, high = read_scores(folders["train_psa"] / "labels" / "train_00000.npz")
    assert len(low) == len(high) == 1 and low.min() > 0.99


def test_tiny_shrinks_a_trial_to_seconds(storage: Storage) -> None:
    raw = parse(
        "stages: [train_cam, make_seeds, train_psa, refine_psa, evaluate]\n"
        "psa: {preset: psa, backbone: {name: resnet38d, weights: nowhere.params, normalisation: imagenet}}\n",
        "f",
    )
    result, _ = run(storage, validate_trial(tiny(raw), "f"))
    assert "psa_mask_miou_train" in result["metrics"]


# -- a stage that was stopped half-way


@pytest.mark.parametrize(
    ("stage", "lost"),
    [
        ("train_psa", ["labels/train_00001.npz", "labels/train_00006.npz", "weights.pt"]),
        ("refine_psa", ["masks/train_00000.png", "masks/train_00005.png"]),
    ],
)
def test_a_stage_begun_by_another_process_ends_the_same(
    storage: Storage, scenes: Path, tmp_path: Path, stage: str, lost: list[str]
) -> None:
    cfg = tiny_config(PSA, scenes)
    wanted, _ = run(storage, cfg)
    own = Storage(tmp_path / "root")
    shutil.copytree(storage.root, own.root)
    plan = Planner(own).plan(cfg)
    folder = folders_of(own, plan)[stage]
    before = products(folder.path)
    for name in (*lost, "manifest.json"):
        (folder.path / name).unlink()
    (own.trial(plan.key).path / "result.json").unlink()
    got = run_plan(own, plan)
    assert products(folder.path) == before and got["metrics"] == wanted["metrics"]
    assert [s["name"] for s in got["stages"] if not s["reused"]] == [stage]


def payload_of(storage: Storage, cfg: TrialConfig, folder: StageDir) -> Payload:
    """What a worker of train_psa is sent, with the labels of a trial that has run."""
    _, folders = run(storage, cfg)
    shutil.copytree(folders["train_psa"].path / "labels", folder.path / "labels")
    return Payload(cfg, folder, {}, layout(Path(str(cfg.data.root))), make_job)


class StopError(Exception):
    """What ends a training in a test."""


def test_a_training_stopped_in_an_epoch_ends_bit_identical(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    cfg = tiny_config({**PSA, "psa.train.momentum": 0.9}, scenes)
    _, folders = run(storage, cfg)
    folder = StageDir(tmp_path / "stage", "train_psa", "key")
    payload = payload_of(storage, cfg, folder)
    job = make_job(payload, CPU)

    def batches(epoch: int) -> Iterator[Any]:
        for index, batch in enumerate(job.batches(epoch)):
            if (epoch, index) == (1, 1):
                raise StopError
            yield batch

    with pytest.raises(StopError):
        fit(SimpleNamespace(**{**vars(job), "batches": batches, "metric": job.metric, "speed": job.speed}), folder,
            cfg.runtime, CPU)  # fmt: skip
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["epoch-00001.pt"]
    again = make_job(payload, CPU)
    fit(again, folder, cfg.runtime, CPU)
    weights = weights_of(folders["train_psa"])
    assert all(torch.equal(value, weights[name]) for name, value in again.net.state_dict().items())
    assert curve(folder) == curve(folders["train_psa"])


# -- workers


@dataclass(frozen=True)
class OneStep:
    """What a group of processes is sent."""

    payload: Payload


def one_step(sent: OneStep, device: torch.device) -> None:
    """Loss, terms and gradients of a step of the global batch, in float64."""
    job = make_job(sent.payload, device)
    job.net.double().train()
    batch = dict(next(iter(job.batches(0))))
    batch["image_N3HW"] = batch["image_N3HW"].double()
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["sample_seed_N"]]
    kinds = torch.tensor(
        [0, 0, 1, 2, 255], dtype=torch.uint8
    )  # pairs of all kinds; workers have unlike numbers of them
    batch["label_Nhw"] = torch.stack([kinds[torch.randint(5, (6, 6), generator=one)] for one in generators])
    loss, terms = job.losses(job.net, batch, 0)
    loss.backward()
    found = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
    found |= {name: p.grad for name, p in job.net.named_parameters() if p.grad is not None}
    sum_over_workers(list(found.values()))
    if rank() == 0:
        torch.save(found, sent.payload.folder / "step.pt")


def test_loss_and_gradients_do_not_depend_on_the_number_of_workers(
    storage: Storage, scenes: Path, tmp_path: Path
) -> None:
    cfg, found = tiny_config(PSA, scenes), {}
    for number in (1, 2):
        folder = StageDir(tmp_path / str(number), "train_psa", "key")
        LocalRuntime().train(one_step, OneStep(payload_of(storage, cfg, folder)), RuntimeConfig(workers=number))
        found[number] = torch.load(folder / "step.pt")
    assert found[1].keys() == found[2].keys() and all(found[1][kind] > 0 for kind in ("bg", "fg", "neg"))
    for name, value in found[1].items():
        atol = 1e-10 * value.abs().max().item()
        torch.testing.assert_close(
            found[2][name], value, rtol=1e-10, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_batch_without_any_pair_changes_nothing_but_the_decay() -> None:
    net = build_net(tiny_config(PSA), pretrained=False).train()
    batch = {
        "image_N3HW": torch.zeros(2, 3, 48, 48),
        "label_Nhw": torch.full((2, 6, 6), 255, dtype=torch.uint8),
        "sample_seed_N": torch.arange(2),
    }
    loss, terms = AffinityLoss(3, ALONE)(net, batch, 0)
    loss.backward()
    assert loss.item() == 0 and all(term.item() == 0 for term in terms.values())
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


# -- config, keys


@pytest.mark.parametrize("name", PSA_PRESETS)
def test_presets_fill_nested_fields_that_are_not_given(name: str) -> None:
    given = PsaConfig.model_validate({"preset": name, "labels": {"bg_power_low": 3}, "walk": {"beta": 2}})
    for section, fields in PSA_PRESETS[name].items():
        for field, value in fields.items():
            wanted = 3 if field == "bg_power_low" else value
            assert getattr(getattr(given, section), field) == wanted, field
    assert given.walk.beta == 2 and given.train.epochs == 8
    assert PsaConfig.model_validate(given.model_dump(mode="json")) == given
    assert PsaConfig() == PsaConfig(preset="ppc")


def test_presets_are_those_of_the_official_codes() -> None:
    """METHOD 8; `crf`: METHOD 9."""
    found = {}
    for name in PSA_PRESETS:
        own = PsaConfig.model_validate({"preset": name})
        labels, walk = own.labels, own.walk
        background = walk.bg_power if walk.background == "power" else -walk.bg_score
        found[name] = (
            labels.bg_power_low, labels.bg_power_high, labels.crf, background, walk.log2_steps, walk.fit_radius,
            walk.beta, own.train.learning_rate,
        )  # fmt: skip
    assert found == {
        "psa": (4, 32, "psa_soft", 16, 8, False, 8, 0.1),
        "seam": (4, 24, "psa_soft", 6, 6, True, 8, 0.01),
        "ppc": (4, 24, "ppc_aff", -0.27, 6, True, 8, 0.01),
    }


def test_what_a_choice_leaves_unread_and_the_preset_decide_nothing() -> None:
    def decisive(section: str, **walk: object) -> object:
        return TrialConfig.model_validate({"psa": {"walk": walk}}).decisive(section)

    power, constant = {"background": "power"}, {"background": "constant"}
    assert decisive("psa.walk", **power, bg_score=0.1) == decisive("psa.walk", **power)
    assert decisive("psa.walk", **power, bg_power=3) != decisive("psa.walk", **power)
    assert decisive("psa.walk", **constant, bg_power=3) == decisive("psa.walk", **constant)
    assert decisive("psa.walk", **constant, bg_score=0.1) != decisive("psa.walk", **constant)
    spelled = {"preset": "ppc", **PSA_PRESETS["psa"]}
    named, by_fields = (TrialConfig.model_validate({"psa": psa}) for psa in ({"preset": "psa"}, spelled))
    assert all(named.decisive(section) == by_fields.decisive(section) for section in ("psa", "psa.walk"))


def test_a_field_of_the_walk_keeps_the_trained_net_and_one_of_the_labels_keeps_the_seeds(
    scenes: Path, storage: Storage
) -> None:
    planner = Planner(storage)

    def stages(changes: dict[str, Any]) -> list[str]:
        return [key for _, key in planner.plan(tiny_config({**ALL, **changes}, scenes)).stages]

    base = stages({})
    first_changed = {
        "psa.walk.beta": 3, "psa.labels.crf": 2, "psa.radius": 2, "psa.train.epochs": 2, "psa.color_jitter": 2,
        "psa.backbone.name": 2, "train.epochs": 0,
    }  # fmt: skip
    values = {
        "psa.walk.beta": 4, "psa.labels.crf": "psa_soft", "psa.radius": 2, "psa.train.epochs": 1,
        "psa.color_jitter": False, "psa.backbone.name": "squeezenet1_1", "train.epochs": 3,
    }  # fmt: skip
    for field, first in first_changed.items():
        same = [a == b for a, b in zip(stages({field: values[field]}), base, strict=True)]
        assert same == [i < first for i in range(5)], field


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"psa.labels.crf": "soft"}, "psa.labels.crf", "no preset 'soft'; there are psa_soft"),
        ({"psa.walk.crf": "seam"}, "psa.walk.crf", "no preset 'seam'"),
        ({"backbone.output_stride": 16}, "backbone.output_stride", "is 16, but AffinityNet .* needs 8"),
        (
            {"psa.backbone.name": "tiny", "psa.backbone.output_stride": 16},
            "psa.backbone.output_stride",
            "is 16, but AffinityNet",
        ),
        ({"psa.train.crop_px": 50}, "psa.train.crop_px", "50 is not a multiple of 8"),
        ({"psa.radius": 5}, "psa.train.crop_px", "less than the 72 that pairs of psa.radius 5 need"),
        ({"stages": ["train_cam", "make_seeds", "refine_psa"]}, "stages", "refine_psa needs train_psa before it"),
        ({"psa.train.batch_size": 3, "runtime.workers": 2, "train.batch_size": 4}, "psa.train.batch_size", "multiple"),
    ],
)
def test_what_types_cannot_say_is_checked_before_anything_starts(
    changes: dict[str, Any], field: str, text: str
) -> None:
    found = list(check_trial(tiny_config({**ALL, **changes})))
    assert [name for name, _ in found] == [field]
    with pytest.raises(ValueError, match=text):
        raise ValueError(found[0][1])


def test_seeds_of_another_split_are_refused_with_both_sides(storage: Storage, scenes: Path) -> None:
    changes = {**ALL, "seeds.splits": ["val"], "seeds.protocol": "fixed"}
    message = r"seeds.splits: the seeds are of \[val\], but .* data.train_split train: 8 of its 8 images have none"
    with pytest.raises(ValueError, match=message):
        Planner(storage).plan(tiny_config(changes, scenes))
    Planner(storage).plan(tiny_config({**changes, "seeds.splits": ["val", "train"]}, scenes))


def test_an_image_too_small_for_the_radius_is_named(storage: Storage, scenes: Path) -> None:
    changes = {**PSA, "psa.walk.fit_radius": False, "psa.radius": 4, "psa.train.crop_px": 56}
    with pytest.raises(ValueError, match=r"train_\d+: \d x \d cells .* psa.radius 4; set psa.walk.fit_radius=true"):
        run(storage, tiny_config(changes, scenes))


def test_a_checkpoint_of_another_net_is_refused_with_both_sides(storage: Storage, scenes: Path, tmp_path: Path) -> None:
    cfg = tiny_config(PSA, scenes)
    _, folders = run(storage, cfg)
    for weights, text in (
        (folders["train_cam"] / "weights.pt", r"(?s)AffinityNet.*Missing key.*f8_5.weight.*Unexpected key.*fc8.weight"),
        (tmp_path / "other.pt", "size mismatch for f8_3.weight: .*torch.Size"),
    ):
        if text.startswith("size"):
            state = torch.load(folders["train_psa"] / "weights.pt")
            state["net"]["f8_3.weight"] = torch.zeros(64, 512, 1, 1)
            torch.save(state, weights)
        with pytest.raises(
            ValueError, match=f"(?s){weights} does not hold this trial's net.*{text.removeprefix('(?s)')}"
        ):
            load_net(cfg.model_dump_json(), weights, CPU)


def test_damaged_label_scores_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a.npz does not hold the label scores .*; delete it and run again"):
        read_scores(tmp_path / "a.npz")

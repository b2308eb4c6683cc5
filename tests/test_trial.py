"""A trial from config to result: what is reused, what a key is made of, and what an error leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import scenes_root, tiny_config

import ppc.planning
import ppc.trial
from ppc.artifacts import Storage, read_json
from ppc.checks import check_trial
from ppc.config import RuntimeConfig, TrialConfig
from ppc.data.labels import read_label_file
from ppc.ledger import alive
from ppc.methods import build_net
from ppc.planning import Planner, TrialPlan, data_name, data_splits
from ppc.runtime import LocalRuntime, MapFunction
from ppc.stages.training import save_net
from ppc.trial import run_trial

STAGES = ["train_cam", "make_seeds", "refine_crf", "evaluate"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "root")


class CallingRuntime(LocalRuntime):
    """The local runtime, which calls something of the test's before each `map`."""

    def __init__(self, before_map: Callable[[], None]) -> None:
        super().__init__()
        self.before_map = before_map

    def map(
        self,
        function: MapFunction,
        shared: Any,
        items: Sequence[Any],
        cfg: RuntimeConfig,
        done: Callable[[int, Any], None],
        *,
        use_gpu: bool = False,
    ) -> None:
        self.before_map()
        super().map(function, shared, items, cfg, done, use_gpu=use_gpu)


def run_plan(plan: TrialPlan, storage: Storage, rt: LocalRuntime | None = None) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, rt or LocalRuntime())


def run(cfg: TrialConfig, storage: Storage) -> dict[str, Any]:
    return run_plan(Planner(storage).plan(cfg), storage)


def plan_of(scenes: Path, storage: Storage, changes: dict[str, Any] | None = None) -> TrialPlan:
    return Planner(storage).plan(tiny_config(changes, scenes))


def reused(result: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in result["stages"] if stage["reused"]]


def stamps(storage: Storage) -> dict[str, int]:
    """When each file of a stage or trial was last written."""
    paths = [p for part in ("stages", "trials") for p in (storage.root / part).rglob("*")]
    return {str(p): p.stat().st_mtime_ns for p in paths if p.is_file() and not p.name.startswith(".")}


# -- from end to end


def test_a_trial_ends_with_its_result(scenes: Path, storage: Storage) -> None:
    plan = plan_of(scenes, storage)
    result = run_plan(plan, storage)
    trial = storage.trial(plan.key)
    assert trial.result() == result and trial.error() is None
    assert result["metrics"].keys() == {"bg_score", "silent_maps_train", "seed_miou_train", "mask_miou_train"}
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert [(s["name"], s["key"]) for s in result["stages"]] == plan.stages
    assert [s["name"] for s in result["stages"]] == STAGES and reused(result) == []
    assert result["wall_s"] == pytest.approx(sum(s["wall_s"] for s in result["stages"])) and result["wall_s"] > 0
    assert result["attempt"] == 1 and result["host"] == socket.gethostname()
    assert abs(result["finished_ms"] - time.time() * 1000) < 60_000
    assert result["counts"] == {"train": 8} and result["protocol"] == "best_on_train"
    state = trial.state()
    assert (state["state"], state["attempt"], state["stage"]) == ("FINISHED", 1, "evaluate")
    assert state["started_ms"] <= state["ended_ms"] and state["pid"] == os.getpid()
    assert TrialConfig.model_validate(read_json(trial.path / "config.json")) == plan.config
    for name, key in plan.stages:
        manifest = storage.stage(name, key).manifest()
        assert manifest is not None and manifest["stage"] == name
        progress = read_json(storage.stage(name, key) / "progress.json")
        assert progress["done"] == progress["total"] > 0, name


def test_running_it_again_runs_nothing(scenes: Path, storage: Storage) -> None:
    plan = plan_of(scenes, storage)
    result, before = run_plan(plan, storage), stamps(storage)
    assert run_plan(plan, storage) == result
    assert stamps(storage) == before


def test_another_crf_reuses_what_comes_before_it(scenes: Path, storage: Storage) -> None:
    first, other = plan_of(scenes, storage), plan_of(scenes, storage, {"crf.preset": "irn_label"})
    assert first.key != other.key and first.stages[:2] == other.stages[:2]
    assert first.stages[2] != other.stages[2] and first.stages[3] != other.stages[3]
    one = run_plan(first, storage)
    before = stamps(storage)
    two = run_plan(other, storage)
    assert reused(two) == ["train_cam", "make_seeds"]
    assert two["metrics"]["seed_miou_train"] == one["metrics"]["seed_miou_train"]
    assert [s["wall_s"] for s in two["stages"][:2]] == [s["wall_s"] for s in one["stages"][:2]]
    after = stamps(storage)
    assert {path: after[path] for path in before} == before, "nothing that was there was touched"


def test_two_trials_at_once_train_what_they_share_once(scenes: Path, storage: Storage) -> None:
    plans = [plan_of(scenes, storage, {"crf.preset": preset}) for preset in ("ppc_seed", "irn_label")]
    results: dict[int, dict[str, Any]] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run_plan(plans[i], storage)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert sorted("train_cam" in reused(result) for result in results.values()) == [False, True]
    assert results[0]["metrics"]["bg_score"] == results[1]["metrics"]["bg_score"]


def test_scenes_are_made_under_the_root_when_no_folder_is_named(storage: Storage) -> None:
    plan = Planner(storage).plan(tiny_config())
    assert plan.config.data.root is None, "a storage that is moved keeps its data"
    assert plan.config.data.scenes.num_train == 8
    made = storage.dataset(data_name(plan.config.data))
    assert made.is_relative_to(storage.root / "data") and len(list((made / "JPEGImages").iterdir())) == 12


# -- keys


def test_what_decides_numbers_is_in_the_key_and_what_does_not_is_not(scenes: Path, storage: Storage) -> None:
    planner = Planner(storage)

    def plan(changes: dict[str, Any]) -> TrialPlan:
        return planner.plan(tiny_config(changes, scenes))

    base = plan({})
    runtime = plan({"runtime.workers": 2, "runtime.cpus_per_worker": 2, "runtime.loader_workers": 1})
    assert (runtime.key, runtime.stages, runtime.variant_key) == (base.key, base.stages, base.variant_key)
    assert plan({"contrast.preset": "official"}).key == base.key, "a preset is the fields that it fills"
    seeded = plan({"seed": 1})
    assert seeded.key != base.key and seeded.variant_key == base.variant_key
    assert all(a != b for a, b in zip(seeded.stages, base.stages, strict=True))
    first_changed = {
        "train.epochs": 0, "contrast.temperature": 0, "views.flip": 0, "method.dropout": 0, "backbone.normalisation": 0,
        "seeds.scales": 1, "seeds.protocol": 1, "seeds.absent_classes": 1, "crf.preset": 2, "crf.bg_score": 2,
    }  # fmt: skip
    values = {
        "train.epochs": 3, "contrast.temperature": 0.2, "views.flip": True, "method.dropout": 0.1,
        "backbone.normalisation": "half", "seeds.scales": [0.5], "seeds.protocol": "fixed",
        "seeds.absent_classes": "skip", "crf.preset": "psa_soft", "crf.bg_score": 0.3,
    }  # fmt: skip
    plans = {field: plan({field: values[field]}) for field in first_changed}
    for field, first in first_changed.items():
        same = [a == b for a, b in zip(plans[field].stages, base.stages, strict=True)]
        assert same == [i < first for i in range(4)], field
        assert plans[field].variant_key != base.variant_key
    assert len({p.key for p in plans.values()} | {base.key}) == len(plans) + 1


def test_without_contrast_its_other_fields_decide_nothing(scenes: Path, storage: Storage) -> None:
    off = {"contrast.prototype_top_k": 0}
    plain = plan_of(scenes, storage, off)
    assert plain.key == plan_of(scenes, storage, {**off, "contrast.temperature": 0.5}).key
    zero = {f"contrast.{name}_weight": 0 for name in ("cross_prototype", "cross_cam", "intra_view")}
    assert plain.key == plan_of(scenes, storage, zero).key
    assert plain.key != plan_of(scenes, storage).key


def test_a_dataset_is_known_by_its_contents_wherever_it_lies(scenes: Path, storage: Storage, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "elsewhere")
    plan, moved = plan_of(scenes, storage), plan_of(tmp_path / "elsewhere", storage)
    assert (moved.key, moved.stages) == (plan.key, plan.stages) and moved.config.data.root != plan.config.data.root
    own = tmp_path / "own"
    shutil.copytree(scenes, own)
    keys = {plan_of(own, storage).key}
    voc = {"data.name": "voc"}
    assert plan_of(own, storage, voc).key in keys, "how a folder came about is not in the key"
    for change in (
        lambda: shutil.copy(own / "JPEGImages/train_00001.jpg", own / "JPEGImages/train_00002.jpg"),
        lambda: shutil.copy(own / "SegmentationClass/train_00001.png", own / "SegmentationClass/train_00003.png"),
        lambda: (own / "ImageSets/Segmentation/train.txt").write_text(
            "\n".join(f"train_0000{i}" for i in (7, 6, 5, 4, 3, 2, 1)) + "\n"
        ),
        lambda: (own / "classes.txt").write_text("a\nb\nc\n"),
        lambda: relabel(own, "train_00004"),
    ):
        change()
        key = plan_of(own, storage, voc).key
        assert key not in keys
        keys.add(key)
    relabel(own, "val_00001")
    shutil.copy(own / "JPEGImages/val_00001.jpg", own / "JPEGImages/val_00002.jpg")
    assert plan_of(own, storage, voc).key == key, "val takes no part in this trial"


def relabel(root: Path, image_id: str) -> None:
    labels = read_label_file(root / "cls_labels.npy", 3)
    labels[image_id] = 1 - labels[image_id]
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))


def test_pretrained_weights_are_known_by_their_contents(scenes: Path, storage: Storage, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> Path:
        net = build_net(tiny_config({"seed": seed}), 3, pretrained=False)
        torch.save(net.backbone.state_dict(), tmp_path / "made.pth")  # the name is in the file's bytes
        shutil.copy(tmp_path / "made.pth", tmp_path / name)
        return tmp_path / name

    plans = [
        plan_of(scenes, storage, {"backbone.weights": str(weights(name, seed))})
        for name, seed in (("a.pth", 5), ("b.pth", 5), ("c.pth", 6))
    ]
    assert plans[0].key == plans[1].key != plans[2].key != plan_of(scenes, storage).key
    assert run_plan(plans[0], storage)["metrics"]["mask_miou_train"] >= 0
    with pytest.raises(ValueError, match="backbone.weights: no file .*nowhere.pth"):
        plan_of(scenes, storage, {"backbone.weights": str(tmp_path / "nowhere.pth")})


def test_other_splits_for_the_seeds_keep_the_trained_net(scenes: Path, storage: Storage) -> None:
    plans = [
        plan_of(scenes, storage, changes)
        for changes in ({}, {"seeds.splits": ["train", "val"]}, {"seeds.protocol": "val_subset"})
    ]
    trained = {dict(plan.stages)["train_cam"] for plan in plans}
    assert len(trained) == 1
    assert len({dict(plan.stages)["make_seeds"] for plan in plans}) == 3
    other = {"data.train_split": "val", "seeds.splits": ["train", "val"]}
    assert dict(plan_of(scenes, storage, other).stages)["train_cam"] not in trained


def test_splits_are_those_that_are_read() -> None:
    assert data_splits(tiny_config()) == ["train"]
    changes = {"seeds.splits": ["val", "train"], "seeds.protocol": "val_subset", "seeds.val_subset_split": "val"}
    assert data_splits(tiny_config(changes)) == ["train", "val"]


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"backbone.name": "resnet5"}, "backbone.name", "there are resnet38d"),
        ({"crf.preset": "soft"}, "crf.preset", "there are psa_soft"),
        ({"train.batch_size": 3, "runtime.workers": 2}, "train.batch_size", "not a multiple of runtime.workers 2"),
        ({"views.target_px": 64}, "views.target_px", "larger than train.crop_px 48"),
        ({"method.name": "eps_seam", "backbone.output_stride": 16, "views.target_px": 31}, "views.target_px", "32"),
        ({"contrast.negative_rank_from": 0.7}, "contrast.negative_rank_from", "smaller"),
        ({"data.name": "voc"}, "data.root", "name the folder"),
        ({"stages": ["evaluate"]}, "stages", "evaluate needs make_seeds"),
        ({"backbone.name": "resnet38d", "backbone.output_stride": 16}, "backbone.output_stride", "resnet38d can have"),
        ({"seeds.splits": ["val"]}, "seeds.protocol", r"data.train_split train, .* not among seeds.splits \[val\]"),
    ],
)
def test_what_types_cannot_say_is_checked_before_anything_starts(
    storage: Storage, changes: dict[str, Any], field: str, text: str
) -> None:
    cfg = tiny_config(changes)
    assert [name for name, _ in check_trial(cfg)] == [field]
    with pytest.raises(ValueError, match=f"^{field}: .*{text}"):
        Planner(storage).plan(cfg)
    assert not storage.root.exists()


def test_an_unknown_timm_model_is_told_before_anything_starts() -> None:
    pytest.importorskip("timm")
    ((field, text),) = check_trial(tiny_config({"backbone.name": "timm:resnet_18"}))
    assert field == "backbone.name" and "no model 'resnet_18'; did you mean resnet18?" in text


def test_a_trial_that_asks_too_much_of_its_data_is_told_so_at_once(scenes: Path, storage: Storage) -> None:
    asked = {"train.batch_size": 9, "seeds.splits": ["train", "va"], "seeds.protocol": "val_subset"}
    with pytest.raises(ValueError, match="^seeds.splits: no split 'va' in .*; did you mean val\\?$"):
        plan_of(scenes, storage, asked)
    with pytest.raises(ValueError, match="^train.batch_size: 9 is more than the 8 images of train$"):
        plan_of(scenes, storage, {**asked, "seeds.splits": ["train"]})
    plan_of(scenes, storage, {"train.batch_size": 8})


@pytest.mark.parametrize(
    ("protocol", "split"), [({"seeds.protocol": "best_on_train"}, "train"), ({"seeds.protocol": "val_subset"}, "val")]
)
def test_a_protocol_that_needs_masks_asks_for_them_before_anything_starts(
    own: Path, storage: Storage, protocol: dict[str, Any], split: str
) -> None:
    for path in (own / "SegmentationClass").glob(f"{split}_*.png"):
        path.unlink()
    changes = {"data.name": "voc", "train.batch_size": 9, **protocol}
    with pytest.raises(ValueError, match=f"needs masks of split {split}; use seeds.protocol fixed") as told:
        plan_of(own, storage, changes)
    assert "train.batch_size: 9" in str(told.value), "all that is wrong at once"
    assert not storage.root.exists()


def test_weights_of_another_net_are_told_before_anything_starts(
    scenes: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    planner, loads = Planner(storage), list[Any]()
    build = ppc.planning.build_backbone
    monkeypatch.setattr(ppc.planning, "build_backbone", lambda *a, **k: loads.append(a) or build(*a, **k))
    for seed in (0, 1):
        with pytest.raises(
            ValueError, match="^backbone.weights: for backbone.name tiny: .*other.pth does not fit tiny"
        ):
            planner.plan(tiny_config({"backbone.weights": str(path), "seed": seed}, scenes))
    assert len(loads) == 1, "a file is tried once"


def test_the_metrics_of_a_plan_are_those_of_its_result(scenes: Path, storage: Storage) -> None:
    plan = plan_of(scenes, storage, {"seeds.splits": ["train", "val"], "train.epochs": 1})
    assert plan.metrics[-1] == "mask_miou_train"
    assert sorted(plan.metrics) == sorted(run_plan(plan, storage)["metrics"])
    assert plan_of(scenes, storage, {"stages": ["train_cam"]}).metrics == []
    seeds_only = plan_of(scenes, storage, {"stages": ["train_cam", "make_seeds", "evaluate"]})
    assert seeds_only.metrics == ["bg_score", "silent_maps_train", "seed_miou_train"]


# -- errors


@pytest.fixture
def own(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may break."""
    shutil.copytree(scenes, tmp_path / "own")
    return tmp_path / "own"


def test_an_error_is_recorded_and_the_next_run_goes_on(own: Path, storage: Storage) -> None:
    plan = plan_of(own, storage, {"data.name": "voc"})
    trial = storage.trial(plan.key)
    (own / "SegmentationClass").rename(own / "away")
    with pytest.raises(ValueError, match="needs masks of split train"):
        run_plan(plan, storage)
    error, state = trial.error(), trial.state()
    assert error is not None and trial.result() is None
    assert (error["type"], error["stage"], error["attempt"]) == ("ValueError", "make_seeds", 1)
    assert "needs masks of split train; use seeds.protocol fixed" in error["message"]
    assert "Traceback" in error["traceback"] and "chosen_score" in error["traceback"]
    assert (state["state"], state["stage"]) == ("FAILED", "make_seeds") and state["ended_ms"] >= state["started_ms"]
    folders = [storage.stage(*stage) for stage in plan.stages]
    assert folders[0].manifest() is not None and folders[1].manifest() is None

    (own / "away").rename(own / "SegmentationClass")
    made = {path: path.stat().st_mtime_ns for path in (folders[1] / "cams").iterdir()}
    assert len(made) == 8
    result = run_plan(plan, storage)
    assert reused(result) == ["train_cam"] and result["attempt"] == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made, "CAMs that were there are not made again"
    assert trial.error() is None and trial.state()["state"] == "FINISHED" and trial.state()["attempt"] == 2


def test_data_that_went_away_is_the_trials_error(own: Path, storage: Storage) -> None:
    plan = plan_of(own, storage, {"data.name": "voc"})
    own.rename(own.with_name("gone"))
    with pytest.raises(ValueError, match="has no folder JPEGImages"):
        run_plan(plan, storage)
    error = storage.trial(plan.key).error()
    assert error is not None and error["type"] == "DataError" and error["stage"] is None
    assert storage.trial(plan.key).state()["state"] == "FAILED"
    own.with_name("gone").rename(own)
    assert run_plan(plan, storage)["attempt"] == 2


@pytest.mark.slow
def test_an_error_in_a_worker_process_is_told_as_its_own(own: Path, storage: Storage) -> None:
    plan = plan_of(own, storage, {"data.name": "voc", "runtime.workers": 2})
    (own / "JPEGImages" / "train_00003.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="train_00003.jpg: not readable as an image"):
        run_plan(plan, storage)
    error = storage.trial(plan.key).error()
    assert error is not None and (error["type"], error["stage"]) == ("DataError", "train_cam")
    assert error["message"].startswith(str(own)) and "augment_cam" not in error["message"]


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_is_not_a_failure(scenes: Path, storage: Storage, at: int) -> None:
    calls = []

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    plan = plan_of(scenes, storage)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, storage, CallingRuntime(interrupt))
    trial = storage.trial(plan.key)
    error = trial.error()
    assert trial.state()["state"] == "KILLED"
    assert error is not None and error["type"] == error["message"] == "KeyboardInterrupt"
    result = run_plan(plan, storage)
    assert reused(result) == STAGES[: 1 if at == 1 else 2] and trial.error() is None


def test_what_keeps_an_attempt_from_starting_is_not_taken_for_the_error_of_the_one_before(storage: Storage) -> None:
    trial = storage.trial("a")
    ppc.trial.record_failure(trial, ValueError("first"), after=0)
    assert (trial.state()["state"], trial.state()["attempt"]) == ("FAILED", 1)
    ppc.trial.record_failure(trial, RuntimeError("second"), after=1)
    error = trial.error()
    assert error is not None and (error["message"], error["attempt"]) == ("second", 2)
    trial.write_state(attempt=3, stage="train_cam")  # this one began, and told of its error itself
    ppc.trial.record_failure(trial, RuntimeError("third"), after=2)
    assert trial.error() == error


def test_checkpoints_that_a_killed_process_left_behind_a_finished_stage_go(scenes: Path, storage: Storage) -> None:
    cfg = tiny_config({"stages": ["train_cam"]}, scenes)
    run(cfg, storage)
    plan = plan_of(scenes, storage)
    assert plan.stages[0] == Planner(storage).plan(cfg).stages[0]
    left = storage.stage(*plan.stages[0]).path / "checkpoints"
    left.mkdir()
    (left / "epoch-00001.pt").write_bytes(b"of no use any more")
    assert "train_cam" in reused(run_plan(plan, storage)) and not left.exists()


# -- the heartbeat


def test_a_trial_at_work_says_so_all_the_time(scenes: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppc.trial, "HEARTBEAT_S", 0.02)
    plan = plan_of(scenes, storage)
    trial, seen = storage.trial(plan.key), []

    def look() -> None:
        first = trial.state()
        deadline = time.monotonic() + 10
        while trial.state()["heartbeat_ms"] == first["heartbeat_ms"] and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((first, trial.state()))

    threads = threading.active_count()
    run_plan(plan, storage, CallingRuntime(look))
    assert [later["stage"] for _, later in seen] == ["make_seeds", "make_seeds", "refine_crf", "evaluate", "evaluate"]
    keys = dict(plan.stages)
    for first, later in seen:
        assert later["heartbeat_ms"] > first["heartbeat_ms"]
        assert later["state"] == "RUNNING" and alive(later) and later["stage_key"] == keys[later["stage"]]
    assert threading.active_count() == threads, "the heart stops with the trial"
    assert trial.state()["state"] == "FINISHED"


def test_damaged_weights_of_a_finished_stage_are_named(scenes: Path, storage: Storage) -> None:
    run(tiny_config({"stages": ["train_cam"]}, scenes), storage)
    plan = plan_of(scenes, storage)
    other = build_net(tiny_config({"contrast.projector_dim": 9}), 3, pretrained=False)
    save_net(other, storage.stage(*plan.stages[0]) / "weights.pt")
    with pytest.raises(ValueError, match="does not hold this trial's net"):
        run_plan(plan, storage)
    content = bytearray((storage.stage(*plan.stages[0]) / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (storage.stage(*plan.stages[0]) / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt is damaged .checksum of .*delete its folder"):
        run_plan(plan, storage)

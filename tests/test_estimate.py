"""The cost of a study against numbers worked out by hand, and a measurement that is taken and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ppc.artifacts import Storage, write_json
from ppc.config import TrialConfig
from ppc.estimate import (
    NOT_MEASURED,
    Cost,
    Rate,
    costs,
    images_of,
    keep,
    key_of,
    like,
    measured,
    remarks,
    seconds,
    table,
)
from ppc.loading import load_study, override_all
from ppc.measure import measure, small
from ppc.schema import validate
from ppc.stages import STAGES
from ppc.study import expand

ROOT = Path(__file__).parent.parent / "experiments"
RUNTIME = {"gpus_per_worker": 1, "cpus_per_worker": 8}
VOC: dict[str, Any] = {
    "data": {"name": "voc", "root": "/not/there", "train_split": "train_aug"},
    "stages": ["train_cam", "make_seeds", "evaluate"],
    "backbone": {"name": "tiny"}, "runtime": RUNTIME,
    "seeds": {"splits": ["train"], "protocol": "val_subset", "val_subset_split": "val", "val_subset_images": 50},
}  # fmt: skip


def config(**changes: Any) -> TrialConfig:
    raw = override_all(VOC, [(name.replace("__", "."), value) for name, value in changes.items()])
    return validate(TrialConfig, raw, "test")


def by_stage(found: list[Cost]) -> dict[str, Cost]:
    return {cost.stage: cost for cost in found}


def test_units_hours_and_disk_by_hand() -> None:
    # Seeds 0 and 1 of one variant; a third trial differs in its inference alone and shares the training of seed 0.
    trials = [config(seed=0), config(seed=1), config(seed=0, seeds__overlays=0)]
    rates = {key_of("train_cam", like("train_cam", trials[0])): Rate(0.5, 4.0, 0.5, "a test")}
    found = by_stage(costs(trials, rates))
    assert (found["train_cam"].runs, found["make_seeds"].runs, found["evaluate"].runs) == (2, 3, 3)
    assert found["train_cam"].units == 2 * 8 * (10582 // 8) == 21152
    assert found["make_seeds"].units == 3 * 2 * (1464 + 50)  # CAMs and seeds; the 50 images that choose the score too
    assert found["evaluate"].units == 3 * 1464
    assert seconds(list(found.values())) == (21152 * 0.5, 21152 * 4.0)  # the other stages are not measured
    assert found["train_cam"].kept_bytes == 2 * 4 * 268960  # float32 of the tiny net, see test_backbones
    assert found["train_cam"].passing_bytes == 2 * 2 * 4 * 268960  # two checkpoints with a momentum a weight
    pixels = 375 * 500
    assert found["make_seeds"].kept_bytes == pytest.approx(3 * 1514 * (4 * 1.5 * pixels + 0.03 * pixels))
    rows = {row[0].partition(" ")[0]: row for row in table(list(found.values()))}
    assert rows["train_cam"][4:6] == ["2.94", "23.5"] and rows["make_seeds"][-1] == NOT_MEASURED
    assert rows["in"][1] == "8" and rows["in"][-1] == "without 2 line(s) not measured"


def test_labels_that_are_not_counted_are_told() -> None:
    psa = config(stages=["train_cam", "make_seeds", "train_psa", "refine_psa", "evaluate"])
    told = "The CRF that makes the labels of train_psa is not counted: two an image."
    assert told in remarks(costs([psa], {})) and not any(
        "not counted" in text for text in remarks(costs([config()], {}))
    )


def test_a_stage_that_was_added_is_told_apart_by_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    added = dataclasses.replace(STAGES["refine_crf"], reads=("seed", "crf"))
    monkeypatch.setitem(STAGES, "refine_mine", added)
    one, two, same = (
        key_of("refine_mine", like("refine_mine", config(**changes)))
        for changes in ({}, {"crf__preset": "eps_soft"}, {"seed": 3})
    )
    assert one != two and one == same


def test_rates_come_from_finished_stages_that_are_alike(tmp_path: Path) -> None:
    storage, cfg = Storage(tmp_path), config()
    folder = storage.stage("train_cam", "k1")
    write_json(folder / "progress.json", {"total": 200, "spent_s": 100.0, "cpu_s": 800.0, "gpu_s": 100.0})
    folder.finish({}, wall_s=1.0, trial="t1")
    write_json(storage.trial("t1").path / "config.json", cfg.model_dump(mode="json"))
    write_json(storage.stage("train_cam", "k2") / "progress.json", {"total": 1, "spent_s": 9.0})  # not finished
    found = measured(storage)
    assert found == {key_of("train_cam", like("train_cam", cfg)): Rate(0.5, 4.0, 0.5, "finished train_cam k1")}
    for other in (
        config(train__batch_size=16), config(train__crop_px=320), config(backbone__name="squeezenet1_1"),
        config(contrast__prototype_top_k=0), config(runtime__gpus_per_worker=0),
    ):  # fmt: skip
        assert key_of("train_cam", like("train_cam", other)) not in found
    same = config(contrast__temperature=0.5, seed=7, train__learning_rate=0.1)  # of no account for its time
    assert key_of("train_cam", like("train_cam", same)) in found


def test_measurements_are_kept_and_finished_stages_outweigh_them(tmp_path: Path) -> None:
    storage, cfg = Storage(tmp_path), config()
    keep(storage, [("train_cam", like("train_cam", cfg), Rate(9.0, 9.0, 9.0, "first"))])
    keep(storage, [("train_cam", like("train_cam", cfg), Rate(1.0, 1.0, 1.0, "second"))])
    (rate,) = measured(storage).values()
    assert rate.source == "second"


def test_measure_runs_each_kind_of_net_once(tmp_path: Path) -> None:
    study = load_study(ROOT / "scenes_k.yaml", overrides=["stages=[train_cam,make_seeds,evaluate]", "seeds.scales=[1]"])
    configs = [spec.config for spec in expand(study, overrides=["train.crop_px=64", "train.batch_size=2"])]
    said: list[str] = []
    measure(configs, Storage(tmp_path), said.append)
    assert len(said) == 2  # with and without contrast; K and seed make no other
    found = costs(configs, measured(Storage(tmp_path)))
    assert all(cost.rate is not None and cost.rate.wall_s > 0 for cost in found)
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]
    measure(configs, Storage(tmp_path), said.append)
    assert len(said) == 2


def test_a_measurement_is_small_and_keeps_the_sizes() -> None:
    found = small(config(train__crop_px=320, backbone__weights="w.pth"))
    assert (found.data.name, found.data.train_split, found.backbone.weights) == ("scenes", "train", None)
    assert (found.train.crop_px, found.train.batch_size, found.data.scenes.num_train) == (320, 8, 8)
    assert (found.train.epochs, found.data.scenes.image_px) == (4, 500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_study_for_gpus_is_not_measured_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this machine has none"):
        measure([config()], Storage(tmp_path), print)


def test_images_are_counted_where_they_are_there(tmp_path: Path) -> None:
    from ppc.data import make_scenes

    root = make_scenes(tmp_path / "d", num_classes=3, num_train=6, num_val=2, image_px=48, seed=0)
    found = images_of(config(data__root=str(root)))
    assert (found.of("train"), found.of("val"), max(found.height, found.width)) == (6, 2, 48)
    with pytest.raises(ValueError, match="how many images has split 'trian'"):
        found.of("trian")

"""What changed between a launch and a resume: refused with a diff, or taken and recorded. Nothing runs on Ray here."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_study import QUIET, make_study
from typer.testing import CliRunner

import ppc.definition
import ppc.launch
import ppc.stages
from ppc import changes, cli
from ppc.artifacts import Storage, write_json
from ppc.config import TrialConfig
from ppc.data.labels import read_label_file
from ppc.data.scenes import make_scenes
from ppc.definition import define_search
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, read_rows
from ppc.methods import build_net
from ppc.places import file_sha256
from ppc.report import build_report
from ppc.study import shared_base
from ppc.study_config import StudyConfig

HERE = Where(local=True, tracking="none")


def saved(storage: Storage, name: str = "k") -> dict[str, Any]:
    return storage.study(name).definition()


def half_done(storage: Storage, **study: Any) -> dict[str, Any]:
    """A study of two trials of which the first has finished and the second has failed after its training."""
    made = make_study(storage, k=[0, 4], seeds=[0], **study)
    key = next(stage["key"] for stage in made["trials"][1]["stages"] if stage["name"] == "make_seeds")
    blocked = storage.stage("make_seeds", key).path
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be made")
    assert run_study(storage, "k", HERE, QUIET) == 1
    assert [row.state for row in read_rows(storage, made)] == [FINISHED, FAILED]
    blocked.unlink()
    return made


def refused(storage: Storage) -> str:
    """Why a resume is refused, which leaves all as it was."""
    before = (storage.study("k").path / "study.json").read_bytes()
    with pytest.raises(ValueError) as told:
        run_study(storage, "k", HERE, QUIET)
    assert (storage.study("k").path / "study.json").read_bytes() == before
    assert "--accept-changes" in str(told.value) and "launch its file again" in str(told.value)
    assert "1 trial(s) still to run: prototype_top_k=4 s=0" in str(told.value)
    return str(told.value)


def taken(storage: Storage, before: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The study after a resume that takes what changed: its finished trial is as it was, the other has a new key."""
    old = [row for row in read_rows(storage, before) if row.state == FINISHED]
    assert run_study(storage, "k", HERE, QUIET, accept_changes=True, **how) == 0
    after = saved(storage)
    first, second = read_rows(storage, after)
    assert first.key == old[0].key and first.result == old[0].result and first.attempt == 1
    assert second.key != before["trials"][1]["key"] and second.state == FINISHED and second.attempt == 1
    (record,) = after["changes"]
    assert record["trials"] == {before["trials"][1]["key"]: second.key} and record["from"] == before["code"]
    assert storage.trial(before["trials"][1]["key"]).result() is None, "no result under a key that is false"
    return after


def raise_version(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    stages = dict(ppc.stages.STAGES)
    stages[stage] = dataclasses.replace(stages[stage], version=stages[stage].version + 1)
    monkeypatch.setattr(ppc.stages, "STAGES", stages)


def test_a_changed_stage_is_told_taken_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    before = half_done(storage)
    raise_version(monkeypatch, "make_seeds")
    monkeypatch.setattr(ppc.definition, "code_version", lambda: {"version": "9", "commit": "b" * 40, "dirty": False})
    words = refused(storage)
    assert "  stage make_seeds: version 1 -> 2\n" in words and "code: commit" in words and f"-> {'b' * 12}" in words
    after = taken(storage, before, runtime=["runtime.log_every_steps=3"])
    first, second = after["trials"]
    assert [entry["config"]["runtime"]["log_every_steps"] for entry in (first, second)] == [10, 3]
    reused = {stage["name"]: stage["reused"] for stage in storage.trial(second["key"]).result()["stages"]}
    assert reused == {"train_cam": True, "make_seeds": False, "refine_crf": False, "evaluate": False}
    assert changes.code_of(after, first["key"]) == before["code"]
    assert changes.code_of(after, second["key"])["commit"] == "b" * 40
    assert changes.trained_otherwise(after) == frozenset(), "the training is what it was"
    line = dict(build_report(storage, "k").header)["changed"]
    assert "make_seeds: version 1 -> 2; 1 trial(s) run as changed, 1 as before" in line
    status = CliRunner().invoke(cli.app, ["study", "status", "k", "--storage", str(tmp_path)])
    assert f"changed: {line}" in status.output and status.exit_code == 0
    assert run_study(storage, "k", HERE, QUIET) == 0 and len(saved(storage)["changes"]) == 1


def add_image(root: Path, source: str, name: str) -> None:
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("SALImages", "png")):
        shutil.copy(root / folder / f"{source}.{ending}", root / folder / f"{name}.{ending}")
    labels = read_label_file(root / "cls_labels.npy", 3)
    np.save(root / "cls_labels.npy", np.array({**labels, name: labels[source]}, dtype=object))
    listed = root / "ImageSets/Segmentation/train.txt"
    listed.write_text(f"{listed.read_text().rstrip()}\n{name}\n")


def test_data_that_grew(tmp_path: Path) -> None:
    root = make_scenes(tmp_path / "set", num_classes=3, num_train=6, num_val=2, image_px=64, seed=3)
    voc = {"data.name": "voc", "data.root": str(root), "train.batch_size": 2, "train.epochs": 1}
    storage = Storage(tmp_path / "storage")
    before = half_done(storage, tiny=voc)
    add_image(root, (root / "ImageSets/Segmentation/train.txt").read_text().split()[0], "more")
    assert f"  data train of {root}: 6 -> 7 images, contents changed\n" in refused(storage)
    after = taken(storage, before)
    assert storage.trial(after["trials"][1]["key"]).result()["counts"]["train"] == 7
    assert changes.trained_otherwise(after) == {after["trials"][0]["key"]}
    fresh = make_study(Storage(tmp_path / "other"), k=[4], seeds=[0], tiny=voc)
    assert fresh["trials"][0]["key"] == after["trials"][1]["key"]
    assert after["data"][0]["fingerprint"] == after["trials"][1]["fingerprint"] != before["data"][0]["fingerprint"]


def test_weights_that_were_written_anew(tmp_path: Path) -> None:
    path, storage = tmp_path / "w.pth", Storage(tmp_path / "storage")

    def write(seed: int) -> str:
        torch.save(build_net(TrialConfig(seed=seed), 3, pretrained=False).backbone.state_dict(), path)
        return file_sha256(path)

    old = write(5)
    before = half_done(storage, tiny={"backbone.weights": str(path)})
    new = write(6)
    assert f"  weights {path}: sha256 {old[:12]}… -> {new[:12]}…\n" in refused(storage)
    after = taken(storage, before)
    fresh = make_study(Storage(tmp_path / "other"), k=[4], seeds=[0], tiny={"backbone.weights": str(path)})
    assert fresh["trials"][0]["key"] == after["trials"][1]["key"]


def test_a_config_of_another_version(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    before = half_done(storage)
    file = storage.study("k").path / "study.json"
    entry = before["trials"][1]
    true_key = entry["key"]
    del entry["config"]["contrast"]["temperature"]
    entry["config"]["contrast"]["margin"] = 0.5
    entry["config"]["gone"] = {"deep": 1}
    del entry["config"]["runtime"]["resource_wait_s"]  # decides no number: no change
    entry["key"] = "0ld" + true_key[3:]
    storage.trial(true_key).path.rename(storage.trial(entry["key"]).path)  # what that version left
    write_json(file, before)
    words = refused(storage)
    for line in ("contrast.margin: no such field any more", "config contrast.temperature: added with default 0.1"):
        assert f"\n  {line}\n" in words
    assert "gone.deep: no such field" in words and "resource_wait_s" not in words
    after = taken(storage, before, runtime=["runtime.max_failures=1"])
    assert after["trials"][1]["key"] == true_key and "margin" not in after["trials"][1]["config"]["contrast"]


def test_a_study_of_a_version_that_did_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    for entry in study["trials"]:
        del entry["facts"]
    write_json(storage.study("k").path / "study.json", study)
    raise_version(monkeypatch, "evaluate")
    with pytest.raises(ValueError, match="^prototype_top_k=4 s=0: the code of a stage, the data or the weights have"):
        run_study(storage, "k", HERE, QUIET)
    drift = changes.look(ppc.definition.Planner(storage), study, {study["trials"][0]["key"]})
    assert drift is not None
    after, keys = changes.accept(
        ppc.definition.Planner(storage), study, {study["trials"][0]["key"]}, drift, code={"version": "9"}
    )
    assert keys == {after["trials"][0]["key"]} and "does not tell which" in changes.told(after)[0]
    assert after["trials"][0]["facts"]["stages"]["evaluate"] == 2


def test_a_trial_that_cannot_be_planned_any_more_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    study["trials"][0]["config"]["contrast"]["negatives"] = "bygone"
    write_json(storage.study("k").path / "study.json", study)
    for accept in (False, True):
        with pytest.raises(ValueError, match="(?s)^prototype_top_k=4 s=0 cannot run.*contrast.negatives.*bygone"):
            run_study(storage, "k", HERE, QUIET, accept_changes=accept)


def test_a_search_does_not_go_on_with_other_code_unsaid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    raw = {
        "name": "k", "base": {"contrast": {"temperature": 0.2}}, "metric": "mask_miou_train",
        "design": {"kind": "search", "axes": {"contrast.prototype_top_k": [2, 4, 8]},
                   "search": {"num_variants": 2, "batch": 1}},
        "tiny": {"train.epochs": 1},
    }  # fmt: skip
    study, storage = StudyConfig.model_validate(raw), Storage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ppc.launch, "next_round_of", lambda *rest: [])  # as if killed between two rounds
        assert run_study(storage, "k", HERE, QUIET, define_search(study, shared_base(study, twin="tiny"), storage)) == 0
    before = saved(storage)
    assert len(before["trials"]) == 2
    before["search"]["base"]["contrast"]["margin"] = 0.5
    write_json(storage.study("k").path / "study.json", before)
    raise_version(monkeypatch, "evaluate")
    with pytest.raises(ValueError, match="(?s)for the next rounds of its search.*evaluate: version 1 -> 2.*margin: no"):
        run_study(storage, "k", HERE, QUIET)
    assert run_study(storage, "k", HERE, QUIET, accept_changes=True) == 0
    after = saved(storage)
    assert [t["key"] for t in after["trials"][:2]] == [t["key"] for t in before["trials"]]
    assert len(after["trials"]) == 3 and after["trials"][2]["facts"]["stages"]["evaluate"] == 2
    assert "0 trial(s) run as changed, 2 as before" in changes.told(after)[0]
    after["search"]["study"]["design"]["search"]["num_variants"] = 3  # it goes on once more, and all is known by now
    assert changes.look(ppc.definition.Planner(storage), after, set()) is None


def test_a_launch_says_how_its_file_differs_before_it_runs(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    made = make_study(storage, k=[0, 4], seeds=[0])
    assert changes.against_saved(made, made) == []
    other = make_study(
        Storage(tmp_path / "other"), k=[4, 8], seeds=[0], train={"momentum": 0.5}, metric="seed_miou_train"
    )
    text = io.StringIO()
    console = Console(file=text, width=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppc.launch, "_run", lambda *rest: text.write("RUN\n"))
        patch.setattr(ppc.launch, "_mark_killed", lambda *rest: None)
        run_study(storage, "k", HERE, console, other)
    told, ran, _ = text.getvalue().partition("RUN\n")
    assert ran
    for line in (
        "1 trial(s) added: prototype_top_k=8 s=0",
        "1 trial(s) of an earlier study of this name are not in its file any more; their files stay: "
        "prototype_top_k=0 s=0",
        "config train.momentum: 'official' -> 0.5",
        "metric: 'mask_miou_train' -> 'seed_miou_train'",
        "1 trial(s) get new keys by that, their earlier files stay: prototype_top_k=4 s=0",
    ):
        assert f"  {line}\n" in told


def test_the_flag_reaches_the_job_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def resume_there(*arguments: Any) -> Exception:
        sent.append(arguments)
        return cli.typer.Exit(0)

    monkeypatch.setattr(cli, "resume_there", resume_there)
    words = ["study", "resume", "k", "--address", "http://head:8265", "--set", "runtime.workers=2", "--accept-changes"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert sent[0][3] == ["--set", "runtime.workers=2", "--accept-changes"]


def test_each_change_is_one_line_with_the_trials_it_is_in() -> None:
    def entry(variant: str, key: str, weights: str | None, **config: Any) -> dict[str, Any]:
        facts = {"stages": {"train_cam": 1}, "data": {}, "weights": weights}
        whole = {"data": {"root": "/d"}, "backbone": {"weights": "/w"}, **config}
        return {"variant": variant, "seed": 0, "key": key, "config": whole, "facts": facts}

    pairs = [(entry(f"v{i}", f"a{i}", "1" * 64, n=1), entry(f"v{i}", f"b{i}", "2" * 64, n=1)) for i in range(9)]
    pairs[3][1]["config"]["n"] = [1]
    drift = changes.Drift(pairs, [], [])
    assert drift.lines == [f"weights /w: sha256 {'1' * 12}… -> {'2' * 12}…", "config n: 1 -> [1] (in v3 s=0)"]
    study = {"name": "k", "code": {"version": "1", "commit": None}}
    words = changes.refusal(drift, study, {"version": "1", "commit": None})
    assert "9 trial(s) still to run: v0 s=0, v1 s=0, v2 s=0, v3 s=0, v4 s=0, v5 s=0 and 3 more" in words
    assert "code:" not in words, "nothing to say of it"
    same = (entry("v", "a", None), entry("v", "b", None))
    assert changes.entry_changes(*same)[0].startswith("code: what enters a content key")

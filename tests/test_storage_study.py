"""Whole studies on storage of either kind: an S3 bucket, and a folder that is moved in the middle."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, s3_server
from tiny_study import QUIET, make_study

import ppc.places
from ppc.artifacts import Storage, read_journal, read_json
from ppc.launch import Where, run_study
from ppc.ledger import FINISHED, PENDING, read_rows
from ppc.places import names_in, read_bytes, remove_tree

# The warnings of Ray and MLflow are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPC_HERE", str(tmp_path / "here"))  # for worker processes
        patch.setattr(ppc.places, "HERE", tmp_path / "here")
        with s3_server(patch):
            yield f"s3://{BUCKET}/{uuid.uuid4().hex}"


def outcome(storage: Storage, study: dict[str, Any]) -> list[Any]:
    """Metrics and loss curves of all trials."""
    found = []
    for row in read_rows(storage, study):
        key = next(stage["key"] for stage in row.stages if stage["name"] == "train_cam")
        points, _ = read_journal(storage.stage("train_cam", key) / "journal.jsonl")
        curve = [{n: v for n, v in p["m"].items() if n.startswith("train/")} for p in points]
        assert row.result is not None and curve
        found.append((row.result["metrics"], curve))
    return found


@pytest.mark.ray
def test_a_study_in_a_bucket_has_the_numbers_of_one_in_a_folder(tmp_path: Path, bucket: str) -> None:
    folder = Storage(tmp_path / "folder")
    expected = make_study(folder, k=[4], seeds=[0])
    assert run_study(folder, "k", Where(local=True, tracking="none"), QUIET) == 0

    storage = Storage.at(bucket)
    study = make_study(storage, k=[4], seeds=[0], runtime={"engine": "train"})  # Ray Train's own files go there too
    assert [t["key"] for t in study["trials"]] == [t["key"] for t in expected["trials"]]
    database = f"sqlite:///{tmp_path}/mlflow.db"
    assert run_study(storage, "k", Where(num_cpus=2, tracking=database), QUIET) == 0
    assert outcome(storage, study) == outcome(folder, expected)
    for name, key in [(s["name"], s["key"]) for s in study["trials"][0]["stages"]]:
        here, there = folder.stage(name, key), storage.stage(name, key)
        for part in ("seeds", "masks"):
            assert names_in(here / part) == names_in(there / part)
            for file in names_in(here / part):
                assert read_bytes(here / part / file) == read_bytes(there / part / file)
        assert names_in(there / "checkpoints") == []
    assert read_bytes(storage.study("k").path / "report" / "report.md")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(database)
    runs = client.search_runs([client.get_experiment_by_name("ppc/k").experiment_id], "tags.`ppc.kind` = 'trial'")
    assert [run.info.status for run in runs] == [FINISHED]
    assert {item.path for item in client.list_artifacts(runs[0].info.run_id)} >= {"config.yaml", "images"}

    # another machine: nothing of this one but the bucket, and one result that went away
    remove_tree(storage.stage("refine_crf", study["trials"][0]["stages"][2]["key"]).path)
    (storage.trial(study["trials"][0]["key"]).path / "result.json").unlink()
    shutil.rmtree(tmp_path / "here")
    assert run_study(storage, "k", Where(local=True, tracking="none"), QUIET) == 0
    assert outcome(storage, study) == outcome(folder, expected)
    trained = storage.stage("train_cam", study["trials"][0]["stages"][0]["key"]).manifest()
    result = storage.trial(study["trials"][0]["key"]).result()
    assert trained is not None and result is not None
    assert [stage["reused"] for stage in result["stages"]] == [True, True, False, True]


def test_a_study_that_is_moved_goes_on(tmp_path: Path) -> None:
    whole = Storage(tmp_path / "whole")
    expected = make_study(whole, k=[0, 4], seeds=[0])
    assert run_study(whole, "k", Where(local=True, tracking="none"), QUIET) == 0

    before = Storage(tmp_path / "before")
    study = make_study(before, k=[0, 4], seeds=[0])
    half = {**study, "trials": study["trials"][:1], "name": "half"}
    assert run_study(before, "half", Where(local=True, tracking="none"), QUIET, half) == 0
    (tmp_path / "disk").mkdir()
    before.root.rename(tmp_path / "disk" / "after")

    after = Storage(tmp_path / "disk" / "after")
    assert [row.state for row in read_rows(after, study)] == [FINISHED, PENDING]
    first = after.trial(study["trials"][0]["key"]).result()
    assert run_study(after, "k", Where(local=True, tracking="none"), QUIET) == 0
    assert outcome(after, study) == outcome(whole, expected)
    assert after.trial(study["trials"][0]["key"]).result() == first, "what was finished is not run again"
    assert not before.root.exists(), "nothing is written to where it was"
    assert str(tmp_path) not in str(read_json(after.study("k").path / "study.json"))

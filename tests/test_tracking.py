"""MLflow: one run a trial whatever happens, true states, no point lost or doubled, and nothing that waits for it."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import ssl
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from PIL import Image

from ppc import mlflow_server, tracking
from ppc.artifacts import Storage, now_ms, read_json, write_json
from ppc.ledger import STALE_S, TrialRow
from ppc.mlflow_embedded import start_ui, ui_command
from ppc.mlflow_server import TrackingError, check_uri, default_uri, experiment_id, probe, server_version, tracking_uri
from ppc.mlflow_views import links
from ppc.redact import safe_uri
from ppc.report import live_note
from ppc.run_record import metric_name, new_points
from ppc.tracking import OWNER, MlflowTracker, NoTracker, SyncLoop, Tracker, make_tracker

mlflow_module = pytest.importorskip("mlflow")


@pytest.fixture
def fake(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, tmp_path / "storage" / "mlflow" / "mlflow.db")
    return FakeStudy(tmp_path / "storage")


def dead_ms() -> int:
    """A heartbeat that is too old."""
    return now_ms() - int(STALE_S * 1000) - 1


def tracker_of(fake: FakeStudy, launch: str | None = "001") -> Tracker:
    return make_tracker(None, fake.storage, fake.study, launch)


def client_of(fake: FakeStudy) -> Any:
    return tracking._client(default_uri(fake.storage))


def runs_of(fake: FakeStudy, kind: str = "trial") -> dict[str, Any]:
    """Runs by name; fails when two have the same trial."""
    client = client_of(fake)
    experiment = client.get_experiment_by_name(f"ppc/{fake.name}")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.data.tags["ppc.kind"] == kind]
    names = [run.data.tags.get("ppc.trial_key", run.info.run_name) for run in runs]
    assert len(set(names)) == len(names)
    return {run.info.run_name: run for run in runs}


def history(fake: FakeStudy, run: Any, name: str) -> list[tuple[int, float, int]]:
    return sorted((m.step, m.value, m.timestamp) for m in client_of(fake).get_metric_history(run.info.run_id, name))


# -- the contract of trackers


@pytest.mark.parametrize("option", ["none", None])
def test_a_tracker_takes_any_state_of_a_study(option: str | None, fake: FakeStudy) -> None:
    tracker = make_tracker(option, fake.storage, fake.study, "001")
    assert isinstance(tracker, NoTracker if option else MlflowTracker)
    tracker.sync(fake.rows)
    for index in range(3):
        fake.start(index)
        fake.journal(index, range(3))
    tracker.sync(fake.rows)
    fake.fail(0)
    fake.finish(1, 0.5)
    tracker.sync(fake.rows, final=True)
    tracker.sync(fake.rows, final=True)
    report = fake.storage.root / "report.md"
    report.write_text("| a |\n|---|\n| 1 |\n")
    tracker.attach([report])
    tracker.close()
    tracker.sync(fake.rows, final=True)  # closed trackers open again
    assert (fake.storage.study("demo").path / "tracking.json").exists() == (option is None)


# -- what is sent


def test_a_study_as_mlflow_shows_it(fake: FakeStudy) -> None:
    fake.start(2)
    fake.journal(2, range(5))
    fake.finish(2, 0.5)
    fake.start(3)
    fake.fail(3)
    tracker = tracker_of(fake)
    tracker.sync(fake.rows, final=True)
    runs, client = runs_of(fake), client_of(fake)
    assert set(runs) == {"prototype_top_k=4 s=0", "prototype_top_k=4 s=1"}  # pending trials have no run
    run, failed = runs["prototype_top_k=4 s=0"], runs["prototype_top_k=4 s=1"]
    (parent,) = runs_of(fake, "study").values()
    assert run.data.params == {"contrast.prototype_top_k": "4", "seed": "0"}
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["ppc.data.scenes"] == "ab" * 32
    assert run.data.tags["mlflow.runColor"].startswith("#")
    assert run.data.tags["ppc.host"] == "host-a"
    assert run.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert run.info.start_time == fake.rows[2].started_ms
    assert (run.info.status, failed.info.status, parent.info.status) == ("FINISHED", "FAILED", "FAILED")
    assert run.data.metrics["final/mask_miou_train"] == 0.5
    assert run.data.metrics["cost/wall_s"] == 30.0
    assert [(s, v) for s, v, _ in history(fake, run, "profile/class_iou_by_id")] == [(0, 0.8), (1, 0.4), (2, 0.0)]
    assert [(s, v) for s, v, _ in history(fake, run, "curve/miou_train")] == [(0, 0.1), (25, 0.5), (50, 0.2)]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("scenes (generated)", "ab" * 18)
    assert failed.data.tags["ppc.error"] == "RuntimeError: no memory left\non the device"
    folder = Path(client.download_artifacts(run.info.run_id, ""))
    assert "prototype_top_k" in (folder / "config.yaml").read_text()
    table = json.loads((folder / "per_class_iou.json").read_text())
    assert table == {
        "columns": ["class", "seed_train", "mask_train"],
        "data": [["background", 0.7, 0.8], ["disc", 0.3, 0.4], ["ring", None, 0.0]],
    }
    assert "Traceback" in Path(client.download_artifacts(failed.info.run_id, "error/attempt-1.txt")).read_text()
    assert folder.is_relative_to(fake.storage.root / "mlflow" / "artifacts")


def test_config_artifact_is_the_config(fake: FakeStudy) -> None:
    from ruamel.yaml import YAML

    from ppc.config import TrialConfig

    fake.start(0)
    tracker_of(fake).sync(fake.rows)
    (run,) = runs_of(fake).values()
    path = Path(client_of(fake).download_artifacts(run.info.run_id, "config.yaml"))
    config = TrialConfig.model_validate(YAML(typ="safe").load(path.read_text()))
    assert config == TrialConfig.model_validate(fake.entry(0)["config"])


def test_points_keep_their_times_and_replay_adds_nothing(fake: FakeStudy) -> None:
    fake.start(0)
    fake.journal(0, range(4))
    tracker = tracker_of(fake)
    tracker.sync(fake.rows)
    (run,) = runs_of(fake).values()
    journal = fake.storage.stage("train_cam", fake.entry(0)["stages"][0]["key"]) / "journal.jsonl"
    written = [json.loads(line) for line in journal.read_text().splitlines()]
    expected = [(p["step"], p["m"]["train/loss"], p["t"]) for p in written]
    assert history(fake, run, "train/loss") == expected
    tracker.sync(fake.rows)
    (fake.storage.study("demo").path / "tracking.json").unlink()  # all is forgotten, all is sent again
    tracker.sync(fake.rows)
    assert history(fake, run, "train/loss") == expected


def test_a_resumed_trial_has_each_step_once(fake: FakeStudy) -> None:
    fake.start(0)
    fake.journal(0, range(6))
    tracker_of(fake).sync(fake.rows)
    fake.start(0, attempt=2)
    fake.journal(0, range(3, 10))  # from its checkpoint at step 3
    tracker_of(fake, "002").sync(fake.rows)
    (run,) = runs_of(fake).values()
    assert [step for step, _, _ in history(fake, run, "train/loss")] == list(range(10))
    assert run.data.tags["ppc.attempt"] == "2"


def test_a_stage_that_was_deleted_and_trained_anew_has_each_step_once(fake: FakeStudy) -> None:
    fake.start(0)
    fake.journal(0, range(6))
    tracker = tracker_of(fake)
    tracker.sync(fake.rows)
    shutil.rmtree(fake.storage.stage("train_cam", fake.entry(0)["stages"][0]["key"]).path)
    time.sleep(0.01)
    fake.journal(0, range(8))
    tracker.sync(fake.rows)
    (run,) = runs_of(fake).values()
    assert [step for step, _, _ in history(fake, run, "train/loss")] == list(range(8))


def test_more_points_than_one_request_takes(fake: FakeStudy) -> None:
    fake.start(0)
    stage = fake.storage.stage("train_cam", fake.entry(0)["stages"][0]["key"])
    stage.path.mkdir(parents=True)
    lines = [json.dumps({"t": 1000 + i, "step": i, "m": {"train/loss": 0.5 + i}}) + "\n" for i in range(2500)]
    (stage.path / "journal.jsonl").write_text("".join(lines))
    tracker_of(fake).sync(fake.rows)
    (run,) = runs_of(fake).values()
    assert history(fake, run, "train/loss") == [(i, 0.5 + i, 1000 + i) for i in range(2500)]


def test_scores_of_a_finished_stage_are_there_before_the_trial_ends(fake: FakeStudy) -> None:
    fake.start(0)
    stage = fake.storage.stage("make_seeds", fake.entry(0)["stages"][1]["key"])
    curve = {"train": {"thresholds": [0.0, 0.25, 0.5], "miou": [0.1, 0.5, 0.2]}}
    made = stage.finish({"metrics": {"bg_score": 0.25}, "curves": curve}, wall_s=10.0)
    tracker = tracker_of(fake)
    tracker.sync(fake.rows)
    (run,) = runs_of(fake).values()
    t = made["finished_ms"]
    sent = {
        "final/bg_score": [(0, 0.25, t)], "cost/make_seeds_s": [(0, 10.0, t)],
        "curve/miou_train": [(0, 0.1, t), (25, 0.5, t), (50, 0.2, t)],
    }  # fmt: skip
    assert run.info.status == "RUNNING" and {name: history(fake, run, name) for name in sent} == sent
    assert run.data.metrics.keys() == sent.keys()
    time.sleep(0.01)
    text = (stage / "manifest.json").read_text()
    fake.finish(0, 0.5)
    (stage / "manifest.json").write_text(text)
    tracker.sync(fake.rows)
    (fake.storage.study("demo").path / "tracking.json").unlink()  # all is forgotten, all is sent again
    tracker.sync(fake.rows)
    (run,) = runs_of(fake).values()
    assert run.info.status == "FINISHED" and {name: history(fake, run, name) for name in sent} == sent
    assert run.data.metrics["final/mask_miou_train"] == 0.5 and run.data.metrics["cost/train_cam_s"] == 15.0


def test_what_is_not_a_number_is_refused_and_said(fake: FakeStudy) -> None:
    fake.start(0)
    fake.finish(0, 0.5)
    path = fake.storage.trial(fake.entry(0)["key"]).path / "result.json"
    path.write_text(
        path.read_text().replace('"bg_score": 0.25', '"bg_score": NaN').replace('"wall_s": 30.0', '"wall_s": Infinity')
    )
    stage = fake.storage.stage("train_cam", fake.entry(0)["stages"][0]["key"])
    stage.path.mkdir(parents=True)
    (stage.path / "journal.jsonl").write_text('{"t": 1, "step": 0, "m": {"train/loss": NaN, "train/mIoU@0.5": 0.25}}\n')
    tracker_of(fake).sync(fake.rows)
    (run,) = runs_of(fake).values()
    assert run.data.tags["ppc.not_finite"] == "bg_score"
    assert {"final/bg_score", "cost/wall_s", "train/loss"} & run.data.metrics.keys() == set()
    assert run.data.metrics["train/mIoU_0.5"] == 0.25
    assert max(run.data.metrics.values()) < 1e6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", "train/loss"), ("mIoU@0.5", "mIoU_0.5"), ("a[1]//b%", "a_1_/b_"), ("/a/../b/", "a/b"),
        ("@", "_"), ("/", "unnamed"),
    ],
)  # fmt: skip
def test_names_are_made_fit_for_mlflow(name: str, expected: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert metric_name(name) == expected
    _validate_metric_name(expected)


def test_overlays_are_sent_once(fake: FakeStudy) -> None:
    fake.start(0)
    fake.finish(0, 0.5, overlays=2)
    tracker_of(fake).sync(fake.rows)
    (fake.storage.study("demo").path / "tracking.json").unlink()
    tracker_of(fake).sync(fake.rows)
    (run,) = runs_of(fake).values()
    names = [
        item.path for item in client_of(fake).list_artifacts(run.info.run_id, "images") if item.path.endswith(".png")
    ]
    assert sorted(name.partition("+")[0] for name in names) == ["images/cam~2007_0", "images/cam~2007_1"]


def test_axis_curve_on_the_parent(fake: FakeStudy) -> None:
    tracker = tracker_of(fake)
    fake.finish(0, 0.40)
    fake.finish(1, 0.50)
    fake.finish(2, 0.60)
    tracker.sync(fake.rows)
    (parent,) = runs_of(fake, "study").values()
    assert [(s, v) for s, v, _ in history(fake, parent, "curve/mask_miou_train")] == [(0, pytest.approx(0.45))]
    fake.finish(3, 0.70)
    tracker.sync(fake.rows, final=True)
    tracker.sync(fake.rows, final=True)
    curve = [(s, v) for s, v, _ in history(fake, parent, "curve/mask_miou_train")]
    assert curve == [(0, pytest.approx(0.45)), (4, pytest.approx(0.65))]


def test_axis_of_fractions_uses_places(tmp_path: Path, fake: FakeStudy) -> None:
    fractions = FakeStudy(fake.storage.root, name="fractions", ks=(0.5, 0.1), seeds=(0,))
    fractions.finish(0, 0.4)
    fractions.finish(1, 0.6)
    tracker_of(fractions).sync(fractions.rows)
    (parent,) = runs_of(fractions, "study").values()
    assert [(s, v) for s, v, _ in history(fractions, parent, "curve/mask_miou_train")] == [(0, 0.6), (1, 0.4)]


def test_a_search_sends_its_curve_when_all_places_are_known(fake: FakeStudy) -> None:
    search = FakeStudy(fake.storage.root, name="search", ks=(1, 0.5), seeds=(0,))
    search.study["search"] = {}
    tracker = tracker_of(search)
    search.finish(0, 0.4)
    search.finish(1, 0.6)
    tracker.sync(search.rows)
    (parent,) = runs_of(search, "study").values()
    assert history(search, parent, "curve/mask_miou_train") == []
    tracker.sync(search.rows, final=True)
    assert [(s, v) for s, v, _ in history(search, parent, "curve/mask_miou_train")] == [(0, 0.6), (1, 0.4)]


def test_a_finished_run_gets_the_name_and_the_factors_that_its_variant_has_now(fake: FakeStudy) -> None:
    tracker = tracker_of(fake)
    fake.finish(0, 0.4)
    tracker.sync(fake.rows, final=True)
    long = "K is none " * 40
    fake.entry(0).update(variant=long, factors={"contrast.prototype_top_k": 0, "train.epochs": 2})
    tracker_of(fake, "002").sync(fake.rows, final=True)
    (run,) = [run for run in runs_of(fake).values() if run.data.tags["ppc.trial_key"] == fake.entry(0)["key"]]
    assert run.info.run_name == f"{long} s=0"[:250] and run.data.tags["ppc.variant"] == long
    assert run.data.params == {"contrast.prototype_top_k": "0", "train.epochs": "2", "seed": "0"}


def test_a_split_of_any_name_may_have_images_left_out(fake: FakeStudy) -> None:
    fake.finish(0, 0.4)
    path = fake.storage.trial(fake.entry(0)["key"]).path / "result.json"
    write_json(path, {**read_json(path), "skipped": {"train+val": {"ids": ["a"], "listed": 9}}})
    tracker_of(fake).sync(fake.rows, final=True)
    run = runs_of(fake)["prototype_top_k=0 s=0"]
    assert run.info.status == "FINISHED" and run.data.tags["ppc.skipped.train_val"] == "1 of 9 images"


def test_two_storages_with_a_study_of_one_name_leave_each_others_runs_alone(fake: FakeStudy, tmp_path: Path) -> None:
    uri = default_uri(fake.storage)
    other = FakeStudy(tmp_path / "other", ks=(0, 8))
    other.study["created_ms"] = fake.study["created_ms"] + 1
    for index in range(4):
        fake.start(index)
    make_tracker(uri, fake.storage, fake.study, "001").sync(fake.rows)
    other.finish(0, 0.7)
    for launch in ("001", "002"):
        make_tracker(uri, other.storage, other.study, launch).sync(other.rows, final=True)
    make_tracker(uri, fake.storage, fake.study, "001").sync(fake.rows)
    mine = runs_of(fake)
    assert len(mine) == 4 and {run.info.status for run in mine.values()} == {"RUNNING"}
    assert [run.info.status for run in runs_of(fake, "study").values()] == ["RUNNING"]
    number = experiment_id(other.storage, "demo", uri)
    assert number is not None and number != experiment_id(fake.storage, "demo", uri)
    theirs = client_of(fake).search_runs([number], "tags.`ppc.kind` = 'trial'")
    assert [run.info.status for run in theirs] == ["FINISHED"]
    assert client_of(fake).get_experiment(number).name == f"ppc/demo {other.study['created_ms']}"


def tags_of(fake: FakeStudy) -> dict[str, str]:
    """Tags of the study's experiment."""
    tags: dict[str, str] = client_of(fake).get_experiment_by_name(f"ppc/{fake.name}").tags
    return tags


def test_the_page_has_views_of_what_was_sent_and_a_note_that_is_kept_current(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, note = tracker_of(fake), live_note(fake.storage, fake.study)
    tracker.sync(fake.rows, note=note(fake.rows))
    tags = tags_of(fake)
    assert tags["mlflow.note.content"].startswith("0 of 4 trials finished. No trial has a result yet.\n\n# Study demo")
    assert tags["mlflow.experiment.primaryMetric.name"] == "final/mask_miou_train"
    assert {name for name in tags if name.startswith("mlflow.sharedViewState.")} == {
        "mlflow.sharedViewState.ppc-results", "mlflow.sharedViewState.ppc-trials",
    }  # fmt: skip
    for index in range(4):
        fake.start(index)
        fake.journal(index, range(2))
        fake.finish(index, 0.5 + 0.1 * (index // 2))
    tracker.sync(fake.rows, note=note(fake.rows))
    tags = tags_of(fake)
    assert tags["mlflow.note.content"].startswith("The best mean is that of prototype_top_k=4: 60.00 ± 0.00, +10.00")
    assert {name.rpartition("-")[2] for name in tags if name.startswith("mlflow.sharedViewState.")} == {
        "results", "trials", "classes", "cams", "training",
    }  # fmt: skip

    sent: list[str] = []
    monkeypatch.setattr("mlflow.MlflowClient.set_experiment_tag", lambda self, number, name, value: sent.append(name))
    tracker.sync(fake.rows, note=note(fake.rows))
    tracker_of(fake).sync(fake.rows, final=True, note=note(fake.rows))
    assert sent == []  # what is there is not sent again
    (fake.storage.study("demo").path / "tracking.json").unlink()
    tracker_of(fake).sync(fake.rows, final=True, note=note(fake.rows))
    assert sorted(sent) == sorted({*tags} - {OWNER}), "a tracker that lost its memory writes all of them again"


def test_what_a_page_cannot_show_keeps_back_no_trial(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    def refuse(self: object, number: str, name: str, value: str) -> None:
        if len(value) > 5000 or "View" in name:
            raise MlflowException("too long", error_code=INVALID_PARAMETER_VALUE)
        taken[name] = value

    taken: dict[str, str] = {}
    monkeypatch.setattr("mlflow.MlflowClient.set_experiment_tag", refuse)
    fake.finish(0, 0.5)
    long = "the answer\n\n" + "a row of the table\n" * 1000
    tracker_of(fake).sync(fake.rows, note=long)
    note = taken["mlflow.note.content"]
    assert note.startswith("the answer\n\na row of the table\n")
    assert note.endswith("row of the table\n\nThe rest is in the report of the newest launch.")
    assert set(runs_of(fake)) == {"prototype_top_k=0 s=0"}

    def no_table(rows: object) -> str:
        raise ValueError("no table")

    fake.finish(1, 0.5)
    with SyncLoop(tracker_of(fake), lambda: fake.rows, note=no_table) as loop:
        assert loop.finish()
    assert len(runs_of(fake)) == 2


def test_a_study_of_an_older_version_gets_all_views(fake: FakeStudy) -> None:
    fake.start(0)
    fake.journal(0, range(3))
    fake.finish(0, 0.5)
    tracker_of(fake).sync(fake.rows)
    before = {name for name in tags_of(fake) if "View" in name}
    path = fake.storage.study("demo").path / "tracking.json"
    memory = json.loads(path.read_text())
    (one,) = memory.values()
    del one["tags"], one["metrics"]
    path.write_text(json.dumps({uri: {**one, "note": "old"} for uri in memory}))
    for name in before:
        client_of(fake).delete_experiment_tag(experiment_id(fake.storage, "demo", default_uri(fake.storage)), name)
    tracker_of(fake).sync(fake.rows)
    assert {name for name in tags_of(fake) if "View" in name} == before and len(before) == 5


def test_a_link_knows_the_study_after_the_storage_was_moved(fake: FakeStudy, tmp_path: Path) -> None:
    fake.finish(0, 0.5)
    tracker_of(fake).sync(fake.rows)
    number = experiment_id(fake.storage, "demo", default_uri(fake.storage))
    moved = Storage(shutil.move(fake.storage.root, tmp_path / "elsewhere"))
    assert experiment_id(moved, "demo", default_uri(moved)) == number is not None
    assert experiment_id(moved, "demo", "http://h:5000") is None


def test_whether_a_server_answers_is_asked_as_its_client_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server behind a proxy with a login, where all pages want it."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            basic = "Basic " + b64encode(b"me:pass word").decode()
            self.send_response(200 if self.headers["Authorization"] in (basic, "Bearer abc") else 401)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(TrackingError, match="wants a login.*MLFLOW_TRACKING_USERNAME"):
            probe(url)
        probe(f"http://me:pass%20word@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
        probe(url)
        server.shutdown()


def test_certificates_are_those_that_mlflows_client_trusts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    assert mlflow_server._trusted().verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))  # a folder of certificates, and there is none
    assert mlflow_server._trusted().cert_store_stats()["x509_ca"] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert mlflow_server._trusted().verify_mode == ssl.CERT_NONE


def test_the_version_is_asked_with_the_login_and_not_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == "Basic " + b64encode(b"me:pass word").decode()
            self.send_response(200 if known and self.path == "/version" else 401)
            self.end_headers()
            self.wfile.write(b"3.17.2" if known else b"no")

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server_version(f"http://127.0.0.1:{server.server_port}") is None
        assert server_version(f"http://me:pass%20word@127.0.0.1:{server.server_port}/") == "3.17.2"
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass word")
        assert server_version(f"http://127.0.0.1:{server.server_port}") == "3.17.2"
        server.shutdown()


def test_report_and_figures_are_attached(fake: FakeStudy, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("| variant | mIoU |\n")
    tracker = tracker_of(fake)
    tracker.sync(fake.rows)
    tracker.attach([report])
    (parent,) = runs_of(fake, "study").values()
    client = client_of(fake)
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.md"]
    pictures = [tmp_path / "cams.png", tmp_path / "predictions.png"]
    for grey, path in enumerate(pictures):
        Image.new("RGB", (7, 5), (grey, 0, 9)).save(path)
    tracker.attach([report, *pictures])
    sent = sorted(item.path for item in client.list_artifacts(parent.info.run_id, "figures"))
    assert sent == ["figures/cams.png", "figures/predictions.png"]
    with Image.open(client.download_artifacts(parent.info.run_id, sent[1])) as image:
        assert image.size == (7, 5) and image.getpixel((3, 3)) == (1, 0, 9)
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.md"]


# -- one run a trial, true states


def test_one_run_a_trial_over_launches_crashes_and_lost_memory(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        fake.start(index)
    tracker_of(fake, "001").sync(fake.rows)
    first = {name: run.info.run_id for name, run in runs_of(fake).items()}
    memory = fake.storage.study("demo").path / "tracking.json"
    saved = memory.read_text()
    tracker_of(fake, "002").sync(fake.rows)
    memory.unlink()
    tracker_of(fake, "003").sync(fake.rows)
    memory.write_text("{ torn")
    tracker_of(fake, "003").sync(fake.rows)
    memory.write_text(saved.replace(first["prototype_top_k=0 s=0"], "0" * 32))  # names a run that is not there
    tracker_of(fake, "003").sync(fake.rows)
    assert {name: run.info.run_id for name, run in runs_of(fake).items()} == first
    assert sorted(runs_of(fake, "study")) == ["demo launch 001", "demo launch 002", "demo launch 003"]


def test_a_launch_that_is_killed_while_it_first_sends_is_in_the_file(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends what it left running reads files alone."""
    fake.start(0)
    seen: list[Any] = []
    path = fake.storage.study("demo").path / "tracking.json"
    monkeypatch.setattr(MlflowTracker, "_sync_trial", lambda *_: seen.append(json.loads(path.read_text())))
    tracker_of(fake).sync(fake.rows)
    ((memory,),) = (list(everything.values()) for everything in seen)
    assert list(memory["launches"]) == ["001"]


def test_a_launch_that_could_not_be_shown_as_running_is_tried_again(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_of(fake)
    tracker.sync([], final=True)

    def unanswered(*words: Any) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._mlflow, "update_run", unanswered)
        with pytest.raises(ConnectionError):
            tracker.sync([])
    assert runs_of(fake, "study")["demo launch 001"].info.status == "FINISHED"
    tracker_of(fake).sync([])
    assert runs_of(fake, "study")["demo launch 001"].info.status == "RUNNING"


def test_a_run_whose_creation_was_not_answered_is_found_again(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.start(0)
    tracker = MlflowTracker(default_uri(fake.storage), fake.storage, fake.study, "001")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "_save", lambda self: None)
        tracker.sync(fake.rows)  # created, and then the process died
    fake.start(1)
    tracker_of(fake).sync(fake.rows)
    assert len(runs_of(fake)) == 2


def test_a_run_that_is_made_after_its_request_was_given_up_is_no_second_run(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.finish(0, 0.5)
    tracker = tracker_of(fake)
    tracker.sync([])
    asked: list[tuple[Any, ...]] = []

    def unanswered(*words: Any) -> None:
        asked.append(words)
        raise ConnectionError("no answer")

    monkeypatch.setattr(tracker._mlflow, "create_run", unanswered)
    with pytest.raises(TrackingError, match="no answer"):
        tracker.sync(fake.rows)
    tracker.sync(fake.rows)  # connects anew, and makes the run
    client_of(fake).create_run(*asked[0])  # the server gets to the first request
    tracker.sync(fake.rows, final=True)
    (run,) = [run for run in client_of(fake).search_runs([asked[0][0]]) if run.data.tags.get("ppc.kind") == "trial"]
    assert run.info.status == "FINISHED" and run.data.metrics["cost/wall_s"] > 0


def test_states_are_true_through_a_life_of_a_trial(fake: FakeStudy) -> None:
    def status() -> str:
        tracker.sync(fake.rows)
        (run,) = runs_of(fake).values()
        return str(run.info.status)

    tracker = tracker_of(fake)
    fake.start(0)
    assert status() == "RUNNING"
    fake.start(0, heartbeat_ms=now_ms() - int(STALE_S * 1000) - 1)  # killed without a word
    assert status() == "KILLED"
    fake.start(0, attempt=2)
    assert status() == "RUNNING"
    fake.fail(0)
    assert status() == "FAILED"
    (run,) = runs_of(fake).values()
    assert run.data.tags["ppc.error_stage"] == "train_cam"
    fake.start(0, attempt=3)
    assert status() == "RUNNING"
    fake.finish(0, 0.5)
    assert status() == "FINISHED"
    (run,) = runs_of(fake).values()
    assert "ppc.error" not in run.data.tags
    assert run.data.tags["ppc.attempt"] == "3"


def test_a_run_left_running_by_a_killed_launch_is_repaired(fake: FakeStudy) -> None:
    fake.start(0)
    tracker_of(fake, "001").sync(fake.rows)
    fake.start(0, heartbeat_ms=dead_ms())
    tracker_of(fake, "002").sync(fake.rows)
    assert [run.info.status for run in runs_of(fake).values()] == ["KILLED"]
    launches = {name: run.info.status for name, run in runs_of(fake, "study").items()}
    assert launches == {"demo launch 001": "KILLED", "demo launch 002": "RUNNING"}


def test_a_run_of_a_trial_that_left_the_study_ends(fake: FakeStudy) -> None:
    for index in range(3):
        fake.start(index)
    tracker_of(fake, "001").sync(fake.rows)
    fake.start(0, heartbeat_ms=dead_ms())
    fake.finish(1, 0.5)
    tracker_of(fake, "002").sync(fake.rows[3:])
    found = {run.data.tags["ppc.trial_key"]: run.info.status for run in runs_of(fake).values()}
    assert [found[row.key] for row in fake.rows[:3]] == ["KILLED", "FINISHED", "RUNNING"]


def test_the_end_of_a_launch_tells_how_it_went(fake: FakeStudy) -> None:
    tracker = tracker_of(fake)
    for index in range(3):
        fake.finish(index, 0.5)
    tracker.sync(fake.rows, final=True)
    assert [run.info.status for run in runs_of(fake, "study").values()] == ["KILLED"]  # one is still to run
    tracker.sync(fake.rows)
    assert [run.info.status for run in runs_of(fake, "study").values()] == ["RUNNING"]
    fake.finish(3, 0.5)
    tracker.sync(fake.rows, final=True)
    (parent,) = runs_of(fake, "study").values()
    assert (parent.info.status, parent.data.tags["ppc.states"]) == ("FINISHED", "FINISHED 4")


def test_a_run_deleted_by_hand_stays_deleted_and_keeps_none_back(fake: FakeStudy) -> None:
    fake.start(0)
    fake.start(1)
    tracker = tracker_of(fake)
    tracker.sync(fake.rows)
    gone, stays = runs_of(fake).values()
    client_of(fake).delete_run(gone.info.run_id)
    for index in (0, 1):
        fake.finish(index, 0.5)
    with pytest.raises(TrackingError):
        tracker.sync(fake.rows)
    tracker.sync(fake.rows)
    assert {run.info.run_id: run.info.status for run in runs_of(fake).values()} == {stays.info.run_id: "FINISHED"}


def test_ppc_sync_goes_on_with_the_newest_launch(fake: FakeStudy) -> None:
    fake.storage.study("demo").new_launch()
    fake.storage.study("demo").new_launch()
    fake.finish(0, 0.5)
    tracker_of(fake, None).sync(fake.rows, final=True)
    assert list(runs_of(fake, "study")) == ["demo launch 002"]


def test_two_writers_take_turns(fake: FakeStudy) -> None:
    for index in range(4):
        fake.start(index)
        fake.journal(index, range(20))
    threads = [threading.Thread(target=tracker_of(fake, launch).sync, args=(fake.rows,)) for launch in ("001", "002")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = runs_of(fake)
    assert len(runs) == 4
    assert all(len(history(fake, run, "train/loss")) == 20 for run in runs.values())


# -- where it is sent


def test_the_current_folder_does_not_matter(fake: FakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd" / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "cwd" / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    before = sorted(tmp_path.glob("cwd/**/*"))
    monkeypatch.chdir(tmp_path / "cwd")
    fake.finish(0, 0.5)
    tracker_of(fake).sync(fake.rows)
    assert len(runs_of(fake)) == 1
    assert sorted(tmp_path.glob("cwd/**/*")) == before
    with sqlite3.connect(fake.storage.root / "mlflow" / "mlflow.db") as database:
        (place,) = database.execute("select artifact_location from experiments where name = 'ppc/demo'").fetchone()
    database.close()
    assert place == (fake.storage.root / "mlflow" / "artifacts" / "demo").as_uri()


def test_uri_comes_from_the_option_then_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage(tmp_path)
    assert tracking_uri(None, storage) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert tracking_uri(None, storage) == "http://host:5000"
    assert tracking_uri("none", storage) == "none"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///a.db", storage) == f"sqlite:///{tmp_path}/a.db"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("postgresql://me:secret@db/mlflow", r"name the driver.*postgresql\+psycopg2"),
        ("postgres://db/mlflow", "name the driver"),
        ("postgresql+nodriver://db/mlflow", "pip install 'nodriver'"),
        ("./mlruns", "expected http"),
        ("file:///x/mlruns", "expected http"),
        ("sqlite://", "absolute"),
    ],
)  # fmt: skip
def test_a_uri_that_cannot_work_is_refused_at_once(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_uri(uri)
    assert "secret" not in str(caught.value)


def test_without_mlflow_the_error_says_what_to_install(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppc.mlflow_server.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[mlflow\]'.*--tracking none"):
        tracker_of(fake)
    assert isinstance(make_tracker("none", fake.storage, fake.study, "001"), NoTracker)


def test_passwords_stay_out_of_files() -> None:
    assert safe_uri("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert safe_uri("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"


# -- the loop


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Scripted:
    """A tracker that does what a test says."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.finals, self.files, self.closed = act, 0, list[Path](), False

    def sync(self, rows: Sequence[TrialRow], *, final: bool = False, note: str = "") -> None:
        self.act()
        self.finals += final

    def attach(self, paths: Sequence[Path]) -> None:
        self.files = list(paths)

    def close(self) -> None:
        self.closed = True


def test_loop_sends_the_rest_and_the_files(tmp_path: Path) -> None:
    tracker = Scripted(lambda: None)
    with SyncLoop(tracker, lambda: [], every_s=0.01) as loop:
        assert loop.finish([tmp_path / "report.md"])
    assert (tracker.finals, tracker.files, tracker.closed, loop.problem) == (1, [tmp_path / "report.md"], True, None)


def test_loop_says_a_lasting_error_once_and_its_end() -> None:
    calls, said = [0], list[str]()

    def act() -> None:
        calls[0] += 1
        if 2 <= calls[0] <= 4:
            raise RuntimeError("no answer\nof the server")

    with SyncLoop(Scripted(act), lambda: [], every_s=0.01, longest_wait_s=0.01, say=said.append) as loop:
        deadline = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert calls[0] > 4, "it failed three times"
    assert ["no answer" in said[0], "works again" in said[1], len(said)] == [True, True, 2]
    assert loop.problem is None


def test_loop_ends_in_time_when_the_tracker_hangs() -> None:
    release = threading.Event()
    loop = SyncLoop(Scripted(lambda: release.wait(30) and None), lambda: [])
    loop.start()
    start = time.monotonic()
    assert not loop.finish(flush_s=0.5)
    assert time.monotonic() - start < 2
    assert loop.problem is not None and "no answer" in loop.problem
    release.set()


def test_no_server_neither_delays_nor_stops(fake: FakeStudy) -> None:
    said: list[str] = []
    tracker = make_tracker(f"http://127.0.0.1:{free_port()}", fake.storage, fake.study, "001")
    with SyncLoop(tracker, lambda: fake.rows, every_s=0.05, longest_wait_s=0.1, say=said.append) as loop:
        start = time.monotonic()
        fake.start(0)
        fake.journal(0, range(200))  # the training: files only
        fake.finish(0, 0.5)
        assert time.monotonic() - start < 5
        start = time.monotonic()
        assert not loop.finish(flush_s=2)
        assert time.monotonic() - start < 5
    assert len(said) == 1 and "no MLflow server answers at http://127.0.0.1" in said[0]
    assert loop.problem is not None and "no MLflow server" in loop.problem


@pytest.mark.slow
def test_points_arrive_once_the_server_is_up_and_the_ui_serves_them(fake: FakeStudy) -> None:
    port = free_port()
    fake.finish(0, 0.5)
    tracker_of(fake).sync(fake.rows)  # straight into the file
    tracker = make_tracker(f"http://127.0.0.1:{port}", fake.storage, fake.study, "001")
    with SyncLoop(tracker, lambda: fake.rows, every_s=0.2, longest_wait_s=0.5, say=lambda text: None) as loop:
        fake.start(1)
        fake.journal(1, range(50))
        while loop.last_error is None:
            time.sleep(0.05)
        with start_ui(fake.storage, port=port) as server:
            fake.journal(1, range(50, 60))
            fake.finish(1, 0.75)
            assert loop.finish(flush_s=60), loop.problem
            runs = runs_of(fake)
            assert {name: run.info.status for name, run in runs.items()} == {
                "prototype_top_k=0 s=0": "FINISHED", "prototype_top_k=0 s=1": "FINISHED",
            }  # fmt: skip
            assert len(history(fake, runs["prototype_top_k=0 s=1"], "train/loss")) == 60
            for run in runs.values():  # the UI can read artifacts of either way
                address = f"{server.url}/get-artifact?path=config.yaml&run_uuid={run.info.run_id}"
                with urllib.request.urlopen(address, timeout=10) as answer:
                    assert b"prototype_top_k" in answer.read()
            number = experiment_id(fake.storage, "demo", f"http://127.0.0.1:{port}")
            assert server_version(server.url) == mlflow_module.__version__
            found = links(server.url, fake.storage, "demo", f"http://127.0.0.1:{port}")
            assert found["MLflow"].startswith(f"http://127.0.0.1:{port}/#/experiments/{number}/runs?")
            assert "viewStateShareKey=ppc-results" in found["MLflow"], "this MLflow's views were not looked at yet"
            with pytest.raises(ValueError, match="--port"):
                start_ui(fake.storage, port=port)
    assert server.process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


def test_ui_command_names_the_storage_and_nothing_else(tmp_path: Path) -> None:
    command, extra = ui_command(Storage(tmp_path), "127.0.0.1", 5001)
    assert command[1:4] == ["-m", "mlflow", "server"]
    assert command[4:] == [
        "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow/mlflow.db", "--artifacts-destination",
        f"{tmp_path}/mlflow/artifacts", "--host", "127.0.0.1", "--port", "5001", "--workers", "1",
    ]  # fmt: skip
    assert extra["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert extra["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_journal_marks(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert new_points(path, [0, -1]) == ([], [0, -1])
    path.write_text('{"t":5,"step":3,"m":{"a":1}}\n{"t":6,"st')
    points, mark = new_points(path, [0, -1])
    assert [tuple(p) for p in points] == [("a", 1.0, 5, 3)]
    assert mark == [29, 3]
    assert new_points(path, mark) == ([], mark)

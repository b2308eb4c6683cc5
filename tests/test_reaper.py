"""What a killed launch left RUNNING in MLflow: ended by `ppc sync` and `ppc ui`, and nothing that lives is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from PIL import Image

from ppc import cli, cli_ui, mlflow_embedded, tracking
from ppc.artifacts import now_ms
from ppc.launch import launch_lock
from ppc.ledger import STALE_S
from ppc.mlflow_server import TrackingError, default_uri
from ppc.reaper import end_what_is_dead, shown_running, sync_studies
from ppc.tracking import make_tracker

pytest.importorskip("mlflow")


@pytest.fixture
def one(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(mlflow_template, tmp_path / "storage" / "mlflow" / "mlflow.db")
    return FakeStudy(tmp_path / "storage", name="one")


def dead_ms() -> int:
    return now_ms() - int(STALE_S * 1000) - 1


def launch_of(fake: FakeStudy) -> None:
    """What a launch sends before it is killed."""
    name = fake.storage.study(fake.name).new_launch().name
    make_tracker(None, fake.storage, fake.study, name).sync(fake.rows)


def statuses(fake: FakeStudy) -> dict[str, str]:
    client = tracking._client(default_uri(fake.storage))
    found = client.get_experiment_by_name(f"ppc/{fake.name}")
    runs: list[Any] = [] if found is None else client.search_runs([found.experiment_id])
    return {run.info.run_name: run.info.status for run in runs}


def test_sync_and_ui_end_what_is_dead_and_nothing_else(one: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = one.storage, default_uri(one.storage)
    two = FakeStudy(storage.root, name="two")
    silent = FakeStudy(storage.root, name="silent")  # was launched with --tracking none
    silent.start(0)
    assert storage.study_names() == ["one", "silent", "two"]
    for fake in (one, two):
        fake.start(0)
        fake.start(1)
        launch_of(fake)
        fake.start(0, heartbeat_ms=dead_ms())
    left = {"prototype_top_k=0 s=0": "RUNNING", "prototype_top_k=0 s=1": "RUNNING"}
    assert statuses(one) == {**left, "one launch 001": "RUNNING"}
    ended = {"prototype_top_k=0 s=0": "KILLED", "prototype_top_k=0 s=1": "RUNNING"}

    with launch_lock(storage.study("two")):  # its launch is alive: it tells MLflow itself
        assert shown_running(storage, "one", uri) and not shown_running(storage, "two", uri)
        end_what_is_dead(storage, uri)
        assert statuses(one) == {**ended, "one launch 001": "KILLED"}, "one trial is at work for another study"
        assert statuses(two) == {**left, "two launch 001": "RUNNING"}
        sync_studies(storage, ["two"], None)  # asked for by name: sends what is there, but does not end the launch
        assert statuses(two) == {**ended, "two launch 001": "RUNNING"}
    assert shown_running(storage, "two", uri) and not shown_running(storage, "one", uri)
    one.finish(1, 0.5)
    assert shown_running(storage, "one", uri)
    end_what_is_dead(storage, uri)
    assert statuses(one)["prototype_top_k=0 s=1"] == "FINISHED" and statuses(two)["two launch 001"] == "KILLED"
    assert not shown_running(storage, "two", uri) and not shown_running(storage, "one", uri)
    assert statuses(silent) == {}, "nobody asked for it"

    def no_mlflow(*words: object) -> None:
        raise AssertionError("MLflow was asked though its files say that nothing is left")

    monkeypatch.setattr("ppc.tracking.make_tracker", no_mlflow)
    end_what_is_dead(storage, uri)


def test_all_studies_are_sent_and_one_that_cannot_be_keeps_back_none(
    one: FakeStudy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = FakeStudy(one.storage.root, name="two")
    for fake in (one, two):
        fake.start(0, heartbeat_ms=dead_ms())
    make = make_tracker

    def broken(option: str | None, storage: Any, study: dict[str, Any], launch: str | None) -> Any:
        if study["name"] == "one":
            raise TrackingError("experiment ppc/one was deleted")
        return make(option, storage, study, launch)

    words = ["ppc", "sync", "--storage", str(one.storage.root)]
    with monkeypatch.context() as patch:
        patch.setattr("ppc.tracking.make_tracker", broken)
        patch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "ppc: one: experiment ppc/one was deleted" in said.err
    assert "two is in the tracker" in said.out and statuses(two)["prototype_top_k=0 s=0"] == "KILLED"
    with pytest.raises(SystemExit) as ended, monkeypatch.context() as patch:
        patch.setattr("sys.argv", [*words, "--all"])
        cli.main()
    assert ended.value.code in (0, None) and statuses(one)["prototype_top_k=0 s=0"] == "KILLED"
    with pytest.raises(SystemExit) as ended, monkeypatch.context() as patch:
        patch.setattr("sys.argv", [*words, "one", "--all"])
        cli.main()
    assert ended.value.code == 2 and "name one study, or say --all" in capsys.readouterr().err


def test_ui_ends_the_dead_before_it_serves(
    one: FakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one.start(0)
    launch_of(one)
    one.start(0, heartbeat_ms=dead_ms())
    seen: list[dict[str, str]] = []
    served: list[str] = []

    class Server:
        url = "http://127.0.0.1:5000"

        def __enter__(self) -> Server:
            if not seen:
                seen.append(statuses(one))
            served.append(self.url)
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(mlflow_embedded, "start_ui", lambda *words: Server())
    cli_ui.ui("one", str(one.storage.root))
    assert seen == [{"prototype_top_k=0 s=0": "KILLED", "one launch 001": "KILLED"}]
    shutil.rmtree(one.storage.root / "mlflow")
    (one.storage.root / "mlflow").write_text("MLflow cannot be had")
    memory = one.storage.study("one").path / "tracking.json"
    memory.write_text(memory.read_text().replace('"ended"', '"other"'))
    cli_ui.ui("one", str(one.storage.root))
    assert len(served) == 2 and "may be shown as running that are not" in capsys.readouterr().out


def test_sync_sends_the_figures_that_a_launch_has_drawn(one: FakeStudy) -> None:
    one.finish(0, 0.5)
    launch_of(one)
    report = Path(one.storage.study("one").path) / "report"
    report.mkdir()
    Image.new("RGB", (4, 4)).save(report / "cams.png")
    sync_studies(one.storage, ["one"], None)
    client = tracking._client(default_uri(one.storage))
    experiment = client.get_experiment_by_name("ppc/one").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`ppc.kind` = 'study'")
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/cams.png"]
    sent = {item.path for item in client.list_artifacts(parent.info.run_id, "report")}
    assert sent == {f"report/report.{ending}" for ending in ("md", "csv", "json", "tex", "html")}


def test_what_mlflows_client_raises_is_one_line_without_the_login(
    one: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    two = FakeStudy(one.storage.root, name="two")
    two.finish(0, 0.5)

    def refuse(self: Any, name: str) -> None:
        if name == "ppc/one":
            raise MlflowException("API request to http://me:url-word@127.0.0.1:9/api failed")
        return real(self, name)

    real = MlflowClient.get_experiment_by_name
    monkeypatch.setattr("mlflow.MlflowClient.get_experiment_by_name", refuse)
    with pytest.raises(TrackingError) as caught:
        sync_studies(one.storage, ["one", "two"], None)
    assert "url-word" not in str(caught.value) and str(caught.value).startswith("one: MlflowException: API request to")
    with pytest.raises(TrackingError) as caught:
        make_tracker(None, one.storage, one.study, None).sync(one.rows)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None, "a traceback would print it"
    monkeypatch.undo()
    assert statuses(two)["prototype_top_k=0 s=0"] == "FINISHED", "the other study is sent all the same"

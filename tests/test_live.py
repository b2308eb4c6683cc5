"""How a study is shown while it runs: losses, time and GPU hours, on a terminal and in a log."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from fake_study import FakeStudy
from rich.console import Console
from typer.testing import CliRunner

import ppc.live
from ppc.artifacts import now_ms, write_json
from ppc.cli import app
from ppc.costs import gpu_hours
from ppc.launch import launch_lock
from ppc.live import time_left_s, watch
from ppc.status import headline, status_lines, status_table


@pytest.fixture
def fake(tmp_path: Path) -> FakeStudy:
    """One trial finished with 2 GPU hours, one at work for half an hour on a GPU, one failed, one waiting."""
    study = FakeStudy(tmp_path)
    study.finish(0, 0.4)
    path = study.storage.trial(study.entry(0)["key"]).path / "result.json"
    write_json(path, {**json.loads(path.read_text()), "cost": {"cpu_h": 3.0, "gpu_h": 2.0, "wall_s": 30.0}})
    study.start(1)
    stage = study.storage.stage("train_cam", study.entry(1)["stages"][0]["key"])
    progress = {"done": 3, "total": 12, "unit": "step", "epoch": 1, "epochs": 4, "left_s": 42.0, "gpu_s": 1800.0}
    write_json(stage / "progress.json", {**progress, "losses": {"train/loss": 0.51234, "train/cls": 0.25}})
    study.start(2)
    study.fail(2)
    return study


def test_gpu_hours_used_and_left(fake: FakeStudy) -> None:
    used, left = gpu_hours(fake.storage, fake.rows)
    assert used == pytest.approx(2.5)
    assert left == pytest.approx((2 - 0.5) + 2 + 2)
    assert "2.50 GPU h used, about 5.50 left" in headline("demo", fake.rows, (used, left), 90.0)


def test_nothing_is_foretold_from_nothing_and_a_cpu_study_has_no_gpu_hours(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    assert gpu_hours(study.storage, study.rows) == (0.0, None)
    assert headline("demo", study.rows, (0.0, None), None) == "demo: 4 pending"
    study.entry(0)["config"]["runtime"]["gpus_per_worker"] = 1
    assert headline("demo", study.rows, (0.0, None), None) == "demo: 4 pending; 0.00 GPU h used, ? left"
    for index in range(4):
        study.finish(index, 0.4)
    assert gpu_hours(study.storage, study.rows) == (0.0, 0.0)


def test_time_left_is_of_what_runs_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = now_ms()
    monkeypatch.setattr(ppc.live, "now_ms", lambda: now)
    study = FakeStudy(tmp_path)
    assert time_left_s(study.rows) is None, "nothing runs"
    study.start(1)
    study.storage.trial(study.entry(1)["key"]).write_state(started_ms=now - 40_000)
    assert time_left_s(study.rows) is None, "nothing is known of what runs"
    stage = study.storage.stage("train_cam", study.entry(1)["stages"][0]["key"])
    write_json(stage / "progress.json", {"done": 3, "total": 12, "unit": "step", "left_s": 10.0})
    assert time_left_s(study.rows) == pytest.approx(10 + 3 * 50), "40 s so far and 10 to come; three wait"
    study.finish(0, 0.4, wall_s=100.0)
    wall_s = study.rows[0].result["wall_s"]
    assert time_left_s(study.rows) == pytest.approx((wall_s - 40) + 2 * wall_s), "as long as the finished one; two wait"
    study.start(2)
    study.storage.trial(study.entry(2)["key"]).write_state(started_ms=now - 40_000)
    assert time_left_s(study.rows) == pytest.approx((2 * (wall_s - 40) + wall_s) / 2), "two at a time, one waits"


def test_losses_stage_epoch_and_error_are_in_the_lines(fake: FakeStudy) -> None:
    heads, _, running, failed, _ = status_lines(fake.rows, generated=True)
    assert "losses" in heads and "train_cam" in running
    assert "epoch 1/4" in running and "loss 0.5123, cls 0.25" in running and "42 s" in running
    assert "RuntimeError in train_cam: no memory left" in failed


def test_a_low_terminal_shows_what_runs_and_what_failed(fake: FakeStudy) -> None:
    out = io.StringIO()
    table = status_table(fake.rows, "demo", generated=True, max_rows=2)
    Console(file=out, width=200, force_terminal=True).print(table)
    assert "running" in out.getvalue() and "no memory left" in out.getvalue()
    assert "not shown: 1 finished, 1 pending" in out.getvalue() and "prototype_top_k=4 s=1" not in out.getvalue()


def test_status_in_a_log_has_no_control_codes(fake: FakeStudy) -> None:
    done = CliRunner().invoke(app, ["study", "status", "demo", "--storage", str(fake.storage.root)])
    assert done.exit_code == 1 and "\x1b" not in done.output
    assert done.output.startswith("demo: 1 finished, 1 running, 1 pending, 1 failed; about ")
    assert "2.50 GPU h used" in done.output and "traceback:" in done.output


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_ends_with_the_last_trial_but_not_between_two(
    fake: FakeStudy, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppc.live, "REFRESH_S", 0.05)
    out, ended = io.StringIO(), threading.Event()
    console = Console(file=out, width=200, force_terminal=terminal)

    def look() -> None:
        watch(fake.storage, dict(fake.study), console)
        ended.set()

    with launch_lock(fake.storage.study("demo")):
        thread = threading.Thread(target=look)
        thread.start()
        fake.finish(1, 0.5)  # for a moment no trial is at work
        assert not ended.wait(1.2), "the launch goes on"
    thread.join(10)
    assert ended.is_set()
    text = capsys.readouterr().out + out.getvalue()
    assert ("\x1b[" in text) is terminal
    assert "2 finished" in text and "(generated data)" in text


def test_an_unchanged_study_is_told_once_in_a_log(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppc.live, "REFRESH_S", 0.05)
    thread = threading.Thread(target=lambda: watch(fake.storage, dict(fake.study), Console(file=io.StringIO())))
    thread.start()
    time.sleep(1.3)
    fake.start(1, heartbeat_ms=now_ms())
    fake.finish(1, 0.5)
    thread.join(10)
    assert not thread.is_alive()
    assert capsys.readouterr().out.count("demo: ") == 2

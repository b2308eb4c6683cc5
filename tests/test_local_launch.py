"""What a launch promises about a study's files, whatever it runs on; here in this process, without Ray."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from tiny_study import QUIET, make_study

import ppc.launch
import ppc.ledger
import ppc.local_study
import ppc.stages
from ppc.artifacts import Storage, now_ms
from ppc.checks import check_trial
from ppc.definition import define
from ppc.launch import Where, command, launch_lock, run_study
from ppc.ledger import FAILED, FINISHED, INTERRUPTED, KILLED, PENDING, RUNNING, read_rows
from ppc.study import baseline, expand
from ppc.study_config import StudyConfig

HERE = Where(local=True, tracking="none")


def stage_of(storage: Storage, study: dict, index: int, name: str) -> Path:
    key = next(s["key"] for s in study["trials"][index]["stages"] if s["name"] == name)
    return storage.stage(name, key).path


def test_a_refused_launch_changes_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    before = (storage.study("k").path / "study.json").read_bytes()
    with launch_lock(storage.study("k")):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
            "from tiny_study import QUIET; from ppc.artifacts import Storage; from ppc.launch import Where, run_study;"
            "storage = Storage(Path(sys.argv[2])); study = storage.study('k').definition();"
            "run_study(storage, 'k', Where(local=True, tracking='none'), QUIET, {**study, 'note': 'another'})"
        )
        words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and f"pid {os.getpid()}" in done.stderr
    assert (storage.study("k").path / "study.json").read_bytes() == before
    assert [row.state for row in read_rows(storage, study)] == [PENDING]


@pytest.mark.parametrize("beats", [True, False])
def test_a_trial_of_another_host_is_waited_for_until_it_is_known_to_live_or_not(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    trial = storage.trial(study["trials"][0]["key"])
    trial.write_state(state=RUNNING, host="elsewhere", pid=1, attempt=1, heartbeat_ms=now_ms())
    monkeypatch.setattr(ppc.launch, "SETTLE_S", 1.0)
    monkeypatch.setattr(ppc.ledger, "STALE_S", 2.0)
    stop = threading.Event()

    def beat() -> None:
        while beats and not stop.wait(0.05):
            trial.write_state(heartbeat_ms=now_ms())

    heart = threading.Thread(target=beat)
    heart.start()
    start_s = time.monotonic()
    try:
        rows = ppc.launch._settled(storage, study)
    finally:
        stop.set()
        heart.join()
    assert time.monotonic() - start_s >= (1.0 if beats else 1.9)
    assert [row.state for row in rows] == [RUNNING if beats else INTERRUPTED]


def test_resume_refuses_keys_that_are_no_longer_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    stages = dict(ppc.stages.STAGES)
    stages["refine_crf"] = dataclasses.replace(stages["refine_crf"], version=stages["refine_crf"].version + 1)
    monkeypatch.setattr(ppc.stages, "STAGES", stages)
    with pytest.raises(ValueError, match="launch its file again"):
        run_study(storage, "k", HERE, QUIET)
    assert [row.state for row in read_rows(storage, study)] == [PENDING]


def test_a_failed_trial_is_named_and_resumed_alone(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[0, 4], seeds=[0])
    blocked = stage_of(storage, study, 1, "make_seeds")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be made")
    assert run_study(storage, "k", HERE, QUIET) == 1
    first, second = read_rows(storage, study)
    assert first.state == FINISHED and second.error is not None and second.error["stage"] == "make_seeds"
    blocked.unlink()
    assert run_study(storage, "k", HERE, QUIET) == 0
    assert [row.attempt for row in read_rows(storage, study)] == [1, 2]


def test_a_relaunch_says_what_left_the_study_and_reuses_what_stayed(tmp_path: Path) -> None:
    from rich.console import Console

    storage = Storage(tmp_path)
    make_study(storage, k=[0, 4], seeds=[0])
    assert run_study(storage, "k", HERE, QUIET) == 0
    raw = {
        "name": "k",
        "design": {"kind": "grid", "axes": {"contrast.prototype_top_k": [4, 8]}},
        "trial_seeds": [0],
    }
    study = StudyConfig.model_validate(raw)
    specs = expand(study, twin="tiny", check=check_trial)
    said = Console(record=True, file=io.StringIO(), width=200)
    definition = define(study, specs, baseline(study, specs), storage)
    assert run_study(storage, "k", HERE, said, definition) == 0
    assert "1 trial(s) of an earlier study of this name" in said.export_text()
    four, eight = read_rows(storage, storage.study("k").definition())
    assert (four.attempt, eight.attempt) == (1, 1)


def test_a_trial_of_another_study_is_shown_as_reused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make_study(storage, name="a", k=[4], seeds=[0])
    assert run_study(storage, "a", HERE, QUIET) == 0
    second = make_study(storage, name="b", k=[4, 8], seeds=[0])
    four, eight = read_rows(storage, second)
    assert four.reused and four.state == FINISHED and eight.state == PENDING
    assert run_study(storage, "b", HERE, QUIET) == 0
    four, eight = read_rows(storage, second)
    assert four.reused and four.attempt == 1 and not eight.reused


def test_a_stage_sees_only_what_comes_before_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    order = ["train_cam", "make_seeds", "evaluate", "refine_crf"]
    study = make_study(storage, k=[4], seeds=[0], tiny={"stages": order}, metric="seed_miou_train")
    assert run_study(storage, "k", HERE, QUIET) == 0
    (row,) = read_rows(storage, study)
    assert row.result is not None and "mask_miou_train" not in row.result["metrics"]


def test_the_command_that_is_printed_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert command() == "ppc"
    monkeypatch.setenv("PATH", "")
    assert Path(command()).exists()


def of_list(variants: dict[str, dict], **fields: object) -> StudyConfig:
    listed = [{"name": name, "set": values} for name, values in variants.items()]
    return StudyConfig.model_validate({"name": "k", "design": {"kind": "list", "variants": listed}, **fields})


def test_variants_that_are_one_trial_run_once_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    off = {"contrast.prototype_top_k": 0}
    study = of_list({"a": off, "b": {**off, "contrast.temperature": 0.5}, "c": {"contrast.prototype_top_k": 4}})
    specs = expand(study, twin="tiny", check=check_trial)
    definition = define(study, specs, "c", storage)
    assert [t.get("same_as") for t in definition["trials"]] == [None, "a", None]
    assert len({t["key"] for t in definition["trials"]}) == 2
    run, keys = ppc.local_study.run_trial, list[str]()

    def counted(cfg: object, key: str, *rest: object) -> object:
        keys.append(key)
        if key == definition["trials"][0]["key"]:
            raise RuntimeError("would be tried again by its second row")
        return run(cfg, key, *rest)

    monkeypatch.setattr(ppc.local_study, "run_trial", counted)
    out = io.StringIO()
    run_study(storage, "k", HERE, Console(file=out, width=300), definition)
    assert len(keys) == 2
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("b  ")]
    assert "same trial as a" in line


def test_the_metric_that_decides_must_be_one_of_the_trials(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    bad = {"metric": "mask_miou_trian", "base": {"stages": ["train_cam", "make_seeds", "refine_crf", "evaluate"]}}
    study = of_list({"a": {}, "b": {"train.learning_rate": 0.1}}, **bad)
    specs = expand(study, twin="tiny", check=check_trial)
    with pytest.raises(ValueError, match="^metric: .*no 'mask_miou_trian'; did you mean mask_miou_train\\?$"):
        define(study, specs, "a", storage)
    no_crf = {"stages": ["train_cam", "make_seeds", "evaluate"]}
    study = of_list({"a": {}, "b": no_crf})
    specs = expand(study, twin="tiny", check=check_trial)
    with pytest.raises(ValueError, match="^b: metric: .*no 'mask_miou_train'; did you mean seed_miou_train"):
        define(study, specs, "a", storage)
    assert define(study, specs[1:], "b", storage, any_metric=True)["metric"] == "seed_miou_train"


def test_brackets_in_names_and_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "[data]" / "[red]voc")
    make_study(storage, name="k", k=[4], seeds=[0])
    study = storage.study("k").definition()
    blocked = storage.stage("train_cam", stage_key(study, 0, "train_cam")).path
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be made")
    out = io.StringIO()
    assert run_study(storage, "k", HERE, Console(file=out, width=4000)) == 1
    text = out.getvalue()
    assert f"study resume k --storage {storage.root} --local\n" in text and f"report: {storage.root}" in text
    assert f"ui k --storage {storage.root}" in text
    assert f"traceback of prototype_top_k=4 s=0: {storage.root}" in text


def stage_key(study: dict, index: int, name: str) -> str:
    return next(s["key"] for s in study["trials"][index]["stages"] if s["name"] == name)


def test_trials_beside_each_other_have_the_numbers_of_one_after_another(tmp_path: Path) -> None:
    beside, after = Storage(tmp_path / "beside"), Storage(tmp_path / "after")
    results = []
    for storage, at_a_time in ((beside, 3), (after, None)):
        study = {**make_study(storage, k=[0, 4], seeds=[0, 1]), "max_concurrent": at_a_time}
        assert run_study(storage, "k", HERE, QUIET, study) == 0
        results.append([(row.key, row.result and row.result["metrics"]) for row in read_rows(storage, study)])
    assert results[0] == results[1]
    pids = {storage: {storage.trial(key).state()["pid"] for key, _ in results[0]} for storage in (beside, after)}
    assert pids[after] == {os.getpid()} and len(pids[beside]) == 4 and os.getpid() not in pids[beside]


LAUNCH_TWO = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_study import QUIET; from ppc.artifacts import Storage; from ppc.launch import Where, run_study
if __name__ == "__main__":
    where = Where(local=True, tracking="none", max_concurrent=2)
    sys.exit(run_study(Storage(Path(sys.argv[2])), "k", where, QUIET))
"""


LaunchTwo = Callable[[Storage], "subprocess.Popen[bytes]"]


@pytest.fixture
def launch_two(tmp_path: Path) -> Iterator[LaunchTwo]:
    """Starts a launch of two trials at a time; none outlives its test."""
    processes = list["subprocess.Popen[bytes]"]()

    def start(storage: Storage) -> subprocess.Popen[bytes]:
        script = tmp_path / "launch.py"
        script.write_text(LAUNCH_TWO)
        words = [sys.executable, str(script), str(Path(__file__).parent), str(storage.root)]
        processes.append(subprocess.Popen(words))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def started(storage: Storage, study: dict) -> list[dict]:
    """The states of two trials that are training at this moment."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = [row for row in read_rows(storage, study) if row.state == RUNNING]
        if len(rows) == 2 and all(
            (storage.stage("train_cam", r.stages[0]["key"]) / "journal.jsonl").exists() for r in rows
        ):
            return [storage.trial(row.key).state() for row in rows]
        time.sleep(0.05)
    raise AssertionError("two trials never trained at a time")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_nothing_of_an_ended_launch_works_on(tmp_path: Path, how: str, launch_two: LaunchTwo) -> None:
    storage = Storage(tmp_path / "storage")
    study = make_study(storage, k=[0, 4], seeds=[0], tiny={"train.epochs": 200})
    launch = launch_two(storage)
    pids = [state["pid"] for state in started(storage, study)]
    launch.send_signal(getattr(signal, how))
    assert launch.wait(60) != 0
    processes = list[psutil.Process]()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert [row.state for row in read_rows(storage, study)] == [KILLED, KILLED]


def test_a_process_that_dies_costs_its_own_trial_alone(tmp_path: Path, launch_two: LaunchTwo) -> None:
    storage = Storage(tmp_path / "storage")
    study = make_study(storage, k=[0, 4], seeds=[0], tiny={"train.epochs": 20})
    launch = launch_two(storage)
    os.kill(started(storage, study)[0]["pid"], signal.SIGKILL)
    assert launch.wait(120) == 1
    first, second = read_rows(storage, study)
    assert first.state == FAILED and second.state == FINISHED
    assert first.error is not None and "exit code -9" in first.error["message"]

"""Many trials, killed at random for minutes, end with the results of trials that nothing happened to (`make soak`).

SOAK_TRIALS and SOAK_SEED say how many trials and which kills; the kills are drawn from the seed, their moments are not.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from tiny_study import QUIET, make_study

from ppc.artifacts import Storage, read_journal
from ppc.launch import Where, run_study
from ppc.ledger import FINISHED, read_rows

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(5400)]
TRIALS, SEED = int(os.environ.get("SOAK_TRIALS", "60")), int(os.environ.get("SOAK_SEED", "0"))
WORKERS = "workers"
MARK = "PPC_SOAK"  # in the environment of all that a launch starts
KILLED_LAUNCHES = 4  # then the launch itself is spared, and lives long enough to see what it gathers
MAX_LAUNCHES = 40
GROWTH = 8  # files more that a process may have open in the last third of the samples than in the first, by medians
FILES_A_WORKER = 3  # that a raylet has open for each of its workers (52, 58, 64, 76 files at 2, 4, 6, 10 workers)
STUDY: dict[str, Any] = {"k": [0, 2, 4, 8, 16, 32], "seeds": list(range(TRIALS // 6))}


def marked(mark: str) -> Iterator[psutil.Process]:
    """All living processes that a marked launch started, itself included."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def victims(mark: str) -> dict[str, list[psutil.Process]]:
    """Processes of Ray that do a trial's work, by what they do: its driver, its training, its images."""
    found: dict[str, list[psutil.Process]] = {}
    for process in marked(mark):
        try:
            title = process.cmdline()[0]
        except (psutil.Error, IndexError):
            continue
        if title.startswith("ray::") and "IDLE" not in title:
            found.setdefault(title.removeprefix("ray::").split("(")[0], []).append(process)
    return found


def open_files(launch: psutil.Process, mark: str) -> dict[str, int]:
    """How many files the processes have open that live as long as the launch, and how many workers there are.

    Nothing before trials are at work.
    """
    pids, workers = {launch.pid: "launch"}, 0
    if not victims(mark):
        return {}
    for process in marked(mark):
        try:
            if (name := process.name()) in ("raylet", "gcs_server"):
                pids[process.pid] = name
            workers += "".join(process.cmdline()[:1]).startswith("ray::")
        except psutil.Error:
            continue
    try:
        files = {name: psutil.Process(pid).num_fds() for pid, name in pids.items()}
    except psutil.Error:
        return {}
    return {**files, WORKERS: workers} if len(files) == 3 else {}


def finished(storage: Storage, study: dict[str, Any]) -> int:
    return sum(row.state == FINISHED for row in read_rows(storage, study))


def metrics(storage: Storage, study: dict[str, Any]) -> dict[str, Any]:
    rows = read_rows(storage, study)
    assert all(row.state == FINISHED for row in rows), Counter(row.state for row in rows)
    return {row.key: row.result and row.result["metrics"] for row in rows}


def test_trials_killed_at_random_end_like_undisturbed_ones(tmp_path: Path) -> None:
    calm, rough = Storage(tmp_path / "calm"), Storage(tmp_path / "rough")
    study = make_study(calm, **STUDY)
    assert run_study(calm, "k", Where(local=True, tracking="none", max_concurrent=os.cpu_count()), QUIET) == 0
    make_study(rough, **STUDY)

    draw, mark, kills, launches = random.Random(SEED), uuid.uuid4().hex, Counter[str](), 0
    code = "from ppc.cli import main; main()"
    words = [sys.executable, "-c", code, "study", "resume", "k", "--storage", str(rough.root), "--num-cpus", "3"]
    samples: list[list[dict[str, int]]] = []  # open files by process, a list for each launch that was spared
    while finished(rough, study) < len(study["trials"]):
        launches += 1
        assert launches <= MAX_LAUNCHES, (tmp_path / "log").read_text()[-3000:]
        samples.append([])
        with (tmp_path / "log").open("a") as log:
            launch = psutil.Popen(words, stdout=log, stderr=log, env={**os.environ, MARK: mark}, start_new_session=True)
        try:
            while launch.poll() is None:
                pause_until = time.monotonic() + draw.uniform(2, 6)
                while time.monotonic() < pause_until and launch.poll() is None:
                    time.sleep(0.2)
                if launch.poll() is not None:
                    break
                if sum(kills.values()) >= TRIALS:
                    pass  # as many kills as trials are enough: a slow machine would never end
                elif launches <= KILLED_LAUNCHES and draw.random() < 0.1:
                    kills["launch"] += 1
                    launch.kill()
                elif found := victims(mark):
                    what = draw.choice(sorted(found))
                    with suppress(psutil.Error):  # it has ended by itself
                        draw.choice(found[what]).kill()
                        kills[what] += 1
                spared = launches > KILLED_LAUNCHES or sum(kills.values()) >= TRIALS
                if spared and (now := open_files(launch, mark)) and min(now.values()) > 0:
                    samples[-1].append(now)
        finally:
            if launch.poll() is None:
                launch.kill()
                launch.wait(60)
    longest = max(samples, key=len)
    print(f"{launches} launches; kills: {dict(kills)}; open files: {longest[:1]} -> {longest[-1:]}")
    assert kills["launch"] >= 1 and sum(kills.values()) >= TRIALS // 4, "too little happened to say anything"

    assert metrics(rough, study) == metrics(calm, study)
    runs = trial_runs(rough)
    assert Counter(run.info.status for run in runs) == {"FINISHED": len(study["trials"])}
    assert len({run.data.tags["ppc.trial_key"] for run in runs}) == len(study["trials"])
    for run, row in ((run, row) for run in runs for row in read_rows(rough, study)):
        if run.data.tags["ppc.trial_key"] == row.key:
            assert_every_point_once(rough, run, row)
    _, alive = psutil.wait_procs(list(marked(mark)), timeout=60)
    assert not alive, [process.cmdline() for process in alive]
    assert len(longest) >= 15, "no launch lived long enough to look at its files"
    third = len(longest) // 3
    first, last = (
        {name: median(sample[name] for sample in part) for name in longest[0]}
        for part in (longest[:third], longest[-third:])
    )
    of_workers = FILES_A_WORKER * max(0, last.pop(WORKERS) - first.pop(WORKERS))  # more of them are no leak
    assert all(last[name] - first[name] <= GROWTH + of_workers for name in first), (first, last, of_workers)


def client(storage: Storage) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{storage.root}/mlflow/mlflow.db")


def trial_runs(storage: Storage) -> list[Any]:
    experiment = client(storage).get_experiment_by_name("ppc/k")
    return list(client(storage).search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'", max_results=1000))


def assert_every_point_once(storage: Storage, run: Any, row: Any) -> None:
    points, _ = read_journal(storage.stage("train_cam", row.stages[0]["key"]) / "journal.jsonl")
    steps = [point["step"] for point in points if "train/loss" in point["m"]]
    assert steps == sorted(set(steps))
    history = client(storage).get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == steps

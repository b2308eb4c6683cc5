"""A cluster of real hosts, and what happens to a study when its driver, a host or a cable is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hosts import Host, Hosts, missing
from tiny_study import QUIET

from ppc.artifacts import Storage, read_journal
from ppc.definition import save
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, TrialRow, read_rows
from ppc.places import names_in

pytestmark = [
    pytest.mark.hosts, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(missing() is not None, reason=f"hosts need {missing()}"),
]  # fmt: skip
AGAIN_S = 90.0  # from the loss of a host to the next epoch of its trial
FAILED_S = 90.0  # from the loss of a host without which there is no room, to FAILED; waits for resources 10 s
SLOW_S = 400.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts") as found:
        yield found


def experiment(folder: Path, ks: list[int], **fields: object) -> Path:
    file = folder / "h.yaml"
    tiny = {"train.epochs": 150, **fields}
    file.write_text(
        json.dumps(
            {
                "name": "h",
                "design": {"kind": "grid", "axes": {"contrast.prototype_top_k": ks}},
                "trial_seeds": [0],
                "tiny": tiny,
            }
        )
    )
    return file


def until(there: Callable[[], object], what: str, timeout_s: float) -> float:
    """Wait for it; how many seconds that took."""
    start = time.monotonic()
    while not there():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - start


def rows_of(storage: Storage) -> list[TrialRow]:
    try:
        return read_rows(storage, storage.study("h-tiny").definition())
    except ValueError:  # not launched yet
        return []


def training(storage: Storage, row: TrialRow) -> Path:
    return Path(str(storage.stage("train_cam", row.stages[0]["key"]).path))


def epochs_of(storage: Storage, index: int) -> int:
    """Epochs of a trial that have a checkpoint."""
    rows = rows_of(storage)
    names = names_in(training(storage, rows[index]) / "checkpoints") if rows else []
    return max([int(name[6:11]) for name in names if name.endswith(".pt")], default=0)


def steps_of(storage: Storage, index: int) -> list[int]:
    points, _ = read_journal(training(storage, rows_of(storage)[index]) / "journal.jsonl")
    return [point["step"] for point in points]


def pid_there(process: psutil.Process) -> int:
    """The pid as the process's own host knows it."""
    (line,) = [x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("NSpid")]
    return int(line.split()[-1])


def ends_well(hosts: Hosts, host: Host, log: str, words: list[str]) -> str:
    process = host.ppc(*words, log=log)
    try:
        code = process.wait(timeout=SLOW_S)
    finally:
        said = hosts.log(log)
    assert code == 0 and said, said
    return said


def test_a_job_whose_driver_was_killed_is_resumed_from_the_other_host(hosts: Hosts, tmp_path: Path) -> None:
    head, other = hosts.add("hosta"), hosts.add("hostb")
    hosts.ray(head, cpus=1, head=True)
    hosts.wait_alive(head)
    hosts.ray(other, cpus=1)
    hosts.wait_alive(head, other)
    storage, file = Storage(tmp_path / "shared"), experiment(tmp_path, [0, 4])
    where = ["--storage", str(storage.root), "--tracking", "none"]
    words = ["submit", str(file), "--address", hosts.url, "--tiny", "--max-concurrent", "1", *where]
    ends_well(hosts, other, "submit", words)
    until(lambda: epochs_of(storage, 1) >= 3, "the second trial trains", SLOW_S)
    first, second = rows_of(storage)
    assert first.state == FINISHED and second.result is None
    kept = {p: p.read_bytes() for p in Path(str(storage.trial(first.key).path)).rglob("*") if p.is_file()}
    (driver,) = head.processes("study launch")

    launch = ["study", "launch", str(file), "--tiny", "--address", hosts.address, *where]
    refused = other.ppc(*launch, log="refused")
    assert refused.wait(timeout=60) == 2
    assert f"is being run by pid {pid_there(driver)} on hosta since 20" in hosts.log("refused"), hosts.log("refused")

    before = epochs_of(storage, 1)
    assert driver.is_running() and rows_of(storage)[1].result is None, "too fast for this test"
    driver.kill()
    resume = ["study", "resume", "h-tiny", "--address", hosts.address, *where]
    said = ends_well(hosts, other, "resume", resume)
    assert "2 trials" in said and "1 to run" in said
    first, second = rows_of(storage)
    assert (first.state, second.state) == (FINISHED, FINISHED) and (first.attempt, second.attempt) == (1, 2)
    assert {p: p.read_bytes() for p in kept} == kept
    steps = steps_of(storage, 1)
    assert steps == sorted(set(steps)) and steps[-1] == 300 and before > 0
    assert json.loads((Path(str(storage.study("h-tiny").path)) / "launch-holder.json").read_text())["host"] == "hostb"


def trainers(hosts: Hosts) -> dict[str, psutil.Process]:
    """The host of each training worker of Ray Train."""
    return {
        host.name: process
        for host in hosts.hosts
        if host.first.is_running()
        for process in host.processes("RayTrainWorker")
    }


def writer(hosts: Hosts) -> str:
    """The host whose worker holds the lock of the training: the one that writes."""
    for name, process in trainers(hosts).items():
        for file in process.open_files():
            if file.path.endswith(".train.lock"):
                return name
    raise AssertionError("no worker writes")


def test_a_trial_on_two_hosts_outlives_a_cut_and_a_death(hosts: Hosts, tmp_path: Path) -> None:
    head = hosts.add("hosta")
    hosts.ray(head, cpus=0, head=True)
    hosts.wait_alive(head)
    two = [hosts.add("hostb"), hosts.add("hostc")]
    for host in two:
        hosts.ray(host, cpus=1)
    hosts.wait_alive(head, *two)
    storage = Storage(tmp_path / "shared")
    fields = {"train.epochs": 400, "runtime.workers": 2, "runtime.resource_wait_s": 10}
    file = experiment(tmp_path, [4], **fields)
    where = ["--address", hosts.address, "--storage", str(storage.root), "--tracking", "none"]
    launch = head.ppc("study", "launch", str(file), "--tiny", *where, log="launch")
    until(lambda: epochs_of(storage, 0) >= 3 or launch.poll() is not None, "the trial trains", SLOW_S)
    assert sorted(trainers(hosts)) == ["hostb", "hostc"], hosts.log("launch")
    spare = hosts.add("hostd")
    hosts.ray(spare, cpus=1)
    hosts.wait_alive(head, *two, spare)

    gone = next(host for host in two if host.name == writer(hosts))
    left = next(host for host in two if host is not gone)
    zombie = trainers(hosts)[gone.name]
    gone.cut()
    before = epochs_of(storage, 0)
    assert before < 400, "too fast for this test"
    again_s = until(lambda: epochs_of(storage, 0) > before + 2 or launch.poll() is not None, "goes on", AGAIN_S)
    assert launch.poll() is None, hosts.log("launch")
    assert {left.name, "hostd"} <= set(trainers(hosts))
    assert writer(hosts) != gone.name, zombie
    print(f"cut: training again after {again_s:.1f} s")

    spare.kill()
    assert rows_of(storage)[0].result is None, "too fast for this test"
    failed_s = until(lambda: rows_of(storage)[0].state == FAILED, "FAILED", FAILED_S)
    print(f"killed, no room: FAILED after {failed_s:.1f} s")
    error = rows_of(storage)[0].error
    assert error is not None and "2 CPU in all but the cluster has 1, waited 10 s" in error["message"], error
    assert launch.wait(timeout=30) == 1

    back = hosts.add("hoste")
    hosts.ray(back, cpus=1)
    hosts.wait_alive(head, left, back)
    ends_well(hosts, head, "resume", ["study", "resume", "h-tiny", *where])
    (row,) = rows_of(storage)
    steps = steps_of(storage, 0)
    assert row.state == FINISHED and row.attempt == 2 and steps == sorted(set(steps)) and steps[-1] == 800

    calm = Storage(tmp_path / "calm")
    definition = storage.study("h-tiny").definition()
    save(definition, calm)
    assert run_study(calm, "h-tiny", Where(local=True, tracking="none"), QUIET, definition) == 0
    (undisturbed,) = rows_of(calm)
    assert undisturbed.result is not None and row.result is not None
    assert row.result["metrics"] == pytest.approx(undisturbed.result["metrics"], abs=0.02)
    assert steps_of(calm, 0) == steps

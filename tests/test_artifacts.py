"""Files on storage: whole or absent, append-only journals, locks that die with their holder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ppc.artifacts
from ppc.artifacts import (
    Journal,
    Progress,
    StageDir,
    Storage,
    StudyDir,
    TrialDir,
    content_key,
    read_journal,
    read_json,
    write_json,
)
from ppc.places import atomic_write, file_sha256

# -- single files


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as handle:
        handle.write(b"half")
        assert not path.exists()
        handle.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, "w") as handle:
        handle.write("new")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from ppc.artifacts import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]), 'w') as handle:\n"
        "    handle.write('new'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', '{"a": 1}}', "\0\0\0", None])
def test_json_that_is_not_whole_reads_as_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    assert read_json(path) is None
    assert read_json(path / "below-a-file.json") is None


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"ü": "ä"}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert read_json(tmp_path / "file.json") == value
    (tmp_path / "latin.json").write_bytes(b'"\xe4"')
    assert read_json(tmp_path / "latin.json") is None


def test_bytes_decide_a_files_sha(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_sha256(tmp_path / "nowhere")


# -- keys


def test_a_key_is_of_the_value_and_not_of_its_order() -> None:
    one = {"a": 1, "b": {"x": [1, 2], "y": None}}
    other = {"b": {"y": None, "x": [1, 2]}, "a": 1}
    assert content_key(one) == content_key(other) and len(content_key(one)) == 20
    different = [one, {**one, "a": 2}, {**one, "a": "1"}, {**one, "a": 1.5}, {**one, "c": None}, [one], [2, 1], [1, 2]]
    assert len({content_key(value) for value in different}) == len(different)
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key({"a": float("inf")})


def test_a_key_is_the_same_in_every_process() -> None:
    code = "from ppc.artifacts import content_key; print(content_key({'b': [1.5, 'x'], 'a': None}))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == content_key({"a": None, "b": [1.5, "x"]})


# -- journal


def test_a_journal_is_read_from_where_one_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.write(1, {"train/loss": 2.0})
    points, offset = read_journal(path)
    assert [(p["step"], p["m"]) for p in points] == [(1, {"train/loss": 2.0})]
    assert abs(points[0]["t"] - time.time() * 1000) < 60_000
    assert read_journal(path, offset) == ([], offset)
    journal.write(2, {"train/loss": 1.0})
    points, end = read_journal(path, offset)
    assert [p["step"] for p in points] == [2] and end == path.stat().st_size
    journal.close()
    assert read_journal(tmp_path / "none.jsonl") == ([], 0)


def test_a_torn_line_waits_for_its_end_and_is_cut_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write(1, {"a": 1.0})
    journal.write(2, {"a": 2.0})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    points, offset = read_journal(path)
    assert [p["step"] for p in points] == [1] and offset == whole.index(b"\n") + 1
    journal = Journal(path)
    assert journal.last_step == 1
    journal.write(2, {"a": 3.0})
    journal.close()
    points, _ = read_journal(path, offset)
    assert [p["m"]["a"] for p in points] == [3.0]


def test_steps_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for start in (0, 1, 2):
        journal = Journal(path)
        for step in range(start, start + 3):
            journal.write(step, {"a": float(10 * start + step)})
        journal.close()
    points, _ = read_journal(path)
    assert [(p["step"], p["m"]["a"]) for p in points] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 24.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_step(tmp_path: Path, value: float) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match=r"step 7: train/er is not finite; lower train.learning_rate"):
        journal.write(7, {"train/cls": 1.0, "train/er": value})
    journal.close()
    assert read_journal(journal.path) == ([], 0)


class NearlyFull:
    """A file on a disk that takes a part of what is written, then nothing."""

    def __init__(self, handle: Any, takes: list[int]) -> None:
        self.handle, self.takes = handle, takes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def write(self, data: bytes) -> int:
        if not (left := self.takes.pop(0)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.handle.write(data[:left]))


def test_a_point_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write(1, {"a": 1.0})
    whole = path.read_bytes()
    journal._file._handle = NearlyFull(journal._file._handle, [7, 0, 1000])
    for _ in range(2):
        with pytest.raises(OSError, match="not written.*journal.jsonl"):
            journal.write(2, {"a": 2.0})
        assert path.read_bytes() == whole and journal.last_step == 1
    journal.write(2, {"a": 2.0})
    journal.close()
    assert [p["step"] for p in read_journal(path)[0]] == [1, 2]


def test_a_line_that_is_no_point_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = [b'{"t":1,"step":%d,"m":{"a":1.0}}' % step for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([good[0], good[1][:9] + good[1], b"\0\0\xff", b"[1]", b'{"step":9}', good[2], b""]))
    points, end = read_journal(path)
    assert [p["step"] for p in points] == [1, 3] and end == path.stat().st_size
    journal = Journal(path)
    assert (journal.last_step, journal.damaged) == (3, 4)
    journal.close()
    with pytest.raises(ValueError, match="byte 5 is in the middle of a line"):
        read_journal(path, 5)


# -- progress


def test_progress_is_not_written_at_every_step_but_at_the_last(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    progress = Progress(path, total=1000, unit="image")
    stamps = set()
    for done in range(1, 1001):
        progress.update(done, epoch=1)
        stamps.add(path.stat().st_mtime_ns)
    assert len(stamps) <= 4
    value = read_json(path)
    assert (value["done"], value["total"], value["unit"], value["epoch"]) == (1000, 1000, "image", 1)


def test_time_left_is_that_of_the_speed_so_far(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.json", total=100, unit="step")
    progress.update(40)  # a resume: these were there before
    assert read_json(progress.path)["left_s"] is None
    time.sleep(0.6)
    progress.update(70)
    assert 0.4 < read_json(progress.path)["left_s"] < 6, "30 done in 0.6 s or a little more, 30 to go"


def test_progress_on_a_full_disk_ends_nothing_and_asks_for_no_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "state.json", {})
    Progress(tmp_path / "progress.json", total=2, unit="step").update(2)
    assert read_json(tmp_path / "progress.json")["done"] == 2
    monkeypatch.setattr(os, "replace", full)
    Progress(tmp_path / "progress.json", total=3, unit="step").update(3)
    assert read_json(tmp_path / "progress.json")["done"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


# -- stages


def test_only_a_whole_manifest_of_this_key_makes_a_stage_done(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "s", "train_cam", "abc")
    assert stage.manifest() is None
    made = stage.finish({"metrics": {"x": 1.0}}, wall_s=2.5)
    assert stage.manifest() == made
    assert made["result"] == {"metrics": {"x": 1.0}} and (made["stage"], made["key"], made["wall_s"]) == (
        "train_cam", "abc", 2.5,
    )  # fmt: skip
    text = (stage / "manifest.json").read_text()
    for wrong in (text[: len(text) // 2], "", "[]", "null", json.dumps({**made, "key": "other"}), '{"key": "abc"}'):
        (stage / "manifest.json").write_text(wrong)
        assert stage.manifest() is None, wrong


def test_the_time_of_a_stage_is_that_of_its_work_in_all_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = [100.0]
    monkeypatch.setattr(ppc.artifacts.time, "monotonic", lambda: clock_s[0])
    stage = StageDir(tmp_path / "s", "train_cam", "abc")
    for done in (1, 2):
        progress = Progress(stage / "progress.json", total=2, unit="step")
        clock_s[0] += 20
        progress.update(done)
        clock_s[0] += 300  # whatever comes after it, such as waiting for the next attempt
    assert stage.finish({}, wall_s=99.0)["wall_s"] == 40


def test_checkpoints_outlive_a_manifest_that_could_not_be_written(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "s", "train_cam", "abc")
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "checkpoints" / "epoch-00001.pt").touch()
    with pytest.raises(ValueError):
        stage.finish({"x": float("nan")}, wall_s=1.0)
    assert (stage / "checkpoints" / "epoch-00001.pt").exists()
    stage.finish({}, wall_s=1.0)
    assert not (stage / "checkpoints").exists()


HOLD = """
import sys, time
from pathlib import Path
from ppc.artifacts import StageDir
with StageDir(Path(sys.argv[1]), "s", "k").lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_makes_others_wait_until_its_holder_dies(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "stage", "s", "k")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(stage.path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            waits: list[float] = []

            def waiting() -> None:
                waits.append(time.monotonic())
                if len(waits) == 3:
                    holder.send_signal(signal.SIGKILL)

            with stage.lock(waiting, poll_s=0.05):
                assert len(waits) >= 3, "it was held as long as its holder lived"
                assert holder.wait(10) == -signal.SIGKILL
        finally:
            holder.kill()


def test_a_lock_is_released_by_an_error_and_holds_between_threads(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "stage", "s", "k")
    with pytest.raises(ValueError, match="inside"), stage.lock():
        raise ValueError("inside")
    inside: list[str] = []

    def other() -> None:
        with stage.lock(poll_s=0.02):
            inside.append("other")

    with stage.lock():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        assert inside == []
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "other"]


# -- trials, studies, the root


def test_a_trials_files_are_read_with_care(tmp_path: Path) -> None:
    trial = TrialDir(tmp_path / "t", "k")
    assert (trial.state(), trial.result(), trial.error()) == ({}, None, None)
    trial.write_state(state="RUNNING", attempt=1)
    trial.write_state(state="FAILED")
    assert trial.state() == {"state": "FAILED", "attempt": 1}
    for name, text in (("state", "[1]"), ("result", "{}"), ("result", '{"metrics"'), ("error", "3")):
        (trial.path / f"{name}.json").write_text(text)
    assert (trial.state(), trial.result(), trial.error()) == ({}, None, None)


def test_a_study_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(ValueError, match=r"no study 'x' .*launched studies: none"):
        storage.study("x").definition()
    saved = {"name": "table6", "trials": [], "created_ms": 0}
    write_json(storage.study("table6").path / "study.json", saved)
    (tmp_path / "studies" / "half").mkdir()
    with pytest.raises(ValueError, match="launched studies: table6$"):
        storage.study("half").definition()
    assert storage.study("table6").definition() == saved


def test_launches_count_up(tmp_path: Path) -> None:
    study = StudyDir(tmp_path / "s", "s")
    assert [study.new_launch().name for _ in range(3)] == ["001", "002", "003"]
    (study.path / "launches" / "notes").mkdir()
    (study.path / "launches" / "011").mkdir()
    assert study.new_launch().name == "012"


def test_a_root_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    Storage(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written.*--storage"):
        Storage(tmp_path / "file").check_writable()


def test_paths_of_one_root_do_not_meet(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    paths = {
        storage.trial("k").path, storage.stage("a", "k").path, storage.stage("b", "k").path,
        storage.study("k").path, storage.dataset("k"),
    }  # fmt: skip
    assert len(paths) == 5 and all(path.is_relative_to(tmp_path) for path in paths)

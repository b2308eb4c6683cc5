"""A study in MLflow: what its files say, sent by one writer. The only file that imports mlflow.

Trial processes write files and nothing else. The launch process reads them every few seconds and sends what MLflow has
not got yet, with the times at which it happened. `tracking.json` remembers what was sent, but for the last seconds of a
process that was killed. Every step can be repeated: MLflow keeps one copy of what it gets twice. So a slow, absent or
restarted server neither stops a training nor costs a point: `ppc sync NAME` sends the rest at any later time.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from ppc import run_record as record
from ppc.artifacts import StageDir, Storage, content_key, now_ms, read_json, write_json
from ppc.figures import square
from ppc.ledger import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    PENDING,
    RUNNING,
    STOPPED,
    TrialRow,
    alive,
    counts,
    stage_dirs,
)
from ppc.locks import LockedError, locked
from ppc.mlflow_page import page_tags, send_page
from ppc.mlflow_server import (
    QUIET,
    TrackingError,
    artifact_place,
    check_uri,
    default_uri,
    is_server,
    move_artifacts,
    probe,
    tracking_uri,
    words_of,
)
from ppc.places import StoragePath, names_in, read_bytes
from ppc.redact import safe_uri
from ppc.run_record import Point, is_number, metric_name
from ppc.sync_loop import NoTracker, SyncLoop, Tracker

__all__ = ["MlflowTracker", "NoTracker", "SyncLoop", "Tracker", "make_tracker"]

LONGEST_NAME = 250  # characters of a run's name that a database of MLflow keeps
BATCH = 1000  # metrics of one request: MLflow's own limit
CLIENT = ("mlflow", "sqlalchemy", "requests", "urllib3")  # whose errors a client lets through
OWNER = "ppc.created_ms"  # tag of an experiment: when the study was made that it is of, which a moved storage keeps
SAVE_EVERY_S = 2.0  # the memory is of all trials: written after each thing sent, it would make a study's cost quadratic
RUN_STATUS = {
    RUNNING: RUNNING, FINISHED: FINISHED, FAILED: FAILED, KILLED: KILLED, INTERRUPTED: KILLED, STOPPED: KILLED,
}  # fmt: skip
EMPTY: dict[str, Any] = {
    "experiment": None, "tags": {}, "metrics": [], "runs": {}, "launches": {},
}  # fmt: skip


def make_tracker(option: str | None, storage: Storage, study: dict[str, Any], launch: str | None) -> Tracker:
    """The tracker that `--tracking`, else MLFLOW_TRACKING_URI, names; else MLflow in a SQLite file of the storage.

    `none` records nothing. `launch` names the launch; None goes on with the newest one.
    """
    uri = tracking_uri(option, storage)
    return NoTracker() if uri == "none" else MlflowTracker(uri, storage, study, launch)


def _client(uri: str) -> Any:
    """A client of that URI that never waits long and says little; makes the schema of a new database file."""
    for name, value in {
        **QUIET, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    for module in ("mlflow", "sqlalchemy", "alembic", "<sqlalchemy"):  # their deprecations are not ours to mend
        warnings.filterwarnings("ignore", module=module)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if is_server(uri) or not uri.startswith("sqlite:///"):
        return MlflowClient(uri, registry_uri=uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=60):  # two processes that make the schema at once break it
        return MlflowClient(uri, registry_uri=uri)


class MlflowTracker:
    """Sends a study to MLflow: one experiment a study, one parent run a launch, one child run a trial."""

    def __init__(self, uri: str, storage: Storage, study: dict[str, Any], launch: str | None) -> None:
        self.uri = check_uri(uri)
        self.storage, self.study = storage, study
        self._folder = storage.study(study["name"]).path
        self._launch = launch
        self._mlflow: Any = None
        self._looked = False  # at MLflow's runs, since this process became the writer
        self._unanswered = False  # a run was asked for and no answer came: the server may make it later
        self._memory = EMPTY  # of this URI: the experiment, runs by trial key, parent runs by launch
        self._saved_at = 0.0

    # -- memory: what was sent

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer of this study, with its memory and a server that answers."""
        try:
            with locked(self._folder / ".tracking.lock", timeout_s=10):
                probe(self.uri)
                self._looked = False
                everything = read_json(self._folder / "tracking.json") or {}
                self._memory = json.loads(json.dumps(EMPTY)) | everything.get(safe_uri(self.uri), {})
                self._saved_at = time.monotonic()
                try:
                    if self._mlflow is None or self._memory["experiment"] is None:
                        self._connect()
                    yield
                except BaseException:
                    with suppress(OSError):  # the first error says more
                        self._save()
                    raise
                self._save()
        except LockedError as error:
            raise TrackingError(f"another process is sending study {self.study['name']} to MLflow") from error
        except BaseException as error:
            self._mlflow = None  # look at everything anew next time
            if type(error).__module__.partition(".")[0] in CLIENT:  # it may hold the URI's password
                raise TrackingError(words_of(error, self.uri)) from None
            raise

    def _save_in_time(self) -> None:
        """`_save`, unless it was a moment ago: `_writing` does at its end."""
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        everything = read_json(self._folder / "tracking.json") or {}
        write_json(self._folder / "tracking.json", {**everything, safe_uri(self.uri): self._memory})

    def _once(self, entry: dict[str, Any], what: str, mark: Any, send: Callable[[], object]) -> None:
        """Send what was not sent with this mark; it is remembered only after the send succeeded."""
        if entry["sent"].get(what) != mark:
            send()
            entry["sent"][what] = mark
            self._save_in_time()

    def _connect(self) -> None:
        if self.uri == default_uri(self.storage):
            move_artifacts(self.storage)
        self._mlflow = _client(self.uri)
        name, own = f"ppc/{self.study['name']}", str(self.study["created_ms"])
        found = self._mlflow.get_experiment_by_name(name)
        if found is not None and found.tags.get(OWNER, own) != own:  # a study of that name in another storage
            name = f"{name} {own}"
            found = self._mlflow.get_experiment_by_name(name)
        if found is None:  # a database has no place for artifacts: without ours they would go to the current folder
            place = artifact_place(self.storage, self.study["name"])
            number = self._mlflow.create_experiment(name, None if is_server(self.uri) else place)
        elif found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise TrackingError(f"experiment {name} was deleted in MLflow; bring it back with: {restore}")
        else:
            number = found.experiment_id
        if found is None or OWNER not in found.tags:
            self._mlflow.set_experiment_tag(number, OWNER, own)
        if self._memory["experiment"] != number:
            self._memory = {**json.loads(json.dumps(EMPTY)), "experiment": number}
        self._reconcile()

    def _reconcile(self) -> None:
        """Make the memory agree with MLflow: runs that are gone are forgotten, runs it does not know are taken up."""
        from mlflow.entities import ViewType

        known: dict[str, dict[str, Any]] = {"trial": {}, "study": {}}
        twice: list[Any] = []
        token = None
        while True:
            numbers, order = [self._memory["experiment"]], ["attributes.start_time ASC"]
            page = self._mlflow.search_runs(numbers, "", ViewType.ALL, 1000, order, token)
            for run in page:
                name = run.data.tags.get("ppc.trial_key") or run.data.tags.get("ppc.launch")
                if not name or run.data.tags.get("ppc.kind") not in known:
                    continue
                first = known[run.data.tags["ppc.kind"]].setdefault(name, run)
                if run.data.tags["ppc.kind"] == "trial":
                    self._memory["metrics"] = sorted({*self._memory["metrics"], *run.data.metrics})
                if first is not run and run.info.lifecycle_stage == "active":
                    twice.append(run)
            if not (token := page.token):
                break
        for run in twice:  # made by a request that was sent again, since its answer did not come in time
            self._mlflow.delete_run(run.info.run_id)
        for part, kind in (("runs", "trial"), ("launches", "study")):
            before, self._memory[part] = self._memory[part], {}
            for name, run in known[kind].items():
                entry = before.get(name)
                if entry is None or entry["id"] != run.info.run_id:
                    own = {tag: value for tag, value in run.data.tags.items() if tag.startswith("ppc.")}
                    entry = {"id": run.info.run_id, "sent": {"tags": own}}
                entry["deleted"] = run.info.lifecycle_stage == "deleted"  # by a person: it stays deleted
                self._memory[part][name] = entry
        self._looked = True

    def _run(self, part: str, name: str, run_name: str, tags: dict[str, str], start_ms: int | None) -> dict[str, Any]:
        """The one run of a trial or a launch, made where there is none."""
        if name not in self._memory[part] and not self._looked:
            self._reconcile()  # it may be there: made just before a crash, or by a request whose answer got lost
        if name not in self._memory[part]:
            try:
                run = self._mlflow.create_run(self._memory["experiment"], start_ms, tags, run_name[:LONGEST_NAME])
            except Exception:
                self._unanswered = True
                raise
            self._memory[part][name] = {"id": run.info.run_id, "sent": {"name": run_name}, "deleted": False}
        entry: dict[str, Any] = self._memory[part][name]
        return entry

    # -- the study and its launches

    def sync(self, rows: Sequence[TrialRow], *, final: bool = False, note: str = "") -> None:
        """See `Tracker.sync`. A trial that cannot be sent does not keep back the others; the first error is raised."""
        with self._writing():
            if final and self._unanswered:
                self._reconcile()
                self._unanswered = False
            launch = self._open_launch(final)
            problems: list[str] = []
            cause: Exception | None = None
            for row in {row.key: row for row in reversed(rows)}.values():
                try:
                    if row.state != PENDING:
                        self._sync_trial(row, launch["id"])
                except Exception as error:  # whatever the client raises
                    probe(self.uri)  # no server, no other trial
                    cause = cause or error
                    problems.append(f"{row.label}: {words_of(error, self.uri)}")
            self._end_left_out({row.key for row in rows})
            self._close_launch(rows, launch, final)
            tags = page_tags(self.study, self._memory, note)
            send_page(self._mlflow, self._memory["experiment"], tags, before=self._memory["tags"])
            if problems:
                raise TrackingError("; ".join(problems[:3])) from cause

    def attach(self, paths: Sequence[StoragePath]) -> None:
        """See `Tracker.attach`."""
        with self._writing():
            launch = self._open_launch(final=True)
            for path in paths:
                if path.suffix == ".png":
                    self._attach_picture(launch, path)
                    continue
                text = read_bytes(path).decode()
                mark = content_key(text)
                if not launch["deleted"] and launch["sent"].get(f"file/{path.name}") != mark:
                    self._mlflow.log_text(launch["id"], text, f"report/{path.name}")
                    launch["sent"][f"file/{path.name}"] = mark

    def _attach_picture(self, launch: dict[str, Any], path: StoragePath) -> None:
        picture = read_bytes(path)
        mark = sha256(picture).hexdigest()
        if not launch["deleted"] and launch["sent"].get(f"file/{path.name}") != mark:
            with Image.open(BytesIO(picture)) as image:
                self._mlflow.log_image(launch["id"], image, artifact_file=f"figures/{path.name}")
            launch["sent"][f"file/{path.name}"] = mark

    def close(self) -> None:
        """See `Tracker.close`."""
        self._mlflow = None

    def _open_launch(self, final: bool) -> dict[str, Any]:
        names = [name for name in names_in(self._folder / "launches") if name.isdigit()]
        name = self._launch or max(names, default="000")
        tags = {"ppc.kind": "study", "ppc.launch": name, **record.code_tags(self.study)}
        launch = self._run("launches", name, f"{self.study['name']} launch {name}", tags, None)
        for other_name, other in self._memory["launches"].items():
            seen_ms = other.get("seen_ms", 0)
            dead = int(other_name) < int(name) and "ended" not in other  # a study has one launch at a time
            if dead and not other["deleted"]:  # its process was killed
                self._mlflow.set_terminated(other["id"], KILLED, seen_ms or None)
                other["ended"] = KILLED
        launch["seen_ms"] = now_ms()
        if not final and launch.get("ended") and not launch["deleted"]:
            self._mlflow.update_run(launch["id"], RUNNING)
        if not final:
            launch.pop("ended", None)
        if "shown" not in launch:  # whoever ends what a killed process left running reads of it in the file
            launch["shown"] = True
            self._save()
        return launch

    def _close_launch(self, rows: Sequence[TrialRow], launch: dict[str, Any], final: bool) -> None:
        if launch["deleted"]:
            return
        states = ", ".join(f"{state} {n}" for state, n in counts(list(rows)).items())
        self._once(launch, "states", states, lambda: self._log(launch["id"], tags={"ppc.states": states}))
        for variant, points in record.axis_curves(self.study, rows, final):
            mark = [list(point) for point in points]
            self._once(launch, f"curve/{variant}", mark, partial(self._log, launch["id"], points))
        if final:
            words = {row.state for row in rows}
            ended = FINISHED if words <= {FINISHED, STOPPED} else FAILED if FAILED in words else KILLED
            if launch.get("ended") != ended:
                self._mlflow.set_terminated(launch["id"], ended)
                launch["ended"] = ended

    # -- one trial

    def _sync_trial(self, row: TrialRow, parent: str) -> None:
        state = self.storage.trial(row.key).state()
        tags = record.trial_tags(row, self.study, (row.result or state).get("host"))
        params = record.trial_params(row)
        entry = self._run("runs", row.key, row.label, {**tags, "mlflow.parentRunId": parent}, row.started_ms)
        finished_ms = row.result and row.result["finished_ms"]
        whole = content_key([row.state, row.attempt, finished_ms, row.label, tags, params])
        if entry["deleted"] or entry["sent"].get("whole") == whole:
            return
        run, label = entry["id"], row.label
        self._once(entry, "name", label, lambda: self._mlflow.update_run(run, name=label[:LONGEST_NAME]))
        self._once(entry, "tags", tags, lambda: self._set_tags(run, entry["sent"].get("tags", {}), tags))
        self._once(entry, "params", params, lambda: self._add_params(run, params))
        self._once(
            entry, "config", 1, lambda: self._mlflow.log_text(run, record.config_yaml(row.config), "config.yaml")
        )
        self._once(entry, "data", 1, lambda: self._log_data(run, row))
        for folder in stage_dirs(self.storage, row):
            self._sync_stage(entry, folder)
        if (error := row.error) is not None:
            text, name = str(error.get("traceback")), f"error/attempt-{error.get('attempt', row.attempt)}.txt"
            self._once(entry, "error", [name, error.get("time_ms")], lambda: self._mlflow.log_text(run, text, name))
        if (result := row.result) is not None:
            self._once(entry, "result", result["finished_ms"], lambda: self._log_result(entry, result))
        ended_ms = None if row.state == RUNNING else row.ended_ms or state.get("heartbeat_ms")
        status = RUN_STATUS[row.state]
        self._once(entry, "status", [status, ended_ms], lambda: self._set_status(run, status, ended_ms))
        if row.state != RUNNING:
            entry["sent"]["whole"] = whole

    def _end_left_out(self, keys: set[str]) -> None:
        """End the runs of trials that are no longer of the study: no row tells of them."""
        for key, entry in self._memory["runs"].items():
            if key in keys or entry["deleted"] or entry["sent"].get("status", [RUNNING])[0] != RUNNING:
                continue
            trial = self.storage.trial(key)
            state = trial.state()
            word = state.get("state", KILLED) if trial.result() is None else FINISHED
            if word != RUNNING or not alive(state):
                ended_ms = state.get("ended_ms") or state.get("heartbeat_ms")
                status = RUN_STATUS[INTERRUPTED if word == RUNNING else word]
                self._once(
                    entry, "status", [status, ended_ms], partial(self._set_status, entry["id"], status, ended_ms)
                )

    def _sync_stage(self, entry: dict[str, Any], folder: StageDir) -> None:
        name, manifest = f"{folder.stage}/{folder.key}", folder.manifest()
        mark = entry["sent"].get(f"journal/{name}", [0, -1])
        points, end = record.new_points(folder / "journal.jsonl", mark)
        if end != mark:
            self._once(entry, f"journal/{name}", end, lambda: self._log_trial(entry["id"], points))
        if manifest is None:
            return
        scores = record.stage_points(manifest)
        names = sorted({point.name for point in scores})  # a result is not to send them again
        self._once(entry, f"metrics/{name}", names, partial(self._log_trial, entry["id"], scores))
        pictures = [folder / "overlays" / picture for picture in names_in(folder / "overlays")]
        fresh = [path for path in pictures if path.suffix == ".png" and f"overlay/{path.stem}" not in entry["sent"]]
        if not fresh:
            return
        there = [item.path.rpartition("/")[2] for item in self._mlflow.list_artifacts(entry["id"], "images")]
        for path in fresh:  # each is stored under a new name, so one that is there must not be sent again
            key = f"cam/{record.image_name(path.stem)}"
            if not any(item.startswith(key.replace("/", "~") + "+step+") for item in there):
                with Image.open(BytesIO(read_bytes(path))) as picture:
                    image = Image.fromarray(square(np.asarray(picture.convert("RGB"))))
                self._mlflow.log_image(entry["id"], image, key=key, step=0, synchronous=True)
            entry["sent"][f"overlay/{path.stem}"] = 1

    def _log(self, run: str, points: Iterable[Point] = (), tags: Mapping[str, str] | None = None) -> None:
        from mlflow.entities import Metric, RunTag

        if tags:
            self._mlflow.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)
        metrics = [Metric(metric_name(p.name), p.value, p.time_ms, p.step) for p in points if is_number(p.value)]
        for start in range(0, len(metrics), BATCH):
            self._mlflow.log_batch(run, metrics[start : start + BATCH], synchronous=True)

    def _log_trial(self, run: str, points: Sequence[Point]) -> None:
        self._log(run, points)
        known = self._memory["metrics"]
        self._memory["metrics"] = sorted({*known, *(metric_name(p.name) for p in points if is_number(p.value))})

    def _set_tags(self, run: str, before: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        self._log(run, tags=tags)
        for name in [name for name in before if name.startswith("ppc.") and name not in tags]:  # such as ppc.error
            try:
                self._mlflow.delete_tag(run, name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _add_params(self, run: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        there = self._mlflow.get_run(run).data.params  # MLflow refuses to change one, even from 4 to 4.0
        fresh = [Param(name, value) for name, value in params.items() if name not in there]
        for start in range(0, len(fresh), 100):
            self._mlflow.log_batch(run, params=fresh[start : start + 100], synchronous=True)

    def _log_data(self, run: str, row: TrialRow) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [Dataset(name, digest, "local", uri) for name, digest, uri in record.datasets(row, self.study)]
        self._mlflow.log_inputs(run, [DatasetInput(d, [InputTag("mlflow.data.context", "train")]) for d in datasets])

    def _log_result(self, entry: dict[str, Any], result: dict[str, Any]) -> None:
        self._log_trial(run := entry["id"], record.result_points(result, self.study["metric"], entry["sent"]))
        if (table := record.class_table(result)) is not None:
            self._mlflow.log_text(run, json.dumps(table), "per_class_iou.json")
            self._log(run, tags={"mlflow.loggedArtifacts": '[{"path": "per_class_iou.json", "type": "table"}]'})

    def _set_status(self, run: str, status: str, ended_ms: int | None) -> None:
        if status == RUNNING:
            self._mlflow.update_run(run, RUNNING)
        else:
            self._mlflow.set_terminated(run, status, ended_ms)

"""Studies as Ray jobs: send one to a cluster, follow and stop it, from a machine that reaches only the job server.

A job is the command that a user would type on the head: it runs there, with this machine's `ppc` and the experiment
files packed along. All that lasts is on the storage, so a stopped or dead job is taken up by another one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from ppc.checks import check_trial, weights_of
from ppc.loading import load_study, of_trial
from ppc.pack import JOB_ENV, STOP_WAIT_S, LaunchOptions, experiment_files, is_absolute, job_env, packed, shared_storage
from ppc.published import check_published
from ppc.study import expand
from ppc.twins import name_of

# The driver of a study belongs on the head, and takes no CPU from the trials.
ON_HEAD = {"node:__internal_head__": 0.001}
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER = "ppc-answer"  # the line after which the log of a question is its answer
MAX_BROKEN = 5  # connections in a row that break, with nothing new, while a log is followed
PAUSE_S = 1.0  # before a broken connection is made again


@dataclass(frozen=True)
class Job:
    """A launch of a study on a cluster, as its job server knows it."""

    id: str
    study: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    storage: str
    message: str
    exit_code: int | None
    started_ms: int | None

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self.status in DONE


# -- what users do


def submit(file: Path, address: str, *, storage: str, options: LaunchOptions | None = None) -> str:
    """Send a study to the cluster behind a job server (`http://HEAD:8265`); the id of its job.

    ValueError names what is wrong with the file, the storage, the package or the cluster, before anything is sent.
    """
    options = options or LaunchOptions()
    study = load_study(file, overrides=options.sets)
    trial_sets = of_trial(options.sets)
    check_published(study, overrides=trial_sets)
    for spec in expand(study, overrides=trial_sets, twin=options.twin, check=check_trial):
        cfg = spec.config
        weights = {f"{section}.weights": file for section, file in weights_of(cfg).items()}
        for name, path in {"data.root": cfg.data.root, **weights}.items():
            if path is not None and not is_absolute(path):
                raise ValueError(
                    f"{name}: {path} means another file on every node; give its absolute path on the cluster, "
                    f"for instance --set {name}=/shared/{path}"
                )
    name = name_of(study.name, options.twin)
    with packed(options.working_dir, experiment_files(file)) as (folder, names):
        words = ["ppc", "study", "launch", names[0]]
        words += [word for item in options.sets for word in ("--set", item)] + (
            [] if options.twin == "full" else [f"--{options.twin}"]
        )
        return _launch(address, name, storage, words, folder, options)


def resubmit(
    study: str,
    address: str,
    words: Sequence[str] = (),
    *,
    storage: str | None = None,
    options: LaunchOptions | None = None,
) -> str:
    """Send `ppc study resume` with some more words; the id of its job. Without a storage: that of its last job."""
    options = options or LaunchOptions()
    storage = storage or _Server(address).last_storage(study)
    with packed(options.working_dir, []) as (folder, _):
        return _launch(address, study, storage, ["ppc", "study", "resume", study, *words], folder, options)


def ask(
    study: str | None,
    address: str,
    words: Sequence[str],
    *,
    storage: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, int]:
    """Run a command that only reads (`ppc study status NAME`) on the head; what it printed, and its exit status.

    For users whose machine does not see the storage: without one, that of the study's last job (of any study's, for
    None). `say` gets the text in pieces, as it comes. It takes the seconds that a process and its imports take there.
    """
    server = _Server(address)
    asked = shlex.join([*words, "--storage", shared_storage(storage or server.last_storage(study))])
    entry = f"echo {ANSWER}; exec {asked}"  # Ray's own line of the command can come after what a quick one prints
    # The head's own PPC_ADDRESS must not make it ask itself; tables are as wide as this terminal.
    env = {**JOB_ENV, "PPC_ADDRESS": "", "COLUMNS": str(shutil.get_terminal_size((160, 24)).columns)}
    with packed(None, []) as (folder, _):
        job_id = server.post(entry, folder, env, {"ppc_question": study or ""})
    told, first, text, said = f"Running entrypoint for job {job_id}: {entry}\n", f"\n{ANSWER}\n", "\n", 0
    try:
        for piece in server.follow(job_id):
            text = (text + piece).replace(told, "")
            answer = text.partition(first)[2]
            whole = answer[: answer.rfind("\n") + 1]  # the rest may be the beginning of Ray's line
            say(whole[said:])
            said = max(said, len(whole))
    except BaseException:  # an interrupt here must not leave a `--watch` running there
        with suppress(Exception):
            server.call("stop_job", job_id)
        raise
    answer = text.partition(first)[2]
    say(answer[said:])
    job = server.job(job_id)
    if job.exit_code is None:
        raise ValueError(f"the cluster could not run `{asked}`: {job.message or job.status}")
    return answer, job.exit_code


def logs(job_id: str, address: str, *, follow: bool = False) -> Iterator[str]:
    """What a job printed, in pieces; with `follow` until it ends, over broken connections."""
    server = _Server(address)
    server.job(job_id)
    if follow:
        yield from server.follow(job_id)
    else:
        yield str(server.call("get_job_logs", job_id))


def status(job_id: str, address: str) -> Job:
    """How a job stands; ValueError when the cluster has none of that id."""
    return _Server(address).job(job_id)


def stop(job_id: str, address: str, *, wait_s: float = STOP_WAIT_S + 15) -> Job:
    """Ask a job to end and wait for it: its trials save what they have, and `resume` takes them up."""
    server = _Server(address)
    job = server.job(job_id)
    if not job.ended:
        server.call("stop_job", job_id)
    deadline = time.monotonic() + wait_s
    while not job.ended:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{job_id} was told to stop but is {job.status} after {wait_s:g} s: ppc logs {job_id} "
                f"--address {address}"
            )
        time.sleep(0.5)
        job = server.job(job_id)
    return job


def find_jobs(address: str, study: str | None = None) -> list[Job]:
    """Launches that this cluster has seen, oldest first: all, or those of a study."""
    return _Server(address).launches(study)


# -- the job server


class _Server:
    """A job server; every error of it is one ValueError that says what to do."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check_answers(self.address)
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        with self._clear(), _no_ray_address():
            self._client = JobSubmissionClient(self.address)

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ValueError(
                f"{self.address} wants a token: export RAY_AUTH_MODE=token, and put the token (on the head: ray "
                "get-auth-token) into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from error
        except requests.exceptions.RequestException as error:
            raise ValueError(f"{self.address} went away ({type(error).__name__})") from error
        except RuntimeError as error:  # what the job server answers
            raise ValueError(f"{self.address}: {error}") from error

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """A method of Ray's client."""
        with self._clear():
            return getattr(self._client, name)(*args, **options)

    def job(self, job_id: str) -> Job:
        """A job of this cluster."""
        try:
            return _job(self.call("get_job_info", job_id))
        except ValueError as error:
            if "does not exist" not in str(error):
                raise
            known = ", ".join(job.id for job in self.launches(None)[-5:]) or "none"
            raise ValueError(f"no job {job_id} at {self.address}; the last ones there: {known}") from error

    def launches(self, study: str | None) -> list[Job]:
        """Jobs that launched something, questions and foreign jobs left out."""
        jobs = [_job(details) for details in self.call("list_jobs") if "ppc_study" in (details.metadata or {})]
        return sorted(
            (job for job in jobs if study in (None, job.study)), key=lambda job: (job.started_ms or 0, job.id)
        )

    def last_storage(self, study: str | None) -> str:
        """Storage of the last launch of a study, or of any."""
        jobs = self.launches(study)
        if not jobs:
            name = "study" if study is None else f"study {study}"
            raise ValueError(f"{self.address} has launched no {name} since it started; pass --storage")
        return jobs[-1].storage

    def post(
        self, entry: str, folder: Path, env: Mapping[str, str], metadata: Mapping[str, str], job_id: str | None = None
    ) -> str:
        """Send a command with its folder."""
        runtime = {"working_dir": str(folder), "env_vars": dict(env)}
        options = {"metadata": dict(metadata), "submission_id": job_id, "entrypoint_resources": ON_HEAD}
        return str(self.call("submit_job", entrypoint=entry, runtime_env=runtime, **options))

    def follow(self, job_id: str) -> Iterator[str]:
        """The log until the job ends; a new connection goes on where a broken one stopped."""
        sent = broken = 0
        while True:
            try:
                seen = 0
                for text in _tail(lambda: self._client.tail_job_logs(job_id)):
                    new, seen = text[max(0, sent - seen) :], seen + len(text)
                    sent = max(sent, seen)
                    if new:
                        broken = 0
                        yield new
                if self.job(job_id).ended:  # else the connection ended, and not the job
                    yield str(self.call("get_job_logs", job_id))[sent:]
                    return
            except (ValueError, OSError, RuntimeError, aiohttp.ClientError) as error:
                broken += 1
                if broken > MAX_BROKEN:
                    raise ValueError(f"the log of {job_id} cannot be followed: {error}") from error
            time.sleep(PAUSE_S)


def _check_answers(address: str) -> None:
    """ValueError when nothing, or something else, answers within seconds; Ray's client would wait for minutes."""
    if not re.match(r"https?://[^/]+$", address):
        raise ValueError(f"{address} is not the address of a job server, which looks like http://HEAD:8265")
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5) as answer:
            version = str(json.loads(answer.read())["ray_version"])
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it wants a token, which Ray's client has if there is one
            return
        raise ValueError(f"{address} answers, but not as Ray's job server (HTTP {error.code})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{address} answers, but not as Ray's job server") from error
    except OSError as error:
        raise ValueError(
            f"no job server answers at {address}: {getattr(error, 'reason', None) or error}; is the head running, and "
            "can this machine reach its port? (a tunnel: ssh -N -L 8265:localhost:8265 HEAD)"
        ) from error
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ValueError(f"the cluster runs Ray {version}, this machine {ray.__version__}; install one version")


@contextmanager
def _no_ray_address() -> Iterator[None]:
    """Ray lets these variables win over the address that a user typed."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _launch(address: str, study: str, storage: str, words: list[str], folder: Path, options: LaunchOptions) -> str:
    env = job_env(options, os.environ)
    words = [*words, "--address", "auto", "--storage", shared_storage(storage), *options.words()]
    metadata = {"ppc_study": study, "ppc_storage": storage}
    server = _Server(address)
    for _ in range(5):
        jobs = server.launches(study)
        for job in jobs:
            if not job.ended and job.storage == storage:
                raise ValueError(
                    f"study {study} is being run by {job.id}; follow it: ppc logs {job.id} -f --address {address}, "
                    f"or end it: ppc study stop {study} --address {address}"
                )
        used = [int(tail) for job in jobs if (tail := job.id.rpartition("-")[2]).isdigit()]
        job_id = f"ppc-{study}-{1 + max(used, default=0)}"
        try:
            # exec: the signal of a stop reaches ppc itself and no shell around it
            return server.post(f"exec {shlex.join(words)}", folder, env, metadata, job_id)
        except ValueError as error:
            if "already exists" not in str(error):
                raise
    raise ValueError(f"others submit {study} to {server.address} at the same time; try again")


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=str(details.submission_id or details.job_id),
        study=metadata.get("ppc_study", ""),
        status=str(details.status),
        storage=metadata.get("ppc_storage", ""),
        message=str(details.message or ""),
        exit_code=details.driver_exit_code,
        started_ms=details.start_time,
    )


def _tail(open_log: Callable[[], Any]) -> Iterator[str]:
    """The pieces of an asynchronous log, for callers that are not."""
    loop = asyncio.new_event_loop()
    pieces = open_log()
    try:
        while True:
            yield loop.run_until_complete(anext(pieces))
    except StopAsyncIteration:
        return
    finally:
        loop.run_until_complete(pieces.aclose())
        loop.close()

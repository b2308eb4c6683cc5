"""What goes along with a study that is sent to a cluster: code, experiment files, environment. Imports no Ray."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import ppc
from ppc.loading import parse
from ppc.redact import SECRET, safe_uri
from ppc.study_config import Twin

MAX_PACK_MIB = 100
# `/name` is left out at the top of the folder alone: ppc/data is code.
EXCLUDES = (
    ".*", "__pycache__", "*.egg-info", "venv", "node_modules", "mlruns", "mlflow.db", "ppc-storage", "/data", "/ppc",
)  # fmt: skip
STOP_WAIT_S = 120
JOB_ENV = {
    "RAY_JOB_STOP_SIGNAL": "SIGINT",  # the launch ends by itself: checkpoints, states, report
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),  # Ray's own 3 s are too few for that
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
PASSED_ENV = (
    "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
    "AWS_DEFAULT_REGION", "RAY_AUTH_MODE", "PPC_DEBUG",
)  # fmt: skip
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class LaunchOptions:
    """What a submitted launch is told beside its file and its storage."""

    sets: Sequence[str] = ()
    twin: Twin = "full"
    max_concurrent: int | None = None
    tracking: str | None = None  # MLflow URI as the cluster sees it, or `none`
    env: Mapping[str, str] = field(default_factory=dict)  # variables of the job, beside `PASSED_ENV`
    working_dir: Path | None = None  # folder to pack beside the experiment's files
    code: Mapping[str, Any] | None = None  # version and commit of this code, which a package cannot tell

    def words(self) -> list[str]:
        """The options that `launch` and `resume` share, as command line words."""
        limit = [] if self.max_concurrent is None else ["--max-concurrent", str(self.max_concurrent)]
        return limit + ([] if self.tracking is None else ["--tracking", self.tracking])


# -- the package


def experiment_files(file: Path) -> list[Path]:
    """The file of an experiment and all that it extends."""
    found: list[Path] = []
    todo = [file.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.append(path)
        raw = parse(path.read_bytes().decode("utf-8-sig"), str(path))
        sections = [raw, raw.get("base")] if isinstance(raw, Mapping) else []
        targets = [section["extends"] for section in sections if isinstance(section, Mapping) and "extends" in section]
        todo += [(path.parent / target).resolve() for target in targets]
    return found


@contextmanager
def packed(working_dir: Path | None, files: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """A folder with this `ppc`, the files and, if given, a working folder; and the paths of the files in it.

    Hidden files, environments, data and storage of the working folder stay out (`EXCLUDES`), and so do links to
    folders. ValueError when the rest is larger than `MAX_PACK_MIB`.
    """
    with tempfile.TemporaryDirectory(prefix="ppc-pack-") as temporary:
        target = Path(temporary)
        code = Path(ppc.__file__).parent
        plan = {target / "ppc" / path.relative_to(code): path for path in _walk(code, ("__pycache__", ".*"))}
        base, prefix = code, target
        if working_dir is not None:
            base = working_dir.resolve()
            plan |= {target / path.relative_to(base): path for path in _walk(base, EXCLUDES)}
            if outside := [str(path) for path in files if not path.is_relative_to(base)]:
                raise ValueError(f"{', '.join(outside)}: not in the folder to pack, {base}; name one that holds all")
        elif files:
            base, prefix = Path(os.path.commonpath([path.parent for path in files])), target / "experiment"
        there_of = {path: prefix / path.relative_to(base) for path in files}
        plan |= {there: path for path, there in there_of.items()}
        _refuse_large(plan, target)
        for there, here in plan.items():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)  # a new date: zip refuses those before 1980
        yield target, [str(there.relative_to(target)) for there in there_of.values()]


def _walk(root: Path, excludes: Sequence[str]) -> Iterator[Path]:
    def out(name: str, top: bool) -> bool:
        return any(fnmatch(name, e) or (top and e == f"/{name}") for e in excludes)

    for folder, folders, names in os.walk(root):
        top = Path(folder) == root
        folders[:] = sorted(name for name in folders if not out(name, top))
        yield from (Path(folder) / n for n in sorted(names) if not out(n, top) and (Path(folder) / n).is_file())


def _refuse_large(plan: Mapping[Path, Path], target: Path) -> None:
    sizes: dict[str, int] = {}
    for there, here in plan.items():
        top = there.relative_to(target).parts[0]
        sizes[top] = sizes.get(top, 0) + here.stat().st_size
    if (total := sum(sizes.values())) > MAX_PACK_MIB << 20:
        most = sorted(sizes, key=lambda name: -sizes[name])[:3]
        largest = ", ".join(f"{name} {sizes[name] / 2**20:.0f} MiB" for name in most)
        raise ValueError(
            f"{total / 2**20:.0f} MiB to pack, more than {MAX_PACK_MIB} (largest: {largest}); data and weights belong "
            "on storage that all nodes see: name them by absolute paths and pack a smaller folder"
        )


# -- the environment


def job_env(options: LaunchOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of the job. ValueError for secrets, which any visitor of Ray's dashboard could read there."""
    passed = {name: environ[name] for name in PASSED_ENV if environ.get(name)}
    uri = passed.get("MLFLOW_TRACKING_URI", "")
    if options.tracking is not None or "MLFLOW_TRACKING_URI" in options.env:
        passed.pop("MLFLOW_TRACKING_URI", None)
    elif uri and (not uri.startswith(("http://", "https://")) or urlsplit(uri).hostname in LOOPBACK):
        raise ValueError(
            f"MLFLOW_TRACKING_URI is {safe_uri(uri)}, which on the cluster means another place than here; "
            "pass --tracking URI as the cluster sees it (or --tracking none), or unset the variable"
        )
    env = {**JOB_ENV, **passed, **options.env}
    if options.code is not None:
        env["PPC_CODE"] = json.dumps(options.code)
    for name, value in env.items():
        if SECRET.search(name):
            raise ValueError(f"{name} would show in Ray's dashboard; set it in the environment of the cluster's nodes")
        _no_password(name, value)
    _no_password("--tracking", options.tracking or "")
    return env


def _no_password(name: str, value: str) -> None:
    if "://" in value and "@" in urlsplit(value).netloc:
        raise ValueError(
            f"{name} {safe_uri(value)} holds a user or password, which would show in Ray's dashboard; set "
            "MLFLOW_TRACKING_USERNAME and _PASSWORD (or the keys of the storage) in the environment of the nodes"
        )


def is_absolute(path: str) -> bool:
    return "://" in path or PurePosixPath(path).is_absolute()


def shared_storage(storage: str) -> str:
    if not is_absolute(storage):
        raise ValueError(
            f"storage {storage} is a folder of this machine; pass --storage with an absolute path or a URI "
            "(/shared/ppc, s3://bucket/ppc) that all nodes of the cluster see"
        )
    _no_password("storage", storage)
    return storage

"""Helpers that several test files share."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppc.places import StoragePath, storage_path

OF_TESTS = ("PPC_SHARED", "PPC_SCREENSHOTS", "PPC_SOAK", "PPC_ALL_EXTRAS")  # what the tests themselves are told by
GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and so may whoever runs these tests: then no
    test, and no process that one starts, could be interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# `make test` installs every extra: there a test that is skipped since a package is missing has failed.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A skip within a test."""
    return _no_skip_of_an_extra((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A skip of a whole file."""
    return _no_skip_of_an_extra((yield))


def _no_skip_of_an_extra(report: Any) -> Any:
    if report.skipped and "could not import" in str(report.longrepr) and os.environ.get("PPC_ALL_EXTRAS"):
        report.outcome, report.longrepr = "failed", str(report.longrepr)
    return report


@pytest.fixture(autouse=True, scope="session")
def nothing_of_the_users() -> Iterator[None]:
    """What users export to work with the project, servers and webhooks among it, is nothing to its tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("PPC_", "MLFLOW_", "RAY_ADDRESS")) and name not in OF_TESTS:
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def threads_are_as_before() -> Iterator[None]:
    """A trial in this process sets torch's threads to its own CPUs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def interrupts_work_afterwards() -> Iterator[None]:
    """Tune and Ray Train leave handlers of their own, and with that of a run that has ended an interrupt does nothing:
    whoever calls them gives SIGINT its handler back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making its schema takes seconds."""
    from ppc import tracking

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking._client(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket of this file's tests."""
    from s3_server import BUCKET, s3_server

    with pytest.MonkeyPatch.context() as patch, s3_server(patch):
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty place on storage, of either kind."""
    if request.param == "folder":
        return storage_path(tmp_path / "root")
    return storage_path(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}")


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file of stored official values, tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)

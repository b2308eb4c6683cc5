"""How much a cluster holds, and a trial that waits while others use it; no cluster is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_study import make_study

from ppc import ray_runtime
from ppc.artifacts import Storage, write_json
from ppc.config import RuntimeConfig
from ppc.ledger import TrialRow, read_rows
from ppc.ray_runtime import START_TRIES, RayRuntime, room_for
from ppc.ray_study import concurrency

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Ray are not ours


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    found = [{"Alive": True, "Resources": one} for one in resources]
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*found, gone])
    total = {name: sum(one.get(name, 0) for one in resources) for one in resources for name in one}
    monkeypatch.setattr("ray.cluster_resources", lambda: total)


@pytest.mark.parametrize(
    ("gpus", "share", "fit"),
    [
        (1, 1, 1), (4, 1, 4), (4, 2, 2), (3, 2, 1), (1, 0.5, 2), (1, 0.25, 4), (1, 0.2, 5), (1, 0.1, 10), (2, 0.2, 10),
        (1, 0.05, 20), (2, 0.6, 2), (3, 0.75, 3), (4, 0.3, 12), (0, 0.5, 0),
    ],
)  # fmt: skip
def test_a_share_of_a_gpu_is_of_one_gpu_and_none_is_lost_to_rounding(
    gpus: float, share: float, fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, {"CPU": 64.0, "GPU": float(gpus)})
    assert room_for({"CPU": 1, "GPU": share}) == fit


def rows_of(storage: Storage, **runtime: Any) -> list[TrialRow]:
    study = make_study(storage, k=[4], seeds=list(range(12)))
    for trial in study["trials"]:
        trial["config"]["runtime"] |= runtime
    write_json(storage.study("k").path / "study.json", study)
    return read_rows(storage, study)


def test_trials_at_a_time_are_those_whose_workers_fit_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, {"CPU": 6.0}, {"CPU": 6.0, "GPU": 2.0})
    storage = Storage(tmp_path)
    assert concurrency(rows_of(storage, cpus_per_worker=4), None) == 2  # and not 12 // 4
    assert concurrency(rows_of(storage, cpus_per_worker=2, workers=2), None) == 3
    assert concurrency(rows_of(storage, cpus_per_worker=1, gpus_per_worker=0.4), None) == 4
    assert concurrency(rows_of(storage, cpus_per_worker=1, gpus_per_worker=0.4), 3) == 3
    assert concurrency(rows_of(storage, cpus_per_worker=9), None) == 1  # it says itself that it does not fit


def test_workers_that_fit_in_all_but_not_on_the_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8.0, "GPU": 3.0})
    ray_runtime.wait_for_resources({"CPU": 1, "GPU": 0.75}, 3, 0)
    with pytest.raises(ValueError, match=r"4 workers of 1 CPU and 0\.75 GPU each but the nodes have room for 3"):
        ray_runtime.wait_for_resources({"CPU": 1, "GPU": 0.75}, 4, 0)


def failing(monkeypatch: pytest.MonkeyPatch, why: Exception, times: int) -> list[int]:
    """Let Ray Train fail so often before it trains; a number for each try."""
    from ray.train.v2.api.exceptions import ControllerError

    tries: list[int] = []

    def fit(self: RayRuntime, worker: object, payload: object, cfg: RuntimeConfig) -> None:
        tries.append(len(tries))
        if len(tries) <= times:
            raise ControllerError(why)

    monkeypatch.setattr(RayRuntime, "_fit", fit)
    nodes(monkeypatch, {"CPU": 4.0, "GPU": 1.0})
    return tries


def test_a_trial_waits_as_long_as_others_use_what_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    cfg = RuntimeConfig(engine="train", gpus_per_worker=1)
    tries = failing(monkeypatch, WorkerGroupStartupTimeoutError(1), 5 * START_TRIES)
    RayRuntime(tmp_path).train(print, None, cfg)
    assert len(tries) == 5 * START_TRIES + 1
    with pytest.raises(ValueError, match="9 CPU in all but the cluster has 4"):  # that it will never have
        RayRuntime(tmp_path).train(print, None, cfg.model_copy(update={"workers": 9, "resource_wait_s": 0}))


def test_workers_that_do_not_come_up_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    tries = failing(monkeypatch, WorkerGroupStartupFailedError("no"), 99)
    with pytest.raises(RuntimeError, match="Ray Train could not run the trial's workers"):
        RayRuntime(tmp_path).train(print, None, RuntimeConfig(engine="train", max_failures=1))
    assert len(tries) == START_TRIES + 1 + 1

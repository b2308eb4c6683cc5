"""What a trial costs beside its training: from Tune's start to the first step, and from the last step to the result.

    python bench/overhead.py [--trials 4] [--steps 60]

The same training (generated scenes, SEAM with contrast on the small net, one CPU) runs three ways, all in this one run:
in a bare loop, as trials that are Ray tasks, and as trials of Ray Train. Trials run one at a time on one cluster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ppc.artifacts import Storage, read_journal
from ppc.config import TrialConfig
from ppc.definition import define, save
from ppc.ledger import read_rows
from ppc.loading import load_trial
from ppc.optim import poly_lr, set_lr
from ppc.planning import open_data, prepare_data
from ppc.ray_study import cluster, run_rows
from ppc.runtime import prepare_process
from ppc.stages.train_cam import make_job
from ppc.stages.training import Payload
from ppc.study import TrialSpec
from ppc.study_config import DesignConfig, StudyConfig, Variant

FILE = Path(__file__).resolve().parent.parent / "experiments" / "scenes_seam_ppc.yaml"
CPU = torch.device("cpu")
Row = dict[str, float | str]


def config(engine: str, steps: int) -> TrialConfig:
    """The training: one epoch of as many steps."""
    cfg = load_trial(FILE)
    changes = {"data.scenes.num_train": steps * cfg.train.batch_size, "data.scenes.num_val": 0}
    sets = [f"{path}={value}" for path, value in changes.items()]
    sets += ["train.epochs=1", "stages=[train_cam]", "runtime.log_every_steps=1", f"runtime.engine={engine}"]
    return load_trial(FILE, overrides=sets)


def bare(cfg: TrialConfig, storage: Storage) -> Row:
    """The training in a loop of its own: no journal, no checkpoint, no other process."""
    prepare_process(cfg.runtime.cpus_per_worker)
    start = time.perf_counter()
    job = make_job(Payload(cfg, storage.stage("train_cam", "bare"), {}, open_data(cfg.data, storage), make_job), CPU)
    job.net.train()
    ends = []
    for step, batch in enumerate(job.batches(0)):
        set_lr(job.optimizer, poly_lr(step, max_step=job.steps_per_epoch, power=job.poly_power))
        loss, _ = job.losses(job.net, batch, step)
        job.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        job.optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    return {
        "how": "bare loop",
        "to_first_step_s": ends[0] - start,
        "step_ms": 1000 * statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)),
        "after_last_step_s": 0.0,
        "whole_s": ends[-1] - start,
    }


def trials(cfg: TrialConfig, storage: Storage, name: str, seeds: list[int]) -> list[Row]:
    """The training as trials of a study, one at a time on the cluster that is connected; a row for each."""
    study = StudyConfig(
        name=name,
        design=DesignConfig(kind="list", variants=[Variant(name=name)]),
        trial_seeds=seeds,
    )
    specs = [TrialSpec(name, {}, seed, cfg.model_copy(update={"seed": seed})) for seed in study.trial_seeds]
    definition = define(study, specs, name, storage, any_metric=True)
    save(definition, storage)
    folder = storage.study(name)
    asked_ms = 1000 * time.time()
    run_rows(read_rows(storage, definition), storage, folder.new_launch(), max_concurrent=1)
    rows: list[Row] = []
    for row in sorted(read_rows(storage, definition), key=lambda row: storage.trial(row.key).state()["started_ms"]):
        assert row.result is not None, row.error
        points, _ = read_journal(storage.stage("train_cam", row.stages[0]["key"]) / "journal.jsonl")
        times_ms = [point["t"] for point in points]
        finished_ms = row.result["finished_ms"]
        rows.append(
            {
                "how": f"{name}, {'first trial' if not rows else 'later trials'}",
                "to_first_step_s": (times_ms[0] - asked_ms) / 1000,
                "step_ms": statistics.median(b - a for a, b in zip(times_ms, times_ms[1:], strict=False)),
                "after_last_step_s": (finished_ms - times_ms[-1]) / 1000,
                "whole_s": (finished_ms - asked_ms) / 1000,
            }
        )
        asked_ms = finished_ms  # the next one waits for nothing else
    return rows


def medians(rows: Sequence[Row]) -> Row:
    """One row for several of a kind."""
    numbers = [name for name in rows[0] if name != "how"]
    return {"how": rows[0]["how"], **{n: statistics.median(float(row[n]) for row in rows) for n in numbers}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ppc-bench-") as folder:
        storage, cfg = Storage(Path(folder)), config("task", arguments.steps)
        prepare_data(cfg.data, storage)  # generated once, outside all times
        bare(cfg, storage)  # warms the file cache up
        rows = [medians([bare(cfg, storage) for _ in range(3)])]
        start = time.perf_counter()
        with cluster(None, num_cpus=2):
            cluster_s = time.perf_counter() - start
            for place, (engine, name) in enumerate((("task", "Ray-task"), ("train", "Ray-Train"))):
                # Seeds of their own: how a trial is run is in no key, and what was run before is not run again.
                seeds = list(range(place * arguments.trials, (place + 1) * arguments.trials))
                first, *later = trials(config(engine, arguments.steps), storage, name, seeds)
                rows += [first, medians(later)]
    base = rows[0]
    print(
        f"{platform.machine()}, torch {torch.__version__}; {arguments.steps} steps a trial, {arguments.trials} trials"
    )
    print(f"cluster start: {cluster_s:.1f} s, once a launch")
    print(
        "| how | to first step, s | step, ms | ratio | last step to result, s | whole, s |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        ratio = float(row["step_ms"]) / float(base["step_ms"])
        print(
            f"| {row['how']} | {row['to_first_step_s']:.2f} | {row['step_ms']:.1f} | {ratio:.2f} "
            f"| {row['after_last_step_s']:.2f} | {row['whole_s']:.1f} |"
        )
    print(json.dumps({"rows": rows, "cluster_start_s": cluster_s}))


if __name__ == "__main__":
    main()

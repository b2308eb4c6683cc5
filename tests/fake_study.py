"""A study on storage whose files are written by hand: what trackers and reports read, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppc.artifacts import Journal, Storage, now_ms, write_json
from ppc.config import TrialConfig
from ppc.ledger import TrialRow, read_rows

CLASSES = ["background", "disc", "ring"]


def blob(image: int, trial: int) -> Any:
    """A picture (48,64,3) that is another one for each image and trial: a warm spot on a cold ground."""
    y, x = np.mgrid[:48, :64]
    heat = np.exp(-((y - 16 - 12 * image) ** 2 + (x - 20 - trial) ** 2) / (60 + 10 * trial))
    return (255 * np.stack([heat, 0.4 * heat, 1 - heat], 2)).astype(np.uint8)


class FakeStudy:
    """Variants K=0 and K=4 of two seeds each, all pending; methods move trials on."""

    def __init__(
        self, root: Path, *, name: str = "demo", ks: tuple[float, ...] = (0, 4), seeds: tuple[int, ...] = (0, 1)
    ):
        self.storage, self.name = Storage(root), name
        trials = []
        for k in ks:
            for seed in seeds:
                key = f"{name}-k{k}-s{seed}"
                config = TrialConfig(seed=seed).model_dump(mode="json")
                config["data"]["root"] = "/data/scenes"
                trials.append(
                    {
                        "key": key, "variant": f"prototype_top_k={k}", "variant_key": f"{name}-k{k}", "seed": seed,
                        "factors": {"contrast.prototype_top_k": k}, "config": config,
                        "stages": [{"name": "train_cam", "key": f"t-{key}"}, {"name": "make_seeds", "key": f"m-{key}"}],
                    }
                )  # fmt: skip
        self.study: dict[str, Any] = {
            "format": 1, "name": name, "note": "K of the prototypes", "metric": "mask_miou_train",
            "baseline": f"prototype_top_k={ks[0]}", "factors": ["contrast.prototype_top_k"], "trials": trials,
            "data": [{"name": "scenes", "root": "/data/scenes", "fingerprint": "ab" * 32, "generated": True}],
            "created_ms": now_ms() - 60_000, "trial_seeds": list(seeds),
            "code": {"version": "0.1", "commit": "c" * 40, "dirty": False},
        }  # fmt: skip
        write_json(self.storage.study(name).path / "study.json", self.study)

    @property
    def rows(self) -> list[TrialRow]:
        """The rows as the files say now."""
        return read_rows(self.storage, self.study)

    def entry(self, index: int) -> dict[str, Any]:
        """A trial of `study.json`."""
        found: dict[str, Any] = self.study["trials"][index]
        return found

    def start(self, index: int, *, attempt: int = 1, heartbeat_ms: int | None = None) -> None:
        """The trial is at work in its first stage."""
        entry, now = self.entry(index), now_ms()
        write_json(
            self.storage.trial(entry["key"]).path / "state.json",
            {
                "state": "RUNNING", "attempt": attempt, "stage": "train_cam", "stage_key": entry["stages"][0]["key"],
                "host": "host-a", "pid": 1, "started_ms": now - 1000, "heartbeat_ms": heartbeat_ms or now,
            },
        )  # fmt: skip

    def journal(self, index: int, steps: range) -> None:
        """Points of the training stage; those that are there already are not written again."""
        stage = self.storage.stage("train_cam", self.entry(index)["stages"][0]["key"])
        journal = Journal(stage.path / "journal.jsonl")
        for step in steps:
            journal.write(step, {"train/loss": 1 / (1 + step), "train/cls": 0.5})
        journal.close()

    def fail(self, index: int, message: str = "no memory left\non the device") -> None:
        """The trial ends with an error."""
        trial = self.storage.trial(self.entry(index)["key"])
        attempt = trial.state().get("attempt", 1)
        error = {"type": "RuntimeError", "message": message, "stage": "train_cam", "attempt": attempt}
        write_json(trial.path / "error.json", {**error, "traceback": "Traceback ...", "time_ms": now_ms()})
        trial.write_state(state="FAILED", ended_ms=now_ms())

    def finish(
        self,
        index: int,
        miou: float,
        *,
        bg_score: float = 0.25,
        wall_s: float = 30.0,
        overlays: int = 2,
        silent: float | None = None,
    ) -> None:
        """The trial has its result, and its CAMs are drawn."""
        entry = self.entry(index)
        stage = self.storage.stage("make_seeds", entry["stages"][1]["key"])
        (stage.path / "overlays").mkdir(parents=True, exist_ok=True)
        for i in range(overlays):
            Image.fromarray(blob(i, index)).save(stage.path / "overlays" / f"2007_{i}.png")
        stage.finish({}, wall_s=10.0)
        stages = [{"name": s["name"], "key": s["key"], "reused": False, "wall_s": wall_s / 2} for s in entry["stages"]]
        result = {
            "metrics": {"seed_miou_train": miou - 0.05, "mask_miou_train": miou, "bg_score": bg_score},
            "counts": {"train": 240}, "protocol": "best_on_train", "absent_classes": "zero", "class_names": CLASSES,
            "per_class_iou": {"seed_train": [0.7, 0.3, None], "mask_train": [0.8, 0.4, 0.0]},
            "curves": {"train": {"thresholds": [0.0, 0.25, 0.5], "miou": [0.1, miou, 0.2]}},
            "stages": stages, "wall_s": wall_s, "finished_ms": now_ms(), "attempt": 1, "host": "host-a",
        }  # fmt: skip
        if silent is not None:
            result["metrics"]["silent_maps_train"] = silent  # type: ignore[index]
        trial = self.storage.trial(entry["key"])
        write_json(trial.path / "result.json", result)
        (trial.path / "error.json").unlink(missing_ok=True)
        trial.write_state(state="FINISHED", ended_ms=now_ms())

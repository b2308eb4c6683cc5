"""One trial: stages in order, finished ones skipped. Knows no Ray and no MLflow."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any

from ppc.artifacts import Storage, TrialDir, content_key, file_sha256, now_ms, write_json
from ppc.backbones import BACKBONES, backbone_problem, build_backbone
from ppc.broken import leave_out_broken, skipped
from ppc.config import SALIENCY, SAME, DataConfig, OptimConfig, OwnBackbone, TrialConfig
from ppc.crf import PRESETS
from ppc.data import DataError, Dataset, open_dataset
from ppc.data.check import fingerprint
from ppc.deeplab import SEG_HEADS
from ppc.faults import storage_error
from ppc.ledger import FAILED, FINISHED, HEARTBEAT_S, KILLED, RUNNING, STOPPED, note_end
from ppc.places import remove
from ppc.redact import without_secrets
from ppc.runtime import Runtime, remedy
from ppc.stages import (
    NETS,
    OPTIM,
    STAGES,
    WEIGHTS,
    inputs_of,
    plan_stages,
    run_stage,
    seed_splits,
    versions_of,
    weights_name,
)
from ppc.stages.make_seeds import seedless
from ppc.stages.products import products_of, splits_of
from ppc.stages.train_irn import problems as irn_problems
from ppc.stages.train_psa import problems as psa_problems
from ppc.train import TrainingStopped


@dataclass(frozen=True)
class TrialPlan:
    """A trial ready to run: its config with absolute paths, its content key and those of its stages."""

    config: TrialConfig
    key: str
    variant_key: str
    stages: list[tuple[str, str]]
    fingerprint: str  # of the data
    metrics: list[str]  # that its result will have
    facts: dict[str, Any]  # what the keys were made of, but for the config: to tell later what changed

    def saved(self) -> dict[str, Any]:
        """What `study.json` holds of it."""
        return {
            "key": self.key, "variant_key": self.variant_key, "config": self.config.model_dump(mode="json"),
            "stages": [{"name": name, "key": key} for name, key in self.stages], "fingerprint": self.fingerprint,
            "facts": self.facts,
        }  # fmt: skip


def data_splits(cfg: TrialConfig) -> list[str]:
    """Splits that a trial touches, in a fixed order."""
    predicted = cfg.segmentation.test.splits if "predict_seg" in cfg.stages else ()
    return list(dict.fromkeys([*tagged_splits(cfg), *predicted]))


def tagged_splits(cfg: TrialConfig) -> list[str]:
    """Splits whose image-level labels a trial looks at; those that are only predicted need none."""
    seeded = seed_splits(cfg) if "make_seeds" in cfg.stages else []
    return list(dict.fromkeys([cfg.data.train_split, *seeded]))


def prepare_data(data: DataConfig, storage: Storage) -> tuple[DataConfig, Dataset]:
    """Open the dataset; generated scenes are made when they are not there. A root that was given becomes absolute."""
    if data.root is not None:
        data = data.model_copy(update={"root": str(Path(data.root).expanduser().resolve())})
    return data, open_data(data, storage)


def open_data(data: DataConfig, storage: Storage) -> Dataset:
    """The dataset of a config; without a root it is the storage's own generated one, wherever the storage is today."""
    root = storage.dataset(data_name(data)) if data.root is None else Path(data.root)
    return open_dataset(data.name, root, labels=data.labels, scenes=data.scenes.model_dump())


def data_name(data: DataConfig) -> str:
    """What tells a dataset from another of the study: its root, or the name of generated scenes."""
    return data.root or f"scenes-{content_key(data.scenes.model_dump())[:8]}"


def nets_of(cfg: TrialConfig) -> list[str]:
    """The nets that a trial trains, as `TrialConfig.backbone_of` knows them."""
    return [net for stage, net in NETS.items() if stage in cfg.stages]


def section_of(cfg: TrialConfig, net: str) -> str:
    """Dotted name of the section that says what a net's backbone is."""
    return "backbone" if cfg.backbone_of(net) is cfg.backbone else f"{net}.backbone"


def with_weights(cfg: TrialConfig, files: Mapping[str, str]) -> TrialConfig:
    """A copy whose weight files, by section, are these."""
    for section, path in files.items():
        head, _, inner = section.partition(".")
        changed = getattr(cfg, head)
        if inner:
            own = getattr(changed, inner).model_copy(update={"weights": path})
            changed = changed.model_copy(update={inner: own})
        else:
            changed = changed.model_copy(update={"weights": path})
        cfg = cfg.model_copy(update={head: changed})
    return cfg


class Planner:
    """Plans trials; contents of data and weights are read once."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._data: dict[str, tuple[DataConfig, Dataset]] = {}
        self._prints: dict[Any, str] = {}
        self._checked: dict[tuple[str, str], bool] = {}  # of a split of a dataset, as it was checked last
        self._misfits: dict[tuple[str, int, Path], str | None] = {}

    def plan(self, cfg: TrialConfig) -> TrialPlan:
        """Resolve paths, read contents, give keys. ValueError names the field that is wrong."""
        problems = [f"{path}: {text}" for path, text in check_trial(cfg)]
        if problems and (cfg.data.name == "scenes" or cfg.data.root is None):
            raise ValueError("\n".join(problems))  # nothing is generated for a trial that is wrong
        data_key = cfg.data.model_dump_json()
        try:
            if data_key not in self._data:
                self._data[data_key] = prepare_data(cfg.data, self.storage)
            data, dataset = self._data[data_key]
            self._leave_out(cfg, data_key, dataset)
            problems += [f"{path}: {text}" for path, text in check_data(cfg, dataset)]
        except ValueError as error:
            problems.append(str(error))
        problems += self._weights_problems(cfg)
        if problems:
            raise ValueError("\n".join(problems))
        with_saliency = [cfg.data.train_split] if cfg.method.name in SALIENCY else []
        splits = {
            split: self._split_print(dataset, data_key, split, split in with_saliency, split in tagged_splits(cfg))
            for split in data_splits(cfg)
        }
        weights, files = self._weights(cfg)
        cfg = with_weights(cfg, files).model_copy(update={"data": data})
        prints = {**splits, **weights}
        stages = plan_stages(cfg, prints)
        unseeded = plan_stages(cfg.model_copy(update={"seed": 0}), prints)
        facts = {
            "stages": versions_of(cfg),
            "weights": weights.get(WEIGHTS),
            **{name: sha for name, sha in weights.items() if name != WEIGHTS},
            "data": {name: {"fingerprint": sha, "images": len(dataset.ids(name))} for name, sha in splits.items()},
        }
        return TrialPlan(
            cfg, content_key(["trial", stages]), content_key(["variant", unseeded]), stages, content_key(splits),
            metrics_of(cfg, dataset), facts,
        )  # fmt: skip

    def _weights(self, cfg: TrialConfig) -> tuple[dict[str, str], dict[str, str]]:
        """sha256 of the weight files of a trial's nets by name among the contents, and their paths by section."""
        prints, files = dict[str, str](), dict[str, str]()
        for net in nets_of(cfg):
            if (backbone := cfg.backbone_of(net)).weights is not None:
                path = Path(backbone.weights).expanduser().resolve()
                if path not in self._prints:
                    self._prints[path] = file_sha256(path)
                prints[weights_name(cfg, net)] = self._prints[path]
                files[section_of(cfg, net)] = str(path)
        return prints, files

    def _weights_problems(self, cfg: TrialConfig) -> list[str]:
        """What keeps a weight file from being loaded into its backbone; a file is tried once a backbone."""
        problems = []
        for net in nets_of(cfg):
            backbone, section = cfg.backbone_of(net), section_of(cfg, net)
            if backbone.weights is None:
                continue
            path = Path(backbone.weights).expanduser().resolve()
            if not path.is_file():
                problems.append(f"{section}.weights: no file {path}")
                continue
            if backbone_problem(backbone.name, backbone.output_stride) is not None:
                continue  # check_trial has told it
            tried = (backbone.name, backbone.output_stride, path)
            if tried not in self._misfits:
                try:
                    build_backbone(
                        backbone.name, output_stride=backbone.output_stride, weights=path, normalisation="auto", seed=0
                    )
                    self._misfits[tried] = None
                except (ValueError, OSError) as error:
                    self._misfits[tried] = f"for {{}}.name {backbone.name}: {error}"
            if (found := self._misfits[tried]) is not None:
                problems.append(f"{section}.weights: {found.format(section)}")
        return list(dict.fromkeys(problems))

    def _leave_out(self, cfg: TrialConfig, data_key: str, dataset: Dataset) -> None:
        """With data.on_broken skip: take the broken images off the trial's splits, once a split."""
        if cfg.data.on_broken == "skip":
            for split in data_splits(cfg):
                tagged = split in tagged_splits(cfg)
                if self._checked.get((data_key, split)) != tagged and split in dataset.splits():
                    leave_out_broken(dataset, split, self.storage, with_labels=tagged)
                    self._checked[data_key, split] = tagged

    def _split_print(self, dataset: Dataset, data_key: str, split: str, with_saliency: bool, with_labels: bool) -> str:
        what = (data_key, split, with_saliency, with_labels)
        if what not in self._prints:
            masks = dataset.has_masks(split)
            try:
                found = fingerprint(
                    dataset, [split], with_masks=masks, with_saliency=with_saliency, with_labels=with_labels
                )
            except DataError as error:
                hint = remedy(error)
                raise error if hint is None else ValueError(f"{error}; {hint}") from error
            left_out = dataset.left_out.get(split, ())  # a result names them
            self._prints[what] = content_key([found, left_out]) if left_out else found
        return self._prints[what]


def check_trial(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """What types cannot say, as (dotted field, problem): names of registries, sizes that must fit together."""
    yield from _check_nets(cfg)
    if cfg.crf.preset not in PRESETS:
        yield "crf.preset", f"no preset {cfg.crf.preset!r}; there are {', '.join(PRESETS)}"
    yield from _check_segmentation(cfg)
    if cfg.views.target_px is not None and cfg.views.target_px > cfg.train.crop_px:
        yield "views.target_px", f"{cfg.views.target_px} is larger than train.crop_px {cfg.train.crop_px}"
    if cfg.contrast.negatives == "ranks" and cfg.contrast.negative_rank_from >= cfg.contrast.negative_rank_to:
        yield "contrast.negative_rank_from", "must be smaller than contrast.negative_rank_to"
    if "make_seeds" in cfg.stages and cfg.seeds.protocol == "best_on_train":
        if cfg.data.train_split not in cfg.seeds.splits:
            listed = ", ".join(cfg.seeds.splits)
            yield (
                "seeds.protocol",
                f"best_on_train takes the score from the masks of data.train_split {cfg.data.train_split}, which is "
                f"not among seeds.splits [{listed}]: add it there, or take protocol fixed or val_subset",
            )
    if cfg.data.name != "scenes" and cfg.data.root is None:
        yield "data.root", "name the folder of the dataset, for instance --set data.root=VOC2012"
    yield from psa_problems(cfg)
    yield from irn_problems(cfg)
    try:
        plan_stages(cfg, {})
    except ValueError as error:
        yield "stages", str(error)


def _check_segmentation(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """Names of the head and the CRF, and masks that are made for splits other than the one they train on."""
    own, train = cfg.segmentation, cfg.data.train_split
    if own.head not in SEG_HEADS:
        yield "segmentation.head", f"no head {own.head!r}; there are {', '.join(SEG_HEADS)}"
    if own.test.crf is not None and own.test.crf not in PRESETS:
        yield "segmentation.test.crf", f"no preset {own.test.crf!r}; there are {', '.join(PRESETS)}, and null: no CRF"
    if "train_seg" in cfg.stages and own.masks != "truth" and train not in splits_of(own.masks, cfg):
        made = ", ".join(splits_of(own.masks, cfg))
        yield (
            "segmentation.masks",
            f"{own.masks} is made for seeds.splits [{made}], but the net trains on data.train_split {train}: add "
            f"{train} to seeds.splits",
        )


def _check_nets(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """Backbones that cannot be built, and batches that the workers cannot share."""
    for section in dict.fromkeys(["backbone", *(section_of(cfg, net) for net in nets_of(cfg))]):
        backbone = cfg.backbone if section == "backbone" else cfg.backbone_of(section.partition(".")[0])
        name = backbone.name
        if name not in BACKBONES and not name.startswith("timm:"):
            yield f"{section}.name", f"no backbone {name!r}; there are {', '.join(BACKBONES)} and timm:MODEL"
        elif problem := backbone_problem(name, backbone.output_stride):
            path, _, text = problem.partition(": ")  # it begins with the field
            yield path.replace("backbone", section, 1), text
    for stage, section in OPTIM.items():
        batch_size = optim_of(cfg, section).batch_size
        if (stage in cfg.stages or stage == "train_cam") and batch_size % cfg.runtime.workers:
            yield f"{section}.batch_size", f"{batch_size} is not a multiple of runtime.workers {cfg.runtime.workers}"
    for net in ("psa", "irn", "segmentation"):
        own = getattr(cfg, net).backbone
        if own.name == SAME and own != OwnBackbone():
            yield f"{net}.backbone.name", f"is {SAME}, so nothing else of {net}.backbone is looked at: name a backbone"


def optim_of(cfg: TrialConfig, section: str) -> OptimConfig:
    """The section of that dotted name, which says how a net is trained."""
    value: Any = cfg
    for part in section.split("."):
        value = getattr(value, part)
    assert isinstance(value, OptimConfig)
    return value


def check_data(cfg: TrialConfig, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """What a config asks of its dataset and does not get, as (dotted field, problem): splits, sizes, masks."""
    seeds, there = cfg.seeds, dataset.splits()
    needed = {"data.train_split": [cfg.data.train_split], "seeds.splits": list(seeds.splits)}
    if seeds.protocol == "val_subset":
        needed["seeds.val_subset_split"] = [seeds.val_subset_split]
    if "predict_seg" in cfg.stages:
        needed["segmentation.test.splits"] = list(cfg.segmentation.test.splits)
    absent = [(field, split) for field, splits in needed.items() for split in splits if split not in there]
    for field, split in absent:
        yield field, f"no split {split!r} in {dataset.root}{nearest(split, there)}"
    if absent:
        return
    images = len(dataset.ids(cfg.data.train_split))
    if cfg.method.name in SALIENCY and not dataset.has_saliency:
        yield "method.name", f"{cfg.method.name} needs saliency maps: {dataset.saliency_place}"
    for stage, section in OPTIM.items():
        batch_size = optim_of(cfg, section).batch_size
        if stage in cfg.stages and batch_size > images:
            yield f"{section}.batch_size", f"{batch_size} is more than the {images} images of {cfg.data.train_split}"
    if {"train_psa", "train_irn"} & {*cfg.stages} and (problem := seedless(cfg, dataset)) is not None:
        yield "seeds.splits", problem
    if "train_seg" in cfg.stages and cfg.segmentation.masks == "truth":
        if not dataset.has_masks(cfg.data.train_split):
            yield "segmentation.masks", f"truth needs masks of split {cfg.data.train_split}, and it has none"
    judge = {"best_on_train": cfg.data.train_split, "val_subset": seeds.val_subset_split}.get(seeds.protocol)
    if "make_seeds" in cfg.stages and judge is not None and not dataset.has_masks(judge):
        yield "seeds.protocol", f"{seeds.protocol} needs masks of split {judge}; use seeds.protocol fixed"


def metrics_of(cfg: TrialConfig, dataset: Dataset | None = None) -> list[str]:
    """The metrics that a trial's stages and splits give, the one that says most last; without a dataset those that it
    would give were there masks of all splits."""
    found = ["bg_score"] if "make_seeds" in cfg.stages else []
    if "evaluate" not in cfg.stages:
        return found
    before = cfg.stages[: cfg.stages.index("evaluate")]
    return found + [
        f"{product}_miou_{split}"
        for product in products_of(before)
        for split in reversed(splits_of(product, cfg))
        if dataset is None or dataset.has_masks(split)
    ]


def nearest(name: str, names: Sequence[str]) -> str:
    """What could have been meant, to end a message with."""
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names) or 'none'}"


class _State:
    """`state.json` of a running trial, with a heartbeat from a thread of its own."""

    def __init__(self, trial: TrialDir, cfg: TrialConfig) -> None:
        self._trial, self._lock, self._stop = trial, threading.Lock(), threading.Event()
        attempt = int(trial.state().get("attempt", 0)) + 1
        self._values: dict[str, Any] = {
            "state": RUNNING, "attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(),
            "started_ms": now_ms(), "stage": None, "stage_key": None, "runtime": cfg.runtime.model_dump(mode="json"),
        }  # fmt: skip
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def attempt(self) -> int:
        return int(self._values["attempt"])

    def write(self, **changes: Any) -> None:
        with self._lock:
            self._values.update(changes, heartbeat_ms=now_ms())
            write_json(self._trial.path / "state.json", self._values)

    def _beat(self) -> None:
        said = False
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.write()
                said = False
            except OSError as error:  # a full disk must not end the training: it may have space again
                if not said:
                    print(f"heartbeat of trial {self._trial.key}: {error.strerror}; the trial goes on", flush=True)
                said = True

    def __enter__(self) -> _State:
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        note_end(self._trial, self.attempt)
        killed = isinstance(error, (KeyboardInterrupt, SystemExit))
        try:
            if error is None:
                self.write(state=FINISHED, ended_ms=now_ms())
                return
            if isinstance(error, TrainingStopped):  # nothing is wrong: neither an error nor a result
                remove(self._trial.path / "error.json")
                self.write(state=STOPPED, ended_ms=now_ms())
                return
            write_json(self._trial.path / "error.json", _describe(error, self._values))
            self.write(state=KILLED if killed else FAILED, ended_ms=now_ms())
        except OSError as second:  # a result alone decides that a trial is finished
            if storage_error(error) is None:  # else the same is being told
                print(f"state of trial {self._trial.key}: {second}", flush=True)


def _describe(error: BaseException, state: Mapping[str, Any]) -> dict[str, Any]:
    words = str(error) or type(error).__name__
    return {
        "type": type(error).__name__,
        "message": without_secrets(words if (hint := remedy(error)) is None else f"{words}; {hint}"),
        "stage": state["stage"],
        "attempt": state["attempt"],
        "host": state["host"],
        "time_ms": now_ms(),
        "traceback": without_secrets("".join(traceback.format_exception(error))),
    }


def record_failure(trial: TrialDir, error: Exception) -> None:
    """Record what kept a trial from starting, or ended its process; all else is recorded by `run_trial` itself."""
    state = trial.state()
    if trial.result() is not None or state.get("state") in (FAILED, KILLED):
        return
    state = {"attempt": 0, "host": socket.gethostname(), "stage": None, **state, "state": FAILED, "ended_ms": now_ms()}
    write_json(trial.path / "error.json", _describe(error, state))
    write_json(trial.path / "state.json", state)


def run_trial(
    cfg: TrialConfig, key: str, stages: list[tuple[str, str]], storage: Storage, rt: Runtime
) -> dict[str, Any]:
    """Run what is missing of a trial and write its result; the result when it was there already.

    A raise is recorded in `error.json`, the state becomes FAILED (KILLED for an interrupt), and it is raised again. A
    training that was asked to stop makes the state STOPPED, which says at which epoch and why.
    """
    trial = storage.trial(key)
    if (result := trial.result()) is not None:
        return result
    write_json(trial.path / "config.json", cfg.model_dump(mode="json"))
    with _State(trial, cfg) as state:
        dataset = open_data(cfg.data, storage)  # in here: data that went away is this trial's error too
        if cfg.data.on_broken == "skip":
            for split in data_splits(cfg):
                leave_out_broken(dataset, split, storage, with_labels=split in tagged_splits(cfg))
        done: list[dict[str, Any]] = []
        merged: dict[str, Any] = {}
        cost = {"gpu_h": 0.0, "cpu_h": 0.0, "wall_s": 0.0}
        folders = {name: storage.stage(name, stage_key) for name, stage_key in stages}
        for name, stage_key in stages:
            state.write(stage=name, stage_key=stage_key)
            folder = folders[name]
            with folder.lock():
                manifest = folder.manifest()
                reused = manifest is not None
                if manifest is None:
                    start = time.monotonic()
                    inputs = {earlier: folders[earlier] for earlier in inputs_of(name, cfg, stages)}
                    folder.forget_stop()  # of whoever was at work here before
                    try:
                        outcome = run_stage(name, cfg, folder, inputs, dataset, rt)
                    except TrainingStopped:
                        state.write(stopped=folder.stop_asked())
                        raise
                    if dataset.left_out:
                        seen = STAGES[name].contents(cfg)
                        mine = {split: one for split, one in skipped(dataset).items() if split in seen}
                        outcome = {**outcome, "skipped": mine}
                    wall_s = time.monotonic() - start
                    manifest = folder.finish(outcome, wall_s=wall_s, trial=key, ran=_ran_with(cfg))
            done.append({"name": name, "key": stage_key, "reused": reused, "wall_s": manifest["wall_s"]})
            _pay(cost, manifest, key)
            _merge(merged, manifest["result"])
        result = {
            **merged, "stages": done, "wall_s": sum(s["wall_s"] for s in done), "finished_ms": now_ms(),
            "attempt": state.attempt, "host": socket.gethostname(), "cost": cost,
        }  # fmt: skip
        result.setdefault("metrics", {})
        write_json(trial.path / "result.json", result)
    with suppress(OSError):  # the error of an earlier attempt; a result outweighs it
        remove(trial.path / "error.json")
    return result


def _ran_with(cfg: TrialConfig) -> dict[str, float]:
    runtime = cfg.runtime
    return {
        "workers": runtime.workers,
        "cpus": runtime.workers * runtime.cpus_per_worker,
        "gpus": runtime.workers * runtime.gpus_per_worker,
    }


def _pay(cost: dict[str, float], manifest: Mapping[str, Any], key: str) -> None:
    """Add what a stage cost, if it is this trial that made it, now or in an earlier attempt."""
    if manifest.get("trial") == key:
        cost["gpu_h"] += manifest["cost"]["gpu_s"] / 3600
        cost["cpu_h"] += manifest["cost"]["cpu_s"] / 3600
        cost["wall_s"] += manifest["wall_s"]


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            into[name] = {**into[name], **value}
        else:
            into[name] = value

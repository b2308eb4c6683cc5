"""From a trial's config to its plan: paths resolved, contents of data and weights read, keys given. Writes nothing but
generated data, and what it found out about broken images (`checks/`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppc.artifacts import Storage, content_key
from ppc.backbones import backbone_problem, build_backbone
from ppc.broken import leave_out_broken
from ppc.checks import check_data, check_trial, metrics_of, nets_of, section_of
from ppc.config import SALIENCY, DataConfig, TrialConfig
from ppc.data import DataError, Dataset, open_dataset
from ppc.data.check import dark_saliency, fingerprint
from ppc.places import file_sha256
from ppc.runtime import remedy
from ppc.stages import (
    WEIGHTS,
    plan_stages,
    seed_splits,
    versions_of,
    weights_name,
)


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
            if with_saliency and (dark := dark_saliency(dataset, dataset.ids(split))) is not None:
                raise ValueError(f"method.name needs saliency maps of 0 to 255: {dark}")
            left_out = dataset.left_out.get(split, ())  # a result names them
            self._prints[what] = content_key([found, left_out]) if left_out else found
        return self._prints[what]

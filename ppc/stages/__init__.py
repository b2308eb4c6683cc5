"""Stages: files in, files out. Each names what decides its result, so that it can be shared and run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppc.artifacts import StageDir, content_key
from ppc.backbones import TIMM
from ppc.config import ONE_VIEW, TrialConfig
from ppc.data import Dataset
from ppc.runtime import Runtime
from ppc.stages.context import StageContext
from ppc.stages.evaluate import run as evaluate
from ppc.stages.make_seeds import run as make_seeds
from ppc.stages.predict_seg import run as predict_seg
from ppc.stages.products import PRODUCTS, products_of, splits_of
from ppc.stages.refine_crf import run as refine_crf
from ppc.stages.refine_irn import run as refine_irn
from ppc.stages.refine_psa import run as refine_psa
from ppc.stages.train_cam import run as train_cam
from ppc.stages.train_irn import run as train_irn
from ppc.stages.train_psa import run as train_psa
from ppc.stages.train_seg import TRUTH
from ppc.stages.train_seg import run as train_seg

__all__ = ["STAGES", "Stage", "StageContext", "plan_stages", "run_stage"]


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    `version` changes when the same inputs give other numbers; it may do so for some configs alone. `reads` are the
    config sections that decide the result, `needs` the stages whose files it reads (of a trial), `uses` those whose
    files it reads when the trial has them, and `contents` names the data it looks at: splits, and weight files
    (`weights_name`).
    """

    run: Callable[[StageContext], dict[str, Any]]
    version: int | Callable[[TrialConfig], int]
    reads: tuple[str, ...]
    contents: Callable[[TrialConfig], Sequence[str]]
    needs: tuple[str, ...] | Callable[[TrialConfig], tuple[str, ...]] = ()
    uses: tuple[str, ...] = ()


def seed_splits(cfg: TrialConfig) -> list[str]:
    """Splits that get seeds, and the one whose masks choose the score under protocol val_subset."""
    chooses = [cfg.seeds.val_subset_split] if cfg.seeds.protocol == "val_subset" else []
    return list(dict.fromkeys([*cfg.seeds.splits, *chooses]))


def weights_name(cfg: TrialConfig, net: str = "backbone") -> str:
    """What the weight file that a net begins with is called among the contents: that of `backbone`, or its own."""
    return WEIGHTS if cfg.backbone_of(net) is cfg.backbone else f"{net}.{WEIGHTS}"


def train_contents(cfg: TrialConfig) -> list[str]:
    """The training split, and the pretrained weights."""
    return [cfg.data.train_split, weights_name(cfg)]


def train_cam_version(cfg: TrialConfig) -> int:
    """2; 3 where ranks of negatives are now those of the kept classes, and where contrast no longer adds the tags of
    the target view to a method of one view."""
    own = cfg.contrast
    ranks_of_kept = own.negatives == "ranks" and own.absent_classes == "drop"
    return 3 if own.active and (ranks_of_kept or cfg.method.name in ONE_VIEW) else 2


def train_seg_version(cfg: TrialConfig) -> int:
    """1; 2 for timm's backbones whose BatchNorm is trained, where it lost the activations that are part of it."""
    timm = cfg.backbone_of("segmentation").name.startswith(TIMM)
    return 2 if timm and cfg.segmentation.batch_norm != "frozen" else 1


def irn_contents(cfg: TrialConfig) -> list[str]:
    """The split that IRNet is trained on, and the weights of its backbone."""
    return [cfg.data.train_split, weights_name(cfg, "irn")]


def psa_contents(cfg: TrialConfig) -> list[str]:
    """The training split, and the pretrained weights of AffinityNet."""
    return [cfg.data.train_split, weights_name(cfg, "psa")]


def seg_contents(cfg: TrialConfig) -> list[str]:
    """The training split, whose fingerprint has its masks, and the pretrained weights."""
    return [cfg.data.train_split, weights_name(cfg, "segmentation")]


def seg_needs(cfg: TrialConfig) -> tuple[str, ...]:
    """The stage that makes the label maps on which the segmentation net trains; none for those of the dataset."""
    masks = cfg.segmentation.masks
    return () if masks == TRUTH else (PRODUCTS[masks][0],)


def test_splits(cfg: TrialConfig) -> list[str]:
    """Splits that the segmentation net predicts."""
    return list(cfg.segmentation.test.splits)


def scored_splits(cfg: TrialConfig) -> list[str]:
    """Splits of all label maps that a trial makes."""
    return list(dict.fromkeys(split for product in products_of(cfg.stages) for split in splits_of(product, cfg)))


def needs_of(name: str, cfg: TrialConfig) -> tuple[str, ...]:
    """The stages that a stage of this trial cannot do without."""
    needs = STAGES[name].needs
    return needs(cfg) if callable(needs) else needs


WEIGHTS = "weights"
TRAIN_READS = ("seed", "data", "backbone", "method", "contrast", "views", "train")
MAKERS = tuple(stage for stage, _ in PRODUCTS.values())

NETS = {
    "train_cam": "backbone",
    "train_psa": "psa",
    "train_irn": "irn",
    "train_seg": "segmentation",
}  # stage -> section
OPTIM = {"train_cam": "train", "train_psa": "psa.train", "train_irn": "irn.train", "train_seg": "segmentation.train"}

STAGES: dict[str, Stage] = {
    "train_cam": Stage(train_cam, train_cam_version, TRAIN_READS, train_contents),
    "make_seeds": Stage(make_seeds, 1, ("seeds",), seed_splits, needs=("train_cam",)),
    "refine_crf": Stage(refine_crf, 1, ("crf",), seed_splits, needs=("make_seeds",)),
    "train_irn": Stage(train_irn, 1, ("seed", "data", "irn"), irn_contents, needs=("make_seeds",)),
    "refine_irn": Stage(refine_irn, 1, ("irn.walk",), seed_splits, needs=("make_seeds", "train_irn")),
    "train_psa": Stage(train_psa, 1, ("seed", "data", "psa"), psa_contents, needs=("make_seeds",)),
    "refine_psa": Stage(refine_psa, 1, ("psa.walk",), seed_splits, needs=("train_psa", "make_seeds")),
    "train_seg": Stage(train_seg, train_seg_version, ("seed", "data", "segmentation"), seg_contents, needs=seg_needs),
    "predict_seg": Stage(predict_seg, 1, ("segmentation.test",), test_splits, needs=("train_seg",)),
    "evaluate": Stage(evaluate, 1, ("evaluate",), scored_splits, uses=MAKERS),
}


def plan_stages(cfg: TrialConfig, fingerprints: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and content keys of a trial's stages.

    A key is made of the stage's version, the config it reads, the contents it looks at (`fingerprints` by split, and of
    the weights), and the keys of the stages before it. ValueError for an unknown stage, or one whose input no earlier
    stage makes.
    """
    keys: dict[str, str] = {}
    for name in cfg.stages:
        if name not in STAGES:
            raise ValueError(f"stages: no stage {name!r}; there are {', '.join(STAGES)}")
        stage = STAGES[name]
        absent = [need for need in needs_of(name, cfg) if need not in keys]
        if name == "evaluate" and not products_of(keys):
            absent = [" or ".join(MAKERS)]
        if absent or name in keys:
            raise ValueError(
                f"stages: {name} needs {', '.join(absent)} before it" if absent else f"stages: {name} twice"
            )
        keys[name] = content_key(
            {
                "stage": name,
                "version": version_of(name, cfg),
                "config": {section: cfg.decisive(section) for section in stage.reads},
                "inputs": {earlier: keys[earlier] for earlier in inputs_of(name, cfg, list(keys.items()))},
                "contents": {part: fingerprints.get(part) for part in stage.contents(cfg)},
            }
        )
    return list(keys.items())


def versions_of(cfg: TrialConfig) -> dict[str, int]:
    """The version of each stage of a trial."""
    return {name: version_of(name, cfg) for name in cfg.stages}


def version_of(name: str, cfg: TrialConfig) -> int:
    """The version of a stage for this config."""
    version = STAGES[name].version
    return version if isinstance(version, int) else version(cfg)


def inputs_of(name: str, cfg: TrialConfig, stages: Sequence[tuple[str, str]]) -> list[str]:
    """The stages among `stages` (names and keys, in order) that come before `name` and whose files it reads."""
    names = [stage for stage, _ in stages]
    earlier = names[: names.index(name)] if name in names else names
    return [stage for stage in (*needs_of(name, cfg), *STAGES[name].uses) if stage in earlier]


def run_stage(
    name: str, cfg: TrialConfig, folder: StageDir, inputs: Mapping[str, StageDir], dataset: Dataset, rt: Runtime
) -> dict[str, Any]:
    """Run one stage and return its result; the caller writes the manifest."""
    return STAGES[name].run(StageContext(cfg, folder, inputs, dataset, rt))

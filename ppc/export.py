"""Label maps and CAMs of a trial as a folder that other code can train on, with a record of where they come from.

The folder has the layout of VOC 2012 (`SegmentationClassAug/ID.png`, `ImageSets/Segmentation/SPLIT.txt`), so that links
to the images make a dataset of it. `provenance.json` is written first and last: an export that was interrupted is told
from another's folder by it, and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppc.artifacts import Storage, now_ms, read_json, write_json
from ppc.figures import decode_palette_png
from ppc.gallery import TITLES, TrialPictures, best_variant, pick_row
from ppc.ledger import TrialRow, make_again, read_rows
from ppc.places import atomic_write, read_bytes
from ppc.stages.make_seeds import decode_cam
from ppc.stages.products import PRODUCTS, splits_of

MADE_BY = "ppc export"
FORMAT = 1
CAM = "cam"
MASKS_FOLDER, CAMS_FOLDER = "SegmentationClassAug", "cams"
LAYOUT = {
    MASKS_FOLDER: "one PNG an image, of the image's size: 8-bit palette indices, 0 background, 1..K the classes in the "
    "order of classes.txt, 255 unknown; the colours are VOC's",
    CAMS_FOLDER: "one NPZ an image, without pickles: `keys` (K,) integers, the image's own classes counted from 0 (the "
    "line of classes.txt is keys + 1), and `cam` (K, H, W) float32, their maps, at most 1, at the image's size",
}


class Source(NamedTuple):
    """What is exported: a product, the stage and folder of its ID.SUFFIX, and the folder that it is copied into."""

    product: str
    stage: str
    folder: str
    suffix: str
    into: str


def export_masks(
    storage: Storage,
    study_name: str,
    out: Path,
    *,
    variant: str | None = None,
    seed: int | None = None,
    product: str | None = None,
    splits: Sequence[str] = (),
) -> str:
    """Copy a trial's label maps into a folder; a line that says what was done.

    Defaults: the best variant, its first finished seed, the last product, all splits of it. ValueError for a trial,
    product or split that is not there, and for a folder that holds anything else than this very export.
    """
    trial = _trial(storage, study_name, variant, seed)
    name = trial.product(product)
    return _export(storage, study_name, out, trial, Source(name, *PRODUCTS[name], ".png", MASKS_FOLDER), splits)


def export_cams(
    storage: Storage,
    study_name: str,
    out: Path,
    *,
    variant: str | None = None,
    seed: int | None = None,
    splits: Sequence[str] = (),
) -> str:
    """Copy a trial's CAMs into a folder, as `export_masks` does label maps."""
    trial = _trial(storage, study_name, variant, seed)
    if "make_seeds" not in trial.folders:
        raise ValueError(f"trial {trial.row.label} makes no CAMs: its stages have no make_seeds")
    return _export(storage, study_name, out, trial, Source(CAM, "make_seeds", "cams", ".npz", CAMS_FOLDER), splits)


def _trial(storage: Storage, study_name: str, variant: str | None, seed: int | None) -> TrialPictures:
    study = storage.study(study_name).definition()
    rows = read_rows(storage, study)
    if variant is None:
        of_seed = [row for row in rows if seed in (None, row.seed)]
        variant = best_variant(study, of_seed)
    return TrialPictures(storage, pick_row(rows, variant, seed))


def _export(
    storage: Storage,
    study_name: str,
    out: Path,
    trial: TrialPictures,
    source: Source,
    splits: Sequence[str],
) -> str:
    product, stage, made = source.product, source.stage, splits_of(source.product, trial.config)
    if unknown := [split for split in splits if split not in made]:
        raise ValueError(f"--split {unknown[0]}: {product} of trial {trial.row.label} is made of {', '.join(made)}")
    lists = {split: trial.splits[split] for split in made if split in (splits or made)}
    told = provenance(storage.study(study_name).definition(), trial, product, stage, lists)
    _claim(out, told)
    write_json(out / "provenance.json", {**told, "complete": False})
    ids = list(dict.fromkeys(image_id for found in lists.values() for image_id in found))
    copied = 0
    for image_id in ids:
        path = trial.folders[stage] / source.folder / f"{image_id}{source.suffix}"
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            raise ValueError(
                f"{path} is missing, though its stage is done; {make_again(storage, trial.row, trial.folders[stage])}"
            ) from None
        if source.suffix == ".png":
            decode_palette_png(content, path)  # ValueError for a damaged one, which others would train on
        elif decode_cam(content) is None:
            raise ValueError(f"{path} is damaged; {make_again(storage, trial.row, trial.folders[stage])}")
        target = out / source.into / path.name
        if not target.is_file() or target.read_bytes() != content:
            with atomic_write(target, durable=False) as handle:
                handle.write(content)
            copied += 1
    for split, found in lists.items():
        _write(out / "ImageSets/Segmentation" / f"{split}.txt", found)
    _write(out / "classes.txt", trial.dataset.class_names)
    _write(out / "README.txt", _words(told, source.into))
    for torn in out.rglob(".*.part"):  # of an interrupted run
        torn.unlink(missing_ok=True)
    write_json(out / "provenance.json", {**told, "complete": True, "exported_ms": now_ms()})
    there = f", {len(ids) - copied} were there" if copied < len(ids) else ""
    return f"{out}: {product} of {trial.row.label}, {len(ids)} images of {', '.join(lists)}{there}"


def provenance(
    study: dict[str, Any], trial: TrialPictures, product: str, stage: str, lists: dict[str, list[str]]
) -> dict[str, Any]:
    """Where an export comes from, as plain data: study, trial, stage, product, its mIoU (in [0, 1]), code and data."""
    row: TrialRow = trial.row
    result = row.result or {}
    entry = next(entry for entry in study["trials"] if entry["key"] == row.key and entry["variant"] == row.variant)
    generated = trial.config.data.name == "scenes"
    return {
        "made_by": MADE_BY, "format": FORMAT, "study": study["name"], "variant": row.variant, "seed": row.seed,
        "trial_key": row.key, "stage": stage, "stage_key": trial.folders[stage].key, "product": product,
        "splits": {
            split: {"images": len(ids), "miou": result.get("metrics", {}).get(f"{product}_miou_{split}")}
            for split, ids in lists.items()
        },
        "bg_score": result.get("metrics", {}).get("bg_score"), "bg_score_protocol": result.get("protocol"),
        "data": {"name": trial.config.data.name, "generated": generated, "fingerprint": entry.get("fingerprint")},
        "classes": list(trial.dataset.class_names), "code": study.get("code"), "factors": row.factors,
        "config": trial.config.model_dump(mode="json", exclude={"runtime": True, "data": {"root"}}),
    }  # fmt: skip


def _claim(out: Path, told: dict[str, Any]) -> None:
    """ValueError unless a folder is ours to fill: not there, empty, or with this very export, whole or a part of it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    before = read_json(out / "provenance.json")
    if not isinstance(before, dict) or before.get("made_by") != MADE_BY:
        raise ValueError(f"{out} is not empty and no earlier export: name a new folder")
    same = ("format", "trial_key", "stage_key", "product")
    if any(before.get(name) != told[name] for name in same) or list(before.get("splits", ())) != list(told["splits"]):
        what = f"{before.get('product')} of {before.get('variant')} s={before.get('seed')}, study {before.get('study')}"
        raise ValueError(
            f"{out} holds another export ({what}, splits {', '.join(before.get('splits', ()))}): name a new folder, or "
            "delete that one"
        )


def _write(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path, "w", durable=False) as handle:
        handle.write("".join(f"{line}\n" for line in lines))


def _words(told: dict[str, Any], folder: str) -> list[str]:
    """The README of an export."""
    what = "class activation maps" if told["product"] == CAM else TITLES.get(told["product"], told["product"])
    code = told["code"] or {}
    changed = " with uncommitted changes" if code.get("dirty") else ""
    lines = [
        f"{told['product']} ({what}) of study {told['study']}, variant {told['variant']}, seed {told['seed']}.",
        "Pseudo labels made by a network from image tags. They are no annotations of people.",
        "Generated data." if told["data"]["generated"] else "",
        "",
        f"{folder}/: {LAYOUT[folder]}",
        "ImageSets/Segmentation/SPLIT.txt: the ids of a split, one a line",
        "classes.txt: the K classes, one a line, without the background",
        "provenance.json: trial, config, code and data that this comes from; `complete` is false after an interruption",
        "",
    ]
    for split, found in told["splits"].items():
        score = "no mIoU" if found["miou"] is None else f"mIoU {100 * found['miou']:.2f} %"
        lines.append(f"{split}: {found['images']} images, {score}")
    lines.append(f"background score {told['bg_score']}, protocol {told['bg_score_protocol']}")
    lines.append(f"code: version {code.get('version')}, commit {code.get('commit')}{changed}")
    return [*lines, f"trial {told['trial_key']}, data fingerprint {told['data']['fingerprint']}"]

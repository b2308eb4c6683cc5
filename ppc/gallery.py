"""Pictures for people: what a trial made of an image stage by stage, CAMs of several variants, predictions.

The kinds are those of the paper: its Figure 4 sets the CAMs of the baseline and of the method side by side, Figure 5
shows predictions. Rows are images, columns have titles, and the legend names the classes that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ppc.artifacts import StageDir, Storage
from ppc.config import TrialConfig
from ppc.data import DataError
from ppc.figures import IGNORE, overlay, picture_grid, read_palette_png
from ppc.ledger import FINISHED, TrialRow, make_again, read_rows, stage_dirs
from ppc.names import check_name
from ppc.places import StoragePath, atomic_write, size_of
from ppc.planning import open_data
from ppc.redact import without_secrets
from ppc.stages.make_seeds import read_cam
from ppc.stages.products import PRODUCTS, products_of, splits_of

Picture = npt.NDArray[np.uint8]
KINDS = ("stages", "cams", "predictions")
IMAGES = 4  # of a figure for which none are named
TITLES = {
    "seed": "seed",
    "mask": "mask (CRF)",
    "psa_mask": "mask (PSA)",
    "irn_mask": "mask (IRN)",
    "seg": "segmentation",
}


def pick_row(rows: Sequence[TrialRow], variant: str | None, seed: int | None) -> TrialRow:
    """The first finished trial of a variant and seed; ValueError lists what there is."""
    for row in rows:
        if row.state == FINISHED and variant in (None, row.variant) and seed in (None, row.seed):
            return row
    have = ", ".join(row.label for row in rows if row.state == FINISHED) or "none"
    asked = [f"variant {variant}"] * (variant is not None) + [f"seed {seed}"] * (seed is not None)
    raise ValueError(f"no finished trial{' of ' if asked else ''}{', '.join(asked)}; finished: {have}")


def best_variant(study: dict[str, Any], rows: Sequence[TrialRow], *, besides: str | None = None) -> str | None:
    """The variant with the highest mean of the study's metric over its seeds, `besides` apart; None without results."""
    means = dict[str, float]()
    for variant in dict.fromkeys(row.variant for row in rows if row.variant != besides):
        values = [row.metric(study["metric"]) for row in rows if row.variant == variant]
        if found := [value for value in values if value is not None]:
            means[variant] = fmean(found)
    return max(means, key=lambda variant: means[variant], default=None)


def compared(study: dict[str, Any], rows: Sequence[TrialRow]) -> list[str]:
    """The variants that a figure of CAMs compares: the baseline, and the best of the others, as far as they have
    results."""
    baseline = study["baseline"]
    done = {row.variant for row in rows if row.state == FINISHED}
    best = best_variant(study, rows, besides=baseline)
    return [variant for variant in (baseline, best) if variant is not None and variant in done]


def pick_rows(rows: Sequence[TrialRow], variants: Sequence[str], seed: int | None) -> list[TrialRow]:
    """A finished trial of each variant, all of one seed where there is such a seed. ValueError lists what there is."""
    if seed is None:
        seeds = [{row.seed for row in rows if row.variant == v and row.state == FINISHED} for v in variants]
        shared = set[int].intersection(*seeds) if seeds else set[int]()
        seed = min(shared, default=None)
    return [pick_row(rows, variant, seed) for variant in variants]


class TrialPictures:
    """What can be drawn of a finished trial: the images of its dataset and the files of its stages."""

    def __init__(self, storage: Storage, row: TrialRow) -> None:
        self.row, self.config = row, TrialConfig.model_validate(row.config)
        self.dataset = open_data(self.config.data, storage)
        self.folders: dict[str, StageDir] = {folder.stage: folder for folder in stage_dirs(storage, row)}
        self.products = products_of(self.folders)

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Ids of each split that the trial made something of, those of its CAMs first; without what it left out."""
        names = [split for product in self.products for split in splits_of(product, self.config)]
        if self.config.seeds.protocol == "val_subset" and "make_seeds" in self.folders:
            names.append(self.config.seeds.val_subset_split)
        skipped = (self.row.result or {}).get("skipped", {})
        return {
            split: [i for i in self.dataset.ids(split) if i not in skipped.get(split, {}).get("ids", ())]
            for split in dict.fromkeys(names)
        }

    def split_of(self, image_id: str) -> str:
        """The split of an image; ValueError when the trial did not look at it."""
        check_name(image_id, "image")
        for split, ids in self.splits.items():
            if image_id in ids:
                return split
        raise ValueError(
            f"no image {image_id} in {', '.join(self.splits) or 'none'}, the splits of trial {self.row.label}"
        )

    def some(self, split: str) -> list[str]:
        """The images of a split that are drawn when none are named: those with overlays, else a few."""
        overlays: list[str] = (self.row.result or {}).get("overlays") or []
        ids = self.splits[split]
        if split == self.config.seeds.splits[0] and set(overlays) <= set(ids) and overlays:
            return overlays
        return ids[:: max(1, len(ids) // IMAGES)][:IMAGES]

    def image(self, image_id: str) -> Picture:
        """The image itself."""
        return self.dataset.image(image_id)

    def truth(self, image_id: str) -> Picture | None:
        """The dataset's mask of an image, None where there is none."""
        split = self.split_of(image_id)
        try:
            self.dataset.mask_path(image_id, split=split)
        except DataError:
            return None
        return self.dataset.mask(image_id, split=split)

    def cam(self, image_id: str) -> Picture | None:
        """The image under the heat of its CAM, the highest class of each pixel; None where the trial made none."""
        check_name(image_id, "image")
        folder = self.folders.get("make_seeds")
        loaded = None if folder is None else read_cam(folder / "cams" / f"{image_id}.npz")
        if loaded is None:
            return None
        image, (_, cam_KHW) = self.image(image_id), loaded
        return overlay(image, cam_KHW.max(0) if len(cam_KHW) else np.zeros(image.shape[:2], np.float32))

    def label(self, product: str, image_id: str) -> Picture | None:
        """A label map of a product, None where the trial made none of this image."""
        stage, name = PRODUCTS[product]
        path = self.folders[stage] / name / f"{check_name(image_id, 'image')}.png"
        return None if size_of(path) is None else read_palette_png(path)

    def product(self, name: str | None) -> str:
        """The product of that name, or the last that the trial makes. ValueError when it makes no such one."""
        if not self.products:
            raise ValueError(f"trial {self.row.label} makes no label maps")
        if name not in (None, *self.products):
            raise ValueError(f"product {name}: trial {self.row.label} makes {', '.join(self.products)}")
        return name or self.products[-1]

    def names(self) -> dict[int, str]:
        """What each label means."""
        return {**dict(enumerate(self.dataset.class_names, 1)), IGNORE: "not scored"}

    def grid(self, columns: dict[str, list[Picture | None]], image_ids: Sequence[str], caption: str) -> Picture:
        """A figure of these columns, those without any picture left out."""
        columns = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
        if self.config.data.name == "scenes":
            caption += "; generated data"
        rows = list(zip(*columns.values(), strict=True))
        return picture_grid(rows, list(columns), row_names=image_ids, legend=self.names(), caption=caption)


def gallery(storage: Storage, row: TrialRow, image_ids: Sequence[str] = ()) -> Picture:
    """Image, CAM, every label map of the trial and the truth of images, (H, W, 3) uint8.

    Without ids: the fixed set that has overlays. ValueError for an image of which the trial made nothing.
    """
    trial = TrialPictures(storage, row)
    trial.product(None)
    image_ids = list(image_ids) or trial.some(next(iter(trial.splits)))
    columns: dict[str, list[Picture | None]] = {
        "CAM": [trial.cam(image_id) for image_id in image_ids],
        **{TITLES.get(name, name): [trial.label(name, image_id) for image_id in image_ids] for name in trial.products},
    }
    for index, image_id in enumerate(image_ids):
        trial.split_of(image_id)
        if all(cells[index] is None for cells in columns.values()):
            lost = trial.folders[PRODUCTS[trial.products[0]][0]]
            raise ValueError(
                f"all that trial {row.label} made of image {image_id} is gone; {make_again(storage, row, lost)}"
            )
    images: dict[str, list[Picture | None]] = {"image": [trial.image(image_id) for image_id in image_ids]}
    truth = {"truth": [trial.truth(image_id) for image_id in image_ids]}
    return trial.grid({**images, **columns, **truth}, image_ids, f"trial {row.label}")


def cams_figure(storage: Storage, rows: Sequence[TrialRow], image_ids: Sequence[str] = ()) -> Picture:
    """Image, truth, and the CAM of each trial (Figure 4 of the paper); without ids the images that have overlays.

    ValueError for an image that one of the trials has no CAM of.
    """

    def draw(trial: TrialPictures, image_id: str) -> Picture:
        if (drawn := trial.cam(image_id)) is None:
            raise ValueError(
                f"no CAM of image {image_id} in trial {trial.row.label}, which has those of "
                f"{', '.join(trial.config.seeds.splits)}"
            )
        return drawn

    split = TrialConfig.model_validate(rows[0].config).seeds.splits[0]
    return _side_by_side(storage, rows, image_ids, split, "CAM", draw)


def predictions_figure(
    storage: Storage, rows: Sequence[TrialRow], product: str | None = None, image_ids: Sequence[str] = ()
) -> Picture:
    """Image, truth, and a label map of each trial (Figure 5 of the paper): the product named, else the trials' last.

    ValueError for a product that a trial does not make, and an image that it has none of.
    """
    first = TrialPictures(storage, rows[0])
    name = first.product(product)

    def draw(trial: TrialPictures, image_id: str) -> Picture:
        if (drawn := trial.label(trial.product(name), image_id)) is None:
            raise ValueError(
                f"no {name} of image {image_id} in trial {trial.row.label}, which has those of "
                f"{', '.join(splits_of(name, trial.config))}"
            )
        return drawn

    return _side_by_side(storage, rows, image_ids, splits_of(name, first.config)[0], TITLES.get(name, name), draw)


def _side_by_side(
    storage: Storage,
    rows: Sequence[TrialRow],
    image_ids: Sequence[str],
    split: str,
    what: str,
    draw: Callable[[TrialPictures, str], Picture],
) -> Picture:
    trials = [TrialPictures(storage, row) for row in rows]
    first = trials[0]
    image_ids = list(image_ids) or first.some(split)
    seeds = {row.seed for row in rows}
    columns: dict[str, list[Picture | None]] = {
        "image": [first.image(image_id) for image_id in image_ids if first.split_of(image_id)],
        "truth": [first.truth(image_id) for image_id in image_ids],
    }
    for trial in trials:
        title = f"{what}\n{trial.row.variant if len(seeds) == 1 else trial.row.label}"
        columns[title] = [draw(trial, image_id) for image_id in image_ids]
    return first.grid(columns, image_ids, f"seed {', '.join(map(str, sorted(seeds)))}")


def figure_of(
    storage: Storage,
    study: dict[str, Any],
    kind: str = "stages",
    *,
    variants: Sequence[str] = (),
    seed: int | None = None,
    product: str | None = None,
    image_ids: Sequence[str] = (),
) -> tuple[Picture, list[TrialRow]]:
    """A figure of a study, of one of `KINDS`, and the trials that it shows.

    Without variants: the first finished trial, for CAMs those of `compared`, for predictions the best. ValueError for
    what does not go together, and for what is not there.
    """
    rows = read_rows(storage, study)
    if kind not in KINDS:
        raise ValueError(f"kind {kind}: there are {', '.join(KINDS)}")
    if product is not None and kind != "predictions":
        raise ValueError(f"a product ({product}) is named for kind predictions alone, not for {kind}")
    if kind == "stages":
        if len(variants) > 1:
            raise ValueError("kind stages is of one trial: name one variant, or take kind cams or predictions")
        row = pick_row(rows, variants[0] if variants else None, seed)
        return gallery(storage, row, image_ids), [row]
    if kind == "cams":
        found = pick_rows(rows, variants or compared(study, rows), seed)
    elif not variants:
        found = [pick_row(rows, best_variant(study, rows), seed)]
    else:
        found = pick_rows(rows, variants, seed)
    found = found or [pick_row(rows, None, seed)]
    if kind == "cams":
        return cams_figure(storage, found, image_ids), found
    return predictions_figure(storage, found, product, image_ids), found


def draw_study(
    storage: Storage, study: dict[str, Any], rows: Sequence[TrialRow], folder: StoragePath
) -> tuple[list[StoragePath], list[str]]:
    """Draw what a launch shows of its study into a folder: `cams.png`, the baseline against the best other variant, and
    `predictions.png` of the best. The files, and what kept one from being drawn: nothing is raised."""
    drawers: dict[str, Callable[[], Picture]] = {}
    with_cams = [row for row in rows if any(stage["name"] == "make_seeds" for stage in row.stages)]
    with_labels = [row for row in rows if products_of([stage["name"] for stage in row.stages])]
    if variants := compared(study, with_cams):
        drawers["cams.png"] = lambda: cams_figure(storage, pick_rows(with_cams, variants, None))
    if (best := best_variant(study, with_labels)) is not None:
        drawers["predictions.png"] = lambda: predictions_figure(storage, pick_rows(with_labels, [best], None))
    files, problems = list[StoragePath](), list[str]()
    for name, draw in drawers.items():
        try:
            save_picture(draw(), folder / name)
        except Exception as error:  # a figure is no result: whatever is wrong with it, the study has its table
            problems.append(without_secrets(f"{name} was not drawn: {type(error).__name__}: {error}"))
        else:
            files.append(folder / name)
    return files, problems


def save_picture(picture: Picture, path: StoragePath, *, small: bool = False) -> None:
    """Write a picture as PNG; a `small` one has 256 colours, and under half of the bytes. ValueError for a path that
    names something else."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"{path}: a picture is written as PNG; name a file that ends in .png")
    image = Image.fromarray(picture)
    if small:
        # of the palettes that Pillow makes, the one that keeps rare colours, and then moves to the frequent ones
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    with atomic_write(path) as handle:
        handle.write(buffer.getvalue())

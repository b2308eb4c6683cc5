"""CAMs of a study's variants for its page: the same few images, small, as data URIs.

What cannot be drawn is said and keeps nothing else from the page.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from ppc.artifacts import Storage
from ppc.config import DataConfig
from ppc.figures import VOC_PALETTE
from ppc.gallery import Picture, TrialPictures, pick_rows
from ppc.ledger import FINISHED, TrialRow, stage_dirs
from ppc.places import StoragePath, names_in, read_bytes
from ppc.planning import data_name
from ppc.redact import without_secrets
from ppc.report_table import Report

MOST_IMAGES, MOST_VARIANTS = 4, 16
SIDE_PX = 192  # at most
COLOURS = 128  # of a PNG: a third of the bytes, and heat stays smooth


@dataclass(frozen=True)
class Shown:
    """A picture as the page shows it; an empty URI is one that could not be drawn."""

    title: str
    uri: str


@dataclass(frozen=True)
class Pictures:
    """An image and its truth, as far as the data are there, the baseline's CAM, and the CAM of each variant."""

    image_id: str
    still: list[Shown]
    cams: list[Shown]  # one a variant, all images in the same order


def cam_pictures(report: Report, storage: Storage, rows: Sequence[TrialRow]) -> tuple[list[Pictures], list[str]]:
    """CAMs that the trials have drawn, all of one seed where that can be; and what could not be shown."""
    drawn = {row.key: _overlays(storage, row) for row in rows if row.state == FINISHED}
    usable = [row for row in rows if drawn.get(row.key)]
    variants, problems = _variants(report, {row.variant for row in usable})
    if not variants:
        return [], problems
    chosen = pick_rows(usable, variants, None)
    shared = sorted(set.intersection(*(set(drawn[row.key]) for row in chosen)))[:MOST_IMAGES]
    if not shared:
        problems.append("no image has a CAM of every variant")
    one_seed = len({row.seed for row in chosen}) == 1
    found = []
    for image_id in shared:
        cams = [
            Shown(row.variant if one_seed else row.label, _cam(drawn[row.key][image_id], row, problems))
            for row in chosen
        ]
        baseline = [
            Shown(f"CAM, {shown.title} (baseline)", shown.uri)
            for shown, row in zip(cams, chosen, strict=True)
            if row.variant in [line.variant for line in report.lines if line.baseline]
        ]
        found.append(Pictures(image_id, [*_stills(storage, chosen[0], image_id, problems), *baseline], cams))
    return found, list(dict.fromkeys(problems))


def _variants(report: Report, there: set[str]) -> tuple[list[str], list[str]]:
    """The variants whose CAMs are shown, in the order of the table, and a word on those that are not."""
    found = [line.variant for line in report.lines if line.variant in there]
    problems = [f"no CAM of {line.variant}" for line in report.lines if line.variant not in there]
    if len(found) > MOST_VARIANTS:
        told = [line.variant for line in report.lines if line.baseline or line.best]
        kept = set(sorted(found, key=lambda variant: variant not in told)[:MOST_VARIANTS])
        problems.append(f"CAMs of {MOST_VARIANTS} variants are shown, of {len(found)}")
        found = [variant for variant in found if variant in kept]
    return found, problems


def _overlays(storage: Storage, row: TrialRow) -> dict[str, StoragePath]:
    """What a trial has drawn: image -> file."""
    found = dict[str, StoragePath]()
    for folder in stage_dirs(storage, row):
        for name in names_in(folder / "overlays"):
            if name.endswith(".png"):
                found[name.removesuffix(".png")] = folder / "overlays" / name
    return found


def _cam(path: StoragePath, row: TrialRow, problems: list[str]) -> str:
    try:
        with Image.open(BytesIO(read_bytes(path))) as image:
            return png_uri(image)
    except Exception as error:  # a torn file is no reason to have no report
        problems.append(without_secrets(f"{path.name} of {row.label}: {type(error).__name__}: {error}"))
        return ""


def _stills(storage: Storage, row: TrialRow, image_id: str, problems: list[str]) -> list[Shown]:
    """The image and its truth; the data may be on another machine."""
    try:
        data = DataConfig.model_validate(row.config["data"])
        root = storage.dataset(data_name(data)) if data.root is None else Path(data.root)
        if not root.is_dir():  # to open generated scenes would make them, and a report makes no data
            problems.append(f"no images and truth: {root} is not on this machine")
            return []
        trial = TrialPictures(storage, row)
        found: list[tuple[str, Picture | None]] = [("image", trial.image(image_id)), ("truth", trial.truth(image_id))]
    except Exception as error:
        problems.append(without_secrets(f"images and truth: {type(error).__name__}: {error}"))
        return []
    return [
        Shown(title, png_uri(Image.fromarray(VOC_PALETTE[picture] if picture.ndim == 2 else picture)))
        for title, picture in found
        if picture is not None
    ]


def png_uri(image: Image.Image) -> str:
    """A small PNG as a data URI."""
    image = image.convert("RGB")
    image.thumbnail((SIDE_PX, SIDE_PX))
    buffer = BytesIO()
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        buffer, "PNG", optimize=True
    )
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"

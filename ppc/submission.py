"""Archives for VOC's evaluation server: written from a trial's predictions, and checked before they are sent.

Layout: results/VOC2012/Segmentation/comp6_test_cls/ID.png, a palette PNG of class indices for every image of the list.
"""

from __future__ import annotations

import gzip
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ppc.artifacts import Storage
from ppc.checks import nets_of
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.ledger import TrialRow, make_again
from ppc.places import atomic_write, read_bytes, size_of
from ppc.planning import open_data
from ppc.stages.products import PRODUCTS

COMPETITIONS = ("comp5", "comp6")  # trained on VOC's data alone; with anything else, ImageNet weights too
LARGEST_PNG = 16 * 2**20  # bytes; a label map of VOC has some thousand
NAMED = 5  # ids in a complaint


def folder_in_archive(split: str, competition: str) -> str:
    """Where the server looks for the label maps of a split."""
    return f"results/VOC2012/Segmentation/{competition}_{split}_cls"


def competition_of(cfg: TrialConfig) -> str:
    """comp6 when any net that a trial trains began from a weight file, which is data beside VOC's; else comp5."""
    return "comp6" if any(cfg.backbone_of(net).weights is not None for net in nets_of(cfg)) else "comp5"


def write_submission(storage: Storage, row: TrialRow, out: Path, *, split: str, competition: str | None) -> str:
    """Pack a trial's predictions of a split and check the archive; the folder in it. competition None: as it trained.

    The same predictions give the same bytes. ValueError when the trial has none of this split, or for a bad archive.
    """
    cfg = TrialConfig.model_validate(row.config)
    competition = competition or competition_of(cfg)
    if competition not in COMPETITIONS:
        raise ValueError(f"--competition {competition}: there are {', '.join(COMPETITIONS)}")
    keys = {stage["name"]: stage["key"] for stage in row.stages}
    stage, folder = PRODUCTS["seg"]
    if stage not in keys:
        raise ValueError(f"trial {row.label} has no stage {stage}: add train_seg and {stage} to stages")
    if split not in cfg.segmentation.test.splits:
        there = ", ".join(cfg.segmentation.test.splits)
        raise ValueError(f"trial {row.label} predicted [{there}], not {split}: add it to segmentation.test.splits")
    dataset, made = open_data(cfg.data, storage), storage.stage(stage, keys[stage])
    masks = made / folder
    inside = folder_in_archive(split, competition)
    with atomic_write(out) as handle, gzip.GzipFile(fileobj=handle, mode="wb", filename="", mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for image_id in sorted(set(dataset.ids(split))):
                path = masks / f"{image_id}.png"
                if size_of(path) is None:
                    raise ValueError(f"{path}: there is no prediction of {image_id}; {make_again(storage, row, made)}")
                data = read_bytes(path)
                entry = tarfile.TarInfo(f"{inside}/{image_id}.png")
                entry.size, entry.mode = len(data), 0o644
                archive.addfile(entry, BytesIO(data))
    if problems := check_submission(out, dataset, split):
        raise ValueError(f"{out} would be refused:\n" + "\n".join(problems))
    return inside


def check_submission(path: Path, dataset: Dataset, split: str) -> list[str]:
    """All that is wrong with an archive for the server, a line each; none when it can be sent. Nothing is unpacked."""
    wanted = list(dict.fromkeys(dataset.ids(split)))
    seen: Counter[str] = Counter()
    folders: dict[str, None] = {}
    problems: list[str] = []
    try:
        with tarfile.open(path, "r:*") as archive:
            for entry in archive:
                if entry.isdir():
                    continue
                folder, image_id, problem = _place(entry, split)
                if problem is not None:
                    problems.append(problem)
                    continue
                folders[folder] = None
                seen[image_id] += 1
                file = archive.extractfile(entry)
                assert file is not None
                data = b"" if entry.size > LARGEST_PNG else file.read()
                problems += [f"{entry.name}: {text}" for text in _complaints(data, image_id, dataset, set(wanted))]
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        return [*problems, f"{path}: not a whole tar archive ({error}); make it again: ppc export submission"]
    if len(folders) > 1:
        problems.append(f"label maps in {' and in '.join(folders)}: an archive is for one competition")
    if missing := [image_id for image_id in wanted if image_id not in seen]:
        problems.append(f"{len(missing)} of the {len(wanted)} images of {split} are missing: {_some(missing)}")
    if twice := [image_id for image_id, number in seen.items() if number > 1]:
        problems.append(f"{len(twice)} images are there more than once: {_some(twice)}")
    return problems


def _place(entry: tarfile.TarInfo, split: str) -> tuple[str, str, str | None]:
    """Folder and image id of an entry, and what is wrong with its place."""
    name = entry.name.removeprefix("./")
    folders = "|".join(re.escape(folder_in_archive(split, competition)) for competition in COMPETITIONS)
    match = re.fullmatch(rf"({folders})/([^/]+)\.png", name)
    if match is None:
        expected = folder_in_archive(split, f"({'|'.join(COMPETITIONS)})")
        return "", "", f"{entry.name}: does not belong there; expected {expected}/ID.png alone"
    if not entry.isfile():
        return "", "", f"{entry.name}: a link or a device, not a file"
    return match[1], match[2], None


def _complaints(data: bytes, image_id: str, dataset: Dataset, wanted: set[str]) -> Iterator[str]:
    """What is wrong with one label map."""
    if image_id not in wanted:
        yield "its image is not on the list"
        return
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            mode, (width, height) = image.mode, image.size
            label_HW = np.array(image) if mode == "P" else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        yield f"not readable as a PNG ({error})"
        return
    expected = dataset.image_size(image_id)
    if (height, width) != expected:
        yield f"{width}x{height} pixels, its image has {expected[1]}x{expected[0]}"
    if label_HW is None:
        yield f"a PNG of mode {mode}; the server takes palette PNGs of class indices (mode P)"
    elif label_HW.max(initial=0) > dataset.num_classes:
        yield f"index {label_HW.max()}; classes are 0 to {dataset.num_classes}, and 255 is no prediction"


def _some(image_ids: Sequence[str]) -> str:
    more = len(image_ids) - NAMED
    return ", ".join(image_ids[:NAMED]) + (f" and {more} more" if more > 0 else "")

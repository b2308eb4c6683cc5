"""What is missing or broken in a data set, file by file; and the fingerprint of its contents."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from ppc.data.dataset import IGNORE, Dataset
from ppc.data.labels import DataError
from ppc.places import file_sha256

THREADS = 8
SALIENCY_SAMPLE = 20
BROKEN_VERSION = 1  # raise it when `broken_images` finds others in the same files


@dataclass(frozen=True)
class Problem:
    """One thing to repair: the file, what is wrong with it, and how to put it right."""

    path: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.remedy}"


def check_dataset(layout: Dataset, splits: Iterable[str], *, with_saliency: bool = False) -> list[Problem]:
    """Decode every listed file and compare what belongs together; every problem once, in the order of the lists.

    A mask is missed where any image of the split has one. Saliency maps are read wherever they are there;
    `with_saliency` makes a missing one a problem.
    """
    found: list[Problem] = []
    lists: dict[str, list[str]] = {}
    for split in splits:
        try:
            lists[split] = layout.ids(split)
        except DataError as error:
            found.append(_problem(error))
    found += [_problem(error) for error in layout.problems()]
    found += _check_lists(layout, lists)
    items = [(split, image_id) for split, ids in lists.items() for image_id in dict.fromkeys(ids)]
    with_masks = {split for split, ids in lists.items() if any_mask(layout, split, ids)}

    def check(item: tuple[str, str]) -> list[Problem]:
        return list(_check_image(layout, *item, with_mask=item[0] in with_masks, with_saliency=with_saliency))

    with ThreadPoolExecutor(THREADS) as pool:
        for problems in pool.map(check, items):
            found += problems
    if with_saliency or layout.has_saliency:
        found += [dark for ids in lists.values() if (dark := dark_saliency(layout, ids)) is not None]
    return list(dict.fromkeys(found))


def _problem(error: DataError) -> Problem:
    return Problem(error.path, error.what, error.remedy)


def _check_lists(layout: Dataset, lists: dict[str, list[str]]) -> Iterator[Problem]:
    for split, ids in lists.items():
        for image_id, times in Counter(ids).items():
            if times > 1:
                yield Problem(str(layout.list_path(split)), f"{image_id} is listed {times} times", "list every id once")
    val = set(lists.get("val", []))
    for split in sorted(split for split in lists if not split.startswith(("val", "trainval"))):
        for image_id in sorted(val.intersection(lists[split])):
            what = f"{image_id} is in {split} and in val"
            yield Problem(str(layout.list_path(split)), what, "take it off one list, or the score on val is not honest")


def any_mask(layout: Dataset, split: str, ids: Sequence[str]) -> bool:
    """Whether any of these images of a split has a mask."""
    return any(layout.has_mask(image_id, split=split) for image_id in ids)


def _check_image(
    layout: Dataset, split: str, image_id: str, *, with_mask: bool, with_saliency: bool
) -> Iterator[Problem]:
    try:
        layout.image(image_id)
    except DataError as error:
        yield _problem(error)
    present: set[str] | None = None
    try:
        if with_mask:
            mask_HW = layout.mask(image_id, split=split)
            present = {layout.class_names[v - 1] for v in np.unique(mask_HW).tolist() if v not in (0, IGNORE)}
    except DataError as error:
        yield _problem(error)
    try:
        tags_K = layout.image_label(image_id, split=split)
        tagged = {name for name, tag in zip(layout.class_names, tags_K, strict=True) if tag}
        if present is not None and (tagged != present if layout.every_tag_has_pixels else present - tagged):
            what = f"the mask shows {_names(present)} but {image_id} is tagged {_names(tagged)}"
            path = str(layout.mask_path(image_id, split=split))
            yield Problem(path, what, f"correct the mask or the label ({layout.label_source})")
    except DataError as error:
        yield _problem(error)
    if not (with_saliency or layout.has_saliency):
        return
    try:
        layout.saliency(image_id)
    except DataError as error:
        if with_saliency or error.what != "missing":
            yield _problem(error)


def dark_saliency(layout: Dataset, ids: Sequence[str]) -> Problem | None:
    """Maps of 0 and 1 where 0 to 255 is meant, which a loss would take for empty: told by the first ones together,
    since one map alone may have no more than a trace."""
    highest = []
    for image_id in ids[:SALIENCY_SAMPLE]:
        with suppress(DataError):
            highest.append(int(layout.saliency(image_id).max()))
    if max(highest, default=0) != 1:
        return None
    what = f"the first {len(highest)} saliency maps hold 0 and 1 alone, of 255"
    return Problem(layout.saliency_place, what, "store 1 as 255")


def broken_images(layout: Dataset, split: str, *, with_labels: bool = True) -> dict[str, Problem]:
    """The images of a split that cannot be used, each with its first problem, in the order of the list.

    A mask is asked for where any image of the split has one; a mask that contradicts the tags can be used. Without
    `with_labels` an image needs no tags: it is only predicted.
    """
    ids = list(dict.fromkeys(layout.ids(split)))
    with_masks = any_mask(layout, split, ids)

    def check(image_id: str) -> Problem | None:
        try:
            layout.image(image_id)
            if with_masks:
                layout.mask(image_id, split=split)
            if with_labels:
                layout.image_label(image_id, split=split)
        except DataError as error:
            return _problem(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(ids, pool.map(check, ids), strict=True)
        return {image_id: problem for image_id, problem in found if problem is not None}


def raw_fingerprint(layout: Dataset, split: str) -> str:
    """sha256 over all that decides which images of a split are broken; missing files are part of it."""
    whole = hashlib.sha256(json.dumps([BROKEN_VERSION, layout.class_names, layout.label_source, split]).encode())
    for path in layout.label_files():
        whole.update(f"\n{path.name} {file_sha256(path) if path.is_file() else None}".encode())

    def digest(image_id: str) -> str:
        finders: list[Callable[[], str]] = [
            lambda: file_sha256(layout.image_path(image_id)),
            partial(layout.mask_digest, image_id, split=split),
            *layout.own_digests(image_id),
        ]
        found: list[str | None] = []
        for find in finders:
            try:
                found.append(find())
            except DataError:
                found.append(None)
        return json.dumps([image_id, found])

    with ThreadPoolExecutor(THREADS) as pool:
        for line in pool.map(digest, layout.ids(split)):
            whole.update(f"\n{line}".encode())
    return whole.hexdigest()


def _names(classes: set[str]) -> str:
    return ", ".join(sorted(classes)) or "nothing"


def fingerprint(
    layout: Dataset, splits: Iterable[str], *, with_masks: bool, with_saliency: bool, with_labels: bool = True
) -> str:
    """sha256 over class names, lists, image-level labels and the bytes of every listed file.

    The same for a copy elsewhere; changes with any byte. Raises DataError if a file is missing, or a label, unless
    `with_labels` is off: an image of VOC's test split has none.
    """
    lists = {split: layout.ids(split) for split in sorted(set(splits))}

    def digest(item: tuple[str, str]) -> str:
        split, image_id = item
        found = [file_sha256(layout.image_path(image_id))]
        if with_masks:
            found.append(layout.mask_digest(image_id, split=split))
        if with_saliency:
            found.append(file_sha256(layout.saliency_path(image_id)))
        try:
            label = layout.image_label(image_id, split=split).tolist()
        except DataError:
            if with_labels:
                raise
            label = None
        return json.dumps([split, image_id, label, found])

    whole = hashlib.sha256(json.dumps(layout.class_names).encode())
    with ThreadPoolExecutor(THREADS) as pool:
        for line in pool.map(digest, [(split, image_id) for split, ids in lists.items() for image_id in ids]):
            whole.update(f"\n{line}".encode())
    return whole.hexdigest()

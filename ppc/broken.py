"""The images that `data.on_broken: skip` leaves out: decided once a split, from its contents alone."""

from __future__ import annotations

from contextlib import suppress

from ppc.artifacts import Storage, read_json, write_json
from ppc.data import Dataset
from ppc.data.check import broken_images, raw_fingerprint
from ppc.data.labels import DataError


def leave_out_broken(
    dataset: Dataset, split: str, storage: Storage, *, with_labels: bool = True, planned: bool = False
) -> None:
    """Take the broken images off a split's list; without `with_labels` one that has no tags is not broken.

    What the check found is kept on storage under the fingerprint of what it read, so that it is made once for all
    trials. Whoever reads the split finds the same images: nothing depends on workers, order or a resume. `planned`: the
    check was made when the trial was, or DataError: the files are others now, and what comes out would go by its key.
    """
    dataset.left_out.pop(split, None)
    path = storage.root / "checks" / f"{raw_fingerprint(dataset, split)}{'' if with_labels else '-untagged'}.json"
    known = read_json(path)
    if not isinstance(known, dict) or "broken" not in known:
        if planned:
            what = f"the files of split {split} are not those that the trial was planned with"
            raise DataError(dataset.root, what, "launch or resume again, which looks at all of them")
        found = broken_images(dataset, split, with_labels=with_labels)
        known = {"split": split, "broken": {image_id: str(problem) for image_id, problem in found.items()}}
        with suppress(OSError):  # it is made again
            write_json(path, known)
    dataset.leave_out(split, known["broken"])


def skipped(dataset: Dataset) -> dict[str, dict[str, object]]:
    """By split: the ids that were left out, and how many were listed."""
    return {
        split: {"ids": list(ids), "listed": len(set(dataset.ids(split))) + len(ids)}
        for split, ids in dataset.left_out.items()
    }

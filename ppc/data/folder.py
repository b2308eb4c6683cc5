"""Your own folder: `images/`, `classes.txt` and `tags.csv`; `masks/`, `saliency/` and lists of splits as there are.

K classes in the order of `classes.txt`; a mask holds 0 = background, 1..K, 255 = ignore.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ppc.data.dataset import Dataset, Float32
from ppc.data.labels import DataError, TableError, read_classes, read_list
from ppc.data.tags import Table, read_table
from ppc.names import check_name

ALL = "train"  # the split of all images, where nothing says which there are
NO_LISTS = re.compile(r"classes|(readme|licen[cs]e)\b.*", re.IGNORECASE)  # text files of the root that are no lists


class FolderLayout(Dataset):
    """Images with a table of tags, one row an image.

    Splits are those of the table's column `split`, and of lists `NAME.txt` in the root; without either all images are
    `train`. An image is named by its file's name, with or without the suffix.
    """

    def __init__(self, root: str | Path, *, labels: str = "auto") -> None:
        """Open `root`; `labels` is auto (the table) or masks. Raises TableError with all that is wrong in the table."""
        root = Path(root)
        for name in ("images", "classes.txt", "tags.csv"):
            if not (root / name).exists():
                remedy = "data.root must be a folder with images/, classes.txt and tags.csv (image,classes)"
                raise DataError(root, f"has no {name}", remedy)
        if labels not in ("auto", "masks"):
            raise ValueError(f"data.labels: `{labels}`, but a folder has auto (tags.csv) and masks")
        names = read_classes(root / "classes.txt")
        super().__init__(root, class_names=names, label_source="tags" if labels == "auto" else labels)
        self._key = tuple(path.stat().st_mtime_ns for path in (root / "tags.csv", root / "images"))
        table = self._table()
        if table.errors:
            raise TableError(table.all_errors())
        if both := sorted(set(table.splits()) & set(self._lists())):
            what = f"there is a list of split `{both[0]}`, and rows of it in tags.csv"
            raise DataError(self.list_path(both[0]), what, "keep the list or the column")

    def _table(self) -> Table:
        # Not an attribute: it would be sent to workers with every copy of this object.
        return read_table(self.root, self.class_names, self._key)

    def _lists(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.txt") if not NO_LISTS.fullmatch(path.stem))

    # -- lists

    def splits(self) -> list[str]:
        """Splits of the table and lists in the root."""
        return sorted({*self._table().splits(), *self._lists()}) or [ALL]

    def list_path(self, split: str) -> Path:
        """The split's list, or the table."""
        path = self.root / f"{check_name(split, 'split')}.txt"
        return path if path.is_file() and not NO_LISTS.fullmatch(split) else self.root / "tags.csv"

    def listed(self, split: str) -> list[str]:
        """Image ids of a split in the order of its list, or of the table's rows."""
        table, path = self._table(), self.list_path(split)
        if path.name != "tags.csv":
            found = []
            for number, line in read_list(path):
                try:
                    found.append(check_name(table.resolve(line), "image"))
                except ValueError as error:
                    raise DataError(path, f"line {number}: {error}", "rename the image and its line") from error
            return found
        if split not in self.splits():
            raise DataError(path, f"no split `{split}`", f"this data set has: {', '.join(self.splits())}")
        whole = not table.splits()
        if not (found := [image_id for image_id, row in table.rows.items() if whole or row.split == split]):
            raise DataError(path, "it has no rows", "write one row an image")
        return found

    # -- files

    def image_path(self, image_id: str) -> Path:
        """The image's file. Raises DataError that names the row of an image that is not there."""
        table = self._table()
        if (name := table.files.get(image_id)) is not None:
            path = self.root / "images" / name
            if path.is_file():
                return path
        if (row := table.rows.get(image_id)) is not None:
            raise table.stray(image_id, row)
        path = self.root / "images" / f"{check_name(image_id, 'image')}.jpg"
        raise DataError(path, "missing", "put the image there or take it off the list", of_image=True)

    def mask_path(self, image_id: str, *, split: str | None = None) -> Path:
        """The mask's file. Raises DataError if there is none."""
        remedy = "put the mask there or take the image off the split"
        return self.find(self.root / "masks", image_id, (".png",), remedy, of_image=True)

    def saliency_path(self, image_id: str) -> Path:
        """The saliency map's file. Raises DataError if there is none."""
        remedy = "a method with saliency needs one map an image"
        return self.find(self.root / "saliency", image_id, (".png", ".jpg"), remedy, of_image=False)

    @property
    def has_saliency(self) -> bool:
        """Whether the root has a folder of saliency maps (a map of every image is not promised)."""
        return (self.root / "saliency").is_dir()

    @property
    def saliency_place(self) -> str:
        """Where saliency maps are looked for."""
        return f"a folder saliency in {self.root}"

    @property
    def classes_place(self) -> str:
        """Where the class names come from."""
        return str(self.root / "classes.txt")

    def label_files(self) -> list[Path]:
        """Files beside the images' own that decide their tags."""
        return [self.root / "tags.csv", self.root / "classes.txt"]

    def problems(self) -> list[DataError]:
        """Images that no row of the table names."""
        table = self._table()
        return [
            DataError(self.root / "images" / name, "has no row in tags.csv", "add its tags there, or move it away")
            for image_id, name in table.files.items()
            if image_id not in table.rows
        ]

    # -- image-level labels

    def image_label(self, image_id: str, *, split: str | None = None) -> Float32:
        """Tags of an image, float32 (K,), 1 = present; `split` only matters to labels from masks."""
        if self.label_source == "masks":
            return self.mask_label(image_id, split)
        table = self._table()
        if (row := table.rows.get(image_id)) is None:
            where = "" if split is None else f" (of split {split})"
            what = f"no row for image `{image_id}`{where}"
            raise DataError(self.root / "tags.csv", what, "add its tags", of_image=True)
        if row.classes is None:
            raise table.untagged(image_id, row)
        label_K = np.zeros(self.num_classes, np.float32)
        label_K[list(row.classes)] = 1
        return label_K

"""The table `tags.csv` of a folder: which classes an image shows and in which split it is; errors with their lines.

Columns `image,classes` (names separated by `;`), or `image` and one column of 0 and 1 a class; `split` may be one more.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ppc.data.dataset import IMAGE_SUFFIXES
from ppc.data.labels import DataError
from ppc.names import check_name

NOTHING = "-"  # of column `classes`: the image shows none of them
SHOWN_CLASSES = 12


@dataclass(frozen=True)
class Row:
    """A line of the table: indices of the classes, None where nothing was written; the split, empty without column."""

    line: int
    classes: tuple[int, ...] | None
    split: str


@dataclass
class Table:
    """The rows by image id in the table's order, the files of `images/`, and what is wrong with lines."""

    path: Path
    files: dict[str, str] = field(default_factory=dict)  # image id -> name of its file
    rows: dict[str, Row] = field(default_factory=dict)
    errors: list[tuple[int, DataError]] = field(default_factory=list)  # that no split can do without

    def splits(self) -> list[str]:
        """Splits of the column `split`."""
        return list(dict.fromkeys(row.split for row in self.rows.values() if row.split))

    def resolve(self, name: str) -> str:
        """The id of an image that is named with or without its suffix."""
        stem, suffix = os.path.splitext(name)
        has_suffix = suffix.lower() in IMAGE_SUFFIXES and (self.files.get(stem) == name or name not in self.files)
        return stem if has_suffix else name

    def stray(self, image_id: str, row: Row) -> DataError:
        """The error of a row without an image."""
        what = f"line {row.line}: no image `{image_id}` in images/"
        return DataError(self.path, what, "put the image there or delete the row", of_image=True)

    def untagged(self, image_id: str, row: Row) -> DataError:
        """The error of a row without classes."""
        what, remedy = f"line {row.line}: image `{image_id}` has no class", f"name its classes, or write {NOTHING}"
        return DataError(self.path, what, f"{remedy} if it shows none of them", of_image=True)

    def all_errors(self) -> list[DataError]:
        """Everything that is wrong, in the order of the lines."""
        found = list(self.errors)
        for image_id, row in self.rows.items():
            if image_id not in self.files:
                found.append((row.line, self.stray(image_id, row)))
            if row.classes is None:
                found.append((row.line, self.untagged(image_id, row)))
        return [error for _, error in sorted(found, key=lambda one: one[0])]


@lru_cache(maxsize=8)
def read_table(root: Path, class_names: tuple[str, ...], key: tuple[int, ...]) -> Table:
    """The table of a folder; read once a process while `key` stays the same. Raises DataError if it cannot be read."""
    table = Table(root / "tags.csv")
    _read_files(root / "images", table)
    try:
        with table.path.open(encoding="utf-8-sig", newline="") as file:
            _read_rows(csv.reader(file, strict=True), class_names, table)
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as CSV in UTF-8: commas between columns, quotes around a cell that holds one"
        raise DataError(table.path, f"not readable as a table ({error})", remedy) from error
    return table


def _read_files(folder: Path, table: Table) -> None:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if stem in table.files:
            error = DataError(folder / name, f"{table.files[stem]} is named `{stem}` too", "rename one of the two")
            table.errors.append((0, error))
        table.files.setdefault(stem, name)


def _read_rows(reader: Iterator[list[str]], class_names: Sequence[str], table: Table) -> None:
    header = [cell.strip() for cell in next(reader, [])]
    known = {name: index for index, name in enumerate(class_names)}
    if (problem := _header_problem(header, known)) is not None:
        table.errors.append((1, DataError(table.path, f"line 1: {problem[0]}", problem[1])))
        return
    for line, cells in _lines(reader):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            what = f"line {line}: {len(cells)} cells, but the header has {len(header)}"
            table.errors.append((line, DataError(table.path, what, "quote a cell that holds a comma")))
            continue
        try:
            _add_row(dict(zip(header, (cell.strip() for cell in cells), strict=True)), line, known, table)
        except DataError as error:
            table.errors.append((line, error))
        except ValueError as error:
            table.errors.append((line, DataError(table.path, f"line {line}: {error}", "rename it")))


def _lines(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    for cells in reader:
        yield reader.line_num, cells  # type: ignore[attr-defined]  # of csv.reader


def _header_problem(header: Sequence[str], known: dict[str, int]) -> tuple[str, str] | None:
    """What is wrong with the names of the columns, and the remedy."""
    form = "begin with the line image,classes or image,CLASS1,CLASS2,... and a column split where there are splits"
    if "image" not in header:
        return "no column `image`", form
    if len(set(header)) < len(header):
        return f"column `{next(name for name in header if header.count(name) > 1)}` comes twice", form
    rest = [name for name in header if name not in ("image", "split")]
    if rest == ["classes"]:
        return None
    if unknown := [name for name in rest if name not in known]:
        return f"column `{unknown[0]}` is none of the {len(known)} classes of classes.txt ({_some(known)})", form
    if missing := [name for name in known if name not in rest]:
        return f"no column for class `{missing[0]}` of classes.txt", form
    return None


def _add_row(cells: dict[str, str], line: int, known: dict[str, int], table: Table) -> None:
    def wrong(what: str, remedy: str) -> DataError:
        return DataError(table.path, f"line {line}: {what}", remedy)

    image_id = check_name(table.resolve(cells["image"]), "image")
    if (first := table.rows.get(image_id)) is not None:
        raise wrong(f"image `{image_id}` is in line {first.line} already", "keep one row an image")
    split = cells.get("split", "")
    if "split" in cells:
        check_name(split, "split")
    if set(cells) <= {"image", "split", "classes"}:
        found = _named(cells["classes"], known, wrong)
    elif bad := [name for name in known if cells[name] not in ("0", "1")]:
        raise wrong(f"`{cells[bad[0]]}` in column `{bad[0]}`", "write 0 or 1")
    else:
        found = tuple(index for name, index in known.items() if cells[name] == "1")
    table.rows[image_id] = Row(line, found, split)


def _named(cell: str, known: dict[str, int], wrong: Callable[[str, str], DataError]) -> tuple[int, ...] | None:
    """Indices of the classes that a cell names; None for an empty cell."""
    if cell == NOTHING:
        return ()
    names = [name.strip() for name in cell.split(";") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise wrong(f"unknown class `{unknown[0]}`", f"classes.txt has {len(known)}: {_some(known)}")
    return tuple(sorted({known[name] for name in names})) if names else None


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = len(shown) - SHOWN_CLASSES
    return ", ".join(shown[:SHOWN_CLASSES]) + (f" and {more} more" if more > 0 else "")

"""The axes of a design: lists of values, and ranges for a search; what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ppc.schema import Problem, admits, check_path, fields, origin_of
from ppc.study_config import AxisRange, DesignConfig


def check_change(path: str, value: Any, where: str) -> Problem | None:
    """What is wrong with a field that a variant sets, whatever it sets it to."""
    if path == "seed":
        return Problem(where, path, "is not varied by a design; list the seeds under `trial_seeds`")
    if isinstance(value, Mapping):
        return Problem(where, path, "should be a value or a list; a group of fields is a variant of a `list` design")
    return check_path(path, where)


def axis_values(axis: list[Any] | AxisRange) -> list[Any]:
    """The values of an axis; of a range its ends."""
    return [axis.low, axis.high] if isinstance(axis, AxisRange) else axis


def is_whole(path: str) -> bool:
    """Whether a field takes whole numbers alone."""
    annotation = fields()[path].annotation
    return admits(annotation, int) and not admits(annotation, float)


def _check_range(path: str, axis: AxisRange, design: DesignConfig, where: str) -> Problem | None:
    if design.kind != "search":
        return Problem(where, path, f"is a range; a design of kind {design.kind} needs the values in a list")
    if path not in fields() or not (is_whole(path) or admits(fields()[path].annotation, float)):
        return check_path(path, where) or Problem(where, path, "is no number; list its values")
    given = (axis.low, axis.high, axis.step or 1)
    if is_whole(path) and any(value != int(value) for value in given):
        return Problem(where, path, "is a whole number, so low, high and step should be")
    return None


def check_axes(design: DesignConfig, overridden: Iterable[str]) -> Iterator[Problem]:
    """What is wrong with the axes of a design; `overridden` are the fields that the command line sets."""
    for path, axis in design.axes.items():
        where, values = origin_of(design.axes, [path]), axis_values(axis)
        if isinstance(axis, AxisRange) and (problem := _check_range(path, axis, design, where)) is not None:
            yield problem
            continue
        if not values:
            yield Problem(where, f"design.axes.{path}", "the axis has no values")
        if path.startswith("runtime."):
            yield Problem(
                where, path, "cannot be an axis: `runtime` never changes a number, so trials would be the same"
            )
        elif path in overridden and design.kind == "grid":
            yield Problem(where, path, "is an axis of this study, so an override of it would have no effect")
        for value in values or [None]:
            if (problem := check_change(path, value, where)) is not None:
                yield problem
                break


def num_points(design: DesignConfig) -> float:
    """How many variants the axes can make; infinity where a range has no steps."""
    sizes = []
    for path, axis in design.axes.items():
        if not isinstance(axis, AxisRange):
            sizes.append(float(len(axis)))
        elif axis.step is None and not is_whole(path):
            return math.inf
        else:
            sizes.append(round((axis.high - axis.low) / (axis.step or 1)) + 1.0)
    return math.prod(sizes)


def check_search(design: DesignConfig) -> Iterator[Problem]:
    """What is wrong with `search`, and with what a search has no use for."""
    if design.kind != "search":
        if design.search is not None:
            yield Problem("", "design.search", f"is for kind search, and this design is of kind {design.kind}")
        return
    for name in ("exclude", "baseline"):
        if getattr(design, name):
            yield Problem("", f"design.{name}", "is not for kind search, whose baseline is the base")
    if design.search is None:
        yield Problem("", "design.search", "is missing: a design of kind search needs num_variants there")
    elif all(path in fields() for path in design.axes) and design.search.num_variants > num_points(design):
        points = f"{num_points(design):.0f} combinations"
        yield Problem("", "design.search.num_variants", f"the axes have {points} only; a grid would try them all")

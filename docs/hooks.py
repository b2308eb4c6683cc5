"""What mkdocs puts into pages when it builds them: the tables of every config field, from the pydantic models."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ppc.config import TrialConfig
from ppc.schema import model_in
from ppc.study_config import StudyConfig

MARK = re.compile(r"^<!-- fields of (\w+) -->$", re.MULTILINE)
MODELS: dict[str, type[BaseModel]] = {"trial": TrialConfig, "study": StudyConfig}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return MARK.sub(lambda match: fields_of(match[1]), markdown)


def fields_of(name: str) -> str:
    """A heading and a table for a model and for each section below it."""
    return "\n\n".join(_section(name, path, section) for path, section in sections(MODELS[name]))


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted name, the model itself (with the empty name) first."""
    yield path, model
    for name, field in model.model_fields.items():
        if (inner := model_in(field.annotation)) is not None:
            yield from sections(inner, f"{path}.{name}".lstrip("."))


def _anchor(root: str, path: str) -> str:
    return "-".join([root, *filter(None, path.split("."))])


def _section(root: str, path: str, model: type[BaseModel]) -> str:
    heading = f"### {path or 'At the top'} {{#{_anchor(root, path)}}}"
    words = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    rows = ["| field | values | default | what |", "|---|---|---|---|"]
    rows += [_row(name, field, _anchor(root, f"{path}.{name}")) for name, field in model.model_fields.items()]
    return "\n".join([f"{heading}\n\n{words}\n", *rows])


def _row(name: str, field: FieldInfo, anchor: str) -> str:
    bounds = [f"{sign} {value}" for at in field.metadata for key, sign in BOUNDS.items() if (value := _bound(at, key))]
    values = ", ".join([_type(field.annotation), *bounds])
    inner = model_in(field.annotation)
    if inner is not None:
        values = f"[{values}](#{anchor})"
    what = field.description or ("" if inner is None else (inner.__doc__ or "").partition(".")[0])
    default = "required" if field.is_required() else _default(field)
    cells = (f"`{name}`", values, default, what)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _bound(at: Any, key: str) -> str:
    value = getattr(at, key, None)
    return "" if value is None else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "empty" if field.default_factory in (dict, list) else "its own"
    value = field.default
    if value == "":
        return "empty"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    """A type in words: what stands in YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return "mapping"
    if (inner := model_in(annotation)) is not None and origin is not list:
        return "section" if type(None) not in arguments else "section or null"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in arguments))
    if origin in (list, tuple):
        return "list of sections" if inner is not None else f"list of {_type(arguments[0])}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type(arguments[0])
    return {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "`true`, `false`",
        type(None): "`null`",
        Any: "any",
    }[annotation]

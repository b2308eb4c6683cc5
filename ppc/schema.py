"""What fields exist and what is wrong with given values: dotted names, problems with their place, JSON schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ppc.config import TrialConfig
from ppc.study_config import StudyConfig

Model = type[BaseModel]
M = TypeVar("M", bound=BaseModel)
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it was written (`file:line`, may be empty), the dotted path, and what it is."""

    where: str
    path: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.text) if part)


class ConfigError(ValueError):
    """All problems of a config at once, in `problems`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n  ".join([f"{len(self.problems)} errors:", *map(str, self.problems)])


class Raw(dict[str, Any]):
    """A mapping that remembers where each of its keys was written, in `origin`."""

    def __init__(self, values: Mapping[str, Any] | None = None, origin: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.origin: dict[str, str] = dict(origin or getattr(values, "origin", {}))


def _into(raw: Any, part: Any) -> bool:
    """Whether `raw[part]` exists."""
    if isinstance(raw, Mapping):
        return part in raw
    return isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw)


def origin_of(raw: Any, loc: Iterable[Any], default: str = "") -> str:
    """Where the deepest known key on the way to `loc` was written."""
    for part in loc:
        if not _into(raw, part):
            break
        default = getattr(raw, "origin", {}).get(part, default)
        raw = raw[part]
    return default


# -- fields


def model_in(annotation: Any) -> Model | None:
    """The first model inside a type: of `Variant`, `list[Variant]` and `Variant | None` it is `Variant`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := model_in(arg))), None)


def admits(annotation: Any, kind: Any) -> bool:
    """Whether a type is, or has inside, `kind` (or `Any`)."""
    return annotation in (kind, Any) or any(admits(arg, kind) for arg in get_args(annotation))


def _walk(model: Model, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, BaseModel):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@cache
def fields(model: Model = TrialConfig) -> dict[str, FieldInfo]:
    """Every field of a config by its dotted name, sections left out."""
    return dict(_walk(model))


def model_at(model: Model, loc: tuple[Any, ...]) -> Model | None:
    """The model of the section at a place, None where there is none; positions and dotted names are skipped."""
    at: Model | None = model
    for part in loc:
        if isinstance(part, str) and "." not in part and at is not None:
            field = at.model_fields.get(part)
            at = model_in(field.annotation) if field is not None else None
    return at


def _likeness(wrong: str, name: str) -> float:
    wrong, name = wrong.lower().replace("-", "_"), name.lower()
    if wrong and wrong == "".join(word[0] for word in name.split("_")):  # lr is learning_rate, wd is weight_decay
        return 0.95
    return SequenceMatcher(None, wrong, name).ratio()


@cache
def nearest(model: Model, loc: tuple[str, ...]) -> tuple[str, ...]:
    """Dotted names of `model` most like the wrong one at `loc`, best first. Ties go to those of the same section."""
    *place, wrong = ".".join(loc).split(".")
    at = model_at(model, tuple(place))
    here = [".".join([*place, name]) for name in at.model_fields] if at is not None else []
    likeness = {
        name: (round(_likeness(wrong, name.rsplit(".", 1)[-1]), 2), name in here)
        for name in dict.fromkeys([*here, *fields(model)])
    }
    top, dotted = max(likeness.values()), ".".join(loc)
    if top[0] < 0.6:
        return tuple(get_close_matches(dotted, fields(model), n=1, cutoff=0.75))
    best = [name for name, like in likeness.items() if like == top]
    best.sort(key=lambda name: SequenceMatcher(None, dotted, name).ratio(), reverse=True)
    if not place:  # train.learning_rate comes before those of the nets that few trials have
        depth = min(name.count(".") for name in best)
        return tuple(name for name in best if name.count(".") == depth)[:3]
    return tuple(best[:1])


def _unknown(model: Model, loc: tuple[str, ...]) -> str:
    names = nearest(model, loc)
    if len(loc) == 1 and model is StudyConfig and loc[0] in TrialConfig.model_fields:
        hint = "; the trials' own seeds are `trial_seeds`" if loc[0] in ("seed", "seeds") else ""
        return f"is a field of a trial: in a study it goes under `base:`{hint}"
    if names and "." in loc[-1] and names[0] == ".".join(loc):
        nested = "..."
        for part in reversed(names[0].split(".")):
            nested = f"{part}: {nested}" if nested == "..." else f"{part}: {{{nested}}}"
        return f"is a dotted name; write it nested here: {nested}"
    if names:
        return f"no such field; did you mean {' or '.join(names)}?"
    at = model_at(model, loc[:-1])
    known = f"; the fields here: {', '.join(at.model_fields)}" if at is not None else ""
    return f"no such field{known}"


def check_path(path: str, where: str) -> Problem | None:
    """What is wrong with a dotted name of a trial's field, None when it is one."""
    if path in fields():
        return None
    loc = tuple(path.split("."))
    if all(loc) and (at := model_at(TrialConfig, loc)) is not None:
        inside = ", ".join(f"{path}.{name}" for name in at.model_fields)
        return Problem(where, path, f"is a section; name one of its fields: {inside}")
    return Problem(where, path, _unknown(TrialConfig, loc))


# -- problems of values


def show(value: Any) -> str:
    """A value as it reads in YAML, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"'{text}'" if isinstance(value, str) else text


def _real(model: Model, raw: Any, loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place without the labels that pydantic adds for the branches of a union."""
    kept: list[Any] = []
    for part in loc:
        at = model_at(model, tuple(kept))
        if not _into(raw, part) and not (at is not None and part in at.model_fields):
            break
        kept.append(part)
        raw = raw[part] if _into(raw, part) else None
    return tuple(kept)


def _text(model: Model, loc: tuple[Any, ...], error: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown(model, tuple(part for part in loc if isinstance(part, str)))
    if kind == "missing":
        short = isinstance(error["loc"][-1], int)
        return f"too few values, got {show(value)}" if short else "is missing, and has no default"
    if kind in ("model_type", "model_attributes_type"):
        return f"should be a section of `field: value` lines, got {show(value)}"
    text = re.sub(r"^(Value error, |(Input|Tuple|List|String) (?=should))| after validation", "", error["msg"])
    if kind == "value_error":
        return text
    text = f"{text}, got {show(value)}"
    if kind == "string_type" and not isinstance(value, dict | list | None):
        text += f'; to give a string, quote it: "{value}"'
    if kind == "list_type" and len(loc) > 2 and loc[-2] == "axes":
        text += "; an axis is `section.field: [value, value]`"
    if kind == "literal_error" and isinstance(value, str):
        close = get_close_matches(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]), n=1)
        text += f"; did you mean '{close[0]}'?" if close else ""
    return text


def _in_union(texts: list[str]) -> str:
    """`should be A, got x` and `should be B, got x` as `should be A or B, got x`."""
    heads = [text.partition(", got ")[0] for text in dict.fromkeys(texts)]
    tail = texts[-1].partition(", got ")
    return " or ".join([heads[0], *(head.removeprefix("should be ") for head in heads[1:])]) + "".join(tail[1:])


def _booleans(model: Model, raw: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Numbers given as true or false, which pydantic would take as 1 and 0."""
    for dotted, field in fields(model).items():
        loc, value = tuple(dotted.split(".")), raw
        for part in loc:
            value = value[part] if _into(value, part) else None
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool) and not admits(field.annotation, bool):
                yield loc, f"should not be a boolean, got {show(item)}"


def problems_of(model: Model, raw: Mapping[str, Any], source: str) -> list[Problem]:
    """Everything that is wrong with a raw config, in the order of the file."""
    found: dict[tuple[Any, ...], list[str]] = {}
    try:
        model.model_validate(raw)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            loc = _real(model, raw, details["loc"])
            found.setdefault(loc, []).append(_text(model, loc, details))
    for loc, text in _booleans(model, raw):
        found.setdefault(loc, [text])
    problems = [
        Problem(origin_of(raw, loc, source), ".".join(map(str, loc)), _in_union(texts)) for loc, texts in found.items()
    ]
    return sorted(problems, key=lambda p: [int(x) if x.isdigit() else 0 for x in [p.where.rpartition(":")[2]]])


def validate(model: type[M], raw: Mapping[str, Any], source: str) -> M:
    """The config that a raw one stands for; ConfigError holds all its problems."""
    problems = problems_of(model, raw, source)
    if problems:
        raise ConfigError(problems)
    return model.model_validate(raw)


# -- JSON schemas


def _merge_defs(*schemas: dict[str, Any]) -> dict[str, Any]:
    defs: dict[str, Any] = {}
    for schema in schemas:
        defs.update(schema.pop("$defs", {}))
    return defs


def _field_refs(model: Model, owner: str) -> dict[str, dict[str, str]]:
    """Dotted field name -> a reference to that field's schema in $defs."""
    refs = {}
    for dotted in fields(model):
        *place, name = dotted.split(".")
        at = model_at(model, tuple(place))
        holder = at.__name__ if place and at is not None else owner
        refs[dotted] = {"$ref": f"#/$defs/{holder}/properties/{name}"}
    return refs


def _closed(properties: dict[str, Any], description: str) -> dict[str, Any]:
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


_EXTENDS = {
    "type": "string",
    "description": "a file this one starts from, relative to this one; its values are the defaults",
}


def trial_schema() -> dict[str, Any]:
    """JSON schema of a trial file: every field optional, `extends` beside them."""
    schema = TrialConfig.model_json_schema()
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {"$schema": _DIALECT, **schema, "title": "ppc trial"}


def study_schema() -> dict[str, Any]:
    """JSON schema of a study file: `base` is a partial trial, and axes and sets complete dotted field names."""
    trial, study = TrialConfig.model_json_schema(), StudyConfig.model_json_schema()
    defs = _merge_defs(trial, study)
    trial["properties"]["extends"] = _EXTENDS
    refs = _field_refs(TrialConfig, "TrialConfig")
    refs.pop("seed")  # the seeds of a study are its trial_seeds
    span = {"$ref": "#/$defs/AxisRange"}
    axes = {name: {"anyOf": [{"type": "array", "minItems": 1, "items": ref}, span]} for name, ref in refs.items()}
    defs["TrialConfig"] = trial
    defs["Fields"] = _closed(refs, "dotted field of a trial -> value")
    defs["Axes"] = _closed(axes, "dotted field of a trial -> values")
    fields_ref, design = {"$ref": "#/$defs/Fields"}, defs["DesignConfig"]["properties"]
    defs["Variant"]["properties"]["set"] = fields_ref
    design["axes"] = {"$ref": "#/$defs/Axes"}
    design["exclude"] = {**design["exclude"], "items": fields_ref}
    design["baseline"] = {
        "description": design["baseline"].get("description", ""),
        "anyOf": [{"type": "string"}, fields_ref, {"type": "null"}],
    }
    properties = {
        "extends": _EXTENDS,
        **study["properties"],
        "base": {"$ref": "#/$defs/TrialConfig"},
        "tiny": fields_ref,
        "scenes": fields_ref,
    }
    study.update(
        properties=properties,
        required=["name"],
        anyOf=[{"required": ["design"]}, {"required": ["extends"]}],
        title="ppc study",
    )
    return {"$schema": _DIALECT, "$defs": defs, **study}


def write_schemas(folder: str | Path) -> list[Path]:
    """Write `trial.schema.json` and `study.schema.json` into a folder; returns their paths."""
    written = []
    for name, schema in (("trial", trial_schema()), ("study", study_schema())):
        path = Path(folder) / f"{name}.schema.json"
        path.write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path)
    return written

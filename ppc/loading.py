"""Experiment files to configs: YAML 1.2 with line numbers, `extends`, overrides, `--tiny`.

A raw config is a tree of `Raw` mappings and plain values; each `Raw` remembers where its keys were written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ppc.config import TrialConfig
from ppc.schema import ConfigError, Problem, Raw, check_path, problems_of, validate
from ppc.study_config import StudyConfig

Override = str | tuple[str, Any]
Kept = Mapping[str, Collection[Any]]
UNSETTABLE = ("base", "design", "tiny", "scenes", "published")  # from outside
STUDY_FIELDS = tuple(name for name in StudyConfig.model_fields if name not in UNSETTABLE)

# -- reading


class _Constructor(SafeConstructor):
    """Dates stay strings: no field is a date, and a name may look like one."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", _Constructor.construct_yaml_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-3 is a number and `no` is a string
    yaml.Constructor = _Constructor
    return yaml


def _tree(value: Any, node: Node | None, source: str, above: tuple[int, ...] = ()) -> Any:
    """The same data as `Raw` mappings; `node` is its place in the text, `above` the ids of the mappings around it."""
    line = f"{source}:{node.start_mark.line + 1}" if node is not None else source
    if id(value) in above:
        raise ConfigError([Problem(line, "", "an alias that refers to itself")])
    above = (*above, id(value))
    if isinstance(value, dict):
        nodes = {k.value: (k, v) for k, v in node.value} if isinstance(node, MappingNode) else {}
        for key in value:
            if not isinstance(key, str):
                raise ConfigError([Problem(line, "", f"the key {key!r} is not a name")])
        lines = {key: f"{source}:{nodes[key][0].start_mark.line + 1}" for key in value if key in nodes}
        return Raw({k: _tree(v, nodes.get(k, (None, None))[1], source, above) for k, v in value.items()}, lines)
    if isinstance(value, list):
        children = node.value if isinstance(node, SequenceNode) else [None] * len(value)
        return [_tree(v, child, source, above) for v, child in zip(value, children, strict=True)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError([Problem(line, "", f"a {type(value).__name__} is not a value that a config can hold")])


def parse(text: str, source: str) -> Any:
    """YAML 1.2 text to plain values and `Raw` mappings; ConfigError names the line."""
    directive = re.search(r"^%YAML\s+(?!1\.2\s*$).*$", text, re.MULTILINE)
    if directive is not None:
        raise ConfigError([Problem(source, "", f"`{directive[0]}`: only YAML 1.2 is read, remove this line")])
    try:
        return _tree(_yaml().load(text), _yaml().compose(text), source)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{source}:{mark.line + 1}" if mark is not None else source
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([Problem(line, "", f"not valid YAML: {reason}")]) from None
    except (YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise ConfigError([Problem(source, "", f"not valid YAML: {reason}")]) from None


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise ConfigError([Problem(str(path), "", f"no such file{hint}")]) from None
    except IsADirectoryError:
        raise ConfigError([Problem(str(path), "", "a folder; name an experiment file (.yaml)")]) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem(str(path), "", "not a text file in UTF-8; expected YAML")]) from None
    except OSError as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None
    if "\0" in text:
        raise ConfigError([Problem(str(path), "", "a binary file; expected YAML")])
    return text


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Raw:
    """`top` laid over `base`, section by section; lists and `design` are taken whole."""
    out = Raw(base, getattr(base, "origin", None))
    for key, value in top.items():
        under = out.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping) and key != "design"
        out[key] = merge(under, value) if both else value  # type: ignore[arg-type]
        out.origin[key] = getattr(top, "origin", {}).get(key, "")
    return out


def _extended(raw: Raw, path: Path, chain: tuple[Path, ...]) -> Raw:
    if "extends" not in raw:
        return raw
    where, target = raw.origin.get("extends", str(path)), raw["extends"]
    own = Raw({k: v for k, v in raw.items() if k != "extends"}, raw.origin)
    if not isinstance(target, str):
        raise ConfigError([Problem(where, "extends", "should be the path of one file, relative to this one")])
    other = path.parent / target
    if other.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, other.resolve()))
        raise ConfigError([Problem(where, "extends", f"files extend each other in a circle: {names}")])
    try:
        base = _load(other, chain)
    except ConfigError as error:
        lines = [p if p.where != str(other) else Problem(where, "extends", str(p)) for p in error.problems]
        raise ConfigError(lines) from None
    base.pop("name", None)  # a name is the study's own
    return merge(base, own)


def _load(path: Path, chain: tuple[Path, ...]) -> Raw:
    raw = parse(_read(path), str(path))
    if raw is None:
        raise ConfigError([Problem(str(path), "", "the file is empty")])
    if not isinstance(raw, Raw):
        kind = "list" if isinstance(raw, list) else f"single value ({str(raw)[:40]!r})"
        raise ConfigError([Problem(str(path), "", f"should hold `field: value` lines at the top, got a {kind}")])
    chain = (*chain, path.resolve())
    if isinstance(raw.get("base"), Raw):
        raw["base"] = _extended(raw["base"], path, chain)
    return _extended(raw, path, chain)


def load_yaml(path: str | Path) -> Raw:
    """The mapping in a YAML file, `extends` resolved (of the file, and of a study's `base`)."""
    return _load(Path(path), ())


# -- overriding


def place(raw: Mapping[str, Any], path: str, value: Any, origin: str) -> Raw:
    """A copy of `raw` with one dotted field set; the path is taken as right."""
    head, _, rest = path.partition(".")
    out = Raw(raw)
    if not rest:
        out[head] = value
        out.origin[head] = origin
        return out
    inner = out.get(head)
    if inner is None or isinstance(inner, Mapping):  # else validation of the whole says what is wrong with the section
        out[head] = place(inner or {}, rest, value, origin)
        out.origin.setdefault(head, origin)
    return out


def get(raw: Any, path: str, default: Any) -> Any:
    """The value of a raw config at a dotted path, or the default where it is not given."""
    for part in path.split("."):
        if not isinstance(raw, Mapping) or part not in raw:
            return default
        raw = raw[part]
    return raw


def split_override(item: Override) -> tuple[str, Any, str]:
    """(dotted path, value, origin) of `a.b=c`, whose right side is YAML 1.2, or of a (path, value) pair."""
    if not isinstance(item, str):
        return item[0], item[1], "override"
    path, sign, text = item.partition("=")
    if not sign or not path.strip():
        raise ConfigError([Problem(f"--set {item}", "", "expected FIELD=VALUE, such as train.epochs=4")])
    if not text.strip():  # YAML's null, which a shell's empty variable does not mean
        raise ConfigError([Problem(f"--set {item}", path.strip(), "no value; write null for none, or '' for no text")])
    return path.strip(), parse(text, f"--set {item}"), f"--set {item}"


def override(raw: Mapping[str, Any], item: Override) -> Raw:
    """A copy of a raw trial with one field set; an unknown field raises, naming the nearest right one."""
    path, value, origin = split_override(item)
    problem = check_path(path, origin)
    if problem is not None:
        raise ConfigError([problem])
    return place(raw, path, value, origin)


def override_study(raw: Mapping[str, Any], item: Override) -> Raw:
    """A copy of a raw study with one field set: of the study, or (with or without `base.`) of its base trial."""
    path, value, origin = split_override(item)
    if path in STUDY_FIELDS:
        return place(raw, path, value, origin)
    path = path.removeprefix("base.")
    if path == "seed":
        raise ConfigError([Problem(origin, path, "a study's seeds are its trial_seeds: --set trial_seeds=[0,1]")])
    problem = check_path(path, origin)
    if problem is not None and (close := get_close_matches(path, STUDY_FIELDS, n=1, cutoff=0.75)):
        problem = Problem(origin, path, f"no such field; did you mean {close[0]}?")
    elif path.partition(".")[0] in UNSETTABLE:
        problem = Problem(origin, path, "cannot be set from outside; change it in the file")
    elif problem is None and get(raw, "design.kind", "") == "grid" and path in get(raw, "design.axes", {}):
        problem = Problem(origin, path, "is an axis of this study, so an override of it would have no effect")
    if problem is not None:
        raise ConfigError([problem])
    return place(raw, f"base.{path}", value, origin)


def of_trial(items: Iterable[str]) -> list[str]:
    """Overrides of a study's base trial, without `base.`: they have the last word, also over --tiny and --scenes."""
    found = [item.strip().removeprefix("base.") for item in items]
    return [item for item in found if item.split("=")[0].split(".")[0].strip() in TrialConfig.model_fields]


def override_all(raw: Mapping[str, Any], items: Iterable[Override], *, study: bool = False) -> Raw:
    """`override` (or `override_study`) for each item in order; one error holds the problems of all items."""
    out = Raw(raw)
    problems: list[Problem] = []
    for item in items:
        try:
            out = override_study(out, item) if study else override(out, item)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return out


# -- tiny

TINY: dict[str, Any] = {
    "data.root": None, "data.scenes.num_train": 8, "data.scenes.num_val": 4, "data.scenes.image_px": 48,
    "backbone.name": "tiny", "backbone.weights": None, "backbone.normalisation": "auto",
    "contrast.projector_dim": 16, "views.target_px": 32,
    "train.epochs": 1, "train.batch_size": 4, "train.crop_px": 48, "train.resize_long_px": [48, 64],
    "train.precision": "fp32",
    "seeds.scales": [1.0], "seeds.val_subset_images": 4, "seeds.overlays": 2,
    "irn.backbone.name": "same", "irn.backbone.output_stride": 8, "irn.backbone.weights": None,
    "irn.backbone.normalisation": "auto", "irn.radius": 4, "irn.walk.log2_steps": 4,
    "irn.train.epochs": 1, "irn.train.batch_size": 4, "irn.train.crop_px": 48, "irn.train.precision": "fp32",
    "psa.backbone.name": "tiny", "psa.backbone.weights": None, "psa.backbone.normalisation": "auto",
    "psa.backbone.output_stride": 8, "psa.train.epochs": 1, "psa.train.batch_size": 4, "psa.train.crop_px": 128,
    "psa.train.precision": "fp32", "psa.walk.fit_radius": True,
    "segmentation.backbone": {}, "segmentation.train.epochs": 1, "segmentation.train.batch_size": 4,
    "segmentation.train.crop_px": 48, "segmentation.train.precision": "fp32", "segmentation.test.scales": [1.0],
    "runtime.workers": 1, "runtime.cpus_per_worker": 1, "runtime.gpus_per_worker": 0, "runtime.loader_workers": 0,
}  # fmt: skip
TINY_DATA: dict[str, Any] = {  # beside TINY where the experiment is on another dataset
    "data.name": "scenes", "data.labels": "auto", "data.train_split": "train",
    "seeds.splits": ["train"], "seeds.val_subset_split": "val", "segmentation.test.splits": ["val"],
}  # fmt: skip


def _room(values: dict[str, Any], kept: Kept) -> None:
    """Make the tiny crop and split as large as kept values need; of what is no number, validation tells."""
    images = "data.scenes.num_train"
    for small, large in (
        ("views.target_px", "train.crop_px"),
        ("train.batch_size", images),
        ("irn.train.batch_size", images),
        ("psa.train.batch_size", images),
        ("segmentation.train.batch_size", images),
    ):
        if large not in kept:
            values[large] = max([values[large], *(int(v) for v in kept.get(small, ()) if str(v).isdecimal())])


def tiny(raw: Mapping[str, Any], extra: Mapping[str, Any] | None = None, *, keep: Kept | None = None) -> Raw:
    """A raw trial shrunk to seconds on a CPU, on generated data.

    `keep`: dotted fields that stay as they are, with the values that they take, for which crop and split are made large
    enough. `extra` (dotted field -> value) has the last word.
    """
    values = {**TINY, **(TINY_DATA if get(raw, "data.name", "scenes") != "scenes" else {})}
    if get(raw, "views.target_px", 0) is None:
        values.pop("views.target_px")  # a view that is not rescaled stays so
    _room(values, keep := keep or {})
    out = Raw(raw)
    for path, value in values.items():
        out = out if path in keep else place(out, path, value, "--tiny")
    return place_all(out, extra or {}, "tiny")


def place_all(raw: Raw, values: Mapping[str, Any], origin: str) -> Raw:
    """A copy with dotted fields set, told to come from `origin` where the values do not know their lines; one
    ConfigError holds all names that are no fields."""
    problems: list[Problem] = []
    for path, value in values.items():
        where = getattr(values, "origin", {}).get(path, origin)
        if (problem := check_path(path, where)) is not None:
            problems.append(problem)
        raw = place(raw, path, value, where)
    if problems:
        raise ConfigError(problems)
    return raw


# -- configs


def is_study(raw: Mapping[str, Any]) -> bool:
    """Whether a raw config is meant as a study: it has a field that only studies have."""
    return any(name in raw for name in StudyConfig.model_fields)


def validate_trial(raw: Mapping[str, Any], source: str | Path) -> TrialConfig:
    """The trial that a raw config stands for; ConfigError holds all its problems, `source` names it in them."""
    if "design" in raw or "base" in raw:
        raise ConfigError([Problem(str(source), "", f"this is a study; use: ppc study launch {source}")])
    return validate(TrialConfig, raw, str(source))


def _remember(config: BaseModel, raw: Any) -> BaseModel:
    """The same config whose free mappings (`base`, `axes`, `set` ...) are the raw ones, which know their lines."""
    update: dict[str, Any] = {}
    for name in type(config).model_fields:
        value, given = getattr(config, name), raw.get(name)
        if isinstance(value, BaseModel) and isinstance(given, Mapping):
            update[name] = _remember(value, given)
        elif isinstance(value, dict) and isinstance(given, Raw):  # a range of an axis is a model by now
            read = {key: item if isinstance(item, BaseModel) else given[key] for key, item in value.items()}
            update[name] = Raw(read, given.origin)
        elif isinstance(value, list) and isinstance(given, list):
            pairs = zip(value, given, strict=True)
            update[name] = [
                _remember(v, g) if isinstance(v, BaseModel) else g if isinstance(g, Raw) else v for v, g in pairs
            ]
    return config.model_copy(update=update)


def validate_study(raw: Mapping[str, Any], source: str | Path) -> StudyConfig:
    """The study that a raw config stands for; its trials are validated when it is expanded (`study.expand`)."""
    if not is_study(raw) and any(name in raw for name in TrialConfig.model_fields):
        raise ConfigError([Problem(str(source), "", f"this is a single trial; use: ppc run {source}")])
    problems = problems_of(StudyConfig, raw, str(source))
    if problems:
        base = raw.get("base")
        in_base = problems_of(TrialConfig, base, str(source)) if isinstance(base, Mapping) else []
        problems += [Problem(p.where, f"base.{p.path}", p.text) for p in in_base]
        raise ConfigError(problems)
    study = _remember(StudyConfig.model_validate(raw), raw)
    assert isinstance(study, StudyConfig)
    return study


def load_trial(
    path: str | Path, *, overrides: Sequence[Override] = (), shrink: Callable[[Raw], Raw] = lambda raw: raw
) -> TrialConfig:
    """The trial in a file; `shrink` (--tiny, --scenes) comes before the overrides, which so have the last word."""
    raw = load_yaml(path)
    if "design" not in raw and "base" not in raw:
        raw = override_all(shrink(raw), overrides)
    return validate_trial(raw, path)


def load_study(path: str | Path, *, overrides: Sequence[Override] = ()) -> StudyConfig:
    """The study in a file; overrides of a trial's field change its base."""
    raw = load_yaml(path)
    if is_study(raw):
        raw = override_all(raw, overrides, study=True)
    return validate_study(raw, path)

"""From a study to its trials, and from trials' numbers to drafts of a table. Pure: no files, no scheduler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ppc.axes import axis_values, check_axes, check_change, check_search
from ppc.config import TrialConfig
from ppc.loading import Override, get, override_all, place
from ppc.schema import ConfigError, Problem, Raw, check_path, fields, origin_of, problems_of, show
from ppc.study_config import DesignConfig, StudyConfig, Twin, Variant
from ppc.twins import as_twin, design_of, extras

BASE, FULL = "base", "full"
Check = Callable[[TrialConfig], Iterable[tuple[str, str]]]


@dataclass(frozen=True)
class TrialSpec:
    """One trial of a study; `factors` are the dotted fields that the design varies, with this trial's values."""

    variant: str
    factors: dict[str, Any]
    seed: int
    config: TrialConfig


@dataclass
class _Draft:
    """A variant on its way: what it sets, where that was written, and, once valid, its config."""

    name: str
    changes: dict[str, Any]
    origins: dict[str, str]
    raw: Raw = field(default_factory=Raw)
    config: TrialConfig | None = None


def value_at(config: TrialConfig, path: str) -> Any:
    """A field's value by its dotted name, as plain data (tuples are lists)."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def _name(values: Mapping[str, Any], axes: Iterable[str]) -> str:
    """`prototype_top_k=4,bg_score=0.2`; a last name that two axes share is given in full."""
    last = [path.rsplit(".", 1)[-1] for path in axes]
    parts = []
    for path, value in values.items():
        short = path.rsplit(".", 1)[-1]
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
        parts.append(f"{short if last.count(short) == 1 else path}={text}")
    return ",".join(parts)


# -- designs


def _check_design(design: DesignConfig, overridden: Iterable[str]) -> Iterator[Problem]:
    """What is wrong with a design before any variant is built."""
    by_axes = design.kind in ("grid", "one_factor", "search")
    wanted, other = ("axes", "variants") if by_axes else ("variants", "axes")
    if not getattr(design, wanted):
        yield Problem("", f"design.{wanted}", f"a design of kind {design.kind} needs {wanted}")
    if getattr(design, other):
        yield Problem("", f"design.{other}", f"a design of kind {design.kind} has no {other}, it has {wanted}")
    yield from check_search(design)
    yield from check_axes(design, overridden)
    for i, variant in enumerate(design.variants):
        for path, value in variant.set.items():
            if (problem := check_change(path, value, origin_of(variant.set, [path]))) is not None:
                yield Problem(problem.where, f"design.variants.{i} ({variant.name}): {path}", problem.text)
    wheres = [(f"design.exclude.{i}", entry) for i, entry in enumerate(design.exclude)]
    if isinstance(design.baseline, Mapping):
        wheres.append(("design.baseline", design.baseline))
    for place_, entry in wheres:
        if not entry:
            yield Problem("", place_, "names no field")
        for path in entry:
            if (problem := check_path(path, origin_of(entry, [path]))) is not None:
                yield Problem(problem.where, f"{place_}: {path}", problem.text)


def _of_variant(variant: Variant, before: _Draft | None = None) -> _Draft:
    origins = {path: origin_of(variant.set, [path]) for path in variant.set}
    if before is None:
        return _Draft(variant.name, dict(variant.set), origins)
    return _Draft(variant.name, {**before.changes, **variant.set}, {**before.origins, **origins})


def _drafts(design: DesignConfig) -> list[_Draft]:
    """The variants of a design, in order, before `exclude`."""
    origins = {path: origin_of(design.axes, [path]) for path in design.axes}
    if design.kind == "grid":
        all_values = product(*map(axis_values, design.axes.values()))
        points = [dict(zip(design.axes, values, strict=True)) for values in all_values]
        return [_Draft(_name(point, design.axes), point, origins) for point in points]
    if design.kind in ("one_factor", "search"):  # a search begins with its base; here its axes are looked at
        points = [{path: value} for path, axis in design.axes.items() for value in axis_values(axis)]
        return [_Draft(BASE, {}, {}), *(_Draft(_name(p, design.axes), p, origins) for p in points)]
    if design.kind == "leave_one_out":
        return [_Draft(FULL, {}, {}), *map(_of_variant, design.variants)]
    drafts: list[_Draft] = []
    for variant in design.variants:
        drafts.append(_of_variant(variant, drafts[-1] if drafts and design.kind == "ladder" else None))
    return drafts


def _resolve(drafts: list[_Draft], base: Raw, where: str, check: Check | None = None) -> list[Problem]:
    """Fill in each draft's config; returns the problems of all drafts, one that several drafts share told once."""
    found: dict[Problem, list[str]] = {}
    for draft in drafts:
        draft.raw = base
        for path, value in draft.changes.items():
            draft.raw = place(draft.raw, path, value, draft.origins.get(path, ""))
        problems = problems_of(TrialConfig, draft.raw, where)
        if not problems:
            draft.config = TrialConfig.model_validate(draft.raw)
            told = check(draft.config) if check is not None else ()
            problems = [Problem(origin_of(draft.raw, path.split("."), where), path, text) for path, text in told]
        for problem in problems:
            found.setdefault(problem, []).append(draft.name)
    return [
        p if len(names) == len(drafts) else Problem(p.where, p.path, f"{p.text} (in {', '.join(names)})")
        for p, names in found.items()
    ]


def _sound(draft: _Draft) -> _Draft:
    """The same draft without the changes that `_check_design` has found fault with."""
    changes = {p: v for p, v in draft.changes.items() if check_change(p, v, "") is None}
    return _Draft(draft.name, changes, draft.origins)


def _coerced(path: str, value: Any) -> Any:
    """A value as its field would hold it: '0.001' is 0.001 and 32.0 is 32."""
    annotation: Any = fields()[path].annotation
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        value = adapter.validate_python(value)
    except ValidationError:
        return value
    return list(value) if isinstance(value, tuple) else value


def _matches(draft: _Draft, wanted: Mapping[str, Any]) -> bool:
    """Whether a variant has these values; one that is not valid (perhaps why it is excluded) is matched as written."""
    for path, value in wanted.items():
        if draft.config is not None:
            has = value_at(draft.config, path)
        else:
            has = _coerced(path, draft.changes.get(path))
        if has != _coerced(path, value):
            return False
    return True


def _excluded(drafts: list[_Draft], design: DesignConfig) -> tuple[list[_Draft], list[Problem]]:
    problems = []
    for i, wanted in enumerate(design.exclude):
        if not any(_matches(draft, wanted) for draft in drafts):
            where = origin_of(wanted, list(wanted)[:1])
            problems.append(Problem(where, f"design.exclude.{i}", f"matches no variant: {show(dict(wanted))}"))
    kept = [draft for draft in drafts if not any(_matches(draft, wanted) for wanted in design.exclude)]
    if not kept:
        problems.append(Problem("", "design.exclude", "leaves no variant"))
    return kept, problems


def _doubles(drafts: list[_Draft]) -> list[Problem]:
    """Names given twice, and variants that would be the same trial under two names."""
    problems, by_name, by_config = [], dict[str, int](), dict[str, str]()
    for draft in drafts:
        by_name[draft.name] = by_name.get(draft.name, 0) + 1
        if draft.config is None:
            continue
        resolved = json.dumps(draft.config.model_dump(mode="json", exclude={"runtime", "seed"}), sort_keys=True)
        other = by_config.setdefault(resolved, draft.name)
        if other != draft.name:
            problems.append(Problem("", "design", f"variants '{other}' and '{draft.name}' have the same config"))
    twice = [name for name, count in by_name.items() if count > 1]
    return problems + [Problem("", "design", f"the variant '{name}' is there twice") for name in twice]


def _stopping_problems(study: StudyConfig) -> Iterator[Problem]:
    if study.design.kind == "search" and study.early_stopping is not None:
        text = "is not for kind search: what is proposed next rests on all trials of a round, trained to their end"
        yield Problem(origin_of(study, ["early_stopping"]), "early_stopping", text)


def _seed_problems(study: StudyConfig) -> Iterator[Problem]:
    for seed in dict.fromkeys(study.trial_seeds):
        if study.trial_seeds.count(seed) > 1:
            yield Problem("", "trial_seeds", f"the seed {seed} is there twice")
        if seed < 0:
            yield Problem("", "trial_seeds", f"a seed should be 0 or more, got {seed}")
    if "seed" in study.base:
        yield Problem(origin_of(study.base, ["seed"]), "base.seed", "a study's seeds are listed under `trial_seeds`")


def _finish(drafts: list[_Draft], study: StudyConfig) -> list[TrialSpec]:
    paths = list(dict.fromkeys([*study.design.axes, *(path for draft in drafts for path in draft.changes)]))
    specs = []
    for draft in drafts:
        assert draft.config is not None
        factors = {path: value_at(draft.config, path) for path in paths}
        for seed in study.trial_seeds:
            specs.append(TrialSpec(draft.name, factors, seed, draft.config.model_copy(update={"seed": seed})))
    return specs


def _varied(design: DesignConfig, base: Raw) -> dict[str, list[Any]]:
    """The fields that a design varies, each with all values that it takes: the base's too, but in a grid."""
    varied: dict[str, list[Any]] = {path: list(axis_values(axis)) for path, axis in design.axes.items()}
    for variant in design.variants:
        for path, value in variant.set.items():
            varied.setdefault(path, []).append(value)
    for path, values in varied.items():
        if design.kind != "grid" and path in fields():
            values.append(get(base, path, fields()[path].default))
    return varied


def _searched(drafts: list[_Draft], base: Raw, where: str, check: Check | None) -> list[_Draft]:
    """The base of a search, once every value and every end of a range was tried; values may need each other, so what
    `check` says of one alone is told for the base only."""
    problems = _resolve(drafts, base, where) or _resolve(drafts[:1], base, where, check)
    if problems:
        raise ConfigError(problems)
    return drafts[:1]


def proposed(
    study: StudyConfig, base: Raw, changes: Mapping[str, Any], check: Check | None = None
) -> list[TrialSpec] | list[Problem]:
    """The trials of one variant of a search, or what is wrong with it."""
    draft = _Draft(BASE if not changes else _name(changes, study.design.axes), dict(changes), {})
    return _resolve([draft], base, f"study {study.name}", check) or _finish([draft], study)


def shared_base(study: StudyConfig, *, overrides: Sequence[Override] = (), twin: Twin = "full") -> Raw:
    """The base of all trials of a twin with overrides, as `expand` takes it."""
    base = Raw(study.base)
    varied = _varied(study.design, base)
    return override_all(as_twin(base, twin, extras(study, twin), keep=varied), overrides)


def expand(
    study: StudyConfig, *, overrides: Sequence[Override] = (), twin: Twin = "full", check: Check | None = None
) -> list[TrialSpec]:
    """Every trial of a study, variant by variant; ConfigError holds the problems of the design and of all variants.

    Order of precedence, lowest first: base, the twin's values (but for the fields that the design varies), the study's
    own for it, overrides, the design. `check` gives the (dotted path, problem) pairs that only layers above know of,
    such as a backbone that is not registered. Of a search these are the trials of its base, with which it begins.
    """
    base, where = Raw(study.base), f"study {study.name}"
    study = study.model_copy(update={"design": design_of(study.design, base, twin)})
    design = study.design
    overridden = [item.partition("=")[0].strip() if isinstance(item, str) else item[0] for item in overrides]
    problems = [*_seed_problems(study), *_stopping_problems(study), *_check_design(design, overridden)]
    try:
        base = shared_base(study, overrides=overrides, twin=twin)
    except ConfigError as error:
        problems += error.problems
    drafts = _drafts(design)
    if problems:  # the values are looked at all the same, so that all errors are told at once
        raise ConfigError(
            problems + _resolve([_sound(draft) for draft in drafts or [_Draft(BASE, {}, {})]], base, where)
        )
    _resolve(drafts, base, where)
    if design.kind == "search":
        return _finish(_searched(drafts, base, where, check), study)
    if design.kind == "one_factor":  # the base's own values are not repeated
        drafts = [d for d in drafts if d.name == BASE or d.config is None or d.config != drafts[0].config]
    drafts, problems = _excluded(drafts, design)
    problems += _resolve(drafts, base, where, check)
    for draft in drafts:
        if draft.config is not None and design.axes and draft.changes:
            draft.name = _name({path: value_at(draft.config, path) for path in draft.changes}, design.axes)
    problems += _doubles(drafts)
    if problems:
        raise ConfigError(problems)
    specs = _finish(drafts, study)
    baseline(study, specs)
    return specs


def baseline(study: StudyConfig, specs: Sequence[TrialSpec]) -> str:
    """The name of the variant that others are compared with; the first where the study names none."""
    wanted, configs = study.design.baseline, {spec.variant: spec.config for spec in specs}
    if wanted is None:
        return specs[0].variant
    if isinstance(wanted, str):
        found = [name for name in configs if name == wanted]
    else:
        found = [name for name, config in configs.items() if _matches(_Draft(name, {}, {}, config=config), wanted)]
    if len(found) == 1:
        return found[0]
    matched = f"matches {len(found)} variants ({', '.join(found)})" if found else "matches no variant"
    text = f"{show(wanted)} {matched}, should match one; the variants: {', '.join(configs)}"
    raise ConfigError([Problem(origin_of(study.design.baseline, list(wanted)[:1]), "design.baseline", text)])


# -- statistics


@dataclass(frozen=True)
class Row:
    """One variant of a table; what cannot be computed is None. Differences are to the baseline, over shared seeds."""

    variant: str
    n: int
    mean: float | None
    std: float | None
    pairs: int
    diff_mean: float | None
    diff_std: float | None


def _mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None below one and two values."""
    if any(not math.isfinite(value) for value in values):
        raise ValueError(f"a metric should be finite, got {list(values)}")
    return (fmean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def summarise(values_by_variant: Mapping[str, Mapping[int, float]], baseline: str) -> list[Row]:
    """A row for each variant of {variant: {seed: value}}, in order; the baseline's own differences are None."""
    if baseline not in values_by_variant:
        names = ", ".join(values_by_variant)
        raise ValueError(f"the baseline '{baseline}' is not among the variants: {names}")
    reference, rows = values_by_variant[baseline], []
    for variant, values in values_by_variant.items():
        shared = [] if variant == baseline else sorted(values.keys() & reference.keys())
        mean, std = _mean_std([values[seed] for seed in sorted(values)])
        diff_mean, diff_std = _mean_std([values[seed] - reference[seed] for seed in shared])
        rows.append(Row(variant, len(values), mean, std, len(shared), diff_mean, diff_std))
    return rows

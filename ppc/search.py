"""A study whose variants are proposed round by round from its own results. The only file that imports optuna.

The ledger is the only memory. Optuna's study is made anew for every round, from the variants so far in the order in
which they were proposed and with a seed of that round, so what is proposed depends on results alone: not on when trials
ended, on how many ran at a time, or on how often the study was resumed. A round is written to `study.json` whole,
before any of its trials runs, and never changes afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ppc.artifacts import content_key
from ppc.axes import is_whole
from ppc.checks import check_trial, weights_of
from ppc.config import TrialConfig
from ppc.ledger import FAILED, FINISHED, TrialRow
from ppc.schema import Raw
from ppc.seeding import derive_seed
from ppc.stages import plan_stages
from ppc.study import TrialSpec, proposed, value_at
from ppc.study_config import AxisRange, DesignConfig, StudyConfig

TRIES = 200  # draws for one proposal; most are refused only where nearly all variants are there already
DIGITS = 4  # significant digits of a drawn number: a name that can be read, and typed again

Changes = dict[str, Any]
Told = tuple[Changes, float | None]  # what a variant sets, and its value; None when a trial of it has failed


@dataclass
class Search:
    """A search as `study.json` holds it under `search`: what is searched, and the proposals of each round so far."""

    study: StudyConfig
    base: dict[str, Any]  # raw fields that all variants share, --tiny and overrides in them
    rounds: list[list[Changes]]

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return {"study": self.study.model_dump(mode="json"), "base": self.base, "rounds": self.rounds}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Search:
        """What `dump` gave. ValueError for a search of an older version that was to find the smallest value."""
        design = data["study"]["design"]
        settings = dict(design["search"])
        if settings.pop("direction", "maximize") != "maximize":  # was a field once
            raise ValueError(
                f"study {data['study']['name']} was searched for the smallest {data['study']['metric']}, which this "
                "version does not do: search under another name for a mIoU"
            )
        study = {**data["study"], "design": {**design, "search": settings}}
        return cls(StudyConfig.model_validate(study), data["base"], data["rounds"])

    def _space(self) -> str:
        """Key of what makes earlier proposals those of this search; how many more are wanted does not."""
        design = self.study.design.model_dump(mode="json")
        own = design["search"]  # `direction` was a field once: the key of a search stays what it was
        design["search"] = {**{name: own[name] for name in ("sampler", "sampler_seed")}, "direction": "maximize"}
        return content_key([design, self.base, self.study.metric, self.study.trial_seeds])

    def specs(self, changes: Sequence[Changes]) -> list[TrialSpec]:
        """All trials of proposals. Those of a file of today are valid: `accepts` has looked."""
        return [spec for one in changes for spec in self._trials(one)]

    def _trials(self, changes: Changes) -> list[TrialSpec]:
        found = proposed(self.study, Raw(self.base), changes, check_trial)
        return [spec for spec in found if isinstance(spec, TrialSpec)]


def start(study: StudyConfig, base: Mapping[str, Any], before: Any) -> Search:
    """A search with its first round: the base and a batch. With all its rounds where `before`, what `study.json` says
    of a search, is of the same space."""
    search = Search(study, dict(base), [])
    if isinstance(before, dict):
        earlier = Search.load(before)
        if earlier._space() == search._space():
            return Search(study, search.base, earlier.rounds)
    search.rounds.append([{}])  # it counts as proposed, so that nothing equal to it is
    search.rounds[0] += propose(search, [], 0)
    return search


def shrunk(study: StudyConfig) -> StudyConfig:
    """The study with at most 3 proposals, two a round, for --tiny; as it is where it searches nothing."""
    design, settings = study.design, study.design.search
    if settings is None:
        return study
    few = {"num_variants": min(3, settings.num_variants), "batch": min(2, settings.batch)}
    return study.model_copy(update={"design": design.model_copy(update={"search": settings.model_copy(update=few)})})


def describe(study: StudyConfig) -> list[str]:
    """What is searched and how, as lines to print."""
    settings = study.design.search
    assert settings is not None
    lines = []
    for path, axis in study.design.axes.items():
        if isinstance(axis, AxisRange):
            words = [f"{axis.low} to {axis.high}", "log" if axis.log else "", f"step {axis.step}" if axis.step else ""]
            lines.append(f"{path}: {', '.join(filter(None, words))}")
        else:
            lines.append(f"{path}: {', '.join(map(str, axis))}")
    how = f"{settings.num_variants} variants beside the base, {settings.batch} a round, sampler {settings.sampler}"
    return [*lines, f"{how} with seed {settings.sampler_seed}, to maximise {study.metric}"]


def next_round(search: Search, rows: Sequence[TrialRow]) -> list[Changes]:
    """Proposals from the results of all rounds before; none when enough are made, when trials of a round have not
    ended, or when not one of its variants has a value (something is wrong that is not the variants' fault)."""
    told = results(search, rows)
    if told is None or all(value is None for _, value in told[-len(search.rounds[-1]) :]):
        return []
    return propose(search, told, len(search.rounds))


def results(search: Search, rows: Sequence[TrialRow]) -> list[Told] | None:
    """Every proposal with the mean of the metric over its seeds, in the order proposed; None while trials are at work.

    A variant with a failed trial has failed: a mean over fewer seeds is not to be compared with the others.
    """
    by_variant: dict[str, list[TrialRow]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, []).append(row)
    if any(row.state not in (FINISHED, FAILED) for row in rows):
        return None
    told: list[Told] = []
    for changes in (one for made in search.rounds for one in made):
        (name, *_) = {spec.variant for spec in search.specs([changes])}
        values = [row.metric(search.study.metric) for row in by_variant[name]]
        known = [value for value in values if value is not None]
        told.append((changes, fmean(known) if len(known) == len(values) else None))
    return told


# -- proposals


def propose(search: Search, told: Sequence[Told], round_number: int) -> list[Changes]:
    """The proposals of a round: valid, and unlike each other and all before. Fewer where no more can be found."""
    try:
        import optuna
        from optuna.trial import TrialState, create_trial
    except ImportError as error:
        raise ImportError("a design of kind search needs Optuna: pip install -e '.[search]'") from error

    design, settings = search.study.design, search.study.design.search
    assert settings is not None
    made = [changes for one in search.rounds for changes in one]
    wanted = min(settings.batch, settings.num_variants - (len(made) - 1))
    distributions = {path: _distribution(path, axis) for path, axis in design.axes.items()}
    seed = derive_seed("search", settings.sampler_seed, round_number) % 2**32
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental in it
        sampler = (
            optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            if settings.sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        memory = optuna.create_study(sampler=sampler, direction="maximize")
        for changes, value in told:
            params = _params(changes or _values_of(search), design)
            if params is not None:
                state = TrialState.FAIL if value is None else TrialState.COMPLETE
                memory.add_trial(create_trial(params=params, distributions=distributions, value=value, state=state))
        accepted, seen = list[Changes](), {_identity(search, changes) for changes in made}
        for _ in range(TRIES * max(0, wanted)):
            if len(accepted) == wanted:
                break
            trial = memory.ask(distributions)
            changes = {path: _value(path, design.axes[path], trial.params[path]) for path in design.axes}
            identity = _identity(search, changes)
            if identity is None or identity in seen:
                memory.tell(trial, state=TrialState.FAIL)
                continue
            seen.add(identity)
            accepted.append(changes)
    return accepted


def _identity(search: Search, changes: Changes) -> str | None:
    """Equal for variants that would be the same trials; None for a variant that is not valid."""
    specs = search.specs([changes])
    if not specs:
        return None
    config = specs[0].config.model_copy(update={"seed": 0})
    return content_key([plan_stages(config, {}), config.data.model_dump(mode="json"), weights_of(config)])


def _values_of(search: Search) -> Changes:
    """What the base has on the axes."""
    config: TrialConfig = search.specs([{}])[0].config
    return {path: value_at(config, path) for path in search.study.design.axes}


def _distribution(path: str, axis: list[Any] | AxisRange) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, AxisRange):
        return CategoricalDistribution(range(len(axis)))  # places: a choice can be a list, which Optuna does not take
    if is_whole(path):
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _value(path: str, axis: list[Any] | AxisRange, param: Any) -> Any:
    """A field's value from Optuna's parameter."""
    if not isinstance(axis, AxisRange):
        return axis[param]
    if is_whole(path):
        return int(param)
    rounded = float(f"{param:.{DIGITS if axis.step is None else 10}g}")
    return min(max(rounded, float(axis.low)), float(axis.high))


def _params(changes: Changes, design: DesignConfig) -> dict[str, Any] | None:
    """Optuna's parameters of a variant; None for one outside the axes, as the base may be."""
    params = {}
    for path, axis in design.axes.items():
        value = changes[path]
        if isinstance(axis, AxisRange):
            inside = isinstance(value, int | float) and axis.low <= value <= axis.high
            steps = (value - axis.low) / axis.step if inside and axis.step else 0
            if not inside or abs(steps - round(steps)) > 1e-8:
                return None
            params[path] = value
        elif value in axis:
            params[path] = axis.index(value)
        else:
            return None
    return params

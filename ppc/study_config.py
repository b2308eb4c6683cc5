"""A study's fields: which variants, which seeds, what decides; each once, with type, unit and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ppc.base_config import Section

Twin = Literal["full", "tiny", "scenes"]  # of a study: as written, for seconds, or the whole design on generated scenes


class Variant(Section):
    """A named row of a `list`, `ladder` or `leave_one_out` design."""

    name: str = Field(min_length=1, description="one line of text")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted field -> value")

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("should be one line of text")
        return name


class AxisRange(Section):
    """All numbers from low to high, both included; whole ones where the field is a whole number."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="drawn on a logarithmic scale")
    step: int | float | None = Field(None, gt=0, description="distance of the values; null: 1, or any number")

    @model_validator(mode="after")
    def _ordered(self) -> AxisRange:
        if self.low >= self.high:
            raise ValueError(f"low should be below high, got {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a log range should have low above 0 and no step")
        steps = (self.high - self.low) / (self.step or 1)
        if self.step is not None and abs(steps - round(steps)) > 1e-8:
            raise ValueError(f"high should be some steps of {self.step} above low {self.low}, got {self.high}")
        return self


def _axis_kind(value: Any) -> str:
    meant = isinstance(value, AxisRange) or (isinstance(value, dict) and bool({"low", "high"} & value.keys()))
    return "range" if meant else "values"


Axis = Annotated[
    Annotated[list[Any], Tag("values")] | Annotated[AxisRange, Tag("range")],
    Discriminator(_axis_kind),
]


class SearchConfig(Section):
    """Variants that a sampler proposes, a batch at a time, from the results of the batches before (Optuna)."""

    num_variants: int = Field(ge=1, description="proposals in all, beside the base")
    batch: int = Field(4, ge=1, description="proposals a round; a round starts when all trials before it have ended")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tpe draws at random until it has 10 results")
    sampler_seed: int = Field(0, ge=0, description="seed of the proposals; not the trials' seed")


class DesignConfig(Section):
    """How a study's variants come from its base trial."""

    kind: Literal["grid", "one_factor", "leave_one_out", "ladder", "list", "search"] = Field(
        description="grid: all combinations; one_factor: the base and each value alone; leave_one_out: all but one; "
        "ladder: each step on top of the last; list: as named; search: proposed"
    )
    axes: dict[str, Axis] = Field(
        default_factory=dict, description="grid, one_factor, search: dotted field -> values; search: or a range"
    )
    search: SearchConfig | None = Field(None, description="search: how many variants, and who proposes them")
    variants: list[Variant] = Field(
        default_factory=list, description="list, ladder (steps), leave_one_out (components)"
    )
    exclude: list[dict[str, Any]] = Field(default_factory=list, description="variants whose fields match are left out")
    baseline: str | dict[str, Any] | None = Field(
        None, description="the variant others are compared with: its name, or the fields that pick it"
    )


class EarlyStopping(Section):
    """Stop trials that train worse than others did at the same epoch (asynchronous successive halving, ASHA)."""

    metric: str = Field(
        "train/cls",
        pattern="^train/",
        description="what is compared: a loss in the journal of the training, its mean over an epoch",
    )
    mode: Literal["min", "max"] = Field("min", description="whether a low or a high value is good")
    min_epochs: int = Field(1, ge=1, description="epochs that every trial gets; the first comparison is after them")
    reduction_factor: float = Field(
        3.0,
        gt=1,
        description="at min_epochs times its powers, a trial goes on that is among the best 1/reduction_factor of "
        "those seen there. The baseline and one seed of every other variant are never stopped: each row keeps a number",
    )


class Published(Section):
    """What was published of a variant, or of a method that this study does not run."""

    variant: str | None = Field(None, description="a variant of this study; the figures stand beside its own")
    method: str | None = Field(None, min_length=1, description="another method; its row comes after the table")
    values: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(min_length=1, description="metric -> per cent")
    source: str = Field(pattern=r"\S", description="where the figures can be looked up")

    @model_validator(mode="after")
    def _one_name(self) -> Published:
        if (self.variant is None) == (self.method is None):
            raise ValueError("should have either `variant`, a row of this study, or `method`, the name of another's")
        return self


class StudyConfig(Section):
    """Variants x seeds: one ablation table."""

    name: str = Field(
        max_length=180,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="of the study's folder and its MLflow experiment",
    )
    note: str = Field("", description="a line for readers of the report")
    base: dict[str, Any] = Field(default_factory=dict, description="fields of TrialConfig that all trials share")
    design: DesignConfig
    trial_seeds: list[int] = Field(default=[0], min_length=1, description="seeds of every variant")
    metric: str = Field("mask_miou_train", description="the metric that decides")
    columns: list[str] = Field(
        default_factory=list, description="metrics of the table, in order; empty: the one that decides, then all others"
    )
    published: list[Published] = Field(default_factory=list, description="figures of papers, of VOC 2012 at full size")
    max_concurrent: int | None = Field(
        None, ge=1, description="trials at a time; null: as many as fit the cluster, one with --local"
    )
    early_stopping: EarlyStopping | None = Field(None, description="null: every trial trains to its last epoch")
    tiny: dict[str, Any] = Field(default_factory=dict, description="dotted fields that --tiny sets beside its own")
    scenes: dict[str, Any] = Field(default_factory=dict, description="dotted fields that --scenes sets beside its own")

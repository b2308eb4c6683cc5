"""Designs to trials, and trials' numbers to rows: each design, what is refused, the baseline, --tiny, statistics."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppc.checks import check_trial
from ppc.config import TrialConfig
from ppc.loading import load_study, parse, validate_study
from ppc.schema import ConfigError
from ppc.study import Row, TrialSpec, baseline, expand, summarise, value_at
from ppc.study_config import StudyConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
K, T, PRESET = "contrast.prototype_top_k", "contrast.temperature", "contrast.preset"


def study(design: str, **more: Any) -> StudyConfig:
    raw = parse(f"name: s\ndesign:\n  {design}\n", "s.yaml")
    return validate_study({**raw, **more}, "s.yaml")


def from_text(folder: Path, text: str) -> StudyConfig:
    path = folder / "s.yaml"
    path.write_text(text)
    return load_study(path)


def variants(specs: list[TrialSpec]) -> dict[str, dict[str, Any]]:
    return {spec.variant: spec.factors for spec in specs}


def errors(config: StudyConfig, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(config, **kwargs)
    return [str(problem) for problem in caught.value.problems]


# -- designs


def test_grid_is_every_combination_with_every_seed() -> None:
    specs = expand(study(f"{{kind: grid, axes: {{{K}: [0, 32.0], {T}: ['0.1', 5e-1]}}}}", trial_seeds=[3, 1]))
    assert [(s.variant, s.seed) for s in specs] == [
        (f"prototype_top_k={k},temperature={t}", seed) for k in (0, 32) for t in (0.1, 0.5) for seed in (3, 1)
    ]
    for spec in specs:
        assert spec.config.seed == spec.seed
        assert {path: value_at(spec.config, path) for path in (K, T)} == spec.factors
    assert specs[-1].factors == {K: 32, T: 0.5}


def test_axes_that_end_alike_are_named_in_full_and_values_may_be_lists() -> None:
    specs = expand(
        study("{kind: grid, axes: {contrast.bg_score: [0.2, 0.3], seeds.bg_score: [0.2], seeds.scales: [[1, 2]]}}")
    )
    assert specs[0].variant == "contrast.bg_score=0.2,seeds.bg_score=0.2,scales=[1.0,2.0]"
    assert specs[0].factors["seeds.scales"] == [1.0, 2.0]
    alone = expand(study("{kind: one_factor, axes: {contrast.bg_score: [0.3], seeds.bg_score: [0.3]}}"))
    assert list(variants(alone)) == ["base", "contrast.bg_score=0.3", "seeds.bg_score=0.3"]


def test_preset_as_an_axis_fills_the_other_fields() -> None:
    official, paper = expand(study(f"{{kind: grid, axes: {{{PRESET}: [official, paper]}}}}"))
    assert (official.config.contrast.negatives, paper.config.contrast.negatives) == ("ranks", "random_half")
    assert (official.variant, paper.variant) == ("preset=official", "preset=paper")
    kept = expand(
        study(f"{{kind: grid, axes: {{{PRESET}: [official, paper]}}}}", base={"contrast": {"negatives": "all"}})
    )
    assert {s.config.contrast.negatives for s in kept} == {"all"}


def test_one_factor_moves_one_axis_at_a_time_and_does_not_repeat_the_base() -> None:
    base = {"contrast": {"prototype_top_k": 4}}
    specs = expand(study(f"{{kind: one_factor, axes: {{{K}: [0, 4, 32], {T}: [0.1, 0.5]}}}}", base=base))
    assert variants(specs) == {
        "base": {K: 4, T: 0.1},
        "prototype_top_k=0": {K: 0, T: 0.1},
        "prototype_top_k=32": {K: 32, T: 0.1},
        "temperature=0.5": {K: 4, T: 0.5},
    }
    assert baseline(study("{kind: list, variants: [{name: x}]}"), specs) == "base"
    without = expand(study(f"{{kind: one_factor, axes: {{{K}: [0, 32, 4]}}, exclude: [{{{K}: 4}}]}}"))
    assert list(variants(without)) == ["base", "prototype_top_k=0"]


def test_one_factor_may_exclude_its_base() -> None:
    specs = expand(study(f"{{kind: one_factor, axes: {{{K}: [0, 4, 32]}}, exclude: [{{{K}: 32.0}}]}}"))
    assert list(variants(specs)) == ["prototype_top_k=0", "prototype_top_k=4"]


def test_leave_one_out_switches_one_component_off() -> None:
    design = """
    kind: leave_one_out
    variants:
    - {name: no cross-CAM, set: {contrast.cross_cam_weight: 0}}
    - {name: no intra-view, set: {contrast.intra_view_weight: 0}}"""
    specs = expand(study(design))
    cam, intra = "contrast.cross_cam_weight", "contrast.intra_view_weight"
    assert variants(specs) == {
        "full": {cam: 0.1, intra: 0.1},
        "no cross-CAM": {cam: 0.0, intra: 0.1},
        "no intra-view": {cam: 0.1, intra: 0.0},
    }


LADDER = """
    kind: {kind}
    variants:
    - {{name: SEAM, set: {{contrast.prototype_top_k: 0}}}}
    - {{name: "+ contrast", set: {{contrast.prototype_top_k: 32, contrast.negatives: all}}}}
    - {{name: "+ mining", set: {{contrast.negatives: ranks}}}}"""


def test_ladder_keeps_the_steps_before_and_list_does_not() -> None:
    n = "contrast.negatives"
    base = {"contrast": {"prototype_top_k": 8}}
    ladder = expand(study(LADDER.format(kind="ladder"), base=base))
    assert variants(ladder) == {
        "SEAM": {K: 0, n: "ranks"}, "+ contrast": {K: 32, n: "all"}, "+ mining": {K: 32, n: "ranks"},
    }  # fmt: skip
    named = expand(study(LADDER.format(kind="list"), base=base))
    assert variants(named)["+ mining"] == {K: 8, n: "ranks"}


# -- exclude and baseline


def test_exclude_matches_resolved_fields_however_written() -> None:
    axes = f"axes: {{{K}: [0, 4], {T}: [0.1, 0.5]}}"
    specs = expand(study(f"{{kind: grid, {axes}, exclude: [{{{K}: 0.0, {T}: '5e-1'}}]}}"))
    assert [tuple(s.factors.values()) for s in specs] == [(0, 0.1), (4, 0.1), (4, 0.5)]
    by_preset = study(
        f"{{kind: grid, axes: {{{PRESET}: [official, paper]}}, exclude: [{{contrast.negatives: random_half}}]}}"
    )
    assert list(variants(expand(by_preset))) == ["preset=official"]


def test_exclude_may_remove_what_would_not_be_valid() -> None:
    axes = f"axes: {{{K}: [0, -1]}}"
    assert len(expand(study(f"{{kind: grid, {axes}, exclude: [{{{K}: -1}}]}}"))) == 1
    assert "in prototype_top_k=-1" in errors(study(f"{{kind: grid, {axes}}}"))[0]


@pytest.mark.parametrize(
    ("exclude", "text"),
    [
        (f"[{{{K}: 5}}]", 'design.exclude.0: matches no variant: {"contrast.prototype_top_k": 5}'),
        ("[{}]", "design.exclude.0: names no field"),
        (f"[{{{K}: 0}}, {{{K}: 4}}]", "design.exclude: leaves no variant"),
        ("[{contrast.prototype_topk: 0}]", "did you mean contrast.prototype_top_k?"),
    ],
)
def test_an_exclude_that_cannot_be_meant_is_refused(exclude: str, text: str) -> None:
    (message,) = errors(study(f"{{kind: grid, axes: {{{K}: [0, 4]}}, exclude: {exclude}}}"))
    assert message.endswith(text)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(f"{{{K}: 4.0}}", "prototype_top_k=4"), ("prototype_top_k=4", "prototype_top_k=4"), ("null", "prototype_top_k=0")],
)
def test_the_baseline_by_fields_by_name_or_the_first(wanted: str, found: str) -> None:
    config = study(f"{{kind: grid, axes: {{{K}: [0, 4]}}, baseline: {wanted}}}")
    assert baseline(config, expand(config)) == found


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (f"{{{K}: 7}}", "matches no variant, should match one; the variants: prototype_top_k=0,temperature=0.1, "),
        (f"{{{K}: 4}}", "matches 2 variants (prototype_top_k=4,temperature=0.1, prototype_top_k=4,temperature=0.5)"),
        ("full", "'full' matches no variant, should match one; the variants: prototype_top_k=0,temperature=0.1"),
        ("{prototype_top_k: 4}", "no such field; did you mean contrast.prototype_top_k?"),
        ("{}", "design.baseline: names no field"),
    ],
)
def test_a_baseline_must_match_one_variant(wanted: str, text: str) -> None:
    (message,) = errors(study(f"{{kind: grid, axes: {{{K}: [0, 4], {T}: [0.1, 0.5]}}, baseline: {wanted}}}"))
    assert text in message


# -- errors


@pytest.mark.parametrize(
    ("design", "text"),
    [
        ("grid", "design.axes: a design of kind grid needs axes"),
        ("ladder", "design.variants: a design of kind ladder needs variants"),
        ("list, variants: [{name: a}], axes: {train.epochs: [1]}", "kind list has no axes, it has variants"),
        ("grid, axes: {train.epochs: [1]}, variants: [{name: a}]", "kind grid has no variants, it has axes"),
        ("grid, axes: {train.epochs: []}", "s.yaml:3: design.axes.train.epochs: the axis has no values"),
        ("grid, axes: {seed: [1, 2]}", "s.yaml:3: seed: is not varied by a design; list the seeds under `trial_seeds`"),
        ("grid, axes: {runtime.workers: [1, 2]}", "runtime.workers: cannot be an axis"),
        ("grid, axes: {contrast: [1]}", "s.yaml:3: contrast: is a section; name one of its fields: contrast.preset"),
        ("grid, axes: {prototype_topk: [1]}", "s.yaml:3: prototype_topk: no such field; did you mean contrast.proto"),
        ("grid, axes: {train.epochs: [{a: 1}]}", "train.epochs: should be a value or a list; a group of fields is a"),
        ("grid, axes: {train.epochs: [1, 1.0]}", "design: the variant 'epochs=1' is there twice"),
        ("list, variants: [{name: a}, {name: b, set: {seed: 1}}]", "design.variants.1 (b): seed: is not varied"),
        ("list, variants: [{name: a}, {name: b}]", "design: variants 'a' and 'b' have the same config"),
        ("list, variants: [{name: a}, {name: b, set: {runtime.workers: 2}}]", "'a' and 'b' have the same config"),
        ("list, variants: [{name: a}, {name: a, set: {train.epochs: 2}}]", "the variant 'a' is there twice"),
        ("leave_one_out, variants: [{name: full, set: {train.epochs: 2}}]", "the variant 'full' is there twice"),
        ("list, variants: [{name: a, set: {train.epoch: 2}}]", "no such field; did you mean train.epochs?"),
    ],
)  # fmt: skip
def test_a_design_that_cannot_be_meant_is_refused(design: str, text: str) -> None:
    messages = errors(study(f"{{kind: {design}}}"))
    assert len(messages) == 1 and text in messages[0], messages


def test_the_name_of_a_variant_is_one_line() -> None:
    for name in ("a\\nb", "a\\tb", "\\e[1m"):
        with pytest.raises(ConfigError, match="s.yaml:3: design.variants.0.name: should be one line of text"):
            study(f'{{kind: list, variants: [{{name: "{name}"}}]}}')
    assert study("{kind: list, variants: [{name: größer <1> $x$}]}").design.variants[0].name == "größer <1> $x$"


def test_seeds_are_distinct_and_belong_to_the_study() -> None:
    design = "{kind: list, variants: [{name: a}]}"
    assert errors(study(design, trial_seeds=[1, 2, 1, 1])) == ["trial_seeds: the seed 1 is there twice"]
    assert errors(study(design, trial_seeds=[-1])) == ["trial_seeds: a seed should be 0 or more, got -1"]
    assert errors(study(design, base={"seed": 3})) == ["base.seed: a study's seeds are listed under `trial_seeds`"]


def test_errors_of_all_variants_come_at_once_each_told_once(tmp_path: Path) -> None:
    config = from_text(
        tmp_path,
        """name: s
base:
  train: {epochs: 0}
  trian: {}
design:
  kind: grid
  axes:
    contrast.prototype_top_k: [0, -1]
    contrast.temperature: [0.1, zero, 0]
""",
    )
    path = tmp_path / "s.yaml"
    top_k, messages = "prototype_top_k", errors(config)
    assert messages == [
        f"{path}:3: train.epochs: should be greater than or equal to 1, got 0",
        f"{path}:4: trian: no such field; did you mean train?",
        f"{path}:9: contrast.temperature: should be a valid number, unable to parse string as a number, got 'zero' "
        f"(in {top_k}=0,temperature=zero, {top_k}=-1,temperature=zero)",
        f"{path}:9: contrast.temperature: should be greater than 0, got 0 "
        f"(in {top_k}=0,temperature=0, {top_k}=-1,temperature=0)",
        f"{path}:8: contrast.prototype_top_k: should be greater than or equal to 0, got -1 "
        f"(in {top_k}=-1,temperature=0.1, {top_k}=-1,temperature=zero, {top_k}=-1,temperature=0)",
    ]
    both = from_text(tmp_path, path.read_text() + "    contrast.prototype_topk: [1]\ntrial_seeds: [1, 1]\n")
    more = errors(both)
    assert any(f"{path}:10: contrast.prototype_topk: no such field" in m for m in more)
    assert any("trial_seeds" in m for m in more) and any("should be greater than 0, got 0" in m for m in more)


def test_layers_above_add_their_own_check() -> None:
    def check(config: TrialConfig) -> Iterator[tuple[str, str]]:
        if config.backbone.name not in ("tiny", "resnet50"):
            yield "backbone.name", f"no backbone '{config.backbone.name}'; the backbones: tiny, resnet50"

    config = study("{kind: grid, axes: {backbone.name: [tiny, resnet5, resnet50]}}")
    assert errors(config, check=check) == [
        "s.yaml:3: backbone.name: no backbone 'resnet5'; the backbones: tiny, resnet50 (in name=resnet5)"
    ]
    assert len(expand(config)) == 3


# -- overrides and tiny


def test_overrides_change_every_trial_but_not_an_axis() -> None:
    config = study(f"{{kind: grid, axes: {{{K}: [0, 4]}}}}", base={"train": {"epochs": 2}})
    specs = expand(config, overrides=["train.epochs=3", (T, 0.5)])
    assert {(s.config.train.epochs, s.config.contrast.temperature) for s in specs} == {(3, 0.5)}
    assert config.base == {"train": {"epochs": 2}}
    assert errors(config, overrides=[f"{K}=4"]) == [
        f"s.yaml:3: {K}: is an axis of this study, so an override of it would have no effect"
    ]
    assert errors(config, overrides=["train.epoch=4"])[0].endswith("no such field; did you mean train.epochs?")
    moved = expand(study(f"{{kind: one_factor, axes: {{{K}: [0, 4]}}}}"), overrides=[f"{K}=4"])
    assert list(variants(moved)) == ["base", "prototype_top_k=0"]


def test_tiny_keeps_variants_distinct_and_the_study_has_a_say() -> None:
    axes = f"axes: {{{K}: [0, 64], contrast.projector_dim: [16, 32]}}"
    design = f"{{kind: grid, {axes}, baseline: {{{K}: 0, contrast.projector_dim: 32}}}}"
    config = study(design, base={"data": {"name": "voc"}}, tiny={"train.batch_size": 2, "train.epochs": 3})
    specs = expand(config, twin="tiny", overrides=["train.epochs=2"])
    assert variants(specs) == variants(expand(config)) and len(specs) == 4
    assert {(s.config.data.name, s.config.train.batch_size, s.config.train.epochs) for s in specs} == {("scenes", 2, 2)}
    # the field a design varies is left alone, else `full` would be the same as `one scale`
    one = study("{kind: leave_one_out, variants: [{name: one scale, set: {seeds.scales: [1.0]}}]}")
    assert [s.config.seeds.scales for s in expand(one, twin="tiny")] == [(0.5, 1.0, 1.5, 2.0), (1.0,)]


STUDIES = [path for path in sorted(EXPERIMENTS.rglob("*.yaml")) if "study.schema.json" in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_experiment_expands_as_it_is_and_tiny(path: Path) -> None:
    config = load_study(path)
    full, small = expand(config), expand(config, twin="tiny")
    assert [(s.variant, s.seed) for s in full] == [(s.variant, s.seed) for s in small]
    assert len({(s.variant, s.seed) for s in full}) == len(full) > 0
    assert baseline(config, full) == baseline(config, small) in variants(full)
    assert all(s.config.data.name == "scenes" for s in small)


# -- statistics


def test_summarise_gives_mean_std_and_paired_differences() -> None:
    values = {"a": {0: 0.5, 1: 0.7, 2: 0.6}, "b": {1: 0.8, 0: 0.5, 3: 0.1}, "c": {2: 0.9}, "d": {}}
    a, b, c, d = summarise(values, "a")
    assert (a.variant, a.n, a.pairs, a.diff_mean, a.diff_std) == ("a", 3, 0, None, None)
    assert math.isclose(a.mean or 0, 0.6) and math.isclose(a.std or 0, 0.1)
    assert (b.n, b.pairs) == (3, 2)
    assert math.isclose(b.diff_mean or 0, 0.05) and math.isclose(b.diff_std or 0, 0.1 / math.sqrt(2))
    assert (c.n, c.mean, c.std, c.pairs, c.diff_std) == (1, 0.9, None, 1, None)
    assert math.isclose(c.diff_mean or 0, 0.3)
    assert d == Row("d", 0, None, None, 0, None, None)


def test_summarise_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="baseline 'x' is not among the variants: a"):
        summarise({"a": {0: 1.0}}, "x")
    with pytest.raises(ValueError, match="finite"):
        summarise({"a": {0: float("nan")}}, "a")


@pytest.mark.parametrize("kind", ["grid", "one_factor"])
def test_a_study_of_large_values_can_be_shrunk(kind: str) -> None:
    axes = {"views.target_px": [96, 160], "train.batch_size": [16]}
    config = StudyConfig.model_validate({"name": "s", "design": {"kind": kind, "axes": axes}})
    specs = expand(config, twin="tiny", check=check_trial)
    assert {spec.config.train.crop_px for spec in specs} == {160}
    assert {spec.config.data.scenes.num_train for spec in specs} == {16}
    assert 160 in {spec.config.views.target_px for spec in specs}

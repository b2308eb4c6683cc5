"""The typed config: equal values give equal configs, presets fill what is not given, sections that decide a key."""

import pytest
from pydantic import ValidationError

from ppc.config import OFFICIAL, PAPER, ContrastConfig, TrialConfig
from ppc.loading import parse, validate_trial
from ppc.schema import fields


def trial(text: str) -> TrialConfig:
    return validate_trial(parse(text, "t.yaml") or {}, "t.yaml")


@pytest.mark.parametrize(
    "spellings",
    [
        ["train: {learning_rate: 1e-3}", "train: {learning_rate: 0.001}", "train: {learning_rate: '0.001'}",
         "train: {learning_rate: 1.0E-3}", "train: {learning_rate: 1.e-3}"],
        ["contrast: {prototype_top_k: 32}", "contrast: {prototype_top_k: 32.0}", "contrast: {prototype_top_k: '32'}",
         ""],
        ["train: {momentum: 0.9}", "train: {momentum: '0.9'}", "train: {momentum: 9e-1}"],
        ["train: {momentum: 0}", "train: {momentum: 0.0}"],
        ["backbone: {output_stride: 8}", "backbone: {output_stride: 8.0}", ""],
        ["seeds: {scales: [1]}", "seeds: {scales: [1.0]}", "seeds: {scales: ['1']}"],
        ["views: {flip: false}", "views: {flip: no}", "views: {flip: off}", "views: {flip: False}", ""],
        ["views: {flip: true}", "views: {flip: yes}", "views: {flip: on}"],
        ["crf: {bg_score: seed}", "crf: {bg_score: 'seed'}", ""],
        ["train: {resize_long_px: [448, 768]}", "train:\n  resize_long_px:\n  - 448\n  - 768.0\n", ""],
        ["stages: [make_seeds, evaluate]", "stages:\n- make_seeds\n- 'evaluate'"],
    ],
    ids=lambda spellings: spellings[0],
)  # fmt: skip
def test_equal_values_give_equal_configs(spellings: list[str]) -> None:
    dumps = {trial(text).model_dump_json() for text in spellings}
    assert len(dumps) == 1


@pytest.mark.parametrize(("word", "kept"), [("no", "no"), ("off", "off"), ("yes", "yes"), ("2020-01-02", "2020-01-02")])
def test_words_stay_strings_in_string_fields(word: str, kept: str) -> None:
    assert trial(f"data: {{train_split: {word}}}").data.train_split == kept


def test_preset_fills_what_is_not_given() -> None:
    assert ContrastConfig() == ContrastConfig.model_validate({"preset": "official"})
    paper = ContrastConfig.model_validate({"preset": "paper", "negatives": "all"})
    given = {**PAPER, "negatives": "all"}
    assert {name: getattr(paper, name) for name in PAPER} == given
    assert OFFICIAL.keys() == PAPER.keys() <= ContrastConfig.model_fields.keys()
    assert {name: getattr(ContrastConfig(), name) for name in OFFICIAL} == OFFICIAL


def test_a_preset_of_a_wrong_type_is_an_ordinary_error() -> None:
    with pytest.raises(ValidationError, match="preset"):
        ContrastConfig.model_validate({"preset": ["paper"]})


def test_configs_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        trial("").train.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrialConfig.model_validate({"train": {"epoch": 3}})


def test_contrast_that_is_off_decides_nothing() -> None:
    off = [trial("contrast: {prototype_top_k: 0}"), trial("contrast: {prototype_top_k: 0, temperature: 0.5}")]
    assert off[0].decisive("contrast") == off[1].decisive("contrast")
    on = [trial(""), trial("contrast: {temperature: 0.5}")]
    assert on[0].decisive("contrast") != on[1].decisive("contrast")


def test_the_name_of_the_preset_does_not_decide() -> None:
    spelled = {**PAPER, "preset": "official"}
    by_name = TrialConfig.model_validate({"contrast": {"preset": "paper"}})
    assert by_name.decisive("contrast") == TrialConfig.model_validate({"contrast": spelled}).decisive("contrast")


def test_a_resolved_config_reads_back_equal() -> None:
    config = trial("contrast: {preset: paper, prototype_top_k: 4}\ntrain: {momentum: 0.9}\nviews: {target_px: null}")
    assert TrialConfig.model_validate_json(config.model_dump_json()) == config
    assert TrialConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_field_of_a_trial_has_a_default() -> None:
    assert all(not field.is_required() for field in fields(TrialConfig).values())


@pytest.mark.parametrize(
    ("section", "rule", "unread", "read_by"),
    [
        (
            "contrast",
            {"negatives": "all"},
            {"negative_rank_from": 0.1, "negative_rank_to": 0.9},
            {"negatives": "ranks"},
        ),
        (
            "contrast",
            {"negatives": "ranks"},
            {"negative_pool": 0.7, "negative_sample": 0.7},
            {"negatives": "random_half"},
        ),
        ("contrast", {"hard_pixels": "paper"}, {"hard_pool": 0.7}, {"hard_pixels": "official"}),
        ("seeds", {"protocol": "best_on_train"}, {"bg_score": 0.4}, {"protocol": "fixed"}),
        ("seeds", {"protocol": "fixed"}, {"val_subset_split": "x", "val_subset_images": 3}, {"protocol": "val_subset"}),
        ("method", {"name": "cam"}, {"er_weight": 2, "ecr_weight": 2, "min_pool_weight": 2}, {"name": "seam"}),
    ],
)
def test_what_the_chosen_rule_does_not_read_decides_nothing(
    section: str, rule: dict[str, object], unread: dict[str, object], read_by: dict[str, object]
) -> None:
    def decisive(*changes: dict[str, object]) -> object:
        values = {key: value for change in changes for key, value in change.items()}
        return TrialConfig.model_validate({section: values}).decisive(section)

    for name, value in unread.items():
        assert decisive(rule, {name: value}) == decisive(rule), name
        assert decisive(read_by, {name: value}) != decisive(read_by), name
    assert decisive(rule) != decisive(read_by)


def test_plain_cam_without_contrast_has_no_target_view() -> None:
    def views(method: str, top_k: int, px: int) -> object:
        values = {"method": {"name": method}, "contrast": {"prototype_top_k": top_k}, "views": {"target_px": px}}
        return TrialConfig.model_validate(values).decisive("views")

    assert views("cam", 0, 64) == views("cam", 0, 128)
    assert views("cam", 4, 64) != views("cam", 4, 128) and views("seam", 0, 64) != views("seam", 0, 128)

"""Experiment files: every error at once with its line, path and remedy; `extends`, overrides, --tiny, schemas."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ppc.config import TrialConfig
from ppc.loading import (
    is_study,
    load_study,
    load_trial,
    load_yaml,
    of_trial,
    override,
    override_all,
    override_study,
    parse,
    tiny,
    validate_study,
    validate_trial,
)  # fmt: skip
from ppc.schema import ConfigError, check_path, fields, nearest, problems_of, study_schema, trial_schema, write_schemas
from ppc.study_config import StudyConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FILES = sorted(p for p in EXPERIMENTS.rglob("*.yaml"))
STUDY = """name: s
base:
  train: {epochs: 2}
design:
  kind: grid
  axes:
    contrast.prototype_top_k: [0, 4]
"""


def write(folder: Path, text: str | bytes, name: str = "x.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def errors(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    return [str(problem) for problem in caught.value.problems]


# -- files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "{path}: the file is empty"),
        ("# only a comment\n", "{path}: the file is empty"),
        ("- a\n- b\n", "{path}: should hold `field: value` lines at the top, got a list"),
        ("just words\n", "{path}: should hold `field: value` lines at the top, got a single value ('just words')"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "{path}: not a text file in UTF-8; expected YAML"),
        (b"seed: 1\n\0\0", "{path}: a binary file; expected YAML"),
        ("train: {epochs: 1\nseed: 2\n", "{path}:2: not valid YAML: "),
        ("train:\n\tepochs: 1\n", "{path}:2: not valid YAML: "),
        ("seed: 1\ntrain: {}\nseed: 2\n", '{path}:3: not valid YAML: while constructing a mapping found duplicate key'),
        ("train:\n  epochs: 1\n  epochs: 1\n", "{path}:3: not valid YAML: "),
        ("seed: 1\n---\nseed: 2\n", "{path}:2: not valid YAML: "),
        ("%YAML 1.1\n---\nseed: no\n", "{path}: `%YAML 1.1`: only YAML 1.2 is read, remove this line"),
        ("seed: 1\n3: 4\n", "{path}:1: the key 3 is not a name"),
        ("train: &a\n  epochs: *a\n", "{path}:1: an alias that refers to itself"),
        ("seed: !!python/object:os.system x\n", "{path}:1: not valid YAML: "),
        ("seed: !!set {a, b}\n", "{path}:1: a set is not a value that a config can hold"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_one_clear_error(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = write(tmp_path, content)
    for load in (load_yaml, load_trial, load_study):
        (message,) = errors(load, path)
        assert message.startswith(expected.format(path=path))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, STUDY, "scenes_k.yaml")
    wrong = tmp_path / "scene_k.yaml"
    assert errors(load_study, wrong) == [f"{wrong}: no such file; did you mean {tmp_path / 'scenes_k.yaml'}?"]
    assert errors(load_trial, tmp_path / "no" / "a.yaml") == [f"{tmp_path / 'no' / 'a.yaml'}: no such file"]
    assert errors(load_trial, tmp_path) == [f"{tmp_path}: a folder; name an experiment file (.yaml)"]


def test_each_kind_of_file_says_which_command_takes_it(tmp_path: Path) -> None:
    study, trial = write(tmp_path, STUDY, "s.yaml"), write(tmp_path, "train: {epochs: 1}", "t.yaml")
    assert errors(load_trial, study) == [f"{study}: this is a study; use: ppc study launch {study}"]
    assert errors(load_trial, study, overrides=["train.epochs=1"], shrink=tiny) == errors(load_trial, study)
    assert errors(load_study, trial) == [f"{trial}: this is a single trial; use: ppc run {trial}"]
    assert errors(load_study, trial, overrides=["train.epochs=1"]) == errors(load_study, trial)


def test_a_bom_and_crlf_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbftrain:\r\n  epochs: 3\r\nseed: 2\r\n")
    assert load_trial(path) == TrialConfig.model_validate({"train": {"epochs": 3}, "seed": 2})


# -- errors


def test_all_errors_at_once_each_with_line_path_and_remedy(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """prototype_topk: 4
train:
  epochs: yes
  learning_rate: .nan
  momentum: x
  batch_size: true
  resize_long_px: [3]
  color_jitter: maybe
  crop_px: 32.5
contrast:
  temprature: 1
  tie_rule: first
  prototype_top_k: -1
data: 5
crf: {bg_score: .inf, preset: 3}
contrast.bg_score: 3
stages: []
lr: 1e-3
zzz: 1
bg_score: 0.2
train_cam:
  epochs: 3
""",
    )
    lines = {
        1: "prototype_topk: no such field; did you mean contrast.prototype_top_k?",
        3: "train.epochs: should be a valid integer, unable to parse string as an integer, got 'yes'",
        4: "train.learning_rate: should be a finite number, got NaN",
        5: "train.momentum: should be 'official' or a valid number, unable to parse string as a number, got 'x'",
        6: "train.batch_size: should not be a boolean, got true",
        7: "train.resize_long_px: too few values, got [3]",
        8: "train.color_jitter: should be a valid boolean, unable to interpret input, got 'maybe'",
        9: "train.crop_px: should be a valid integer, got a number with a fractional part, got 32.5",
        11: "contrast.temprature: no such field; did you mean contrast.temperature?",
        12: "contrast.tie_rule: should be 'first_index' or 'random', got 'first'; did you mean 'first_index'?",
        13: "contrast.prototype_top_k: should be greater than or equal to 0, got -1",
        14: "data: should be a section of `field: value` lines, got 5",
        15: 'crf.preset: should be a valid string, got 3; to give a string, quote it: "3"',
        16: "contrast.bg_score: is a dotted name; write it nested here: contrast: {bg_score: ...}",
        17: "stages: should have at least 1 item, not 0, got []",
        18: "lr: no such field; did you mean train.learning_rate?",
    }
    found = errors(load_trial, path)
    for line, text in lines.items():
        assert f"{path}:{line}: {text}" in found
    assert f"{path}:15: crf.bg_score: should be 'seed' or a finite number, got Infinity" in found
    assert any(m.startswith(f"{path}:19: zzz: no such field; the fields here: seed, stages, data,") for m in found)
    assert any(
        m.startswith(f"{path}:20: bg_score: ") and "contrast.bg_score" in m and "crf.bg_score" in m for m in found
    )
    assert any(m.startswith(f"{path}:21: train_cam: no such field") for m in found)
    assert len(found) == 20
    numbers = [int(m.removeprefix(f"{path}:").split(":")[0]) for m in found]
    assert numbers == sorted(numbers)
    with pytest.raises(ConfigError, match=r"^20 errors:\n  .*x\.yaml:1: prototype_topk"):
        load_trial(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "'nan'", "'inf'"])
@pytest.mark.parametrize("field", ["train.learning_rate", "train.momentum", "crf.bg_score", "views.rotate_deg"])
def test_nan_and_infinity_are_refused(field: str, value: str) -> None:
    section, name = field.split(".")
    (message,) = errors(validate_trial, parse(f"{section}: {{{name}: {value}}}", "f"), "f")
    assert message.startswith(f"f:1: {field}: ")


@pytest.mark.parametrize("text", ["contrast: {prototype_top_k: true}", "seeds: {scales: [true]}", "seed: false"])
def test_booleans_are_no_numbers(text: str) -> None:
    (message,) = errors(validate_trial, parse(text, "f"), "f")
    assert "should not be a boolean" in message


def test_study_errors_come_with_those_of_its_base(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: a b\nmetrik: x\nseeds: [0]\nbase:\n  train: {epoch: 1}\n"
        "design:\n  kind: gird\n  axes: {contrast: {prototype_top_k: [1]}}\n",
    )
    found = errors(load_study, path)
    assert f"{path}:2: metrik: no such field; did you mean metric?" in found
    under = "is a field of a trial: in a study it goes under `base:`; the trials' own seeds are `trial_seeds`"
    assert f"{path}:3: seeds: {under}" in found
    assert f"{path}:5: base.train.epoch: no such field; did you mean train.epochs?" in found
    assert any(
        m.startswith(f"{path}:7: design.kind: should be 'grid'") and m.endswith("did you mean 'grid'?") for m in found
    )
    assert any(
        m.startswith(f"{path}:8: design.axes.contrast: ") and "`section.field: [value, value]`" in m for m in found
    )
    assert any(m.startswith(f"{path}:1: name: should match pattern") for m in found)
    assert len(found) == 6
    assert errors(validate_study, {"base": {}}, "s") == [
        "s: name: is missing, and has no default", "s: design: is missing, and has no default",
    ]  # fmt: skip


def test_errors_without_lines_name_the_source() -> None:
    assert errors(validate_trial, {"train": {"epochs": 0}}, "here") == [
        "here: train.epochs: should be greater than or equal to 1, got 0"
    ]
    assert problems_of(TrialConfig, {}, "here") == []


def test_an_error_can_be_pickled_between_processes() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_trial({"trian": {}, "lr": 1}, "f")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.problems == caught.value.problems


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("prototype_topk", "contrast.prototype_top_k"),
        ("contrast.prototype_topk", "contrast.prototype_top_k"),
        ("constrast.prototype_top_k", "contrast.prototype_top_k"),
        ("constrast", "contrast"),
        ("constrast.bg_score", "contrast.bg_score"),
        ("contrast.epochs", "train.epochs"),
        ("method.weights", "backbone.weights"),
        ("lr", "train.learning_rate"),
        ("train.wd", "train.weight_decay"),
        ("data.scenes.num_cls", "data.scenes.num_classes"),
        ("Batch-Size", "train.batch_size"),
    ],
)
def test_the_nearest_right_name(wrong: str, right: str) -> None:
    assert nearest(TrialConfig, tuple(wrong.split("."))) == (right,)


def test_every_field_is_its_own_nearest_name() -> None:
    for name in fields():
        assert check_path(name, "") is None
        assert nearest(TrialConfig, tuple(name.split(".")))[0] == name


# -- extends


def test_extends_merges_section_by_section_and_keeps_lines(tmp_path: Path) -> None:
    write(tmp_path, "train: {epochs: 9, batch_size: 2}\nseeds:\n  scales: [0.5, 1]\n", "base/b.yaml")
    path = write(tmp_path, "extends: base/b.yaml\ntrain: {epochs: 3}\nseeds: {scales: [2]}\n")
    config = load_trial(path)
    assert (config.train.epochs, config.train.batch_size, config.seeds.scales) == (3, 2, (2.0,))
    write(tmp_path, "train: {epochs: 9,\n batch_size: 0}\n", "base/b.yaml")
    assert errors(load_trial, path) == [
        f"{tmp_path / 'base/b.yaml'}:2: train.batch_size: should be greater than or equal to 1, got 0"
    ]


def test_a_study_extends_a_study_and_its_base_a_trial(tmp_path: Path) -> None:
    write(tmp_path, "train: {epochs: 9, batch_size: 2}\n", "trial.yaml")
    one = write(tmp_path, STUDY.replace("base:\n", "base:\n  extends: trial.yaml\n"), "one.yaml")
    assert load_study(one).base == {"train": {"epochs": 2, "batch_size": 2}}
    design = "design: {kind: one_factor, axes: {train.epochs: [1]}}"
    two = write(
        tmp_path, f"extends: ../one.yaml\nname: t\nbase: {{train: {{batch_size: 5}}}}\n{design}\n", "sub/two.yaml"
    )
    study = load_study(two)
    assert study.base == {"train": {"epochs": 2, "batch_size": 5}}
    assert study.design.axes == {"train.epochs": [1]}  # a design is taken whole
    unnamed = write(tmp_path, "extends: one.yaml\nmetric: m\n", "three.yaml")
    assert errors(load_study, unnamed) == [f"{unnamed}: name: is missing, and has no default"]


def test_extends_refuses_circles_and_names_both_files(tmp_path: Path) -> None:
    a, b = write(tmp_path, "extends: b.yaml\n", "a.yaml"), write(tmp_path, "seed: 1\nextends: a.yaml\n", "b.yaml")
    assert errors(load_trial, a) == [f"{b}:2: extends: files extend each other in a circle: a.yaml -> b.yaml -> a.yaml"]
    itself = write(tmp_path, "extends: c.yaml\n", "c.yaml")
    assert errors(load_trial, itself) == [f"{itself}:1: extends: files extend each other in a circle: c.yaml -> c.yaml"]
    lost = write(tmp_path, "seed: 1\nextends: nowhere.yaml\n", "d.yaml")
    assert errors(load_trial, lost) == [f"{lost}:2: extends: {tmp_path / 'nowhere.yaml'}: no such file"]
    wrong = write(tmp_path, "extends: [a.yaml]\n", "e.yaml")
    assert errors(load_trial, wrong) == [f"{wrong}:1: extends: should be the path of one file, relative to this one"]


# -- overrides


def test_an_override_is_yaml_and_leaves_its_input_alone() -> None:
    raw = parse("train: {epochs: 2}", "f")
    new = override(raw, "train.learning_rate=1e-3")
    new = override_all(
        new, ["seeds.scales=[1, 1.5]", "data.root=no", "backbone.weights=null", ("seed", 4), "views.flip=yes"]
    )
    config = validate_trial(new, "f")
    assert (config.train.epochs, config.train.learning_rate, config.seeds.scales) == (2, 0.001, (1.0, 1.5))
    assert (config.data.root, config.backbone.weights, config.seed, config.views.flip) == ("no", None, 4, True)
    assert raw == {"train": {"epochs": 2}}


def test_a_wrong_override_says_so() -> None:
    assert errors(override, {}, "contrast.prototype_topk=4") == [
        "--set contrast.prototype_topk=4: contrast.prototype_topk: "
        "no such field; did you mean contrast.prototype_top_k?"
    ]
    (message,) = errors(override, {}, "train=4")
    assert "train: is a section; name one of its fields: train.epochs, train.batch_size" in message
    assert errors(override, {}, "train.epochs") == ["--set train.epochs: expected FIELD=VALUE, such as train.epochs=4"]
    (message,) = errors(override, {}, "seeds.scales=[1,")
    assert message.startswith("--set seeds.scales=[1,:1: not valid YAML")
    assert len(errors(override_all, {}, ["a=1", "b=2", "train.epochs=0"])) == 2
    bad = override({}, "train.epochs=0")
    assert errors(validate_trial, bad, "f") == [
        "--set train.epochs=0: train.epochs: should be greater than or equal to 1, got 0"
    ]
    hidden = override({"train": 5}, "train.epochs=3")
    assert errors(validate_trial, hidden, "f") == ["f: train: should be a section of `field: value` lines, got 5"]


def test_overrides_of_a_study_reach_itself_or_its_base(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    study = load_study(
        path, overrides=["trial_seeds=[3, 4]", "train.batch_size=2", "base.train.epochs=5", "max_concurrent=2"]
    )
    assert (study.trial_seeds, study.max_concurrent) == ([3, 4], 2)
    assert study.base == {"train": {"epochs": 5, "batch_size": 2}}
    assert errors(load_study, path, overrides=["seed=3", "trian.epochs=3", "trial_seed=[1]", "design.kind=list"]) == [
        "--set seed=3: seed: a study's seeds are its trial_seeds: --set trial_seeds=[0,1]",
        "--set trian.epochs=3: trian.epochs: no such field; did you mean train.epochs?",
        "--set trial_seed=[1]: trial_seed: no such field; did you mean trial_seeds?",
        "--set design.kind=list: design.kind: cannot be set from outside; change it in the file",
    ]
    (message,) = errors(override_study, load_yaml(path), "contrast.prototype_top_k=1")
    assert "contrast.prototype_top_k: is an axis of this study" in message


# -- tiny


def test_tiny_shrinks_any_trial_to_generated_data_on_a_cpu() -> None:
    raw = parse(
        "data: {name: voc, root: /d, train_split: train_aug, labels: xml}\n"
        "backbone: {name: resnet38d, weights: w.params}\n"
        "contrast: {prototype_top_k: 64}\nviews: {target_px: null, rotate_deg: 20}\nseeds: {splits: [train, val]}\n"
        "runtime: {workers: 4, gpus_per_worker: 1}\n",
        "f",
    )
    config = validate_trial(tiny(raw), "f")
    assert (config.data.name, config.data.root, config.data.train_split, config.data.labels) == (
        "scenes",
        None,
        "train",
        "auto",
    )
    assert (config.backbone.name, config.backbone.weights) == ("tiny", None)
    assert (config.train.epochs, config.train.batch_size, config.data.scenes.num_train) == (1, 4, 8)
    assert (config.runtime.workers, config.runtime.gpus_per_worker, config.seeds.splits) == (1, 0, ("train",))
    assert (config.contrast.prototype_top_k, config.views.rotate_deg, config.views.target_px) == (64, 20.0, None)
    assert raw["data"]["name"] == "voc"
    small = validate_trial(tiny(raw, {"backbone.name": "resnet50"}, keep={"seeds.scales": []}), "f")
    assert (small.backbone.name, len(small.seeds.scales)) == ("resnet50", 4)
    assert errors(tiny, raw, {"backbone.nam": "x"}) == [
        "tiny: backbone.nam: no such field; did you mean backbone.name?"
    ]


def test_tiny_makes_room_for_values_that_stay() -> None:
    kept = {"views.target_px": [64, None, "96"], "train.batch_size": [4, 12]}
    raw = tiny({"views": {"target_px": 96}, "train": {"batch_size": 12}}, keep=kept)
    config = validate_trial(raw, "f")
    assert (config.train.crop_px, config.data.scenes.num_train) == (96, 12)
    for net in ("psa", "irn", "segmentation"):
        config = validate_trial(tiny({}, keep={f"{net}.train.batch_size": [4, 16]}), "f")
        assert config.data.scenes.num_train == 16
    crop = validate_trial(tiny({}, keep={**kept, "train.crop_px": [448]}), "f")
    assert (crop.train.crop_px, crop.data.scenes.num_train) == (448, 12)


def test_overrides_of_a_study_win_over_tiny_with_and_without_base() -> None:
    items = ["train.epochs=2", " base.train.crop_px=64", "trial_seeds=[3]", "max_concurrent=2"]
    assert of_trial(items) == ["train.epochs=2", "train.crop_px=64"]


def test_overrides_win_over_tiny(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 9}\nseeds: {splits: [train, val]}\n")
    config = load_trial(path, shrink=tiny, overrides=["train.epochs=2"])
    assert (config.train.epochs, config.train.crop_px, config.seeds.splits) == (2, 48, ("train", "val"))


# -- schemas


def test_the_committed_schemas_are_current(tmp_path: Path) -> None:
    for path in write_schemas(tmp_path):
        assert (EXPERIMENTS / path.name).read_text("utf-8") == path.read_text("utf-8"), "run: ppc schema --write"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_experiment_file_loads_and_fits_its_schema(path: Path) -> None:
    raw = parse(path.read_text("utf-8"), str(path))
    study = is_study(raw)
    Draft202012Validator(study_schema() if study else trial_schema()).validate(raw)
    assert isinstance(load_study(path) if study else load_trial(path), StudyConfig if study else TrialConfig)
    first = path.read_text("utf-8").splitlines()[0]
    schema = (path.parent / first.rpartition("$schema=")[2]).resolve()
    assert schema == (EXPERIMENTS / f"{'study' if study else 'trial'}.schema.json").resolve(), "for editors: first line"


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"base": {"train": {"epoch": 1}}}, "base"),
        ({"base": {"train": {"epochs": 0}}}, "base"),
        ({"design": {"kind": "gird"}}, "design"),
        ({"design": {"kind": "grid", "axes": {"contrast.prototype_topk": [1]}}}, "design"),
        ({"design": {"kind": "grid", "axes": {"contrast.prototype_top_k": ["x"]}}}, "design"),
        ({"design": {"kind": "list", "variants": [{"name": "a", "set": {"train.epochs": 0}}]}}, "design"),
        ({"tiny": {"train": {"epochs": 1}}}, "tiny"),
        ({"trial_seed": [1]}, ""),
    ],
)
def test_the_study_schema_finds_what_an_editor_should_mark(change: dict[str, Any], at: str) -> None:
    validator = Draft202012Validator(study_schema())
    good = parse(STUDY, "f")
    assert validator.is_valid(good)
    found = list(validator.iter_errors({**good, **change}))
    assert [next(iter(error.absolute_path), "") for error in found] == [at]


def test_schemas_know_descriptions_and_extends() -> None:
    schema = json.loads(json.dumps(trial_schema()))
    for each in (schema, study_schema()):
        Draft202012Validator.check_schema(each)
    assert schema["$defs"]["ContrastConfig"]["properties"]["prototype_top_k"]["description"].startswith("K: CAM pixels")
    assert Draft202012Validator(schema).is_valid({"extends": "a.yaml", "train": {"epochs": 2}})
    assert Draft202012Validator(study_schema()).is_valid({"extends": "a.yaml", "name": "b"})
    assert not Draft202012Validator(study_schema()).is_valid({"name": "b"})

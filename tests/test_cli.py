"""The command line as a user meets it: what it prints, its exit codes, and one clear error for each mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upath import UPath

from ppc import cli, places
from ppc.artifacts import Storage
from ppc.cli import app
from ppc.doctor import EXTRAS, NEEDED, examine
from ppc.ledger import FINISHED, read_rows

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.yaml"))
STUDIES = [path for path in EXPERIMENTS if "study.schema.json" in path.read_text()]
TRIALS = [path for path in EXPERIMENTS if path not in STUDIES]
pytestmark = pytest.mark.filterwarnings("ignore")

# Imports of ray and mlflow fail as they do where neither is installed.
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from ppc.cli import main
main()
"""


def call(
    *words: str | Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run `ppc words` in this process; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["ppc", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def ppc(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: call(*words, capfd=capfd, monkeypatch=monkeypatch)


def test_run_local_works_with_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    file = next(path for path in TRIALS if path.name == "scenes_seam_ppc.yaml")
    words = ["run", str(file), "--tiny", "--local", "--storage", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "mask_miou_train" in done.stdout
    (result,) = tmp_path.glob("trials/*/result.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert 0 < metrics["seed_miou_train"] < 1 and 0 < metrics["mask_miou_train"] < 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_runs_tiny_with_all_its_stages(path: Path, tmp_path: Path, ppc) -> None:  # noqa: ANN001
    code, out, err = ppc("study", "launch", path, "--tiny", "--local", "--storage", tmp_path)
    assert code == 0, out + err
    name = next(tmp_path.glob("studies/*")).name
    storage = Storage(tmp_path)
    rows = read_rows(storage, storage.study(name).definition())
    assert rows and all(row.state == FINISHED for row in rows)
    assert all([s["name"] for s in row.result["stages"]] == row.config["stages"] for row in rows)
    code, out, _ = ppc("report", name, "--storage", tmp_path)
    assert code == 0 and all(row.variant in out for row in rows)
    code, out, _ = ppc("study", "status", name, "--storage", tmp_path)
    assert code == 0 and f"{len(rows)} finished" in out and "(generated data)" in out
    code, _, err = ppc("figure", name, tmp_path / "picture.png", "--storage", tmp_path)
    assert code == 0 and (tmp_path / "picture.png").stat().st_size > 1000, err


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_every_trial_file_runs_tiny(path: Path, tmp_path: Path, ppc) -> None:  # noqa: ANN001
    code, out, err = ppc("run", path, "--tiny", "--local", "--storage", tmp_path)
    assert code == 0, out + err


def test_dry_run_prints_the_trials_and_writes_nothing(tmp_path: Path, ppc) -> None:  # noqa: ANN001
    code, out, _ = ppc("study", "launch", EXPERIMENTS[0].parent / "scenes_k.yaml", "--dry-run", "--storage", tmp_path)
    assert code == 0 and "6 trials" in out and "contrast.prototype_top_k=32" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "launch", "nowhere.yaml"], "nowhere.yaml"),
        (["study", "launch", STUDIES[0], "--set", "train.lr=1"], "did you mean train.learning_rate"),
        (["run", TRIALS[0], "--set", "backbone.name=resnet51"], "resnet51"),
        (["run", TRIALS[0], "--set", "backbone.weights=missing.pth"], "missing.pth"),
        (["run", TRIALS[0], "--set", "data.name=voc", "--set", "data.root=no/such/folder"], "no/such/folder"),
        (["run", TRIALS[0], "--set", "stages=[refine_crf]"], "refine_crf needs make_seeds"),
        (
            ["run", TRIALS[0], "--set", "train.batch_size=7", "--set", "runtime.workers=2"],
            "multiple of runtime.workers",
        ),
        (["run", STUDIES[0]], "ppc study launch"),
        (["study", "launch", TRIALS[0]], "ppc run"),
        (
            ["study", "launch", STUDIES[0], "--dry-run", "--set", "metric=mask_miou_tain"],
            "no 'mask_miou_tain'; did you mean",
        ),
        (["study", "launch", STUDIES[0], "--dry-run", "--set", "metric=bg_score"], "cannot decide; take a mIoU"),
        (["run", TRIALS[0], "--set", "train.epochs="], "--set train.epochs=: train.epochs: no value; write null"),
        (["study", "status", "unknown"], "no study 'unknown'"),
        (["report", "unknown"], "no study 'unknown'"),
        (["data", "check", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_clear_error(words: list[str], said: str, tmp_path: Path, ppc) -> None:  # noqa: ANN001
    local = ["--local"] if words[0] == "run" or words[1] == "launch" else []
    storage = [] if words[0] == "data" else ["--storage", tmp_path]
    code, out, err = ppc(*words, *local, *storage)
    assert code == 2 and said in err.replace("\n", " "), out + err
    assert "Traceback" not in out + err


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path, ppc) -> None:  # noqa: ANN001
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for words in (["run", TRIALS[0]], ["study", "launch", STUDIES[0]]):
        code, _, err = ppc(*words, "--tiny", "--local", "--storage", blocked)
        assert code == 2 and f"storage {blocked} cannot be written" in err and "pass --storage PLACE" in err


def test_data_commands(tmp_path: Path, ppc) -> None:  # noqa: ANN001
    root = tmp_path / "scenes"
    sizes = ["--num-train", "6", "--num-val", "2", "--image-px", "48"]
    assert ppc("data", "make-scenes", root, *sizes)[0] == 0
    code, out, _ = ppc("data", "check", root)
    assert code == 0 and "train 6, val 2 images; 0 problem(s)" in out
    image = sorted((root / "JPEGImages").iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    code, out, _ = ppc("data", "check", root)
    assert code == 1 and image.name in out


def test_the_doctor_knows_what_the_project_needs() -> None:
    project = tomllib.loads((EXPERIMENTS[0].parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(items: list[str]) -> list[str]:
        return [re.split(r"[\[>=<]", item)[0] for item in items]

    assert set(NEEDED) == set(names(project["dependencies"]))
    extras = {name: names(items)[0] for name, items in project["optional-dependencies"].items()}
    del extras["dev"], extras["docs"]
    assert {extra: name for extra, (name, _) in EXTRAS.items()} == extras


def test_schema_and_doctor(tmp_path: Path, ppc) -> None:  # noqa: ANN001
    code, out, _ = ppc("schema")
    assert code == 0 and "design" in json.loads(out)["properties"]
    code, out, _ = ppc("schema", "--of", "trial")
    assert code == 0 and "backbone" in json.loads(out)["properties"] and "design" not in json.loads(out)["properties"]
    assert ppc("schema", "--of", "trail")[0] == 2
    code, out, _ = ppc("doctor", "--storage", tmp_path)
    assert code == 0 and "torch" in out and str(tmp_path) in out.replace("\n", "")


def test_the_doctor_asks_no_remote_store_for_its_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "HERE", tmp_path / "nothing was kept here yet")
    storage = Storage(UPath("memory://bucket/project"))
    (found,) = [finding for finding in examine(storage) if finding.text.startswith("storage ")]
    assert found.ok and "free" not in found.text and str(storage.root) in found.text


def test_what_is_missing_is_printed_with_its_brackets(tmp_path: Path, ppc, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    from importlib import metadata

    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    code, out, _ = ppc("doctor", "--storage", tmp_path / "[red]")
    assert code == 1 and "pip install -e '.[timm]'" in out and "pip install -e '.[ray]'" in out
    assert "pip install torch" in out and str(tmp_path / "[red]") in out
    root = tmp_path / "[data]"
    assert ppc("data", "make-scenes", root, "--num-train", "2", "--num-val", "1", "--image-px", "32")[0] == 0
    assert str(root) in ppc("data", "check", root)[1].replace("\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study", "launch", "experiments/scenes_k.yaml", "--max-concurrent", "0"], "--max-concurrent"),
        (["study", "launch", "experiments/scenes_k.yaml", "--num-cpus", "-1"], "--num-cpus"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(words: list[str], told: str) -> None:
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 2 and told in ran.output and "1" in ran.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["study", "launch", "experiments/scenes_k.yaml", "--local", "--tracking", "http://h"],
            "--tracking: --local runs",
        ),
        (
            ["study", "resume", "k", "--local", "--address", "auto", "--num-cpus", "2"],
            "--address, --num-cpus: --local runs",
        ),
        (
            ["study", "resume", "k", "--address", "http://h:8265", "--local"],
            "a job server runs this on its own cluster",
        ),
        (["study", "resume", "k", "-f"], "--follow prints the log of a job"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str], told: str) -> None:
    ran = CliRunner().invoke(app, words)
    assert isinstance(ran.exception, ValueError) and told in str(ran.exception)

"""Nothing is unpickled, no name leads out of its folder, and no secret shows."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from tiny_run import scenes_root
from tiny_study import QUIET, make_study
from typer.testing import CliRunner

import ppc
from ppc.artifacts import Storage
from ppc.cli import app
from ppc.data import VocLayout
from ppc.data.check import check_dataset
from ppc.data.labels import DataError, parse_id
from ppc.gallery import gallery
from ppc.launch import Where, run_study
from ppc.names import MAX_BYTES, check_name
from ppc.redact import safe_uri, without_secrets
from ppc.study_config import StudyConfig

# -- what is read from files


def unsafe_calls(tree: ast.AST) -> list[tuple[int, str]]:
    """Calls that can run code of the file that they read, as (line, what)."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        bad = (
            (
                last in ("load", "loads", "Unpickler")
                and name.startswith(("pickle.", "cloudpickle.", "joblib.", "dill."))
            )
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (
                last == "load"
                and name.startswith(("np.", "numpy."))
                and options.get("allow_pickle", "False") != "False"
            )
            or (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"))
            or (last == "YAML" and options.get("typ") == "'unsafe'")
            or name in ("eval", "exec", "marshal.loads", "shelve.open")
        )
        if bad:
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "pickle.loads(b)", "cloudpickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "yaml.load(f)", "YAML(typ='unsafe')", "eval(x)",
    ],
)  # fmt: skip
def test_the_search_for_unsafe_calls_finds_them(text: str) -> None:
    assert len(unsafe_calls(ast.parse(text))) == 1


def test_nothing_is_unpickled() -> None:
    found, names = [], set()
    for path in sorted(Path(ppc.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        # `yaml` is in loading.py a parser of kind `safe`, made there
        found += [
            (path.name, *call) for call in unsafe_calls(tree) if (path.name, call[1]) != ("loading.py", "yaml.load")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "joblib"):
                names |= {alias.name for alias in node.names}
    assert found == []
    assert names <= {"UnpicklingError"}


def test_label_files_of_a_dataset_may_hold_arrays_and_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    from ppc.data.labels import read_label_file

    path = tmp_path / "cls_labels.npy"
    path.write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(DataError, match="refused: it asks for posix.mkdir"):
        read_label_file(path, 3)
    assert not (tmp_path / "ran").exists()


# -- names

BAD = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "x" * (MAX_BYTES + 1), "\udcff"]


@pytest.mark.parametrize("name", BAD)
def test_no_name_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "root")
    makers: list[Callable[[], Any]] = [
        lambda: check_name(name, "name"),
        lambda: storage.study(name),
        lambda: storage.trial(name),
        lambda: storage.stage(name, "k"),
        lambda: storage.stage("train_cam", name),
        lambda: storage.dataset(name),
        lambda: StudyConfig.model_validate(
            {"name": name, "design": {"kind": "list", "variants": [{"name": "a"}]}, "trial_seeds": [0]}
        ),
    ]
    for make in makers:
        with pytest.raises(ValueError):
            make()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["k", "run-a.b_c", "2007_000032", "ünïcode image (2)", "x" * MAX_BYTES, "a..b", "-"])
def test_other_names_are_taken(name: str) -> None:
    assert check_name(name, "name") == name


@pytest.mark.parametrize("line", ["..", "...jpg", ".x", "a\\..\\b", "a\0", "/JPEGImages/...jpg", "x" * 300])
def test_ids_of_lists_stay_in_their_folder(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 7: image"):
        parse_id(line, tmp_path / "list.txt", 7)


def test_a_path_in_a_list_is_its_last_part() -> None:
    assert parse_id("../../../etc/x.jpg", Path("list.txt"), 1) == "x"


def test_a_dataset_reads_nothing_outside(tmp_path: Path) -> None:
    root = scenes_root(tmp_path)
    (tmp_path / "secret.txt").write_text("train_00000\n")
    dataset = VocLayout(root)
    with pytest.raises(ValueError, match=r"split '\.\./\.\./\.\./secret'"):
        dataset.ids("../../../secret")
    for read in (dataset.image, dataset.mask, dataset.saliency):
        with pytest.raises(ValueError, match="image '../x'"):
            read("../x")
    (root / "ImageSets/Segmentation/bad.txt").write_text("train_00000\n..\n")
    (problem,) = check_dataset(dataset, ["bad"])
    assert problem.path.endswith("bad.txt") and problem.what.startswith("line 2: image '..'")


@pytest.mark.parametrize("command", ["report", "compare", "sync", "study status", "study resume", "figure", "ui"])
def test_no_command_leaves_the_storage(command: str, tmp_path: Path) -> None:
    FakeStudy(tmp_path / "outside", name="x")
    before = sorted(tmp_path.rglob("*"))
    words = [*command.split(), "../../outside/studies/x", *(["out.png"] if command == "figure" else [])]
    done = CliRunner().invoke(app, [*words, "--storage", str(tmp_path / "here")])
    assert isinstance(done.exception, ValueError) and str(done.exception).startswith("study '../../outside")
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "here"}


def test_a_picture_is_of_an_image_of_the_study(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make_study(storage, k=[4], seeds=[0])
    from ppc.ledger import read_rows

    (row,) = read_rows(storage, storage.study("k").definition())
    with pytest.raises(ValueError, match="image '../../x'"):
        gallery(storage, row, ["../../x"])


# -- secrets

PASSWORD, KEY = "s3cr3t pa/ss", "wJalrXUtnFEMIKEY"


def test_texts_lose_their_secrets() -> None:
    env = {"MLFLOW_TRACKING_PASSWORD": PASSWORD, "AWS_SECRET_ACCESS_KEY": KEY, "PATH": "/bin", "X_TOKEN": "1"}
    text = f"cannot reach https://me:{PASSWORD}@host/x with {KEY}, in /bin 1: also https://me:s3cr3t%20pa%2Fss@host/x"
    clean = without_secrets(text, env)
    assert clean == "cannot reach https://***@host/x with ***, in /bin 1: also https://***@host/x"
    assert without_secrets("postgresql+psycopg2://u:other@db:5432/m", {}) == "postgresql+psycopg2://***@db:5432/m"
    for same in ("https://host:5000/a@b", "see a@b.org: 12", "s3://bucket/x:y"):
        assert without_secrets(same, {}) == same
    assert safe_uri("https://me:pw@host:5000/x") == "https://host:5000/x"
    for uri, clean in (
        (
            "postgresql+psycopg2://db/m?user=u&password=hunter2&sslmode=off",
            "postgresql+psycopg2://db/m?user=u&password=***&sslmode=off",
        ),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dhunter2", "mssql+pyodbc:///?odbc_connect=***"),
    ):
        assert safe_uri(uri) == without_secrets(uri, {}) == clean


def test_secrets_of_the_environment_and_of_uris_reach_no_file_and_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(tmp_path)
    make_study(storage, k=[4], seeds=[0])
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    uri = "http://me:url-word@127.0.0.1:9"  # the port of `discard`: nothing answers

    def fail(*rest: Any) -> Any:  # as a careless client would
        raise RuntimeError(f"cannot log in at {uri} as {os.environ['MLFLOW_TRACKING_PASSWORD']}; key {KEY}")

    monkeypatch.setattr("ppc.trial.run_stage", fail)
    monkeypatch.setattr("ppc.sync_loop.FLUSH_S", 1.0)
    assert run_study(storage, "k", Where(local=True, tracking=uri), QUIET) == 1
    (error,) = tmp_path.glob("trials/*/error.json")
    assert "cannot log in at http://***@127.0.0.1:9 as ***; key ***" in error.read_text()
    said = capfd.readouterr()
    texts = {"stdout": said.out, "stderr": said.err}
    texts |= {str(p): p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()}
    assert "no MLflow server answers at http://127.0.0.1:9" in said.out
    for where, text in texts.items():
        for secret in (PASSWORD, KEY, "url-word"):
            assert secret not in text, where

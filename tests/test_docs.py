"""The documentation against the code: commands, options, YAML, fields, links, the reference, the added loss."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from ppc.cli import app
from ppc.config import TrialConfig
from ppc.loading import load_study, parse, validate_study, validate_trial
from ppc.schema import fields
from ppc.study import expand
from ppc.study_config import StudyConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def blocks(kind: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for found, text in BLOCK.findall(page.read_text()) if found == kind]


def spans() -> list[tuple[str, str]]:
    return [(page.name, span) for page in PAGES for span in SPAN.findall(BLOCK.sub("", page.read_text()))]


def check_ppc(words: list[str], *, bare: bool) -> None:
    """Every command and option of a call of ppc is there; click raises where one is not. Nothing is run. `bare`: a
    sentence may name a command without its arguments."""
    command: Any = typer.main.get_command(app)
    names = ["ppc"]
    while hasattr(command, "commands"):
        assert words, f"{names} alone is no command"
        names.append(words[0])
        command, words = command.commands.get(words[0]), words[1:]
        assert command is not None, f"no command {' '.join(names)}"
    if words or not bare:
        command.make_context(" ".join(names), list(words))


def check_line(line: str, *, bare: bool = False) -> None:
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words  # where its output goes is the shell's
    if not words or words[0] == "export":
        return
    if words[0] == "ppc":
        check_ppc(words[1:], bare=bare)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    else:
        assert (ROOT / words[0]).is_file(), f"{line}: no such program here"
    for word in words:
        if word.startswith("experiments/") and "my_" not in word:
            assert (ROOT / word).is_file(), line


@pytest.mark.parametrize(("page", "text"), [(p, t) for kind in ("bash", "text") for p, t in blocks(kind)])
def test_shell_snippets_call_what_there_is(page: str, text: str) -> None:
    for line in text.splitlines():
        check_line(line)


def test_commands_in_sentences_are_there_too() -> None:
    found = [span for _, span in spans() if span.startswith(("ppc ", "make "))]
    assert len(found) > 5
    for span in found:
        check_line(span, bare=True)


ELSEWHERE = ("README.md", "CONTRIBUTING.md", "cluster/README.md")
SHORT = re.compile(r"\.\.\.|tableN|\bN\.yaml")  # words of a sentence that stand for others


@pytest.mark.parametrize("file", ELSEWHERE)
def test_commands_of_the_other_documents_are_there(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPC_ADDRESS", "http://head:8265")  # as they tell users to
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line for kind, block in BLOCK.findall(text) if kind in ("bash", "text") for line in block.splitlines()]
    spans = [span for span in SPAN.findall(BLOCK.sub("", text)) if not SHORT.search(span)]
    found = [(line.strip(), False) for line in lines] + [(span, True) for span in spans]
    found = [(line, bare) for line, bare in found if line.startswith(("ppc ", "make "))]
    assert found
    for line, bare in found:
        check_line(line, bare=bare)


def test_an_option_that_is_not_there_is_found() -> None:
    check_line("ppc study status NAME --watch  # for long")
    for line, text in (("ppc study status NAME --watches", "--watches"), ("ppc study look NAME", "look")):
        with pytest.raises(Exception, match=text):
            check_line(line)


def test_extras_in_sentences_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = {name for page in PAGES for name in re.findall(r"pip install -e ['\"]\.\[(\w+)\]", page.read_text())}
    assert found and found <= set(extras)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_snippets_are_valid(page: str, text: str, tmp_path: Path) -> None:
    raw = parse(text, page)
    if "name" in raw:  # a whole study, beside the files that it extends
        for file in (ROOT / "experiments").glob("scenes*.yaml"):
            shutil.copy(file, tmp_path)
        (tmp_path / "snippet.yaml").write_text(text)
        assert expand(load_study(tmp_path / "snippet.yaml"))
    elif set(raw) <= set(StudyConfig.model_fields):
        stub = {"name": "x", "design": {"kind": "list", "variants": [{"name": "a"}]}}
        study = validate_study({**stub, **raw}, page)
        assert expand(study)
    else:
        validate_trial(raw, page)


def test_fields_that_are_named_exist() -> None:
    known = {*fields(TrialConfig), *fields(StudyConfig), *(f"design.{name}" for name in ("kind", "axes"))}
    heads = {name.partition(".")[0] for name in known if "." in name}
    dotted = re.compile(r"[a-z]+(\.[a-z0-9_]+)+")
    found = {span.partition(":")[0] for _, span in spans()}
    named = {name for name in found if dotted.fullmatch(name) and name.partition(".")[0] in heads}
    assert len(named) > 10 and named <= known, named - known


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_field_with_its_meaning() -> None:
    text = hooks().on_page_markdown((ROOT / "docs" / "reference.md").read_text())
    for model, part in zip((TrialConfig, StudyConfig), text.split("\n## ")[1:], strict=True):
        for path, field in fields(model).items():
            section, _, name = path.rpartition(".")
            table = part.split(f"### {section or 'At the top'} {{#")[1].split("\n### ")[0]
            (row,) = re.findall(rf"^\| `{name}` \|.*$", table, re.MULTILINE)
            assert field.description, f"{path} has no description"
            assert field.description.replace("|", "\\|") in row, path
    assert "| `temperature` | number, > 0 | `0.1` | tau of the softmax over prototypes |" in text
    assert "| `crf` | text or `null` | `null` |" in text and "| `high` | whole number or number | required |" in text


def test_the_api_page_names_the_whole_api() -> None:
    import ppc.api

    text = (ROOT / "docs" / "python.md").read_text()
    public = {name for name in vars(ppc.api.Study) if not name.startswith("_")}
    missing = {name for name in public | set(ppc.api.__all__) if name not in text}
    assert not missing
    assert {name for name in re.findall(r"study\.(\w+)", text)} <= {*public, "ipynb"}


class Links(HTMLParser):
    """Targets of a page, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key, value in attrs if key in ("id", "name") and value}
        targets = [value for key in ("href", "src") if (value := found.get(key))]
        self.targets += targets
        if tag in ("script", "img") or (tag == "link" and found.get("rel") == "stylesheet"):
            self.loaded += targets


def test_the_site_builds_and_its_links_resolve(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in tmp_path.glob("*.html"):
        pages[path.name] = Links()
        pages[path.name].feed(path.read_text())
    assert {page.with_suffix(".html").name for page in PAGES} <= set(pages)
    for name, page in pages.items():
        assert not [target for target in page.loaded if "//" in target], "a page loads nothing from elsewhere"
        for target in page.targets:
            if name == "404.html" or target.startswith(("http", "mailto:", "data:")) or target == ".":
                continue
            file, _, anchor = target.partition("#")
            assert (tmp_path / (file or name)).exists(), f"{name}: {target}"
            if anchor and (file or name) in pages and not anchor.startswith("__"):
                assert anchor in pages[file or name].anchors, f"{name}: {target}"
    assert "tau of the softmax over prototypes" in (tmp_path / "reference.html").read_text()


def test_the_loss_of_the_tutorial_can_be_added(tmp_path: Path) -> None:
    ((_, patch),) = blocks("diff")
    shutil.copytree(ROOT / "ppc", tmp_path / "ppc", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"docs/add-a-loss.md does not fit the code any more: {done.stderr}"
    code = """
import math, torch, ppc
from ppc.config import TrialConfig
from ppc.losses import entropy_loss
from ppc.methods import METHODS, journal_metrics
logit = torch.tensor([[0.0, 2.0], [-1.0, 0.5]], dtype=torch.float64, requires_grad=True)
p = logit.sigmoid()
slow = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
ours = entropy_loss(logit, num_images_global=2)
assert torch.allclose(ours, slow), (ours, slow)
halves = sum(entropy_loss(logit[i : i + 1], num_images_global=2) for i in range(2))
assert torch.allclose(halves, slow)
cam = TrialConfig.model_validate({"method": {"name": "cam", "entropy_weight": 0.1}, "contrast": {"prototype_top_k": 0}})
assert "train/entropy" in journal_metrics(cam) and cam.decisive("method")["entropy_weight"] == 0.1
assert "entropy_weight" not in TrialConfig().decisive("method")
print(ppc.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr

"""The LaTeX table: what stands in it, that text of users cannot break it, and that a TeX engine takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy

from ppc.artifacts import write_json
from ppc.latex import escape
from ppc.report import build_report, latex

MIOUS = {0: (0.40, 0.42, 0.47), 4: (0.50, 0.53, 0.58), 32: (0.41, 0.40, None)}  # K -> by seed


def three_seeds(tmp_path: Path, **changes: Any) -> FakeStudy:
    """K = 0, 4, 32 of three seeds: 4 is better by 0.10, 0.11, 0.11; one trial of 32 failed."""
    study = FakeStudy(tmp_path, ks=tuple(MIOUS), seeds=(0, 1, 2))
    for index, miou in enumerate(miou for mious in MIOUS.values() for miou in mious):
        if miou is None:
            study.start(index)
            study.fail(index, "50% of C:\\data_1 {lost} & #2 ~ ^ <none>")
        else:
            study.finish(index, miou)
    study.study |= changes
    write_json(study.storage.study("demo").path / "study.json", study.study)
    return study


def table_rows(text: str) -> list[list[str]]:
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    return [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in body.splitlines() if line.endswith(r"\\")]


def test_the_table_by_hand(tmp_path: Path) -> None:
    published = [
        {"variant": "prototype_top_k=4", "values": {"mask_miou_train": 61.5}, "source": "a paper, Table 6"},
        {"method": "Another & one", "values": {"mask_miou_train": 66.0}, "source": "a thread"},
    ]
    study = three_seeds(tmp_path, published=published, columns=["mask_miou_train"], note="K of 50%")
    text = latex(build_report(study.storage, "demo"))
    heads, base, four, many, another = table_rows(text)
    assert heads == ["variant", r"mask mIoU, train (\%)", "published", "$n$", "difference", "$p$ (Holm)"]
    # means 0.43 and 0.53667; deviations 0.03606 and 0.04041; differences 0.10, 0.11, 0.11: t = 32, p = 0.00097594
    assert base == [r"prototype\_top\_k=0", r"$43.00 \pm 3.61$", "--", "3", "baseline", "--"]
    assert four == [
        r"prototype\_top\_k=4", r"$\mathbf{53.67 \pm 4.04}$", "$61.50$", "3", r"$+10.67 \pm 0.58$", "$0.00098$$^{***}$"
    ]  # fmt: skip
    assert many == [r"prototype\_top\_k=32", r"$40.50 \pm 0.71$", "--", "2 of 3", r"$-0.50 \pm 2.12$", "--"]
    assert another == [r"Another \& one", "", "$66.00$", "", "", ""]
    assert text.count(r"\mathbf") == 1 and r"\caption{K of 50\%}" in text
    note = text[text.index("minipage") :]
    for said in (
        "Split: train: 240 images.", r"best\_on\_train", "Seeds: 0, 1, 2.", r"\emph{Generated data.}",
        "paired t-test over the seeds shared with the baseline, Holm's correction over 1 test(s)",
        r"prototype\_top\_k=32: 2 finished, 1 failed.", r"No test, hence no star, for prototype\_top\_k=32: 2 shared",
        "(a paper, Table 6)", r"Published, Another \& one: a thread.",
    ):  # fmt: skip
        assert said in note, said
    assert "c" * 40 in text and f"fingerprint {'ab' * 32}" in text, "the facts are in comments"


def test_with_two_seeds_there_is_no_star_and_it_says_so(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for index, miou in enumerate((0.40, 0.42, 0.50, 0.51)):
        study.finish(index, miou)
    text = latex(build_report(study.storage, "demo"))
    assert "Holm" not in text and "$^{" not in text
    assert "No test, hence no star, for any variant: 2 shared seed(s), a test needs 3." in text


@pytest.mark.parametrize(
    ("text", "latex_text"),
    [
        ("50% & a_b #1 $x {y}", r"50\% \& a\_b \#1 \$x \{y\}"),
        ("a\\b~c^d <e> |f|", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d \textless{}e\textgreater{} "
                             r"\textbar{}f\textbar{}"),
        ("[x] *y ---stopped", "{[}x] {*}y -{}-{}-stopped"),
        ("two\nlines\x07", "two lines"),
        ("é Ü α ± 中 ę", r"\'{e} \" {U} $\alpha$ $\pm$ \texttt{U+4E2D} \texttt{U+0119}".replace(r"\" {U}", r"\"{U}")),
    ],
)  # fmt: skip
def test_text_is_escaped(text: str, latex_text: str) -> None:
    assert escape(text) == latex_text


NASTY = r"""a_b&c%d$e#f{g}h~i^j\k<l>m|n"o`p'q*[r]--é–…中αß"""


def nasty(tmp_path: Path) -> str:
    study = three_seeds(tmp_path, note=NASTY)
    for entry in study.study["trials"]:
        entry["variant"] = {"prototype_top_k=0": f"[{NASTY}", "prototype_top_k=4": "*"}.get(entry["variant"], NASTY)
    study.study["baseline"] = f"[{NASTY}"
    study.study["published"] = [{"method": NASTY, "values": {"seed_miou_train": 1.0}, "source": NASTY}]
    write_json(study.storage.study("demo").path / "study.json", study.study)
    return latex(build_report(study.storage, "demo"))


def test_nothing_of_a_user_is_left_bare(tmp_path: Path) -> None:
    text = "\n".join(line for line in nasty(tmp_path).splitlines() if not line.startswith("%"))
    assert text.isascii()
    bare = re.sub(r"\\[{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    widths = {line.count("&") for line in bare.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1


def test_it_compiles(tmp_path: Path) -> None:
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("neither pdflatex nor tectonic is on PATH: the LaTeX table was not compiled")
    document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n%s\\end{document}\n"
    path = tmp_path / "paper.tex"
    path.write_text(document % nasty(tmp_path / "storage"))
    how = ["-interaction=nonstopmode", "-halt-on-error"] if engine.endswith("pdflatex") else []
    done = subprocess.run([engine, *how, path.name], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]

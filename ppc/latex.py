r"""The report as a LaTeX table for a paper: booktabs, plus and minus in math, the best mean bold, a note under it.

What is needed of the paper is `\usepackage{booktabs}`. Text of users is escaped, so any engine compiles it.
"""

from __future__ import annotations

import re
import unicodedata

from ppc.published import NONE, is_iou, per_cent
from ppc.report_table import Line, Report, figure, number, p_text, remarks, source_lines, tested

ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "`": "{`}",
    "[": "{[}", "*": "{*}",  # behind the end of a row these are LaTeX's own
    "±": r"$\pm$", "×": r"$\times$", "µ": r"$\mu$", "°": r"$^\circ$", "–": "--", "—": "---", "…": r"\ldots{}",
    "‘": "`", "’": "'", "“": "``", "”": "''", "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}",
    "Ø": r"\O{}", "œ": r"\oe{}", "Œ": r"\OE{}", "ł": r"\l{}", "Ł": r"\L{}",
}  # fmt: skip
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
NOTED = ("metric", "split", "skipped", "segmentation", "background score", "absent classes", "seeds", "published")


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; a letter that not every engine has is named by its code point."""
    pieces = re.split("(--+)", " ".join(text.split()))  # which would be one dash
    return "".join("{}".join(p) if p.startswith("--") else "".join(map(_letter, p)) for p in pieces)


def _letter(letter: str) -> str:
    if letter in ESCAPES:
        return ESCAPES[letter]
    if letter.isascii():
        return letter if letter.isprintable() else ""
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in ACCENTS:
        return rf"\{ACCENTS[marks[0]]}{{{base}}}"
    found = re.fullmatch(r"GREEK SMALL LETTER (\w+)", unicodedata.name(letter, ""))
    if found and found[1] not in ("OMICRON", "FINAL"):
        return rf"$\{found[1].lower().replace('lamda', 'lambda')}$"
    return rf"\texttt{{U+{ord(letter):04X}}}"


def heading(metric: str) -> str:
    r"""`mask_miou_train` as `mask mIoU, train (\%)`."""
    found = re.fullmatch(r"(.+)_miou_(.+)", metric)
    words = f"{found[1].replace('_', ' ')} mIoU, {found[2]}" if found else metric
    return escape(words) + (r" (\%)" if is_iou(metric) else "")


def _figure(mean: float | None, std: float | None, metric: str, *, bold: bool = False, sign: bool = False) -> str:
    if mean is None:
        return "--"
    text = number(mean, metric, sign=sign) + ("" if std is None else rf" \pm {number(std, metric)}")
    return rf"$\mathbf{{{text}}}$" if bold else f"${text}$"


def _row(line: Line, report: Report) -> list[str]:
    cells = [escape(line.variant)]
    total = sum(line.states.values())
    for metric in report.shown:
        decides = metric == report.metric
        cells.append(_figure(*figure(line, report, metric), metric, bold=line.best and decides))
        if metric in report.published:
            claim = line.published.get(metric)
            cells.append("--" if claim is None else f"${per_cent(claim.value)}$")
        if decides:
            cells.append(str(line.n) if line.n == total else f"{line.n} of {total}")
            difference = _figure(line.diff_mean, line.diff_std, metric, sign=True)
            cells.append("baseline" if line.baseline else difference)
            cells += [_p(line)] if tested(report) else []
    return cells


def _p(line: Line) -> str:
    value, _, stars = p_text(line).rpartition(" ")
    if not stars.startswith("*"):
        value, stars = p_text(line), ""
    value = "--" if value == NONE else value.replace("< ", "<")
    return (value if value == "--" else f"${value}$") + (f"$^{{{stars}}}$" if stars else "")


def _others(report: Report) -> list[list[str]]:
    """The rows of published methods that the study does not run: their figures under `published`."""
    rows = []
    for other in report.other_methods:
        cells = [escape(other.name)]
        for metric in report.shown:
            cells.append("")
            if metric in report.published:
                cells.append(f"${per_cent(other.values[metric])}$" if metric in other.values else "--")
            if metric == report.metric:
                cells += ["", "", *([""] if tested(report) else [])]
        rows.append(cells)
    return rows


def latex(report: Report) -> str:
    """The table as LaTeX; all facts of the header are in comments above it."""
    heads = ["variant"]
    for metric in report.shown:
        heads += [heading(metric), *(["published"] if metric in report.published else [])]
        if metric == report.metric:
            heads += ["$n$", "difference", *(["$p$ (Holm)"] if tested(report) else [])]
    facts = [(name, text) for name, text in report.header if name in NOTED]
    note = [f"{escape(name.capitalize())}: {escape(text)}." for name, text in facts]
    note += [r"\emph{Generated data.}"] if report.generated else []
    note += ["Bold: the best mean. Difference: to the baseline, over the seeds that both have."]
    unfinished = [line for line in report.lines if line.states.get("FINISHED", 0) != sum(line.states.values())]
    note += [
        f"{escape(line.variant)}: {', '.join(f'{n} {state.lower()}' for state, n in line.states.items())}."
        for line in unfinished
    ]
    note += [escape(text) for text in [*remarks(report), *(f"{text}." for text in source_lines(report))]]
    note += [f"Published, {escape(other.name)}: {escape(other.source)}." for other in report.other_methods]
    body = [" & ".join(_row(line, report)) + r" \\" for line in report.lines]
    if others := _others(report):
        body += [r"\midrule", *(" & ".join(row) + r" \\" for row in others)]
    comments = [f"% {name}: {' '.join(text.split())}" for name, text in report.header]
    lines = [
        f"% Study {' '.join(report.study.split())}, by ppc report --format latex. Needs \\usepackage{{booktabs}}.",
        *comments,
        r"\begin{table}[t]",
        r"\centering\small",
        rf"\caption{{{escape(report.note or report.study)}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9:.-]', '-', report.study)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip",
        r"\begin{minipage}{\linewidth}\footnotesize\raggedright",
        *note,
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"

"""The report as text: Markdown, CSV, a table on a terminal, plain lines in a log."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppc.published import csv_cells, csv_columns, csv_rows, metric_split, others_table
from ppc.redact import AS_IT_IS
from ppc.report_table import Report, align, cells, columns, remarks, source_lines


def markdown(report: Report) -> str:
    """The report as Markdown; the best mean is bold."""
    parts = [f"# Study {report.study}", ""]
    parts += [report.note, ""] if report.note else []
    parts += [f"- {name}: {text}" for name, text in report.header]
    heads = columns(report)
    parts += ["", *_markdown_row(heads), f"|{'|'.join(['---'] * len(heads))}|"]
    for line in report.lines:
        row = cells(line, report)
        place = heads.index(report.metric)
        row = [cell.replace("*", r"\*") for cell in row]
        row[place] = f"**{row[place]}**" if line.best else row[place]
        parts += _markdown_row(row)
    if others := others_table(report.other_methods, report.published):
        parts += ["", *_markdown_row(others[0]), f"|{'|'.join(['---'] * len(others[0]))}|"]
        parts += [text for row in others[1:] for text in _markdown_row(row)]
    parts.append("")
    for text in remarks(report):
        parts += [text.replace("*", r"\*"), ""]
    parts += [f"- {text}" for text in source_lines(report)]
    parts += [f"- {label}: {text}" for label, text in report.errors]
    return "\n".join(parts).rstrip() + "\n"


def _markdown_row(row: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"]


def as_csv(report: Report) -> str:
    """One line a variant, numbers as they are in the data (IoU in [0, 1]); an empty cell is a missing value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    factors = list(dict.fromkeys(name for line in report.lines for name in line.factors))
    states = list(dict.fromkeys(state for line in report.lines for state in line.states))
    names = ("mean", "std", "n", "diff_mean", "diff_std", "pairs", "bg_score", "trial_s", "baseline", "best")
    tests = ("t", "p", "p_holm", "why_not")
    data = ("split", "count", "protocol", "generated", "same_as")
    heads = ["variant", *factors, "metric", *data, *names, *tests, *(state.lower() for state in states)]
    writer.writerow([*heads, *csv_columns(report.published)])
    for line in report.lines:
        known = [line.factors.get(name) for name in factors]
        numbers = [getattr(line, name) for name in names]
        numbers += [getattr(line.test, name, None) for name in tests]
        trials = [line.states.get(state, 0) for state in states]
        split, same = metric_split(report.metric), "; ".join(line.same_as)
        told = [split, line.count, line.protocol, report.generated, same]
        more = csv_cells(report.published, line.means(report.metric), line.published)
        writer.writerow([line.variant, *known, report.metric, *told, *numbers, *trials, *more])
    writer.writerows(csv_rows(report.published, report.other_methods, len(heads) - 1))
    return text.getvalue()


def print_report(report: Report, console: Console) -> None:
    """Print the report: a table on a terminal, plain lines elsewhere (nothing is cut to a width)."""
    for name, text in report.header:
        console.print(f"{name}: {text}", **AS_IT_IS)
    table_cells = [cells(line, report) for line in report.lines]
    if console.is_terminal:
        table = Table(title=Text(f"study {report.study}"), title_justify="left")
        for column in columns(report):
            table.add_column(
                Text(column), justify="left" if column in ("variant", "trials") else "right", overflow="fold"
            )
        for line, row in zip(report.lines, table_cells, strict=True):
            table.add_row(*map(Text, row), style="bold" if line.best else None)
        console.print(table)
    else:
        for line, row in zip(report.lines, table_cells, strict=True):
            row[columns(report).index(report.metric)] += " *" if line.best else ""
        for text in align([columns(report), *table_cells]):
            console.print(text, **AS_IT_IS)
        if any(line.best for line in report.lines):
            console.print("* the best mean, in its column", **AS_IT_IS)
    others = others_table(report.other_methods, report.published)
    for text in [*(align(others) if others else []), *source_lines(report), *remarks(report)]:
        console.print(text, **AS_IT_IS)
    for label, text in report.errors:
        console.print(f"{label}: {text}", **AS_IT_IS)

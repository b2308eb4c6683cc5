"""What each trial of a study does now: a table for a terminal, plain lines for a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ppc.ledger import FAILED, FINISHED, INTERRUPTED, KILLED, PENDING, RUNNING, STOPPED, TrialRow, counts, stopped_at
from ppc.published import is_iou
from ppc.report import align, duration, number, one_line

STATUS_COLUMNS = ("trial", "state", "try", "stage", "progress", "losses", "left", "result", "error")
STYLES = {FINISHED: "green", FAILED: "red", KILLED: "red", INTERRUPTED: "yellow", STOPPED: "blue"}


def _status_cells(row: TrialRow) -> list[str]:
    progress, losses, left = "", "", ""
    if row.progress:
        done, total = row.progress.get("done", 0), row.progress.get("total", 0)
        progress = f"{done}/{total} {row.progress.get('unit', '')}".rstrip()
        if row.progress.get("epochs"):
            progress += f", epoch {row.progress.get('epoch', 0)}/{row.progress['epochs']}"
        left = "" if row.progress.get("left_s") is None else duration(row.progress["left_s"])
        losses = ", ".join(
            f"{name.rpartition('/')[2]} {value:.4g}" for name, value in (row.progress.get("losses") or {}).items()
        )
    metrics = (row.result or {"metrics": {}})["metrics"]
    result = ", ".join(f"{name} {number(value, name)}" for name, value in metrics.items() if is_iou(name))
    state = f"{row.state.lower()} (reused)" if row.reused else row.state.lower()
    if row.stopped is not None:
        progress = f"stopped at {stopped_at(row)}"
    stage = "" if row.state == FINISHED else row.stage or ""
    error = one_line(row.error) if row.error else ""
    return [row.label, state, str(row.attempt or ""), stage, progress, losses, left, result, error]


def _used(rows: Sequence[TrialRow]) -> tuple[list[str], list[list[str]]]:
    """Columns in which some trial has something to say."""
    lines = [_status_cells(row) for row in rows]
    keep = [i for i in range(len(STATUS_COLUMNS)) if i < 2 or any(line[i] for line in lines)]
    return [STATUS_COLUMNS[i] for i in keep], [[line[i] for i in keep] for line in lines]


def headline(name: str, rows: Sequence[TrialRow], hours: tuple[float, float | None], left_s: float | None) -> str:
    """A study in a line: trials per state, seconds left as time, GPU hours used and left where GPUs are held."""
    words = ", ".join(f"{n} {state.lower()}" for state, n in counts(list(rows)).items())
    parts = [words]
    if any(row.state == RUNNING for row in rows):
        parts.append("time left unknown" if left_s is None else f"about {duration(left_s)} left")
    used_h, left_h = hours
    if used_h or any(row.config.get("runtime", {}).get("gpus_per_worker") for row in rows):
        parts.append(f"{used_h:.2f} GPU h used, {'?' if left_h is None else f'about {left_h:.2f}'} left")
    return f"{name}: {'; '.join(parts)}"


def _that_fit(rows: Sequence[TrialRow], limit: int | None) -> tuple[list[TrialRow], str]:
    """As many rows as fit, those at work and those that went wrong before others; and what the rest are, in words."""
    if limit is None or len(rows) <= limit:
        return list(rows), ""
    first = sorted(range(len(rows)), key=lambda i: rows[i].state in (FINISHED, STOPPED, PENDING))[: max(1, limit)]
    rest = counts([row for i, row in enumerate(rows) if i not in first])
    words = ", ".join(f"{n} {state.lower()}" for state, n in rest.items())
    return [rows[i] for i in sorted(first)], f"not shown: {words}"


def status_table(rows: Sequence[TrialRow], title: str = "", *, generated: bool, max_rows: int | None = None) -> Table:
    """Trials x what they do now, for a terminal; the title says when the data are generated."""
    rows, rest = _that_fit(rows, max_rows)
    heads, lines = _used(rows)
    table = Table(title=Text(f"{title}{' (generated data)' if generated else ''}".strip()), title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(Text, line), style=STYLES.get(row.state))  # Text: brackets in an error are no markup
    table.caption = Text(rest) if rest else None
    return table


def status_lines(rows: Sequence[TrialRow], *, generated: bool) -> list[str]:
    """The same as plain lines for a log, headings first; each figure says when its data are generated."""
    heads, lines = _used(rows)
    if generated:
        heads = [f"{head} (generated data)" if head == "result" else head for head in heads]
    return align([heads, *lines])

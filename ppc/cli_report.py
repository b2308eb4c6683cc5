"""Commands that put results into tables. Thin, as `cli.py`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ppc.cli_jobs import ask_head, at_job_server, refuse_cluster
from ppc.cli_options import DEFAULT_STORAGE, OptionalStorageOption, ServerOption
from ppc.redact import AS_IT_IS

FORMATS = {"md": "md", "latex": "tex", "csv": "csv", "html": "html"}  # and the ending of its file


def _known(formats: list[str], known: list[str]) -> None:
    for one in formats:
        if one not in known:
            raise ValueError(f"--format {one}: there are {', '.join(known)}")


def report(
    name: Annotated[str | None, typer.Argument(help="Study; left out with --best.")] = None,
    storage: OptionalStorageOption = None,
    address: ServerOption = None,
    formats: Annotated[
        list[str],
        typer.Option("--format", help="Print this alone: md, latex, csv, or of html the path; repeatable."),
    ] = [],  # noqa: B006
    best: Annotated[bool, typer.Option("--best", help="The best variant of every study of the storage.")] = False,
) -> None:
    """Print the table of a study and write it as Markdown, CSV, JSON, LaTeX and HTML."""
    refuse_cluster(address)
    _known(formats, ["md"] if best else list(FORMATS))
    if (name is None) != best:
        raise ValueError("report: name a study, or say --best for the best of all studies of the storage, not both")
    if at_job_server(address):
        words = [
            *([name] if name else []),
            *(["--best"] if best else []),
            *(w for f in formats for w in ("--format", f)),
        ]
        raise ask_head(name, ["report", *words], str(address), storage)
    from ppc.artifacts import Storage
    from ppc.compare import as_markdown, as_text, best_table
    from ppc.places import read_bytes
    from ppc.report import build_report, print_report, write_report

    store = Storage.at(storage or DEFAULT_STORAGE)
    if name is None:
        rows = best_table(store)
        empty = f"{store.no_study()}\n"
        print(empty if len(rows) == 1 else (as_markdown if formats else as_text)(rows), end="")
        return
    built = build_report(store, name)
    try:
        written = write_report(built, store.study(name).path / "report", store)
    except OSError as error:  # the table is wanted all the same
        elsewhere = Path(tempfile.mkdtemp(prefix=f"ppc-report-{name}-"))
        print(f"{error}; the report is in {elsewhere}", file=sys.stderr)
        written = write_report(built, elsewhere, store)
    files = {path.suffix[1:]: path for path in written}
    for one in formats:
        path = files[FORMATS[one]]
        print(path if one == "html" else read_bytes(path).decode().rstrip("\n"))
    if formats:
        return
    console = Console()
    print_report(built, console)
    for ending in ("md", "html"):
        console.print(f"report: {files[ending]}", **AS_IT_IS)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Studies of this storage.")],
    storage: Annotated[str, typer.Option("--storage", envvar="PPC_STORAGE", help="As for launch.")] = DEFAULT_STORAGE,
    metric: Annotated[str | None, typer.Option(help="Default: that of the first study.")] = None,
    formats: Annotated[list[str], typer.Option("--format", help="md or csv; repeatable. Default: text.")] = [],  # noqa: B006
) -> None:
    """One table of several studies: a row for each distinct config, told apart by the fields that differ."""
    _known(formats, ["md", "csv"])
    from ppc.artifacts import Storage
    from ppc.compare import as_csv, as_markdown, as_text, table
    from ppc.compare import compare as join

    found = join(Storage.at(storage), names, metric)
    for one in formats or ["text"]:
        if one == "csv":
            print(as_csv(found), end="")
            continue
        print((as_markdown if one == "md" else as_text)(table(found)), *found.remarks, sep="\n")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(report)
    app.command()(compare)

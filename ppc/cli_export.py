"""Commands that hand a trial's products to others. Thin, as `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export_app = typer.Typer(help="Hand a trial's products to others.", no_args_is_help=True)
StorageOption = Annotated[
    str,
    typer.Option("--storage", envvar="PPC_STORAGE", help="Folder or s3://bucket/prefix that holds all of a project."),
]
VariantOption = Annotated[str | None, typer.Option(help="Row of the table. Default: the first.")]
SeedOption = Annotated[int | None, typer.Option(help="Default: the first.")]


@export_app.command("submission")
def export_submission(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="Study whose trial predicted the split.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.tgz", help="Archive to write.")],
    storage: StorageOption = "ppc-storage",
    variant: VariantOption = None,
    seed: SeedOption = None,
    split: Annotated[str, typer.Option(help="Split of the server.")] = "test",
    competition: Annotated[
        str | None, typer.Option(help="comp5: VOC's data alone; comp6: others too. Default: by the trial's weights.")
    ] = None,
) -> None:
    """Pack a trial's predictions for VOC's evaluation server, and check the archive."""
    from ppc.artifacts import Storage
    from ppc.gallery import pick_row
    from ppc.ledger import read_rows
    from ppc.submission import write_submission

    store = Storage.at(storage)
    row = pick_row(read_rows(store, store.study(name).definition()), variant, seed)
    inside = write_submission(store, row, out, split=split, competition=competition)
    print(f"{out}: {row.label}, {inside}")


def check_submission_command(
    file: Annotated[Path, typer.Argument(help="Archive for the server.")],
    data: Annotated[Path, typer.Option("--data", metavar="ROOT", help="Folder in the VOC layout with the split.")],
    split: Annotated[str, typer.Option(help="Split of the server.")] = "test",
) -> None:
    """List what the evaluation server would refuse in an archive. Exit code 1 when anything is."""
    from ppc.data import open_dataset
    from ppc.submission import check_submission

    problems = check_submission(file, open_dataset("voc", data), split)
    for problem in problems:
        print(problem)
    print(f"{file}: {len(problems)} problem(s)")
    raise typer.Exit(1 if problems else 0)


def register(app: typer.Typer, data_app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(export_app, name="export")
    data_app.command("check-submission")(check_submission_command)

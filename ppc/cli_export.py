"""Commands that hand a trial's products to others. Thin, as `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppc.cli_options import DEFAULT_STORAGE, StorageOption

export_app = typer.Typer(help="Hand a trial's products to others.", no_args_is_help=True)
OutArgument = Annotated[Path, typer.Argument(help="Folder to fill: new, empty, or of the same export before.")]
VariantOption = Annotated[str | None, typer.Option(help="Row of the table. Default: the first.")]
BestOption = Annotated[str | None, typer.Option("--variant", help="Row of the table. Default: the best.")]
SeedOption = Annotated[int | None, typer.Option(help="Default: the first.")]
SplitOption = Annotated[list[str], typer.Option("--split", help="Repeatable. Default: all of the product's.")]


def figure(
    name: str,
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    storage: StorageOption = DEFAULT_STORAGE,
    kind: Annotated[
        str,
        typer.Option(
            help="stages: image, CAM, every label map, truth of one trial; cams: CAMs of variants side by side; "
            "predictions: a label map of variants."
        ),
    ] = "stages",
    variants: Annotated[
        list[str],
        typer.Option(
            "--variant",
            help="Row of the table; repeatable for cams and predictions. Default: the first for stages, the baseline "
            "and the best other for cams, the best for predictions.",
        ),
    ] = [],  # noqa: B006
    seed: SeedOption = None,
    product: Annotated[
        str | None,
        typer.Option(help="Label map of predictions: seed, mask, psa_mask, irn_mask, seg. Default: the last."),
    ] = None,
    images: Annotated[list[str], typer.Option("--image", help="Image id; repeatable.")] = [],  # noqa: B006
    small: Annotated[bool, typer.Option("--small", help="256 colours: less than half of the bytes.")] = False,
) -> None:
    """Draw what trials made of images."""
    from ppc.artifacts import Storage
    from ppc.gallery import figure_of, save_picture

    store = Storage.at(storage)
    study = store.study(name).definition()
    picture, rows = figure_of(store, study, kind, variants=variants, seed=seed, product=product, image_ids=images)
    save_picture(picture, out, small=small)
    typer.echo(f"{out}: {', '.join(row.label for row in rows)}")


@export_app.command("masks")
def export_masks(
    study: str,
    out: OutArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    variant: BestOption = None,
    seed: SeedOption = None,
    product: Annotated[
        str | None, typer.Option(help="seed, mask, psa_mask, irn_mask or seg. Default: the last the trial makes.")
    ] = None,
    splits: SplitOption = [],  # noqa: B006
) -> None:
    """Label maps of a trial as palette PNGs, with lists of ids, classes.txt and where they come from.

    A run that was interrupted is finished by calling it again.
    """
    from ppc.artifacts import Storage
    from ppc.export import export_masks as export

    typer.echo(export(Storage.at(storage), study, out, variant=variant, seed=seed, product=product, splits=splits))


@export_app.command("cams")
def export_cams(
    study: str,
    out: OutArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    variant: BestOption = None,
    seed: SeedOption = None,
    splits: SplitOption = [],  # noqa: B006
) -> None:
    """CAMs of a trial as ID.npz (`keys`, `cam`), with lists of ids, classes.txt and where they come from."""
    from ppc.artifacts import Storage
    from ppc.export import export_cams as export

    typer.echo(export(Storage.at(storage), study, out, variant=variant, seed=seed, splits=splits))


@export_app.command("submission")
def export_submission(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="Study whose trial predicted the split.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.tgz", help="Archive to write.")],
    storage: StorageOption = DEFAULT_STORAGE,
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


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(figure)
    app.add_typer(export_app, name="export")

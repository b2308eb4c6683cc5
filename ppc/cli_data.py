"""Commands on datasets, and on what a server takes of one. Thin, as `cli.py`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ppc.redact import AS_IT_IS

data_app = typer.Typer(help="Make and check datasets.", no_args_is_help=True)
console = Console()


@data_app.command("make-scenes")
def make_scenes_command(
    root: Annotated[Path, typer.Argument(help="Folder to make.")],
    num_classes: int = 5,
    num_train: int = 240,
    num_val: int = 60,
    image_px: int = 112,
    seed: int = 0,
) -> None:
    """Make the built-in generated dataset."""
    from ppc.data.scenes import make_scenes

    make_scenes(root, num_classes=num_classes, num_train=num_train, num_val=num_val, image_px=image_px, seed=seed)
    console.print(f"{root}: {num_train} train and {num_val} val images, generated", **AS_IT_IS)


@data_app.command("check")
def check(
    root: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    name: Annotated[str, typer.Option(help="Its layout: voc, coco or folder.")] = "voc",
    splits: Annotated[
        list[str], typer.Option("--split", help="Split to check; repeatable. Default: train and val, as there are.")
    ] = [],  # noqa: B006
    labels: Annotated[
        str, typer.Option(help="As data.labels: auto, or of voc cls_labels, xml or masks, of others masks.")
    ] = "auto",
    saliency: Annotated[bool, typer.Option("--saliency", help="A missing saliency map is a problem too.")] = False,
) -> None:
    """List what is missing or broken, file by file. Exit code 1 when anything is."""
    from ppc.data import DataError, open_dataset
    from ppc.data.check import any_mask, check_dataset

    dataset = open_dataset("voc" if name == "scenes" else name, root, labels=labels)  # scenes are not to be made here
    splits = splits or [split for split in ("train", "val") if split in dataset.splits()] or ["train"]
    problems = check_dataset(dataset, splits, with_saliency=saliency)
    for problem in problems:
        console.print(str(problem), **AS_IT_IS)
    sizes = list[str]()
    for split in splits:
        with suppress(DataError):  # one of the problems
            ids = dataset.ids(split)
            masks = "" if any_mask(dataset, split, ids) else " (no masks)"
            sizes.append(f"{split} {len(ids)}{masks}")
    console.print(f"{root}: {', '.join(sizes) or 'no'} images; {len(problems)} problem(s)", **AS_IT_IS)
    raise typer.Exit(1 if problems else 0)


@data_app.command("check-submission")
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

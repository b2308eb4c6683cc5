"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# a str and not a Path: Path("s3://b/x") is s3:/b/x
StorageOption = Annotated[
    str,
    typer.Option("--storage", envvar="PPC_STORAGE", help="Folder or s3://bucket/prefix that holds all of a project."),
]
OptionalStorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage", envvar="PPC_STORAGE", help="As for launch; with a job server: by default that of the last job."
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option("--address", envvar="PPC_ADDRESS", help="Job server (http://HEAD:8265): ask it, not this machine."),
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field; repeatable.")]
RuntimeSetOption = Annotated[
    list[str], typer.Option("--set", metavar="runtime.X=VALUE", help="Change how what is left runs; repeatable.")
]
TinyOption = Annotated[bool, typer.Option("--tiny", help="Shrink to seconds: generated images, one epoch.")]
ScenesOption = Annotated[
    bool, typer.Option("--scenes", help="The whole design on the generated scenes, at a size for two CPUs.")
]
LocalOption = Annotated[bool, typer.Option("--local", help="On this machine alone, without Ray and MLflow.")]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster, or `auto`. Default: one on this machine.")]
CpusOption = Annotated[int | None, typer.Option(min=1, help="CPUs of the cluster that is started here.")]
ConcurrentOption = Annotated[
    int | None, typer.Option(min=1, help="Trials at a time. Default: the file's; else all that fit, one with --local.")
]
TrackingOption = Annotated[
    str | None, typer.Option(help="MLflow URI, or `none`. Default: MLFLOW_TRACKING_URI, else SQLite in the storage.")
]


def refuse_beside_local(local: bool, address: str | None, num_cpus: int | None, tracking: str | None) -> None:
    """ValueError for options that `--local` has no use for."""
    given = {"--address": address, "--num-cpus": num_cpus, "--tracking": None if tracking == "none" else tracking}
    if local and (names := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"{', '.join(names)}: --local runs on this machine without Ray and MLflow; leave out one of them"
        )


def _notify_url(url: str | None) -> str | None:
    if not url:
        return None
    from ppc.notify import check_url

    return check_url(url)


NotifyOption = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="URL",
        envvar="PPC_NOTIFY",
        callback=_notify_url,
        help="Post a JSON message there when a trial first fails and when the study ends.",
    ),
]
DEFAULT_STORAGE = "ppc-storage"


def words_again(command: list[str], file: Path, sets: list[str], twin: str) -> list[str]:
    """The words of a command line that give the same trials again."""
    again = [word for item in sets for word in ("--set", item)]
    return [*command, str(file), *([] if twin == "full" else [f"--{twin}"]), *again]

"""Commands that talk to a cluster's job server. Thin, as `cli.py`.

`--address` of a command that looks at a study or resumes it is one of two things. `http://HEAD:8265` is a job server:
the command runs on the head, for a machine that sees neither the cluster's network nor its storage. `auto` or
`HOST:PORT` is a Ray cluster that this process joins, so it has to run on one of the cluster's machines.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ppc.cli_options import ConcurrentOption, ScenesOption, SetOption, TinyOption, TrackingOption

JobServerOption = Annotated[
    str, typer.Option("--address", envvar="PPC_ADDRESS", help="Job server of the cluster: http://HEAD:8265.")
]
# a str and not a Path: Path("s3://b/x") is s3:/b/x
RemoteStorageOption = Annotated[
    str | None,
    typer.Option("--storage", envvar="PPC_STORAGE", help="Absolute path or URI that the cluster's nodes see."),
]


def at_job_server(address: str | None) -> bool:
    """Whether an address names a job server, and not a Ray cluster to join."""
    return address is not None and address.startswith(("http://", "https://"))


def refuse_job_server(address: str | None, command: str) -> None:
    """ValueError for a job server where a cluster to join is needed."""
    if at_job_server(address):
        raise ValueError(
            f"--address {address} is a job server, which takes studies from: {command} --address {address}"
        )


def refuse_cluster(address: str | None) -> None:
    """ValueError for a cluster to join where only files are read."""
    if address is not None and not at_job_server(address):
        raise ValueError(
            f"--address {address}: only a job server (http://HEAD:8265) is asked how studies stand; where the storage "
            "is seen, leave --address out and pass --storage"
        )


def ask_head(name: str | None, words: list[str], address: str, storage: str | None) -> typer.Exit:
    """Let the head run a command that reads, and print what it says; the exit to raise."""
    from ppc.jobs import ask

    return typer.Exit(ask(name, address, ["ppc", *words], storage=storage, say=_print_piece)[1])


def resume_there(
    name: str,
    address: str,
    storage: str | None,
    words: list[str],
    max_concurrent: int | None,
    tracking: str | None,
    follow: bool,
) -> typer.Exit:
    """Send `ppc study resume` to a job server, print the job's id and, if asked, its log; the exit to raise."""
    from ppc.definition import code_version
    from ppc.jobs import resubmit
    from ppc.pack import LaunchOptions

    options = LaunchOptions(max_concurrent=max_concurrent, tracking=tracking, code=code_version())
    job_id = resubmit(name, address, words, storage=storage, options=options)
    _say_sent(job_id, address)
    return typer.Exit(_follow(job_id, address) if follow else 0)


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _say_sent(job_id: str, address: str) -> None:
    print(f"{job_id}\nfollow it: ppc logs {job_id} -f --address {address}")


def _follow(job_id: str, address: str) -> int:
    from ppc.jobs import logs, status

    for text in logs(job_id, address, follow=True):
        _print_piece(text)
    job = status(job_id, address)
    if job.status != "SUCCEEDED":
        print(f"{job_id}: {job.status} {job.message.splitlines()[0] if job.message else ''}", file=sys.stderr)
    return 0 if job.status == "SUCCEEDED" else 1


def submit(
    file: Annotated[Path, typer.Argument(help="YAML file of a study.")],
    address: JobServerOption,
    storage: RemoteStorageOption = None,
    sets: SetOption = [],  # noqa: B006
    tiny: TinyOption = False,
    scenes: ScenesOption = False,
    max_concurrent: ConcurrentOption = None,
    tracking: TrackingOption = None,
    variables: Annotated[list[str], typer.Option("--env", metavar="NAME=VALUE", help="Variable of the job.")] = [],  # noqa: B006
    working_dir: Annotated[Path | None, typer.Option(help="Folder to pack beside the experiment's files.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print the job's log until it ends.")] = False,
) -> None:
    """Send a study to a cluster as a Ray job and print the job's id."""
    from ppc import jobs
    from ppc.definition import code_version
    from ppc.pack import LaunchOptions
    from ppc.twins import twin_of

    if storage is None:
        raise ValueError("pass --storage with an absolute path or a URI that all nodes of the cluster see")
    if bad := [item for item in variables if "=" not in item]:
        raise ValueError(f"--env {bad[0]}: expected NAME=VALUE")
    options = LaunchOptions(
        sets,
        twin_of(tiny=tiny, scenes=scenes),
        max_concurrent,
        tracking,
        dict(item.split("=", 1) for item in variables),
        working_dir,
        code_version(),
    )
    job_id = jobs.submit(file, address, storage=storage, options=options)
    _say_sent(job_id, address)
    if follow:
        raise typer.Exit(_follow(job_id, address))


def logs(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    address: JobServerOption,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Until the job ends; exit code 1 if it failed.")
    ] = False,
) -> None:
    """Print what a submitted study prints."""
    from ppc.jobs import logs as job_logs

    if follow:
        raise typer.Exit(_follow(job_id, address))
    for text in job_logs(job_id, address):
        print(text, end="")


def study_stop(name: str, address: JobServerOption) -> None:
    """Stop a submitted study: trials save what they have, and `resume` takes them up."""
    from ppc.jobs import find_jobs, stop

    running = [job for job in find_jobs(address, name) if not job.ended]
    for job in running:
        print(f"{job.id}: {stop(job.id, address).status}")
    if not running:
        print(f"no job of {name} runs at {address}")


def register(app: typer.Typer, study_app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(submit)
    app.command()(logs)
    study_app.command("stop")(study_stop)

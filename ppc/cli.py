"""The command line: thin, every command a few calls of the modules below it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from ppc.cli_data import data_app
from ppc.cli_export import register as register_export
from ppc.cli_jobs import ask_head, at_job_server, refuse_cluster, refuse_job_server, register, resume_there
from ppc.cli_options import (
    DEFAULT_STORAGE,
    AddressOption,
    ConcurrentOption,
    CpusOption,
    LocalOption,
    NotifyOption,
    OptionalStorageOption,
    RuntimeSetOption,
    ScenesOption,
    ServerOption,
    SetOption,
    StorageOption,
    TinyOption,
    TrackingOption,
    refuse_beside_local,
    words_again,
)
from ppc.cli_report import register as register_report
from ppc.cli_ui import register as register_ui
from ppc.redact import AS_IT_IS

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
study_app = typer.Typer(help="Launch, watch and resume studies.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(data_app, name="data")
console = Console()


def _storage(place: str) -> Any:
    from ppc.artifacts import Storage

    return Storage.at(place)


def _beside_a_user() -> bool:
    """Whether this is no job on a cluster's head, whose loopback nobody looks at."""
    return "PPC_CODE" not in os.environ


def _run_defined(definition: dict[str, Any], storage: Any, where: Any, typed: list[str]) -> None:
    from ppc.launch import run_study
    from ppc.redact import without_secrets

    definition["command"] = without_secrets(shlex.join(["ppc", *typed]))  # of the words those that decide numbers
    raise typer.Exit(run_study(storage, definition["name"], where, console, definition))


def _print_cost(configs: list[Any], storage: Any, measured: bool) -> None:
    from ppc.estimate import costs, remarks, table
    from ppc.estimate import measured as rates
    from ppc.measure import measure
    from ppc.report import align

    if measured:
        measure(configs, storage, lambda text: console.print(text, **AS_IT_IS))
    found = costs(configs, rates(storage))
    for text in [*align(table(found)), *remarks(found)]:
        console.print(text, **AS_IT_IS)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of one trial.")],
    storage: StorageOption = DEFAULT_STORAGE,
    sets: SetOption = [],  # noqa: B006  (typer wants a plain default)
    tiny: TinyOption = False,
    scenes: ScenesOption = False,
    local: LocalOption = False,
    address: AddressOption = None,
    num_cpus: CpusOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Run one trial: a study of one row."""
    refuse_job_server(address, "ppc submit FILE")
    from ppc.definition import define
    from ppc.launch import Where
    from ppc.loading import load_trial
    from ppc.study import TrialSpec
    from ppc.study_config import DesignConfig, StudyConfig, Variant
    from ppc.twins import as_twin, name_of, twin_of

    refuse_beside_local(local, address, num_cpus, tracking)
    twin = twin_of(tiny=tiny, scenes=scenes)
    trial = load_trial(config, overrides=sets, shrink=lambda raw: as_twin(raw, twin))
    name = name_of("run-" + re.sub(r"[^A-Za-z0-9._-]+", "-", config.stem)[:100], twin)
    design = DesignConfig(kind="list", variants=[Variant(name=name)])
    study = StudyConfig(name=name, design=design, trial_seeds=[trial.seed])
    spec = TrialSpec(name, {}, trial.seed, trial)
    store = _storage(storage)
    definition = define(study, [spec], name, store, any_metric=True, twin=twin)
    _run_defined(
        definition,
        store,
        Where(local, address, num_cpus, None, "none" if local else tracking, ui=_beside_a_user()),
        words_again(["run"], config, sets, twin),
    )


@study_app.command("launch")
def study_launch(
    file: Annotated[Path, typer.Argument(help="YAML file of a study.")],
    storage: StorageOption = DEFAULT_STORAGE,
    sets: SetOption = [],  # noqa: B006
    tiny: TinyOption = False,
    scenes: ScenesOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and what they cost, and stop.")] = False,
    measured: Annotated[bool, typer.Option("--measure", help="With --dry-run: time a few real steps here.")] = False,
    local: LocalOption = False,
    address: AddressOption = None,
    num_cpus: CpusOption = None,
    max_concurrent: ConcurrentOption = None,
    tracking: TrackingOption = None,
    notify: NotifyOption = None,
) -> None:
    """Run all trials of a study that have no result yet. Launching again goes on where it stopped."""
    refuse_job_server(address, f"ppc submit {file}")
    refuse_beside_local(local, address, num_cpus, tracking)
    from ppc.checks import check_trial, metrics_of
    from ppc.definition import define, define_search, undecided
    from ppc.launch import Where
    from ppc.loading import load_study, of_trial
    from ppc.published import check_published
    from ppc.search import describe, shrunk, start
    from ppc.study import baseline, expand, shared_base
    from ppc.twins import study_of, twin_of

    twin = twin_of(tiny=tiny, scenes=scenes)
    study = load_study(file, overrides=sets)
    study = shrunk(study) if twin == "tiny" else study
    trial_sets = of_trial(sets)
    specs = expand(study, overrides=trial_sets, twin=twin, check=check_trial)
    check_published(study, overrides=trial_sets)
    base = shared_base(study, overrides=trial_sets, twin=twin)
    study = study_of(study, twin)
    searched = study.design.kind == "search"
    if dry_run:
        if searched:
            console.print("\n".join(describe(study)), **AS_IT_IS)
            search = start(study, base, None)
            specs = search.specs(search.rounds[0])
        for spec in specs:
            if (problem := undecided(study.metric, spec.config, metrics_of(spec.config))) is not None:
                raise ValueError(f"{spec.variant}: {problem}")
            factors = ", ".join(f"{path}={value}" for path, value in spec.factors.items())
            console.print(f"{spec.variant}  seed {spec.seed}  {factors}", **AS_IT_IS)
        console.print(f"{len(specs)} trials", **AS_IT_IS)
        _print_cost([spec.config for spec in specs], _storage(storage), measured)
        return
    if measured:
        raise ValueError("--measure goes with --dry-run, which says what the study will cost")
    store = _storage(storage)
    if searched:
        definition = define_search(study, base, store, twin=twin)
    else:
        definition = define(study, specs, baseline(study, specs), store, twin=twin)
    _run_defined(
        definition,
        store,
        Where(
            local, address, num_cpus, max_concurrent, "none" if local else tracking, ui=_beside_a_user(), notify=notify
        ),
        words_again(["study", "launch"], file, sets, twin),
    )


@study_app.command("resume")
def study_resume(
    name: str,
    storage: OptionalStorageOption = None,
    sets: RuntimeSetOption = [],  # noqa: B006
    local: LocalOption = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, `auto`, or a job server (http://HEAD:8265) to send this to."),
    ] = None,
    num_cpus: CpusOption = None,
    max_concurrent: ConcurrentOption = None,
    tracking: TrackingOption = None,
    stopped: Annotated[bool, typer.Option("--stopped", help="Also those stopped early, to their last epoch.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Take changed code, config, data or weights, and record that.")
    ] = False,
    notify: NotifyOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Job server: print the job's log to its end.")] = False,
) -> None:
    """Run the trials of a study that have no result, from their last checkpoints.

    Exit code 1 when one has no result. With other resources they stay the same trials: --set runtime.workers=2. What
    has changed since the launch is told and refused; with --accept-changes what is left runs as changed.
    """
    if at_job_server(address):
        words = [word for item in sets for word in ("--set", item)] + (["--stopped"] if stopped else [])
        words += ["--accept-changes"] if accept_changes else []
        if notify is not None:  # a job's words and variables show in Ray's dashboard
            print(
                "notify: the head posts, to the PPC_NOTIFY in the environment of the cluster's nodes", file=sys.stderr
            )
        if local or num_cpus is not None:
            raise ValueError("--local, --num-cpus: a job server runs this on its own cluster; leave them out")
        raise resume_there(name, str(address), storage, words, max_concurrent, tracking, follow)
    from ppc.launch import Where, run_study

    if follow:
        raise ValueError("--follow prints the log of a job: name the job server, --address http://HEAD:8265")
    refuse_beside_local(local, address, num_cpus, tracking)
    where = Where(
        local, address, num_cpus, max_concurrent, "none" if local else tracking, ui=_beside_a_user(), notify=notify
    )
    raise typer.Exit(
        run_study(
            _storage(storage or DEFAULT_STORAGE),
            name,
            where,
            console,
            runtime=sets,
            stopped=stopped,
            accept_changes=accept_changes,
        )
    )


@study_app.command("status")
def study_status(
    name: str,
    storage: OptionalStorageOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until no trial runs.")] = False,
    address: ServerOption = None,
) -> None:
    """Trials x state, stage, progress and error. Exit code 1 when a trial failed."""
    refuse_cluster(address)
    if at_job_server(address):
        raise ask_head(name, ["study", "status", name, *(["--watch"] if watch else [])], str(address), storage)
    from ppc.changes import told
    from ppc.ledger import FAILED
    from ppc.live import show as show_study
    from ppc.live import watch as watch_study
    from ppc.report import skipped_lines

    store = _storage(storage or DEFAULT_STORAGE)
    study = store.study(name).definition()
    rows = (watch_study if watch else show_study)(store, study, console)
    for line in skipped_lines(rows):
        console.print(line, **AS_IT_IS)
    for line in told(study):
        console.print(f"changed: {line}", **AS_IT_IS)
    for row in rows:
        if row.error:
            where = store.trial(row.key).path / "error.json"
            console.print(f"{row.label}: {row.error['message']}\n  traceback: {where}", **AS_IT_IS)
    raise typer.Exit(1 if any(row.state == FAILED for row in rows) else 0)


@study_app.command("list")
def study_list(
    storage: OptionalStorageOption = None,
    address: ServerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Those that can be read, as JSON; times in unix ms.")] = False,
) -> None:
    """All studies of a storage: trials per state, hours, dates, the best variant so far."""
    refuse_cluster(address)
    if at_job_server(address):
        raise ask_head(None, ["study", "list", *(["--json"] if as_json else [])], str(address), storage)
    import json

    from ppc.overview import as_data, overview_lines, overviews

    store = _storage(storage or DEFAULT_STORAGE)
    found, problems = overviews(store)
    if as_json:
        print(json.dumps(as_data(found), indent=1))
        return
    print(*(overview_lines(found) if found else [store.no_study()]), sep="\n")
    for problem in problems:
        print(problem, file=sys.stderr)


@app.command()
def sync(
    name: Annotated[str | None, typer.Argument(help="Study. Default: all of the storage.")] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    tracking: TrackingOption = None,
    every: Annotated[bool, typer.Option("--all", help="All studies of the storage.")] = False,
) -> None:
    """Send to MLflow what a launch could not send, and that a killed one is not running. Twice changes nothing."""
    from ppc.reaper import sync_studies

    if name is not None and every:
        raise ValueError(f"sync {name} --all: name one study, or say --all")
    store = _storage(storage)
    names = store.study_names() if name is None else [name]
    sync_studies(store, names, tracking, lambda text: console.print(text, **AS_IT_IS))
    if not names:
        console.print(store.no_study(), **AS_IT_IS)


@app.command()
def doctor(storage: StorageOption = DEFAULT_STORAGE) -> None:
    """Say what of this machine a study can use, and what is missing. Exit code 1 when something needed is."""
    from ppc.doctor import examine

    findings = examine(_storage(storage))
    for finding in findings:
        word = Text(f"{'ok' if finding.ok else finding.word:8}", style="green" if finding.ok else "red")
        console.print(word.append(finding.text, style="default"), soft_wrap=True)
    raise typer.Exit(0 if all(finding.ok or finding.optional for finding in findings) else 1)


@app.command()
def schema(
    write: Annotated[Path | None, typer.Option(help="Folder to write the schema files to.")] = None,
    of: Annotated[Literal["study", "trial"], typer.Option(help="Of which kind of file.")] = "study",
) -> None:
    """Print the JSON schema of experiment files, or write both."""
    import json

    from ppc.schema import study_schema, trial_schema, write_schemas

    if write is not None:
        for path in write_schemas(write):
            console.print(str(path), **AS_IT_IS)
        return
    print(json.dumps(study_schema() if of == "study" else trial_schema(), indent=2))


register(app, study_app)
register_export(app)
register_report(app)
register_ui(app)


def main() -> None:
    """Entry point: what a user can get wrong is one clear message, not a traceback (set PPC_DEBUG=1 for one)."""
    from ppc.mlflow_server import TrackingError
    from ppc.redact import without_secrets

    try:
        app()
    except (ValueError, OSError, ImportError, TrackingError) as error:
        if os.environ.get("PPC_DEBUG"):
            raise
        print(without_secrets(f"ppc: {error}"), file=sys.stderr)
        sys.exit(2)

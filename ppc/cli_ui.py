"""The command that opens MLflow. Thin, as `cli.py`."""

from __future__ import annotations

import webbrowser
from typing import Annotated, Any

import typer
from rich.console import Console

from ppc.cli_options import DEFAULT_STORAGE, StorageOption, TrackingOption
from ppc.redact import AS_IT_IS

OpenOption = Annotated[bool, typer.Option("--open", help="Open the link in a browser.")]
console = Console()


def _say(text: str) -> None:
    console.print(text, **AS_IT_IS)


def _show(url: str, storage: Any, study: str | None, uri: str, open_it: bool) -> None:
    """Print the link of a study, or of the UI, on the server at `url`; with `open_it` a browser opens it."""
    from ppc.mlflow_server import experiment_id
    from ppc.mlflow_views import links

    found = links(url, storage, study, uri)
    for name, link in found.items():
        _say(f"{name}: {link}")
    if study is not None and experiment_id(storage, study, uri) is None:
        _say(f"nothing of {study} is in this MLflow: ppc sync {study} sends it")
    if open_it and not webbrowser.open(next(iter(found.values()))):
        _say("no browser could be opened here: open the link yourself")


def ui(
    study: Annotated[str | None, typer.Argument(help="Study whose page the link opens.")] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    host: str = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 5000, or another one when that is taken.")
    ] = None,
    tracking: TrackingOption = None,
    open_it: OpenOption = False,
) -> None:
    """Print the link to a study in MLflow, and serve this storage's MLflow until Ctrl-C where no server is named.

    What a killed launch left running there ends.
    """
    from ppc.artifacts import Storage
    from ppc.exposure import open_to_others
    from ppc.mlflow_embedded import running, start_ui
    from ppc.mlflow_server import default_uri, experiment_id, is_server, probe, tracking_uri
    from ppc.reaper import end_what_is_dead

    store = Storage.at(storage)
    uri = tracking_uri(tracking, store)
    if uri not in ("none", default_uri(store)) and not is_server(uri):
        raise ValueError(f"ui: {uri.partition(':')[0]} is a database; name the MLflow server in front of it")
    uri = default_uri(store) if uri == "none" else uri
    if study is not None and experiment_id(store, study, uri) is None:
        store.study(study).definition()  # says so when there is no such study
    if is_server(uri):
        probe(uri)
        _show(uri, store, study, uri, open_it)
        return
    end_what_is_dead(store, uri)
    found = running(store)
    if found is not None and found[1] == "ui" and port is None:
        _show(found[0], store, study, uri, open_it)
        _say("another `ppc ui` serves it already")
        return
    if (warning := open_to_others(host)) is not None:
        _say(f"WARNING: {warning}")
    with start_ui(store, host, port) as server:
        _show(server.url, store, study, uri, open_it)
        _say("Ctrl-C ends it")
        try:
            server.wait()
        except KeyboardInterrupt:
            _say("stopped")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(ui)

"""Sending studies to MLflow without a launch, so that nothing is shown as running that has no process behind it.

A launch tells MLflow itself how its trials stand. One that was killed cannot, and what it left RUNNING there stays so
until somebody looks at the files: the next launch of the study, `ppc sync`, and `ppc ui` before it shows anything.
A trial with a living heartbeat, and a launch that holds the study's lock, are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ppc.artifacts import Storage, read_json
from ppc.ledger import RUNNING, read_rows
from ppc.mlflow_server import TrackingError
from ppc.places import names_in
from ppc.redact import safe_uri, without_secrets


def shown_running(storage: Storage, name: str, uri: str) -> bool:
    """Whether the MLflow at a URI shows something of the study as running that is not, by what was sent there.

    Reads files alone.
    """
    folder = storage.study(name)
    memory: dict[str, Any] | None = (read_json(folder.path / "tracking.json") or {}).get(safe_uri(uri))
    if memory is None or folder.being_run():
        return False
    if any("ended" not in launch and not launch["deleted"] for launch in memory["launches"].values()):
        return True
    alive = {row.key for row in read_rows(storage, folder.definition()) if row.state == RUNNING}
    return any(
        entry["sent"].get("status", [RUNNING])[0] == RUNNING and not entry["deleted"] and key not in alive
        for key, entry in memory["runs"].items()
    )


def sync_studies(
    storage: Storage,
    names: Sequence[str],
    option: str | None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> None:
    """Send to MLflow what it has not got of these studies, and how their trials stand now.

    TrackingError with all problems at the end: a study that cannot be sent does not keep back the others.
    """
    from ppc.report import live_note, report_of, write_report
    from ppc.tracking import make_tracker

    problems = []
    for name in names:
        folder = storage.study(name)
        try:
            study, running = folder.definition(), folder.being_run()
            tracker = make_tracker(option, storage, study, None)
            rows = read_rows(storage, study)
            tracker.sync(rows, final=not running, note=live_note(storage, study)(rows))
            if not running:
                report = folder.path / "report"
                drawn = [report / picture for picture in names_in(report) if picture.endswith(".png")]
                tracker.attach([*write_report(report_of(storage, study, rows), report, storage), *drawn])
            tracker.close()
        except (TrackingError, ValueError, OSError) as error:
            problems.append(without_secrets(f"{name}: {error}"))
            continue
        say(f"{name} is in the tracker" + (", so far: it is being run, and its launch sends the rest" * running))
    if problems:
        raise TrackingError("\n".join(problems))


def end_what_is_dead(storage: Storage, uri: str) -> None:
    """Send the studies of which the MLflow at a URI shows something as running that is not. What keeps that from being
    done is said and no error: it is for whoever only wants to look."""
    try:
        if found := [name for name in storage.study_names() if shown_running(storage, name, uri)]:
            sync_studies(storage, found, uri)
    except (OSError, ValueError, TrackingError) as error:
        print(without_secrets(f"some runs may be shown as running that are not: {error}"), flush=True)

"""The page of a study in MLflow's UI: its note, the metric that it is about, its saved views. Imports no mlflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppc.mlflow_views import saved_views
from ppc.run_record import image_name, metric_name

NOTE = "mlflow.note.content"
NOTE_LIMIT, OLD_NOTE_LIMIT = 19_000, 4_900  # characters: MLflow refuses a tag of more than 20,000, once 5,000
PAGE = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on runs, not on traces


def page_tags(study: Mapping[str, Any], memory: Mapping[str, Any], note: str) -> dict[str, str]:
    """Tags of the experiment that have the UI open on this study's trials, with views of what was sent of them by now.

    Args:
        memory: the tracker's, of which `metrics` are the names that were sent and `runs` the trials'.
        note: Markdown; an empty one leaves the page the note that it has.
    """
    pictures = {
        f"cam/{image_name(what.removeprefix('overlay/'))}"
        for entry in memory["runs"].values()
        for what in entry["sent"]
        if what.startswith("overlay/")
    }
    metric, number = study["metric"], len(study["trials"])
    views = saved_views(study["factors"], metric, memory["metrics"], sorted(pictures), number, study["created_ms"])
    tags = {**PAGE, "mlflow.experiment.primaryMetric.name": metric_name(f"final/{metric}"), **views}
    return tags | ({NOTE: cut(note, NOTE_LIMIT)} if note else {})


def send_page(client: Any, experiment: str, tags: Mapping[str, str], *, before: dict[str, str]) -> None:
    """Set the tags that are not as they were sent `before`, which then has them."""
    for name, value in tags.items():
        if value == before.get(name):
            continue
        try:
            client.set_experiment_tag(experiment, name, value)
        except Exception as error:  # of mlflow, which this file does not import
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if name == NOTE:  # a server older than 2026-08 takes 5,000 characters; its page has no views
                client.set_experiment_tag(experiment, name, cut(value, OLD_NOTE_LIMIT))
        before[name] = value


def cut(text: str, limit: int) -> str:
    """The whole lines of a text that fit, and a word when some do not."""
    if len(text) <= limit:
        return text
    return text[: limit - 100].rpartition("\n")[0] + "\n\nThe rest is in the report of the newest launch."

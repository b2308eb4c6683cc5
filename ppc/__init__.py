"""ppc: Ray-distributed experiments and ablations for weakly supervised segmentation by pixel-to-prototype contrast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppc.api import Cam, MarkdownText, Study, load_study, study_names

__version__ = "0.1.0"
__all__ = ["Cam", "MarkdownText", "Study", "__version__", "load_study", "study_names"]


def __getattr__(name: str) -> Any:
    """The API, imported when it is first asked for: most of ppc, and every worker, does without."""
    if name not in __all__:
        raise AttributeError(f"module 'ppc' has no attribute {name!r}")
    from importlib import import_module  # by name: to the layers of pyproject.toml this is no import

    return getattr(import_module("ppc.api"), name)

"""Helpers that several test files share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file of stored official values, tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)

"""What a stage is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ppc.artifacts import StageDir
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.runtime import Runtime


@dataclass(frozen=True)
class StageContext:
    """The trial's config, the stage's own folder, the folders of the stages before it, the data, and where to run."""

    cfg: TrialConfig
    folder: StageDir
    inputs: Mapping[str, StageDir]
    dataset: Dataset
    rt: Runtime

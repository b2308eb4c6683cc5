"""The room of a worker group that Ray Train forgets: given back at once."""

from __future__ import annotations

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class RoomBack(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]  # Ray has no types
    """Shut a worker group down whose worker dies between its start and its first call (Ray 2.x).

    Ray Train does so before that and after it. In between it keeps the group's placement group, with all its CPUs and
    GPUs, until the job ends: the next try of the trial, and every other trial, would wait for them for ever.
    """

    def __init__(self) -> None:
        self._started: WorkerGroup | None = None

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._started = worker_group

    async def before_controller_shutdown(self) -> None:
        """At every end of a run: after a good one, the group is shut down already."""
        if self._started is not None and self._started.has_started():
            self._started.get_worker_group_state().shutdown()

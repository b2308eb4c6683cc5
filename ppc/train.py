"""The only training loop: schedule, precision, sums over workers, journal, checkpoints and resume.

A loss here is this worker's share of the loss of the global batch: shares of all workers add up to it, and so do their
gradients. That makes the numbers independent of how many workers there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppc.artifacts import Journal, Progress, StageDir
from ppc.config import RuntimeConfig
from ppc.optim import poly_lr, set_lr
from ppc.places import StoragePath, atomic_write, names_in, read_bytes, remove
from ppc.weights import load_checked

Batch = Mapping[str, Any]
KEEP_CHECKPOINTS = 2
GRADIENT = "largest gradient"  # beside the terms: it is wrong one step before the loss is


def rank() -> int:
    """This worker's number; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many workers train together; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Equal-shaped tensors of all workers, concatenated along dim 0 in rank order; no gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(x.dtype)


def sum_over_workers(tensors: Sequence[Tensor]) -> None:
    """Add tensors up over the workers, in place, in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def wait_for_workers() -> None:
    """Return when all workers are here."""
    if world_size() > 1:
        dist.barrier()


def _no_ids(epoch: int, index: int) -> Sequence[str]:
    return ()


class TrainingStopped(Exception):  # noqa: N818 - it is no error
    """Training was asked to end before its last epoch (`StageDir.ask_stop`): nothing is wrong with it."""


@dataclass(frozen=True)
class Job:
    """What is trained: `losses` gives this worker's share of the loss and of each named term of the global batch.

    `ids` names the images of a global batch, those of all workers, by epoch and place in it: for error messages.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Iterable[Batch]]
    losses: Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Tensor]]]
    epochs: int
    steps_per_epoch: int
    poly_power: float
    precision: str
    ids: Callable[[int, int], Sequence[str]] = _no_ids
    section: str = "train"  # of the config: error messages name its fields, the journal's metrics begin with its head

    def metric(self, name: str) -> str:
        """Name of a term in the journal: `train/loss` of the CAM net, `psa/loss` of the net of section psa."""
        return f"{self.section.partition('.')[0]}/{name}"

    @property
    def speed(self) -> str:
        """Name of the steps a second in the journal."""
        return "speed/steps_per_s" if self.section == "train" else f"speed/{self.metric('steps_per_s')}"


def fit(job: Job, stage: StageDir, runtime: RuntimeConfig, device: torch.device) -> None:
    """Train from the newest good checkpoint of the stage, or from the start, to the last epoch.

    Stopped after any epoch and started again it ends with the same weights, bit for bit on a CPU. ValueError, naming
    the step, when a loss, a gradient or a weight is not finite: before a checkpoint or a point of that is written.
    TrainingStopped at the next point of the journal when the stage is asked to stop; checkpoints stay.
    """
    job.net.to(device).train()
    wait_for_workers()  # the first may have waited for another process of this stage: look at checkpoints after that
    start = _load_newest(job, stage)
    if len(starts := set(gather(torch.tensor([start], device=device)).tolist())) > 1:  # their files are not the same
        raise RuntimeError(f"{stage.path}: the workers would go on from epochs {sorted(starts)}; resume the study")
    journal = Journal(stage / "journal.jsonl") if rank() == 0 else None
    if journal and journal.damaged:
        print(f"{journal.path}: {journal.damaged} damaged lines are passed over", flush=True)
    cpus, gpus = runtime.workers * runtime.cpus_per_worker, runtime.workers * runtime.gpus_per_worker
    total = job.epochs * job.steps_per_epoch
    progress = Progress(stage / "progress.json", total=total, unit="step", cpus=cpus, gpus=gpus)
    try:
        for epoch in range(start, job.epochs):
            stop = _epoch(job, epoch, journal, progress, runtime, device, stage)
            last = epoch + 1 == job.epochs
            if last or (epoch + 1) % runtime.checkpoint_every_epochs == 0:
                _check_weights(job, epoch)
                if journal:
                    journal.flush()  # the steps before a checkpoint are not done again
                    save_checkpoint(job, stage, epoch + 1)
            if stop and not last:
                raise TrainingStopped(f"asked to stop after epoch {epoch + 1} of {job.epochs}")
    finally:
        if journal:
            journal.close()
    wait_for_workers()


def _epoch(
    job: Job, epoch: int, journal: Journal | None, progress: Progress, runtime: RuntimeConfig, device: torch.device,
    stage: StageDir,
) -> bool:  # fmt: skip
    """Train one epoch; whether the stage was asked to stop at its end. Asked before, TrainingStopped."""
    window: list[dict[str, Tensor]] = []
    stop, losses = False, dict[str, float]()
    window_start = time.monotonic()
    parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
    max_step = job.epochs * job.steps_per_epoch
    for index, batch in enumerate(job.batches(epoch)):
        step = epoch * job.steps_per_epoch + index
        set_lr(job.optimizer, poly_lr(step, max_step=max_step, power=job.poly_power))
        with _memory_told(job, epoch, index, batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
                loss, terms = job.losses(job.net, batch, step)
            job.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in parameters if p.grad is not None]
            sum_over_workers(gradients)
            job.optimizer.step()
        window.append({"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}})
        # A share, as the terms are; the maximum, since a sum of squares overflows long before a gradient does.
        window[-1][GRADIENT] = nn.utils.get_total_norm(gradients, math.inf) / world_size()
        if (index + 1) % runtime.log_every_steps == 0 or index + 1 == job.steps_per_epoch:
            metrics, stop = _window_means(job, epoch, index, window, rank() == 0 and stage.stop_asked() is not None)
            spent_s = time.monotonic() - window_start
            losses = metrics
            if journal:
                lr = job.optimizer.param_groups[0]["lr"]
                rest = {job.metric("lr"): lr, job.metric("epoch"): epoch, job.speed: len(window) / spent_s}
                journal.write(step + 1, {**metrics, **rest})
            window, window_start = [], time.monotonic()
        if rank() == 0:
            progress.update(step + 1, epoch=epoch + 1, epochs=job.epochs, losses=losses)
        if stop and index + 1 < job.steps_per_epoch:
            raise TrainingStopped(f"asked to stop after step {step + 1} of {max_step}")
    return stop


def _window_means(
    job: Job, epoch: int, index: int, window: list[dict[str, Tensor]], stop: bool
) -> tuple[dict[str, float], bool]:
    """Means of the terms over the steps of a window, which ends at batch `index` of an epoch, over all workers; and
    whether any of them was asked to stop: they all end at the same step.

    The values of each step stay on the device until here, so that no step waits for it. ValueError for the first step
    at which one is not finite; all workers raise it, since all have the same sums.
    """
    names = list(window[0])
    steps_TS = torch.stack([torch.stack([w[name].float() for w in window]) for name in names])
    means_T = torch.stack([row_S.mean() for row_S in steps_TS])
    asked = torch.full_like(means_T[:1], float(stop))
    sum_over_workers([means_T, steps_TS, asked])
    for place, values in enumerate(zip(*steps_TS.tolist(), strict=True)):
        bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        if bad:
            at = index + 1 - len(window) + place
            listed = ", ".join(f"{name} {value:.6g}" for name, value in zip(names, values, strict=True))
            raise ValueError(
                f"{_step(job, epoch, at)}: {', '.join(bad)} not finite; lower {_remedy(job)}\n"
                f"  terms: {listed}\n{_images(job, epoch, at)}"
            )
    means = zip(names, means_T.tolist(), strict=True)
    return {job.metric(name): value for name, value in means if name != GRADIENT}, bool(asked.item())


def _remedy(job: Job) -> str:
    return f"{job.section}.learning_rate" + (" or raise contrast.temperature" if job.section == "train" else "")


def _step(job: Job, epoch: int, index: int) -> str:
    step = epoch * job.steps_per_epoch + index
    return f"step {step + 1} of {job.epochs * job.steps_per_epoch} (epoch {epoch + 1})"


def _images(job: Job, epoch: int, index: int) -> str:
    return f"  images of the batch: {', '.join(job.ids(epoch, index)) or 'not known'}"


@contextmanager
def _memory_told(job: Job, epoch: int, index: int, batch: Batch) -> Iterator[None]:
    """What a batch that does not fit into memory was, and what to do: torch.OutOfMemoryError says both."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        images = batch.get("image_N3HW")
        size = "a batch" if images is None else f"{len(images)} images of {images.shape[3]}x{images.shape[2]} pixels"
        raise torch.OutOfMemoryError(
            f"{_step(job, epoch, index)}: out of memory with {size} in each of {world_size()} worker(s). Gradients "
            "do not depend on runtime.workers or runtime.gpus_per_worker: with others it stays the same trial and goes "
            f"on from its checkpoint; a smaller {job.section}.crop_px (the size above) or {job.section}.batch_size "
            "makes another"
            f"\n{_images(job, epoch, index)}\n  {error}"
        ) from error


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    bad = [~torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    return not bad or not bool(torch.stack(bad).any())


def _check_weights(job: Job, epoch: int) -> None:
    """ValueError when the last update broke a weight, which no loss has seen yet: a resume would start from it."""
    if not _all_finite(job.net.state_dict().values()):
        names = [name for name, value in job.net.state_dict().items() if not _all_finite([value])]
        index = job.steps_per_epoch - 1
        raise ValueError(
            f"{_step(job, epoch, index)}: {len(names)} weight(s) not finite after it, the first is {names[0]}; "
            f"lower {job.section}.learning_rate\n{_images(job, epoch, index)}"
        )


def checkpoints(stage: StageDir) -> list[StoragePath]:
    """Checkpoints of a stage, newest first."""
    folder = stage / "checkpoints"
    names = [name for name in names_in(folder) if name.startswith("epoch-") and name.endswith(".pt")]
    return [folder / name for name in reversed(names)]


def save_checkpoint(job: Job, stage: StageDir, epoch: int) -> None:
    """Write the state after `epoch` epochs; older ones but one are removed only when it is there whole."""
    state = {"key": stage.key, "epoch": epoch, "net": job.net.state_dict(), "optimizer": job.optimizer.state_dict()}
    name = f"epoch-{epoch:05d}.pt"
    with atomic_write(stage / "checkpoints" / name) as handle:
        torch.save(state, handle)
    there = checkpoints(stage)
    passed_over = [path for path in there if path.name > name]  # of before: damaged, or the training would not be here
    for old in [*passed_over, *there[len(passed_over) + KEEP_CHECKPOINTS :]]:
        remove(old)


def _load_newest(job: Job, stage: StageDir) -> int:
    """Load the newest checkpoint that is whole; the epoch to go on with.

    OSError, and not an earlier one or a new start, when the storage does not give what it has.
    """
    for path in checkpoints(stage):
        content = read_bytes(path)
        try:
            state = load_checked(BytesIO(content), torch.device("cpu"))  # a second copy may not fit beside the net
            key, epoch, net, optimizer = (state[name] for name in ("key", "epoch", "net", "optimizer"))
            if not _all_finite(net.values()):
                raise BadZipFile("it holds weights that are not finite")
        except (RuntimeError, EOFError, OSError, KeyError, UnpicklingError, BadZipFile) as error:
            print(f"checkpoint {path} is damaged ({type(error).__name__}); taking the one before", flush=True)
            continue
        if key != stage.key:
            raise ValueError(f"{path} belongs to stage key {key}, not {stage.key}; delete {path.parent}")
        job.net.load_state_dict(net)
        job.optimizer.load_state_dict(optimizer)
        return int(epoch)
    return 0

"""Training batches whose order and augmentation depend on (seed, epoch, sample) alone.

N images of a rank's batch, K foreground classes, H = W = crop_px. Neither the number of workers, nor that of loading
processes, nor where a run was resumed changes what is in a global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ppc.data.dataset import Dataset as ImageSet
from ppc.data.labels import DataError
from ppc.data.transforms import CropBox, augment_cam
from ppc.faults import StorageError
from ppc.seeding import derive_rng, derive_seed

Normalise = Callable[[NDArray[np.uint8]], Tensor]
Address = tuple[int, int]  # (epoch, position in that epoch's order)


class Sample(TypedDict):
    """One augmented image; `sample_seed` is for draws that belong to it: dropout, the target view."""

    image_3HW: Tensor
    label_K: Tensor
    id: str
    sample_seed: int
    saliency_1HW: NotRequired[Tensor]


class Batch(TypedDict):
    """A rank's part of a global batch: float32 images, labels and saliency in [0, 1], int64 seeds."""

    image_N3HW: Tensor
    label_NK: Tensor
    ids: list[str]
    sample_seed_N: Tensor
    saliency_N1HW: NotRequired[Tensor]


def epoch_order(num_images: int, *, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation of the split's images."""
    order = list(range(num_images))
    derive_rng("order", seed, epoch).shuffle(order)
    return order


def rank_positions(num_images: int, *, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Positions of each global batch that fall to a rank; an incomplete last batch is dropped.

    Raises ValueError if the global batch does not divide by the workers, or is larger than the split.
    """
    if batch_size % world_size:
        raise ValueError(
            f"train.batch_size {batch_size} is the global batch and must be a multiple of runtime.workers {world_size}"
        )
    if num_images < batch_size:
        raise ValueError(
            f"train.batch_size is {batch_size} but the split has {num_images} images: lower it or add images"
        )
    share = batch_size // world_size
    starts = range(rank * share, num_images - batch_size + rank * share + 1, batch_size)
    return [list(range(start, start + share)) for start in starts]


class TrainSet(Dataset[Any]):
    """The images of a split, addressed by (epoch, position in that epoch's order); what a sample is, a subclass says.

    A sample must depend on (seed, epoch, image id) alone: draw from `derive_rng("augment", self.seed, epoch, id)`.
    """

    def __init__(self, ids: Sequence[str], *, seed: int) -> None:
        self.ids, self.seed = list(ids), seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.ids)

    def id_at(self, epoch: int, position: int) -> str:
        """The image at a position of an epoch's order."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.ids), seed=self.seed, epoch=epoch))
        return self.ids[self._order[1][position]]

    def __getitem__(self, address: Address) -> Any:
        epoch, position = address
        return self.sample(epoch, self.id_at(epoch, position))

    def sample(self, epoch: int, image_id: str) -> Any:
        """One image as an epoch sees it."""
        raise NotImplementedError

    def collate(self, samples: list[Any]) -> Any:
        """Samples stacked to a batch, a mapping."""
        raise NotImplementedError


class CamTrainSet(TrainSet):
    """Augmented images with their tags, and saliency maps where the method has them."""

    def __init__(
        self,
        layout: ImageSet,
        split: str,
        *,
        crop_px: int,
        resize_long_px: tuple[int, int],
        color_jitter: bool,
        normalise: Normalise,
        seed: int,
        with_saliency: bool = False,
    ) -> None:
        """`normalise` takes uint8 (H, W, 3) to a float32 tensor (3, H, W), pixel by pixel."""
        super().__init__(layout.ids(split), seed=seed)
        self.layout, self.split = layout, split
        self.crop_px, self.resize_long_px, self.color_jitter = crop_px, resize_long_px, color_jitter
        self.normalise, self.with_saliency = normalise, with_saliency

    def sample(self, epoch: int, image_id: str) -> Sample:
        """The image augmented, its visible part normalised and padded with 0, its tags and saliency map."""
        view = augment_cam(
            self.layout.image(image_id),
            self.layout.saliency(image_id) if self.with_saliency else None,
            resize_long_px=self.resize_long_px,
            crop_px=self.crop_px,
            color_jitter=self.color_jitter,
            rng=derive_rng("augment", self.seed, epoch, image_id),
        )
        sample: Sample = {
            "image_3HW": _pad(self.normalise(view.image_HW3), view.box),
            "label_K": torch.from_numpy(self.layout.image_label(image_id, split=self.split)),
            "id": image_id,
            "sample_seed": derive_seed("sample", self.seed, epoch, image_id),
        }
        if view.saliency_HW is not None:
            saliency_1HW = torch.from_numpy(view.saliency_HW.copy())[None].float() / 255
            sample["saliency_1HW"] = _pad(saliency_1HW, view.box)
        return sample

    def collate(self, samples: list[Sample]) -> Batch:
        """Stack samples into a batch."""
        return collate(samples)


def _pad(part_XHW: Tensor, box: CropBox) -> Tensor:
    square = part_XHW.new_zeros(part_XHW.shape[0], box.crop_px, box.crop_px)
    square[:, box.to_top : box.to_top + box.height, box.to_left : box.to_left + box.width] = part_XHW
    return square


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch."""
    batch: Batch = {
        "image_N3HW": torch.stack([s["image_3HW"] for s in samples]),
        "label_NK": torch.stack([s["label_K"] for s in samples]),
        "ids": [s["id"] for s in samples],
        "sample_seed_N": torch.tensor([s["sample_seed"] for s in samples], dtype=torch.int64),
    }
    if "saliency_1HW" in samples[0]:
        batch["saliency_N1HW"] = torch.stack([s["saliency_1HW"] for s in samples])
    return batch


class _Failed(NamedTuple):
    """In the place of a sample or a batch: why there is none."""

    error: DataError | StorageError


class _Carrying(Dataset[Any]):
    """A training set whose errors come out of a loader's process as they are; torch makes texts of them."""

    def __init__(self, inner: TrainSet) -> None:
        self.inner = inner

    def __getitem__(self, address: Any) -> Any:
        try:
            return self.inner[address]
        except (DataError, StorageError) as error:
            return _Failed(error)

    def collate(self, samples: list[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, _Failed)), None)
        return self.inner.collate(samples) if failed is None else failed


class Loader:
    """A rank's batches of any epoch, read by `num_workers` processes (0: in this one)."""

    def __init__(
        self,
        dataset: TrainSet,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`batch_size` is the global one, over all `world_size` ranks. Raises ValueError as `rank_positions`."""
        self.positions = rank_positions(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
        self.dataset, self.num_workers, self.pin_memory = dataset, num_workers, pin_memory
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.positions)

    def global_ids(self, epoch: int, index: int) -> list[str]:
        """Images of a global batch, those of all ranks: the `index`-th of an epoch."""
        first = index * self.batch_size
        return [self.dataset.id_at(epoch, position) for position in range(first, first + self.batch_size)]

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch."""
        addresses = [[(epoch, p) for p in positions] for positions in self.positions]
        carrying = _Carrying(self.dataset)
        loader: DataLoader[Any] = DataLoader(
            carrying,
            batch_sampler=addresses,  # any iterable of addresses; the data set takes them
            collate_fn=carrying.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or the loader would draw from the global generator
        )
        try:
            for batch in loader:
                if isinstance(batch, _Failed):
                    raise batch.error
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise RuntimeError(
                "a process that reads images died, most often for want of memory (their number is "
                "runtime.loader_workers): lower that, or give the trial more memory"
            ) from error

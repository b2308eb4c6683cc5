"""IRNet's training batches: images with the labels that an earlier phase wrote (METHOD 1.1, 10).

N images of a rank's batch, H = W = crop_px, h = w = H / 4 the grid of IRNet's maps.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from ppc.data.dataset import Dataset
from ppc.data.loader import Normalise, TrainSet
from ppc.data.transforms import apply_crop, augment_irn, rescale, visible_part
from ppc.figures import IGNORE, read_palette_png
from ppc.places import StoragePath
from ppc.seeding import derive_rng

GRID = 0.25  # cells a pixel


class IrnSample(TypedDict):
    """One augmented image; labels are 0 background, 255 unsure or outside, else the class."""

    image_3HW: Tensor
    label_hw: Tensor
    id: str


class IrnBatch(TypedDict):
    """A rank's part of a global batch: float32 images, int64 labels."""

    image_N3HW: Tensor
    label_Nhw: Tensor
    ids: list[str]


class IrnTrainSet(TrainSet):
    """Augmented images of a split with their label maps `labels/ID.png`."""

    def __init__(
        self,
        layout: Dataset,
        split: str,
        labels: StoragePath,
        *,
        crop_px: int,
        scale: tuple[float, float],
        normalise: Normalise,
        seed: int,
    ) -> None:
        """`normalise` takes uint8 (H, W, 3) to a float32 tensor (3, H, W), pixel by pixel."""
        super().__init__(layout.ids(split), seed=seed)
        self.layout, self.labels = layout, labels
        self.crop_px, self.scale, self.normalise = crop_px, scale, normalise

    def sample(self, epoch: int, image_id: str) -> IrnSample:
        """The image augmented, its visible part normalised and padded with 0, and its labels on the grid."""
        image_HW3, label_HW, box = augment_irn(
            self.layout.image(image_id),
            read_palette_png(self.labels / f"{image_id}.png"),
            scale=self.scale,
            crop_px=self.crop_px,
            rng=derive_rng("augment", self.seed, epoch, image_id),
        )
        square_3HW = torch.zeros(3, self.crop_px, self.crop_px)
        rows, columns = slice(box.to_top, box.to_top + box.height), slice(box.to_left, box.to_left + box.width)
        square_3HW[:, rows, columns] = self.normalise(visible_part(image_HW3, box))
        label_hw = rescale(apply_crop(label_HW, box, fill=IGNORE), GRID, nearest=True)
        return {"image_3HW": square_3HW, "label_hw": torch.from_numpy(label_hw.astype("int64")), "id": image_id}

    def collate(self, samples: list[IrnSample]) -> IrnBatch:
        """Stack samples into a batch."""
        return {
            "image_N3HW": torch.stack([s["image_3HW"] for s in samples]),
            "label_Nhw": torch.stack([s["label_hw"] for s in samples]),
            "ids": [s["id"] for s in samples],
        }

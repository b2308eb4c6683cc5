"""How pixels become what a net sees. It travels with the net's weights.  H W image size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """(pixel / scale - mean) / std; mean and std are in the order that the net sees: BGR where `bgr`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    bgr: bool

    def apply(self, image_HW3: np.ndarray[Any, Any]) -> Tensor:
        """RGB image (H, W, 3) with values 0..255 -> float32 (3, H, W)."""
        assert image_HW3.ndim == 3 and image_HW3.shape[2] == 3, f"expected (H, W, 3), got {image_HW3.shape}"
        x_3HW = torch.from_numpy(np.array(image_HW3.transpose(2, 0, 1), dtype=np.float32, order="C"))
        if self.bgr:
            x_3HW = x_3HW.flip(0)
        mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x_3HW / self.scale - mean_311) / std_311

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a JSON file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Normalisation":
        """Inverse of `to_dict`."""
        mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"a normalisation has three means and three stds, got {dict(values)}")
        return cls(mean, std, float(values["scale"]), bool(values["bgr"]))


NORMALISATIONS = {
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0, False),
    "half": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 255.0, False),
    "caffe_bgr": Normalisation((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), 1.0, True),
    "unit": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 255.0, False),
}

"""Augmentations (METHOD 1.1): pure functions on uint8 arrays; randomness comes in as an explicit `random.Random`.

Every step is a draw (`draw_*`, parameters from the generator) and an application (a pure function of them), so that an
image and its saliency map or label share one draw. Arrays are (H, W) or (H, W, 3).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image

Uint8 = NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)
JITTER_STEPS = ("brightness", "contrast", "saturation", "hue")
SEGMENT_SHIFT = 10  # HSV levels, both ways (METHOD 1.1, DeepLab)


# -- long side


def draw_long_px(rng: random.Random, low_px: int, high_px: int) -> int:
    """Length of the long side, an integer from [low_px, high_px], both ends included."""
    return rng.randint(low_px, high_px)


def resize_long(image: Uint8, long_px: int) -> Uint8:
    """Resize (bicubic, PIL) so that the long side is `long_px`; the other side is rounded, at least 1 pixel."""
    height, width = image.shape[:2]
    if width < height:
        size = (max(1, round(width * long_px / height)), long_px)
    else:
        size = (long_px, max(1, round(height * long_px / width)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


# -- crop or pad


@dataclass(frozen=True)
class CropBox:
    """A square of `crop_px`: the part of the image it shows, and where in the square that part lies. Pixels."""

    crop_px: int
    top: int
    left: int
    to_top: int
    to_left: int
    height: int
    width: int


def _draw_axis(rng: random.Random, side: int, crop_px: int) -> tuple[int, int]:
    """(start in the image, start in the square) along one axis; one of the two is 0."""
    start = rng.randrange(abs(side - crop_px) + 1)
    return (start, 0) if side > crop_px else (0, start)


def draw_crop(rng: random.Random, *, height: int, width: int, crop_px: int) -> CropBox:
    """A uniform crop or placement; the width offset is drawn before the height offset."""
    left, to_left = _draw_axis(rng, width, crop_px)
    top, to_top = _draw_axis(rng, height, crop_px)
    return CropBox(crop_px, top, left, to_top, to_left, min(height, crop_px), min(width, crop_px))


def visible_part(image: NDArray[Scalar], box: CropBox) -> NDArray[Scalar]:
    """The part of (H, W, ...) that the square shows, without padding."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def apply_crop(image: NDArray[Scalar], box: CropBox, *, fill: float) -> NDArray[Scalar]:
    """(H, W, ...) -> (crop_px, crop_px, ...), padded with `fill`."""
    square = np.full((box.crop_px, box.crop_px, *image.shape[2:]), fill, image.dtype)
    square[box.to_top : box.to_top + box.height, box.to_left : box.to_left + box.width] = visible_part(image, box)
    return square


# -- flip, colour, scale


def draw_flip(rng: random.Random) -> bool:
    """Heads with p = 0.5."""
    return rng.random() < 0.5


def flip(image: NDArray[Scalar]) -> NDArray[Scalar]:
    """Mirror left and right."""
    return np.ascontiguousarray(image[:, ::-1])


@dataclass(frozen=True)
class Jitter:
    """Colour changes in the order they are applied: (step, factor)."""

    steps: tuple[tuple[str, float], ...]


def draw_jitter(rng: random.Random, *, brightness: float, contrast: float, saturation: float, hue: float) -> Jitter:
    """Factors from U[1-x, 1+x] (hue: U[-x, x]) in a random order; the distribution of torchvision's ColorJitter."""
    order = rng.sample(JITTER_STEPS, len(JITTER_STEPS))
    factors = {
        "brightness": rng.uniform(max(0.0, 1 - brightness), 1 + brightness),
        "contrast": rng.uniform(max(0.0, 1 - contrast), 1 + contrast),
        "saturation": rng.uniform(max(0.0, 1 - saturation), 1 + saturation),
        "hue": rng.uniform(-hue, hue),
    }
    return Jitter(tuple((step, factors[step]) for step in order))


def jitter_color(image_HW3: Uint8, jitter: Jitter) -> Uint8:
    """Apply the colour changes to an RGB image."""
    image: Any = Image.fromarray(image_HW3)
    for step, factor in jitter.steps:
        image = getattr(TF, f"adjust_{step}")(image, factor)
    return np.asarray(image)


def draw_scale(rng: random.Random, low: float, high: float) -> float:
    """A scale from U[low, high]."""
    return low + rng.random() * (high - low)


def rescale(image: Uint8, scale: float, *, nearest: bool) -> Uint8:
    """Rescale with PIL as IRN does: bicubic, or nearest for a label."""
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, method))


def rescale_cv(image: Uint8, scale: float, *, nearest: bool) -> Uint8:
    """Rescale with OpenCV as the segmentation recipe does: cubic, or nearest for a label."""
    method = cv2.INTER_NEAREST if nearest else cv2.INTER_CUBIC
    resized: Uint8 = cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=method)
    return resized


def draw_hsv(rng: random.Random, limit: int) -> tuple[int, int, int]:
    """Integer shifts of hue, saturation and value, each from {-limit..limit}."""
    return rng.randint(-limit, limit), rng.randint(-limit, limit), rng.randint(-limit, limit)


def shift_hsv(image_HW3: Uint8, shift: tuple[int, int, int]) -> Uint8:
    """Shift an RGB image in OpenCV's HSV (hue modulo 180, saturation and value clipped to 0..255)."""
    hsv = cv2.cvtColor(np.ascontiguousarray(image_HW3), cv2.COLOR_RGB2HSV).astype(np.int32) + np.array(shift)
    hsv[..., 0] %= 180
    rgb: Uint8 = cv2.cvtColor(np.clip(hsv, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
    return rgb


# -- chains


@dataclass(frozen=True)
class CamView:
    """An augmented training image before normalisation: what the crop shows, and where it lies in the square."""

    image_HW3: Uint8
    saliency_HW: Uint8 | None
    box: CropBox


def augment_cam(
    image_HW3: Uint8,
    saliency_HW: Uint8 | None,
    *,
    resize_long_px: tuple[int, int],
    crop_px: int,
    color_jitter: bool,
    rng: random.Random,
) -> CamView:
    """CAM training (METHOD 1.1: PSA, SEAM, PPC, EPS): long side, flip p = .5, colour jitter of the image alone, crop.

    The caller normalises the visible part and pads afterwards, so that padding is 0 after normalisation.
    """
    long_px = draw_long_px(rng, *resize_long_px)
    mirrored = draw_flip(rng)
    jitter = draw_jitter(rng, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1) if color_jitter else Jitter(())
    image = resize_long(image_HW3, long_px)
    box = draw_crop(rng, height=image.shape[0], width=image.shape[1], crop_px=crop_px)
    image = flip(image) if mirrored else image
    image = visible_part(jitter_color(image, jitter), box)
    if saliency_HW is None:
        return CamView(image, None, box)
    saliency = resize_long(saliency_HW, long_px)
    return CamView(image, visible_part(flip(saliency) if mirrored else saliency, box), box)


def augment_affinity(
    image_HW3: Uint8, score_XHW: NDArray[np.float32], *, crop_px: int, color_jitter: bool, rng: random.Random
) -> tuple[Uint8, NDArray[np.float32]]:
    """AffinityNet training (METHOD 1.1): colour jitter of the image, a joint crop and flip (p = .5); no rescale.

    Both are `crop_px` squares, padded with 0: the caller normalises the image with its padding.
    """
    jitter = draw_jitter(rng, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1) if color_jitter else Jitter(())
    box = draw_crop(rng, height=image_HW3.shape[0], width=image_HW3.shape[1], crop_px=crop_px)
    image = apply_crop(jitter_color(image_HW3, jitter), box, fill=0)
    score_HWX = apply_crop(np.moveaxis(score_XHW, 0, -1), box, fill=0)
    if draw_flip(rng):
        image, score_HWX = flip(image), flip(score_HWX)
    return image, np.ascontiguousarray(np.moveaxis(score_HWX, -1, 0))


def augment_segment(
    image_HW3: Uint8, label_HW: Uint8, *, scale: tuple[float, float], hsv: bool, crop_px: int, rng: random.Random
) -> tuple[Uint8, Uint8, CropBox]:
    """Segmentation training (METHOD 1.1: DeepLab): HSV shift, flip p = .5, scale, crop; image, label and the crop.

    Returned uncropped: normalise the image, then `apply_crop` with fill 0 for the image and 255 for the label.
    """
    image = shift_hsv(image_HW3, draw_hsv(rng, SEGMENT_SHIFT)) if hsv else image_HW3
    label = label_HW
    if draw_flip(rng):
        image, label = flip(image), flip(label)
    factor = draw_scale(rng, *scale)
    image, label = rescale_cv(image, factor, nearest=False), rescale_cv(label, factor, nearest=True)
    return image, label, draw_crop(rng, height=image.shape[0], width=image.shape[1], crop_px=crop_px)


def augment_irn(
    image_HW3: Uint8, label_HW: Uint8, *, scale: tuple[float, float], crop_px: int, rng: random.Random
) -> tuple[Uint8, Uint8, CropBox]:
    """IRNet's training (METHOD 1.1: IRN irn): scale, flip p = .5, crop; image, label and the crop.

    Returned uncropped: normalise the image, then `apply_crop` with fill 0 for the image and 255 for the label.
    """
    factor = draw_scale(rng, *scale)
    image, label = rescale(image_HW3, factor, nearest=False), rescale(label_HW, factor, nearest=True)
    if draw_flip(rng):
        image, label = flip(image), flip(label)
    return image, label, draw_crop(rng, height=image.shape[0], width=image.shape[1], crop_px=crop_px)

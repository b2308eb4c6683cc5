"""Pictures: palette PNGs of label maps, heat overlays of CAMs, rows of pictures for a README. numpy and Pillow alone.

H W pixels, 3 RGB; images are uint8, CAMs in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ppc.places import StoragePath, atomic_write, read_bytes

Array = npt.NDArray[Any]
IGNORE = 255


def voc_palette() -> Array:
    """The 256 colours of VOC's label maps, (256, 3): bit b of a label goes to channel b % 3, highest bits first."""
    label_256 = np.arange(256, dtype=np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= ((label_256 >> bit) & 1) << (7 - bit // 3)
    return palette


VOC_PALETTE = voc_palette()

# Dark blue, through green, to bright yellow: lightness grows all the way, so it reads in grey and with any eyes.
_RAMP_AT = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_RAMP_RGB = np.array([[38, 20, 90], [36, 92, 150], [30, 150, 125], [140, 205, 70], [255, 238, 60]], np.float64)


def heat(cam_HW: Array) -> Array:
    """Colours of scores in [0, 1] (clipped), (H, W, 3) uint8."""
    score_HW = np.clip(np.nan_to_num(np.asarray(cam_HW, np.float64)), 0.0, 1.0)
    channels = [np.interp(score_HW, _RAMP_AT, _RAMP_RGB[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(image_HW3: Array, cam_HW: Array, *, strength: float = 0.75) -> Array:
    """The image under the heat of its CAM, (H, W, 3) uint8; where the CAM is 0 the image stays as it is.

    A CAM of another size is stretched to the image's. ValueError for an image that is not (H, W, 3) uint8.
    """
    image_HW3 = np.asarray(image_HW3)
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(f"expected an RGB image (H, W, 3) of uint8, got {image_HW3.shape} of {image_HW3.dtype}")
    height, width = image_HW3.shape[:2]
    score_HW = np.clip(np.nan_to_num(np.asarray(cam_HW, np.float32)), 0.0, 1.0)
    if score_HW.shape != (height, width):
        resized = Image.fromarray(score_HW).resize((width, height), Image.Resampling.BILINEAR)
        score_HW = np.asarray(resized)
    # The root shows weak responses too; with the score itself only the discriminative part would be seen.
    alpha_HW1 = (strength * np.sqrt(score_HW))[..., None]
    mixed_HW3 = image_HW3 * (1.0 - alpha_HW1) + heat(score_HW) * alpha_HW1
    return np.clip(np.rint(mixed_HW3), 0, 255).astype(np.uint8)


def palette_png(label_HW: Array, path: StoragePath) -> None:
    """Write a label map as a palette PNG (atomically): indices are the labels, 255 is the rim.

    ValueError for labels outside 0..255.
    """
    label_HW = np.asarray(label_HW)
    if label_HW.ndim != 2:
        raise ValueError(f"{path}: expected a label map (H, W), got shape {label_HW.shape}")
    if label_HW.size and not (0 <= label_HW.min() and label_HW.max() <= 255):
        raise ValueError(f"{path}: labels {label_HW.min()}..{label_HW.max()} do not fit a palette PNG (0..255)")
    image = Image.fromarray(np.ascontiguousarray(label_HW.astype(np.uint8)))
    image.putpalette(VOC_PALETTE.tobytes())
    with atomic_write(path) as handle:
        image.save(handle, format="PNG")


def read_palette_png(path: StoragePath) -> Array:
    """Labels of a palette or greyscale PNG, (H, W) uint8; ValueError for a colour image, whose labels are lost."""
    with Image.open(BytesIO(read_bytes(path))) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path}: a label map has mode P or L, this is {image.mode}; write it with palette_png")
        return np.array(image, dtype=np.uint8)


def square(image_HW3: Array, *, fill: int = 255) -> Array:
    """The image in the middle of a square: MLflow's image grid cuts wide ones."""
    height, width = image_HW3.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), fill, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image_HW3
    return canvas


def contact_row(images: Sequence[Array], labels: Sequence[str], *, height_px: int = 160, gap_px: int = 8) -> Array:
    """Pictures side by side at one height, each with its label under it, (H, W, 3) uint8 on white.

    Images are RGB, or label maps (H, W), which get the palette. ValueError when labels do not match the images.
    """
    if len(images) != len(labels) or not images:
        raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many of each, at least one")
    tiles = [_tile(np.asarray(image), height_px) for image in images]
    font = ImageFont.load_default()
    text_px = 16
    width_px = sum(tile.width for tile in tiles) + gap_px * (len(tiles) + 1)
    canvas = Image.new("RGB", (width_px, height_px + 2 * gap_px + text_px), "white")
    draw = ImageDraw.Draw(canvas)
    left = gap_px
    for tile, label in zip(tiles, labels, strict=True):
        canvas.paste(tile, (left, gap_px))
        draw.text((left, height_px + gap_px + 3), label, fill="black", font=font)
        left += tile.width + gap_px
    return np.asarray(canvas)


def _tile(image: Array, height_px: int) -> Image.Image:
    is_labels = image.ndim == 2
    colours = VOC_PALETTE[image] if is_labels else image
    width_px = max(1, round(colours.shape[1] * height_px / colours.shape[0]))
    how = Image.Resampling.NEAREST if is_labels else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(colours.astype(np.uint8))).resize((width_px, height_px), how)

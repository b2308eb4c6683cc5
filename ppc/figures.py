"""Pictures: palette PNGs of label maps, heat overlays of CAMs, grids of pictures with titles. numpy and Pillow alone.

H W pixels, 3 RGB; images are uint8, CAMs in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ppc.places import StoragePath, atomic_write, read_bytes

Array = npt.NDArray[Any]
IGNORE = 255
TITLE_PX, NOTE_PX, LINE_PX = 14, 11, 18  # heights of letters, and of a line of them
NARROWEST_PX = 110  # of a column, for its title's sake
MOST_LEGEND_LINES = 3


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
    """Labels of a palette or greyscale PNG, (H, W) uint8; ValueError for a damaged file, and for a colour image, whose
    labels are lost."""
    return decode_palette_png(read_bytes(path), path)


def decode_palette_png(data: bytes, path: StoragePath) -> Array:
    """`read_palette_png` of a file's contents; `path` is named in its errors."""
    try:
        with Image.open(BytesIO(data)) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"{path}: a label map has mode P or L, this is {image.mode}; write it with palette_png"
                )
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, EOFError) as error:  # what PIL raises for files that are cut or no image
        raise ValueError(
            f"{path} is not a whole PNG; delete {path.parents[1]}, so that it is made again by a resume (of a finished "
            "trial its result.json too)"
        ) from error


def square(image_HW3: Array, *, fill: int = 255) -> Array:
    """The image in the middle of a square: MLflow's image grid cuts wide ones."""
    height, width = image_HW3.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), fill, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image_HW3
    return canvas


def picture_grid(
    rows: Sequence[Sequence[Array | None]],
    titles: Sequence[str],
    *,
    row_names: Sequence[str] = (),
    legend: Mapping[int, str] | None = None,
    caption: str = "",
    box_px: tuple[int, int] = (160, 240),
    gap_px: int = 8,
) -> Array:
    """Rows of pictures under the titles of their columns, (H, W, 3) uint8 on white.

    Pictures are RGB, or label maps (H, W), which get the palette; None is an empty cell. Each is scaled into a box of
    that height and width. `row_names` stand under the rows. The legend names those of its labels that the label maps
    hold, in as many lines as fit, and a caption ends it all. ValueError when titles or names do not match the pictures.
    """
    if not rows or not titles or any(len(row) != len(titles) for row in rows) or len(row_names) not in (0, len(rows)):
        raise ValueError(
            f"{len(rows)} rows of {sorted({len(row) for row in rows})} pictures, {len(titles)} titles and "
            f"{len(row_names)} names of rows; expected a title for each column and a name for each row"
        )
    tiles = [[None if picture is None else _tile(np.asarray(picture), box_px) for picture in row] for row in rows]
    widths = [
        max([NARROWEST_PX, *(tile.width for tile in column if tile is not None)]) for column in zip(*tiles, strict=True)
    ]
    lefts = [gap_px + sum(widths[:i]) + gap_px * i for i in range(len(widths))]
    total_px = sum(widths) + gap_px * (len(widths) + 1)
    lines = [_lines(title, TITLE_PX, width) for title, width in zip(titles, widths, strict=True)]
    top_px = gap_px + LINE_PX * max(map(len, lines))
    heights = [max((tile.height for tile in row if tile is not None), default=box_px[0]) for row in tiles]
    name_px = LINE_PX if row_names else gap_px
    strips = [_legend(_present(rows, legend or {}), total_px, gap_px), _caption(caption, total_px, gap_px)]
    height_px = top_px + sum(heights) + name_px * len(rows) + sum(strip.height for strip in strips) + gap_px
    canvas = Image.new("RGB", (total_px, height_px), "white")
    draw = ImageDraw.Draw(canvas)
    for left, width, words in zip(lefts, widths, lines, strict=True):
        for i, line in enumerate(words):  # those of a shorter title stand lowest, just above their pictures
            place = (left + width / 2, top_px - LINE_PX * (len(words) - i) + LINE_PX / 2 - 2)
            draw.text(place, line, fill="black", font=_font(TITLE_PX), anchor="mm")
    top = top_px
    for index, (row, height) in enumerate(zip(tiles, heights, strict=True)):
        for left, width, tile in zip(lefts, widths, row, strict=True):
            if tile is None:
                draw.text((left + width / 2, top + height / 2), "none", fill="grey", font=_font(NOTE_PX), anchor="mm")
            else:
                canvas.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
        if row_names:
            name = _cut(row_names[index], NOTE_PX, total_px - 2 * gap_px)
            draw.text((gap_px, top + height + 2), name, fill="grey", font=_font(NOTE_PX))
        top += height + name_px
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return np.asarray(canvas)


def _present(rows: Sequence[Sequence[Array | None]], legend: Mapping[int, str]) -> dict[int, str]:
    """The entries of a legend whose labels are in the pictures."""
    there = set[int]()
    for picture in (picture for row in rows for picture in row):
        if picture is not None and picture.ndim == 2:
            there |= set(np.unique(picture).tolist())
    return {label: name for label, name in legend.items() if label in there}


def _legend(names: Mapping[int, str], width_px: int, gap_px: int) -> Image.Image:
    """A strip of coloured squares with names; those for which there is no room are counted."""
    font, box, places, left, line = _font(NOTE_PX), 11, list[tuple[int, int, int, str]](), gap_px, 0
    for label, name in names.items():
        name = _cut(name, NOTE_PX, width_px - 2 * gap_px - box - 5)
        needed = box + 5 + round(font.getlength(name)) + 14
        if left > gap_px and left + needed - 14 > width_px - gap_px:
            left, line = gap_px, line + 1
        if line == MOST_LEGEND_LINES:
            break
        places.append((left, line, label, name))
        left += needed
    used = 1 + max((line for _, line, _, _ in places), default=-1)
    more = len(names) - len(places)
    strip = Image.new("RGB", (width_px, LINE_PX * (used + bool(more)) + (gap_px if places else 0)), "white")
    draw = ImageDraw.Draw(strip)
    for left, line, label, name in places:
        top = gap_px + LINE_PX * line
        draw.rectangle((left, top, left + box, top + box), fill=tuple(VOC_PALETTE[label].tolist()), outline="grey")
        draw.text((left + box + 5, top - 1), name, fill="black", font=font)
    if more:
        draw.text((gap_px, gap_px + LINE_PX * used - 1), f"and {more} more", fill="grey", font=font)
    return strip


def _caption(text: str, width_px: int, gap_px: int) -> Image.Image:
    lines = _lines(text, NOTE_PX, width_px - 2 * gap_px) if text else []
    strip = Image.new("RGB", (width_px, LINE_PX * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((gap_px, LINE_PX * i + 2), line, fill="grey", font=_font(NOTE_PX))
    return strip


def _font(size_px: int) -> Any:
    return ImageFont.load_default(size_px)


def _lines(text: str, size_px: int, width_px: int) -> list[str]:
    """A text broken into lines of that width: behind a space or a sign where there is one, else anywhere."""
    font, found = _font(size_px), list[str]()
    for paragraph in text.split("\n"):
        found.append("")
        for piece in re.findall(r"[^ ,=_/]*[ ,=_/]?", paragraph):
            if font.getlength((found[-1] + piece).rstrip()) <= width_px:
                found[-1] += piece
                continue
            found += [""] if found[-1] else []
            for letter in piece:
                if found[-1] and font.getlength(found[-1] + letter) > width_px:
                    found.append("")
                found[-1] += letter
    return [line.strip() for line in found]


def _cut(text: str, size_px: int, width_px: int) -> str:
    """A text cut to a width."""
    font = _font(size_px)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(f"{text}...") > width_px:
        text = text[:-1]
    return f"{text}..."


def _tile(image: Array, box_px: tuple[int, int]) -> Image.Image:
    """A picture as large as fits into a box of that height and width."""
    is_labels = image.ndim == 2
    colours = VOC_PALETTE[image] if is_labels else image
    scale = min(box_px[0] / image.shape[0], box_px[1] / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    how = Image.Resampling.NEAREST if is_labels else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(colours.astype(np.uint8))).resize(size, how)

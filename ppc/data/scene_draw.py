"""Draws one generated scene: 1-3 objects on a textured background, its exact mask and an imperfect saliency map.

What makes it hard in VOC's way: only a small part of an object has a colour and a pattern of its own class. The larger
body shares its colour with another class and its texture with several, and is now and then a stranger's; the background
tells something about the class too. So a classifier is right looking at parts, and its CAM under-covers.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Uint8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

MAX_CLASSES = 12
BACKGROUNDS = 6
OBJECTS_P = (0.45, 0.35, 0.20)  # of 1, 2, 3 objects
HOME_BACKGROUND_P = 0.4  # the first object stands on its class's own background
STRANGE_BODY_P = 0.25  # an object wears the body of any class
TRIES = 25  # to place an object without hiding another
IGNORE = 255


@dataclass(frozen=True)
class Scene:
    """One scene; `part_HW` marks the visible discriminative parts (it is not part of the data set)."""

    image_HW3: Uint8
    mask_HW: Uint8
    saliency_HW: Uint8
    part_HW: Bool


@dataclass(frozen=True)
class _Object:
    """Coverage in [0, 1] and colour of one object, on the whole image."""

    category: int
    cover_HW: Float32
    part_HW: Float32
    color_HW3: Float32


def draw_scene(rng: np.random.Generator, *, num_classes: int, image_px: int, first_class: int) -> Scene:
    """A scene whose first object is of class `first_class` (0-based); `image_px` is the longer side."""
    short = int(round(image_px * rng.uniform(0.75, 1.0)))
    height, width = (short, image_px) if rng.random() < 0.6 else (image_px, short)
    objects = _place_objects(rng, height, width, num_classes, first_class)
    home = rng.random() < HOME_BACKGROUND_P
    image = _background(rng, height, width, first_class % BACKGROUNDS if home else int(rng.integers(BACKGROUNDS)))
    owner_HW = np.zeros((height, width), np.int32)
    part_HW = np.zeros((height, width), bool)
    for number, item in enumerate(objects, 1):
        image += (item.color_HW3 - image) * item.cover_HW[..., None]
        inside = item.cover_HW > 0.5
        owner_HW[inside] = number
        part_HW = np.where(inside, item.part_HW > 0.5, part_HW)
    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    categories = np.array([0, *(item.category + 1 for item in objects)], np.uint8)
    mask_HW = categories[owner_HW]
    # The rim: one pixel on either side of every border, between two objects of one class too.
    borders = cv2.morphologyEx(owner_HW.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    mask_HW[borders > 0] = IGNORE
    image_HW3 = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return Scene(image_HW3, mask_HW, _saliency(rng, owner_HW), part_HW)


def _place_objects(
    rng: np.random.Generator, height: int, width: int, num_classes: int, first_class: int
) -> list[_Object]:
    objects: list[_Object] = []
    for number in range(1 + int(rng.choice(len(OBJECTS_P), p=OBJECTS_P))):
        category = first_class if number == 0 else int(rng.integers(num_classes))
        for _ in range(TRIES):
            item = _draw_object(rng, height, width, category, num_classes, crowd=number)
            if all(_still_seen(other, item) for other in objects):
                objects.append(item)
                break
    return objects


def _still_seen(below: _Object, above: _Object) -> bool:
    """Whether an object keeps most of its body and of its part when another is drawn over it."""
    free_HW = 1 - above.cover_HW
    body = float((below.cover_HW * free_HW).sum() / below.cover_HW.sum())
    part = float((below.part_HW * free_HW).sum() / below.part_HW.sum())
    return body > 0.75 and part > 0.8


def _rgb(hue: float, saturation: float, value: float) -> Float32:
    return np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)), np.float32)


def _blend(below: Float32, above: Float32, cover_HW: Float32) -> Float32:
    """Colour `above` where the cover is 1, `below` where it is 0; either is one colour or an image."""
    image: Float32 = below + (above - below) * cover_HW[..., None]
    return image.astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, grain_px: float) -> Float32:
    """Smooth noise in [0, 1] whose blobs are about `grain_px` wide."""
    rows, columns = max(2, round(height / grain_px)), max(2, round(width / grain_px))
    field = rng.random((rows, columns)).astype(np.float32)
    smooth: Float32 = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, 0, 1)


def _wave(along: Float32, period_px: float) -> Float32:
    wave: Float32 = (0.5 + 0.5 * np.sin(along * (2 * np.pi / period_px))).astype(np.float32)
    return wave


def _grid(height: int, width: int) -> tuple[Float32, Float32]:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    return rows, columns


def _background(rng: np.random.Generator, height: int, width: int, kind: int) -> Float32:
    """A dull textured background of one of `BACKGROUNDS` kinds, with a few grey blobs that are nothing."""
    y, x = _grid(height, width)
    hue, value = (0.30, 0.58, 0.52, 0.05, 0.12, 0.78)[kind] + rng.uniform(-0.03, 0.03), rng.uniform(0.32, 0.5)
    dark, light = _rgb(hue, 0.25, value - 0.1), _rgb(hue + 0.02, 0.18, value + 0.1)
    coarse = _noise(rng, height, width, 18)
    pattern = (
        0.7 * _noise(rng, height, width, 3) + 0.3 * coarse,  # grass
        y / height * 0.8 + 0.2 * coarse,  # sky
        0.6 * _wave(y + 5 * coarse, 8) + 0.4 * coarse,  # water
        0.7 * np.maximum(_wave(y, 11) > 0.93, _wave(x + 7 * (y // 11 % 2), 17) > 0.95) + 0.3 * coarse,  # bricks
        0.8 * _noise(rng, height, width, 1.5) + 0.2 * coarse,  # sand
        0.4 * _wave(x, 14) + 0.4 * _wave(y, 14) + 0.2 * coarse,  # cloth
    )[kind]
    image = _blend(dark, light, pattern.astype(np.float32))
    for _ in range(int(rng.integers(0, 3))):
        center = rng.uniform(0, width), rng.uniform(0, height)
        far = np.hypot(x - center[0], (y - center[1]) * rng.uniform(0.7, 1.4))
        cover = 0.8 * np.clip(rng.uniform(4, 11) * height / 112 - far + 0.5, 0, 1)
        image += (_rgb(rng.random(), 0.12, rng.uniform(0.25, 0.65)) - image) * cover[..., None].astype(np.float32)
    return image


def _draw_object(
    rng: np.random.Generator, height: int, width: int, category: int, num_classes: int, *, crowd: int
) -> _Object:
    """One object at a random place; `crowd` objects are there already, so it is smaller."""
    y, x = _grid(height, width)
    radius = min(height, width) * rng.uniform(0.24, 0.38) * (1.0, 0.85, 0.75)[crowd]
    center_x, center_y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
    tilt = rng.uniform(-0.6, 0.6) + (np.pi if rng.random() < 0.5 else 0.0)
    part_px = max(3.5, 0.36 * radius)
    # Moved so that the whole part is in the picture: a tag that nothing shows would only be noise.
    reach_x, reach_y = 0.78 * radius * np.cos(tilt), 0.78 * radius * np.sin(tilt)
    center_x += np.clip(center_x + reach_x, part_px, width - part_px) - (center_x + reach_x)
    center_y += np.clip(center_y + reach_y, part_px, height - part_px) - (center_y + reach_y)
    along = (x - center_x) * np.cos(tilt) + (y - center_y) * np.sin(tilt)
    across = (y - center_y) * np.cos(tilt) - (x - center_x) * np.sin(tilt)
    wearer = int(rng.integers(num_classes)) if rng.random() < STRANGE_BODY_P else category
    body_cover = _body_cover(rng, along, across, radius, wearer)
    part_along, part_across = along - 0.78 * radius, across
    part_cover = np.clip(part_px - np.hypot(part_along, part_across) + 0.5, 0, 1).astype(np.float32)
    color = _body_color(rng, along, across, wearer, radius)
    color = _blend(color, _part_color(rng, part_along, part_across, category, part_px), part_cover)
    return _Object(category, np.maximum(body_cover, part_cover), part_cover, color)


def _body_cover(rng: np.random.Generator, along: Float32, across: Float32, radius: float, wearer: int) -> Float32:
    """A wobbly superellipse: round, boxy or pointed."""
    power, slim = (2.0, 4.0, 1.4)[wearer % 3], rng.uniform(0.55, 0.8)
    distance = (np.abs(along / radius) ** power + np.abs(across / (radius * slim)) ** power) ** (1 / power)
    angle = np.arctan2(across, along)
    wobble = sum(rng.uniform(0, 0.07) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    cover: Float32 = ((1 + wobble - distance) * radius * slim + 0.5).astype(np.float32)
    return np.clip(cover, 0, 1)


def _body_color(rng: np.random.Generator, along: Float32, across: Float32, wearer: int, radius: float) -> Float32:
    """Two classes share a hue; a texture is shared by every fourth or so."""
    pair = wearer // 2
    hue = 0.04 + 0.618 * pair + rng.uniform(-0.025, 0.025)
    value = rng.uniform(0.72, 0.92)
    light, dark = _rgb(hue, 0.26, value), _rgb(hue, 0.36, value - 0.2)
    stripe = _wave(along, 9.0)
    texture = (
        stripe,
        _wave(along, 7.0) * _wave(across, 7.0),
        _wave(across, 6.0),
        _wave(along + across, 8.0) * 0.3,
    )[wearer % 2 * 2 + pair % 2]
    shade = 1 - 0.12 * np.clip(across / radius, -1, 1)
    color: Float32 = (_blend(light, dark, texture) * shade[..., None]).astype(np.float32)
    return color


def _part_color(rng: np.random.Generator, along: Float32, across: Float32, category: int, part_px: float) -> Float32:
    """A vivid hue of the class's own, with a ring, a cross, a half or a bull's eye in white or black."""
    own = _rgb(5 * category / MAX_CLASSES + rng.uniform(-0.012, 0.012), 1.0, rng.uniform(0.85, 1.0))
    ink = np.zeros(3, np.float32) if category % 2 else np.ones(3, np.float32)
    far = np.hypot(along, across)
    inked = (
        np.abs(far - 0.62 * part_px) < 0.13 * part_px,
        np.minimum(np.abs(along), np.abs(across)) < 0.14 * part_px,
        across > 0.4 * part_px,
        far < 0.36 * part_px,
    )[category // 2 % 4]
    return _blend(own, ink, inked.astype(np.float32))


def _saliency(rng: np.random.Generator, owner_HW: NDArray[np.int32]) -> Uint8:
    """Soft foreground: edges off by a pixel or two, some objects faint, now and then a false blob."""
    height, width = owner_HW.shape
    strength = np.array([0.0, *rng.choice([1.0, 0.95, 0.5], size=owner_HW.max(), p=[0.6, 0.3, 0.1])], np.float32)
    soft = strength[owner_HW]
    kernel = np.ones((3, 3), np.uint8)
    soft = (cv2.erode, cv2.dilate)[int(rng.integers(2))](soft, kernel, iterations=int(rng.integers(0, 3)))
    if rng.random() < 0.2:
        y, x = _grid(height, width)
        far = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height))
        soft = np.maximum(soft, 0.7 * np.clip(rng.uniform(4, 9) - far, 0, 1))
    soft = cv2.GaussianBlur(soft.astype(np.float32), (0, 0), 1.5)
    soft = np.clip(soft + 0.08 * (_noise(rng, height, width, 12) - 0.5), 0, 1)
    saliency_HW: Uint8 = np.rint(soft * 255).astype(np.uint8)
    return saliency_HW

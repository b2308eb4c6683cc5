"""Augmentations against the official values, and the properties a draw must have."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import golden

from ppc.data import transforms as T

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return golden("augment_50x36")


@pytest.fixture
def rng(vectors: dict[str, np.ndarray]) -> random.Random:
    return random.Random(int(vectors["meta_seed"]))


def normalise(image: np.ndarray) -> np.ndarray:
    return ((image / 255.0 - MEAN) / STD).astype(np.float32)


def test_resize_long_is_the_official_one(vectors, rng):
    image = T.resize_long(vectors["image"], T.draw_long_px(rng, 40, 70))
    np.testing.assert_array_equal(image, vectors["resize_long_40_70"])


@pytest.mark.parametrize("crop_px", [24, 64])
def test_crop_is_the_official_one(vectors, rng, crop_px):
    box = T.draw_crop(rng, height=50, width=36, crop_px=crop_px)
    expected = {
        f"random_crop_{crop_px}": (vectors["normalised"], 0),
        f"eps_crop_img_{crop_px}": (vectors["normalised"], 0),
        f"eps_crop_mask_{crop_px}": ((vectors["label"] / 255).astype(np.float32), 0),
        f"irn_crop_img_{crop_px}": (vectors["image"], 0),
        f"irn_crop_lab_{crop_px}": (vectors["label"], 255),
    }
    for name, (source, fill) in expected.items():
        np.testing.assert_array_equal(T.apply_crop(source, box, fill=fill), vectors[name], err_msg=name)


def test_irn_scale_is_the_official_one(vectors, rng):
    scale = T.draw_scale(rng, 0.5, 1.5)
    np.testing.assert_array_equal(T.rescale(vectors["image"], scale, nearest=False), vectors["irn_scale_img"])
    np.testing.assert_array_equal(T.rescale(vectors["label"], scale, nearest=True), vectors["irn_scale_lab"])


def test_segmentation_chain_is_the_official_one(vectors, rng):
    image, label, box = T.augment_segment(
        vectors["image"], vectors["label"], scale=(0.5, 1.5), hsv=True, crop_px=32, rng=rng
    )
    cropped = T.apply_crop(normalise(image), box, fill=0)
    np.testing.assert_allclose(cropped, vectors["seg_img_chain"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(T.apply_crop(label, box, fill=255), vectors["seg_lab_chain"])


def test_segmentation_flip_mirrors_image_and_label(vectors):
    """The stored chain does not flip (its draw is 0.93); this seed does."""
    seed = next(s for s in range(100) if _third_draw_flips(s))
    image, label, _ = T.augment_segment(
        vectors["image"], vectors["label"], scale=(1.0, 1.0), hsv=True, crop_px=32, rng=random.Random(seed)
    )
    np.testing.assert_array_equal(label, vectors["label"][:, ::-1])
    shifted = T.shift_hsv(vectors["image"], T.draw_hsv(random.Random(seed), 10))
    np.testing.assert_array_equal(image, shifted[:, ::-1])


def test_segmentation_without_the_hsv_shift_leaves_colours_alone(vectors):
    knobs = {"scale": (1.0, 1.0), "hsv": False, "crop_px": 32}
    image, _, _ = T.augment_segment(vectors["image"], vectors["label"], **knobs, rng=random.Random(0))
    assert any(np.array_equal(image, side) for side in (vectors["image"], vectors["image"][:, ::-1]))


def _third_draw_flips(seed: int) -> bool:
    rng = random.Random(seed)
    T.draw_hsv(rng, 10)
    return T.draw_flip(rng)


def test_crop_draws_the_width_first():
    """A square that pads the width and cuts the height: the first draw decides the column."""
    box = T.draw_crop(random.Random(3), height=90, width=20, crop_px=40)
    rng = random.Random(3)
    assert (box.to_left, box.left) == (rng.randrange(21), 0)
    assert (box.top, box.to_top) == (rng.randrange(51), 0)
    assert (box.height, box.width) == (40, 20)


def test_crop_reaches_every_offset():
    rng = random.Random(0)
    boxes = [T.draw_crop(rng, height=7, width=3, crop_px=5) for _ in range(300)]
    assert {box.top for box in boxes} == {0, 1, 2} and {box.to_left for box in boxes} == {0, 1, 2}


@pytest.mark.parametrize("shape", [(200, 3), (3, 200), (1, 1)])
def test_resize_long_keeps_a_thin_image(shape):
    image = T.resize_long(np.zeros((*shape, 3), np.uint8), 16)
    assert max(image.shape[:2]) == 16 and min(image.shape[:2]) >= 1


def test_jitter_has_torchvisions_ranges_and_every_order():
    rng = random.Random(0)
    drawn = [T.draw_jitter(rng, brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1) for _ in range(2000)]
    for step, low, high in (
        ("brightness", 0.7, 1.3),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
    ):
        factors = np.array([dict(jitter.steps)[step] for jitter in drawn])
        assert low <= factors.min() < low + 0.02 and high - 0.02 < factors.max() <= high, step
        assert abs(factors.mean() - (low + high) / 2) < 0.02, step
    assert len({tuple(step for step, _ in jitter.steps) for jitter in drawn}) == 24


def test_jitter_applies_its_steps_in_order():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    darker_then_grey = T.jitter_color(image, T.Jitter((("brightness", 0.5), ("saturation", 0.0))))
    assert (darker_then_grey.max(2) == darker_then_grey.min(2)).all()
    half = (image * 0.5).astype(int)
    np.testing.assert_array_equal(T.jitter_color(image, T.Jitter((("brightness", 0.5),))), half)
    one = T.jitter_color(image, T.Jitter((("brightness", 1.3), ("contrast", 0.7))))
    other = T.jitter_color(image, T.Jitter((("contrast", 0.7), ("brightness", 1.3))))
    assert (one != other).any()


def test_image_and_saliency_share_size_flip_and_crop():
    """The saliency map equals the image's channels, so it must come out equal to them."""
    gray = np.random.default_rng(1).integers(0, 256, (40, 60), dtype=np.uint8)
    image = np.repeat(gray[..., None], 3, 2)
    flipped = set()
    for seed in range(12):
        view = T.augment_cam(
            image, gray, resize_long_px=(30, 90), crop_px=48, color_jitter=False, rng=random.Random(seed)
        )
        np.testing.assert_array_equal(view.image_HW3[..., 1], view.saliency_HW)
        again = T.augment_cam(
            image, None, resize_long_px=(30, 90), crop_px=48, color_jitter=False, rng=random.Random(seed)
        )
        np.testing.assert_array_equal(view.image_HW3, again.image_HW3)
        rng = random.Random(seed)
        T.draw_long_px(rng, 30, 90)
        flipped.add(T.draw_flip(rng))
    assert flipped == {True, False}


def test_inputs_are_not_changed(vectors):
    image, label = vectors["image"].copy(), vectors["label"].copy()
    T.augment_segment(image, label, scale=(0.5, 1.5), hsv=True, crop_px=32, rng=random.Random(0))
    T.augment_cam(image, label, resize_long_px=(30, 90), crop_px=32, color_jitter=True, rng=random.Random(0))
    np.testing.assert_array_equal(image, vectors["image"])
    np.testing.assert_array_equal(label, vectors["label"])

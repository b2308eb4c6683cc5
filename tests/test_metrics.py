"""IoU and the background-score curve against the official values and a loop over thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import golden

from ppc.cam import seed_from_cam
from ppc.metrics import (
    OFFICIAL_THRESHOLDS,
    choose_bg_score,
    confusion,
    curve_confusions,
    curve_counts,
    curve_miou,
    iou,
    miou,
    silent_counts,
)

EVALS = ["eval_4img", "eval_10img"]
C = 21


def images(data: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(data[f"cam_{i:02d}"], data[f"keys_{i:02d}"], data[f"gt_{i:02d}"]) for i in range(int(data["n_images"]))]


@pytest.mark.parametrize("name", EVALS)
def test_the_curve_is_the_official_one(name):
    data = golden(name)
    assert list(OFFICIAL_THRESHOLDS) == data["thresholds"].tolist()
    counts = sum(
        curve_counts(cam, keys, gt, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=C) for cam, keys, gt in images(data)
    )
    assert counts.dtype == np.int64
    iou_TC = iou(curve_confusions(counts), absent="zero")
    np.testing.assert_allclose(100 * iou_TC, data["iou_per_class"], rtol=1e-9, atol=0)
    curve_T = curve_miou(counts, absent="zero")
    np.testing.assert_allclose(100 * curve_T, data["miou_curve"], rtol=1e-9)
    best = choose_bg_score(OFFICIAL_THRESHOLDS, curve_T)
    assert best == OFFICIAL_THRESHOLDS[int(data["best_index"])]


@pytest.mark.parametrize("name", EVALS)
def test_seeds_and_scores_are_the_official_ones(name):
    data = golden(name)
    best = OFFICIAL_THRESHOLDS[int(data["best_index"])]
    conf = np.zeros((C, C), np.int64)
    for index, (cam, keys, gt) in enumerate(images(data)):
        seed = seed_from_cam(cam, keys, bg_score=best)
        np.testing.assert_array_equal(seed, data[f"pred_best_{index:02d}"])
        conf += confusion(seed, gt, C)
    np.testing.assert_array_equal(conf, data["eps_confusion"])
    np.testing.assert_allclose(100 * iou(conf, absent="zero"), data["png_iou_at_best"], rtol=1e-9, atol=0)
    assert 100 * miou(conf, absent="zero") == pytest.approx(float(data["png_miou_at_best"]), rel=1e-9)
    np.testing.assert_allclose(iou(conf, absent="skip"), data["eps_iou"], rtol=1e-9, equal_nan=True)
    assert miou(conf, absent="skip") == pytest.approx(float(data["eps_miou_nanmean"]), rel=1e-9)
    # the remaining stored scores are plain sums of the same counts
    hit, truth, found = conf.diagonal(), conf.sum(1), conf.sum(0)
    assert hit.sum() / conf.sum() == pytest.approx(float(data["eps_acc"]), rel=1e-9)
    for key, total in (("eps_recall", truth), ("eps_precision", found)):
        np.testing.assert_array_equal(np.isnan(data[key]), total == 0)
        np.testing.assert_allclose(hit[total > 0] / total[total > 0], data[key][total > 0], rtol=1e-9)


def drawn(seed: int, classes: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A CAM whose values are often exactly thresholds, keys in any order, and a truth with 255."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(0, 4))
    keys = rng.permutation(classes - 1)[:k]
    cam = np.where(
        rng.random((k, 13, 9)) < 0.5, rng.integers(-1, 62, (k, 13, 9)) / 100, rng.normal(0.3, 0.3, (k, 13, 9))
    )
    gt = rng.integers(0, classes, (13, 9)).astype(np.uint8)
    gt[rng.random(gt.shape) < 0.15] = 255
    return cam.astype(np.float32), keys, gt


@pytest.mark.parametrize("seed", range(12))
def test_the_curve_equals_a_loop_over_thresholds(seed):
    cam, keys, gt = drawn(seed)
    counts = curve_counts(cam, keys, gt, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=6)
    assert counts.sum() == (gt != 255).sum()
    for t, conf_CC in zip(OFFICIAL_THRESHOLDS, curve_confusions(counts), strict=True):
        np.testing.assert_array_equal(conf_CC, confusion(seed_from_cam(cam, keys, bg_score=t), gt, 6))


def test_silent_maps_are_those_that_give_no_seed_at_any_score():
    cam = np.array([[[0.0, 0.4]], [[0.0, 0.0]], [[-1.0, -1.0]], [[-0.1, 1e-6]]], np.float32)
    np.testing.assert_array_equal(silent_counts(cam), [2, 4])
    np.testing.assert_array_equal(silent_counts(cam[:0]), [0, 0])
    for k, seeded in enumerate((True, False, False, True)):
        assert bool(seed_from_cam(cam[k : k + 1], [0], bg_score=0.0).any()) is seeded


def test_shards_add_up_in_any_order():
    parts = [curve_counts(*drawn(s), thresholds_T=(0.1, 0.2, 0.4), num_classes=6) for s in range(8)]
    whole = sum(parts)
    np.testing.assert_array_equal(sum(parts[5:]) + sum(parts[:5][::-1]), whole)
    conf = sum(curve_confusions(part) for part in parts)
    np.testing.assert_array_equal(curve_confusions(whole), conf)
    seeds = [(seed_from_cam(cam, keys, bg_score=0.2), gt) for cam, keys, gt in map(drawn, range(8))]
    np.testing.assert_array_equal(conf[1], sum(confusion(pred, gt, 6) for pred, gt in seeds))


def test_confusion_and_iou_by_hand():
    gt = np.array([[0, 0, 1, 255], [1, 1, 2, 255]], np.uint8)
    pred = np.array([[0, 1, 1, 1], [1, 0, 0, 3]], np.uint8)
    conf = confusion(pred, gt, 5)
    assert conf.tolist() == [[1, 1, 0, 0, 0], [1, 2, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    zero = [1 / 4, 2 / 4, 0, 0, 0]  # class 2 is missed; 3 occurs under 255 only and 4 nowhere
    assert iou(conf, absent="zero").tolist() == zero
    np.testing.assert_array_equal(iou(conf, absent="skip"), [*zero[:3], np.nan, np.nan])
    assert miou(conf, absent="zero") == pytest.approx(0.75 / 5)
    assert miou(conf, absent="skip") == pytest.approx(0.75 / 3)


def test_nothing_counted_has_no_mean():
    empty = np.zeros((3, 3), np.int64)
    assert np.isnan(miou(empty, absent="skip")) and miou(empty, absent="zero") == 0


def test_one_matrix_over_the_set_is_not_a_mean_over_images():
    gt = [np.zeros((10, 10), np.uint8), np.array([[1]], np.uint8)]
    pred = [np.zeros((10, 10), np.uint8), np.array([[0]], np.uint8)]
    conf = sum(confusion(p, g, 2) for p, g in zip(pred, gt, strict=True))
    assert iou(conf, absent="zero").tolist() == [100 / 101, 0]


def test_choice_of_the_background_score():
    grid = (0.1, 0.2, 0.3, 0.4)
    assert choose_bg_score(grid, [0.1, 0.5, 0.5, 0.2]) == 0.2  # the first of equals
    assert choose_bg_score(grid, [np.nan, 0.1, np.nan, 0.2]) == 0.4
    with pytest.raises(ValueError, match=r"seeds\.protocol"):
        choose_bg_score(grid, [np.nan] * 4)


def test_what_does_not_fit_is_refused():
    gt = np.array([[0, 4]], np.uint8)
    with pytest.raises(ValueError, match="truth holds class 4"):
        confusion(np.zeros((1, 2)), gt, 4)
    with pytest.raises(ValueError, match="prediction holds class 255"):
        confusion(np.full((1, 2), 255, np.uint8), gt, 5)
    with pytest.raises(ValueError, match="image's size"):
        confusion(np.zeros((2, 1)), gt, 5)
    with pytest.raises(ValueError, match="ascend"):
        curve_counts(np.zeros((1, 1, 2)), [0], gt, thresholds_T=(0.2, 0.2), num_classes=5)
    with pytest.raises(ValueError, match="key 7"):
        curve_counts(np.zeros((1, 1, 2)), [7], gt, thresholds_T=(0.2,), num_classes=5)


def test_inputs_stay_as_they_are():
    cam, keys, gt = drawn(3)
    before = cam.copy(), keys.copy(), gt.copy()
    counts = curve_counts(cam, keys, gt, thresholds_T=(0.1, 0.2), num_classes=6)
    kept = counts.copy()
    curve_miou(counts, absent="skip")
    confusion(gt * (gt != 255), gt, 6)
    for array, old in zip((cam, keys, gt, counts), (*before, kept), strict=True):
        np.testing.assert_array_equal(array, old)

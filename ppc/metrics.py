"""IoU from counts: one confusion matrix over a whole set, and the whole background-score curve from one pass.

Shapes: K maps of an image, C = K+1 classes with background, H W pixels, T thresholds. Counts are int64 and add up over
images and workers in any order; only `iou` divides. IoU is in [0, 1]. Pixels that are 255 in the truth are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ppc.cam import strongest_class

IGNORE = 255
OFFICIAL_THRESHOLDS: tuple[float, ...] = tuple(i / 100 for i in range(60))  # the official curve, METHOD 12

AbsentRule = Literal["zero", "skip"]
Counts = npt.NDArray[np.int64]
SILENT = "silent_maps_"  # of the metric that `silent_counts` gives; a split follows
Floats = npt.NDArray[np.float64]


def _counted(gt_HW: npt.NDArray[Any], shape: tuple[int, ...], num_classes: int) -> npt.NDArray[np.bool_]:
    """The pixels that count; ValueError when the truth does not fit the prediction or the classes."""
    if gt_HW.shape != shape:
        raise ValueError(f"the truth is {gt_HW.shape} and the prediction {shape}; both must have the image's size")
    valid_HW: npt.NDArray[np.bool_] = gt_HW != IGNORE
    top = int(gt_HW[valid_HW].max(initial=0))
    if top >= num_classes:
        raise ValueError(f"the truth holds class {top}, but there are {num_classes} classes with background")
    return valid_HW


def confusion(pred_HW: npt.ArrayLike, gt_HW: npt.ArrayLike, num_classes: int) -> Counts:
    """Confusion counts (C,C) of one image, [truth, prediction]; add them over the set before `iou`."""
    pred, gt = np.asarray(pred_HW), np.asarray(gt_HW)
    valid = _counted(gt, pred.shape, num_classes)
    pred_P, gt_P = pred[valid].astype(np.int64), gt[valid].astype(np.int64)
    if pred_P.max(initial=0) >= num_classes:
        raise ValueError(f"the prediction holds class {pred_P.max()}, but there are {num_classes} with background")
    return np.bincount(gt_P * num_classes + pred_P, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(conf_CC: Counts, *, absent: AbsentRule) -> Floats:
    """Per-class IoU (...,C) of confusion counts (...,C,C).

    A class in neither truth nor prediction is 0 by rule `zero` (the official VOC script) and NaN by rule `skip` (EPS,
    IRN), METHOD 12.
    """
    hit = np.diagonal(conf_CC, axis1=-2, axis2=-1).astype(np.float64)
    union = conf_CC.sum(axis=-1) + conf_CC.sum(axis=-2) - hit
    return np.where((union > 0) | (absent == "zero"), hit / np.maximum(union, 1), np.nan)


def miou(conf_CC: Counts, *, absent: AbsentRule) -> float:
    """Mean IoU over the classes with background, in [0, 1]; over those that occur by rule `skip` (NaN if none does)."""
    iou_C = iou(conf_CC, absent=absent)
    scored_C = iou_C[~np.isnan(iou_C)]
    return float(scored_C.mean()) if len(scored_C) else float("nan")


def curve_counts(
    cam_KHW: npt.ArrayLike,
    keys: npt.ArrayLike,
    gt_HW: npt.ArrayLike,
    *,
    thresholds_T: Sequence[float],
    num_classes: int,
) -> Counts:
    """Counts (T+1,C,C) of one image, [level, truth, strongest class]: the seeds of all background scores at once.

    A pixel's level is the number of thresholds below its highest CAM value, in float32, so it is foreground at exactly
    the first `level` thresholds, as in `seed_from_cam`. Add the counts over images, then `curve_confusions`. The
    thresholds ascend.
    """
    threshold_T = np.asarray(thresholds_T, dtype=np.float32)
    if threshold_T.ndim != 1 or not (np.diff(threshold_T) > 0).all():
        raise ValueError("the thresholds of a curve must ascend, and differ in float32")
    value_HW, label_HW = strongest_class(cam_KHW, keys)
    if label_HW.max(initial=0) >= num_classes:
        raise ValueError(f"the CAM has key {label_HW.max() - 1}, but there are {num_classes} classes with background")
    gt = np.asarray(gt_HW)
    # Pixels that do not count have a row of their own, which is cheaper than to pick out the others.
    truth_HW = np.where(_counted(gt, value_HW.shape, num_classes), gt, num_classes)
    cell_P = np.searchsorted(threshold_T, value_HW.ravel(), side="left")
    for index_HW, size in ((truth_HW, num_classes + 1), (label_HW, num_classes)):
        cell_P *= size
        cell_P += index_HW.ravel()
    shape = (len(threshold_T) + 1, num_classes + 1, num_classes)
    return np.bincount(cell_P, minlength=int(np.prod(shape))).reshape(shape)[:, :-1]


def curve_confusions(counts_LCC: Counts) -> Counts:
    """The confusion counts (T,C,C), [truth, prediction], of the seeds at each threshold, from summed curve counts."""
    above_TCC = counts_LCC[::-1].cumsum(axis=0)[::-1][1:].copy()  # foreground at threshold t: level above t
    rest_TC = counts_LCC.sum(axis=(0, 2)) - above_TCC.sum(axis=2)
    above_TCC[:, :, 0] += rest_TC
    return above_TCC


def curve_miou(counts_LCC: Counts, *, absent: AbsentRule) -> Floats:
    """The mIoU (T,) at each threshold, from summed curve counts."""
    return np.array([miou(conf_CC, absent=absent) for conf_CC in curve_confusions(counts_LCC)])


def silent_counts(cam_KHW: npt.NDArray[Any]) -> Counts:
    """[maps that are nowhere above 0, maps] of one image's classes: a silent map gives no seed at any score."""
    return np.array([int((cam_KHW <= 0).all(axis=(1, 2)).sum()), len(cam_KHW)], np.int64)


def choose_bg_score(thresholds_T: Sequence[float], miou_T: npt.ArrayLike) -> float:
    """The first of the best thresholds of a curve; ValueError for a curve without a value."""
    curve_T = np.asarray(miou_T, dtype=np.float64)
    if curve_T.shape != (len(thresholds_T),) or np.isnan(curve_T).all():
        raise ValueError("no curve to choose the background score from: no image has masks; set seeds.protocol: fixed")
    return float(thresholds_T[int(np.nanargmax(curve_T))])

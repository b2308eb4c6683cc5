"""Dense CRF of one image, array in and array out, with the named settings of the official codes (METHOD 9).

Shapes: C labels, H W pixels. The result Q is the (C,H,W) float32 marginals; its argmax is the refined label map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
LABEL_GT_PROB = 0.7  # how far all official codes trust a label map


@dataclass(frozen=True)
class CrfParams:
    """Kernel widths in pixels and grey levels, their weights, and how the unary is made."""

    unary: Literal["soft", "labels"]
    """From probabilities (`crf_soft`) or from a label map (`crf_labels`)."""
    classes: Literal["all", "present"]
    """Labels that take part: all of the dataset, or background and the image's own."""
    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    iterations: int
    position: Literal["xy", "yx"] = "xy"
    """Order of the position features. The lattice is approximate and depends on it: only `ppc_aff` has rows first."""


PRESETS: dict[str, CrfParams] = {
    # PSA, SEAM and EPS: probabilities for the low and high background powers of AffinityNet
    "psa_soft": CrfParams("soft", "present", 3, 3, 80, 13, 10, 10),
    # PPC's branch esp: as above, fewer iterations; its seeds + CRF are the pseudo masks
    "eps_soft": CrfParams("soft", "present", 3, 3, 80, 13, 10, 5),
    # PPC's seeds + CRF, METHOD 6.5
    "ppc_seed": CrfParams("labels", "all", 3, 3, 50, 5, 10, 10),
    # PPC's aff_prepare; it hands its own features to the CRF, rows before columns
    "ppc_aff": CrfParams("labels", "all", 3, 3, 80, 13, 10, 10, position="yx"),
    # IRN's confident labels, METHOD 10
    "irn_label": CrfParams("labels", "present", 3, 3, 50, 5, 10, 10),
    # SEAM after the random walk; off by default there
    "seam_aff": CrfParams("soft", "all", 3, 3, 80, 13, 10, 1),
    # DeepLab's predictions, SEAM's segmentation code
    "deeplab_test": CrfParams("soft", "all", 3, 3, 32, 13, 10, 1),
    # DeepLab-v2 ResNet101 as published; PPC names it, iterations unverified
    "deeplab_v2": CrfParams("soft", "all", 1, 3, 67, 3, 4, 10),
}


def _densecrf() -> tuple[Any, Any]:
    """The modules densecrf and utils of pydensecrf; here, so that all else works without them."""
    try:
        from pydensecrf import densecrf, utils
    except ImportError as error:
        remedy = "pip install pydensecrf2 (the package named pydensecrf does not compile today)"
        raise ImportError(f"the dense CRF needs the module pydensecrf: {remedy}") from error
    return densecrf, utils


def _infer(image_HW3: npt.NDArray[np.uint8], unary_CHW: Floats, scale_C: Floats, params: CrfParams) -> Floats:
    """Mean field of a Potts model with a strength per label (1: as `params` says)."""
    densecrf, utils = _densecrf()
    C, H, W = unary_CHW.shape
    if image_HW3.shape != (H, W, 3) or image_HW3.dtype != np.uint8:
        raise ValueError(f"the CRF needs a uint8 image of {(H, W, 3)}, got {image_HW3.dtype} of {image_HW3.shape}")
    image = np.array(image_HW3, order="C")  # a copy: pydensecrf refuses strided and read-only arrays
    field = densecrf.DenseCRF2D(W, H, C)
    field.setUnaryEnergy(np.ascontiguousarray(unary_CHW.reshape(C, -1), dtype=np.float32))
    # pydensecrf negates a number but not a vector of compatibilities
    gaussian_C = (-params.gaussian_compat * scale_C).astype(np.float32)
    bilateral_C = (-params.bilateral_compat * scale_C).astype(np.float32)
    if params.position == "xy":
        field.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=gaussian_C)
        sxy, srgb = params.bilateral_sxy, params.bilateral_srgb
        field.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=bilateral_C)
    else:
        position = utils.create_pairwise_gaussian((params.gaussian_sxy,) * 2, (H, W))
        field.addPairwiseEnergy(position, compat=gaussian_C)
        sdims, schan = (params.bilateral_sxy,) * 2, (params.bilateral_srgb,) * 3
        colour = utils.create_pairwise_bilateral(sdims, schan, image, chdim=2)
        field.addPairwiseEnergy(colour, compat=bilateral_C)
    return np.array(field.inference(params.iterations), dtype=np.float32).reshape(C, H, W)


def crf_soft(image_HW3: npt.NDArray[np.uint8], prob_CHW: npt.ArrayLike, *, params: CrfParams) -> Floats:
    """Marginals (C,H,W) from the probabilities or scores of C labels; below 1e-5 they count as 1e-5."""
    prob = np.asarray(prob_CHW, dtype=np.float32)
    return _infer(image_HW3, -np.log(np.clip(prob, 1e-5, 1)), np.ones(len(prob), np.float32), params)


def crf_labels(
    image_HW3: npt.NDArray[np.uint8],
    label_HW: npt.ArrayLike,
    *,
    num_labels: int,
    gt_prob: float,
    params: CrfParams,
) -> Floats:
    """Marginals (num_labels,H,W) from a label map that is trusted with probability `gt_prob`.

    `num_labels` decides results: the rest of the probability is shared by the other labels. Those that do not occur
    all start alike, so they stay alike, and the m of them run as one label with the unary of their sum and 1/m of the
    strength. This is exact but for rounding, and 2.4 times as fast for 2 of 21 labels on 500 x 375 pixels.
    """
    present_L, local_HW = np.unique(np.asarray(label_HW), return_inverse=True)
    if present_L[0] < 0 or present_L[-1] >= num_labels:
        raise ValueError(f"the label map holds {present_L[-1]}, but num_labels is {num_labels}")
    if num_labels == 1:
        return np.ones((1, *local_HW.shape), np.float32)
    L, others = len(present_L), num_labels - len(present_L)
    unary = np.full((L + (others > 0), *local_HW.shape), -np.log((1 - gt_prob) / (num_labels - 1)), np.float32)
    np.put_along_axis(unary, local_HW[None], np.float32(-np.log(gt_prob)), axis=0)
    scale = np.ones(len(unary), np.float32)
    if others:
        unary[L] -= np.float32(np.log(others))
        scale[L] = 1 / others
    q = _infer(image_HW3, unary, scale, params)
    full = np.empty((num_labels, *local_HW.shape), np.float32)
    if others:
        full[:] = q[L] / others
    full[present_L] = q[:L]
    return full


def refine_scores(
    image_HW3: npt.NDArray[np.uint8],
    score_CHW: npt.ArrayLike,
    keys: npt.ArrayLike,
    *,
    num_classes: int,
    params: CrfParams,
) -> Floats:
    """Marginals (C,H,W) from the scores of [background, classes of `keys`], in that order, as `params` says.

    Labels start from the highest score, ties to the lowest label. With `classes` all, those that are not there take
    part with a score of 0; they win nowhere, and are not returned.
    """
    score = np.asarray(score_CHW, dtype=np.float32)
    label_C = np.concatenate([[0], np.asarray(keys, dtype=np.int64) + 1])
    names_L = np.sort(label_C) if params.classes == "present" else np.arange(num_classes)
    place_C = np.searchsorted(names_L, label_C)
    if params.unary == "labels":
        order = np.argsort(label_C)
        start_HW = place_C[order][score[order].argmax(axis=0)]
        q_LHW = crf_labels(image_HW3, start_HW, num_labels=len(names_L), gt_prob=LABEL_GT_PROB, params=params)
    else:
        score_LHW = np.zeros((len(names_L), *score.shape[1:]), np.float32)
        score_LHW[place_C] = score
        q_LHW = crf_soft(image_HW3, score_LHW, params=params)
    return q_LHW[place_C]


def refine_seed(
    image_HW3: npt.NDArray[np.uint8],
    cam_KHW: npt.ArrayLike,
    keys: npt.ArrayLike,
    *,
    background: float | npt.ArrayLike,
    num_classes: int,
    params: CrfParams,
) -> npt.NDArray[np.uint8]:
    """The CRF's label map (0 background, key + 1) of a CAM and its background, a score or (H,W), as `params` says."""
    cam, label_K = np.asarray(cam_KHW, dtype=np.float32), np.asarray(keys, dtype=np.int64) + 1
    score_CHW = np.concatenate([np.broadcast_to(np.asarray(background, np.float32), (1, *cam.shape[1:])), cam])
    q_CHW = refine_scores(image_HW3, score_CHW, keys, num_classes=num_classes, params=params)
    label_C = np.concatenate([[0], label_K])
    order = np.argsort(label_C)
    refined_HW: npt.NDArray[np.uint8] = label_C[order][q_CHW[order].argmax(axis=0)].astype(np.uint8)
    return refined_HW

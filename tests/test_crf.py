"""The dense CRF against all stored official results, and its promises."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import golden

from ppc.crf import LABEL_GT_PROB, PRESETS, CrfParams, crf_labels, crf_soft, refine_seed

CRFS = ["crf_60x80", "crf_71x53"]


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def scores(cams: np.ndarray, power: int) -> np.ndarray:
    """[background, CAMs] with PSA's background (1 - max)^power."""
    cam = cams.astype(np.float32)
    return np.concatenate([(1 - cam.max(0, keepdims=True)) ** power, cam])


@pytest.mark.parametrize("name", CRFS)
def test_label_crfs_are_the_official_ones(name):
    data = golden(name)
    names = np.r_[0, data["keys"] + 1]
    cases = [("label_bg026", "infer_crf_q", "infer_crf_label", "ppc_seed")]
    cases += [(f"prep_label_a{a}", f"prep_crf_q_a{a}", f"prep_crf_label_a{a}", "ppc_aff") for a in (4, 24)]
    for label, q, result, preset in cases:
        out = crf_labels(data["image"], data[label], num_labels=21, gt_prob=LABEL_GT_PROB, params=PRESETS[preset])
        assert out.shape == (21, *data[label].shape) and out.dtype == np.float32
        close(out[names], data[q])
        np.testing.assert_array_equal(out.argmax(0), data[result])


@pytest.mark.parametrize("name", CRFS)
def test_irn_labels_are_the_official_ones(name):
    data = golden(name)
    for t in ("30", "05"):
        label, params = data[f"irn_label_in_{t}"], PRESETS["irn_label"]
        out = crf_labels(data["image"], label, num_labels=len(data["keys"]) + 1, gt_prob=0.7, params=params)
        np.testing.assert_array_equal(out.argmax(0), data[f"irn_crf_out_{t}"])


@pytest.mark.parametrize("name", CRFS)
def test_soft_crfs_are_the_official_ones(name):
    data = golden(name)
    for power in (4, 24):
        out = crf_soft(data["image"], scores(data["cams"], power), params=PRESETS["psa_soft"])
        close(out, data[f"soft_crf_a{power}"])
    for preset, q, result in (
        ("deeplab_test", "seg_crf_q", "seg_crf_label"),
        ("deeplab_v2", "v2_crf_q", "v2_crf_label"),
    ):
        out = crf_soft(data["image"], data["seg_prob"], params=PRESETS[preset])
        close(out[data["seg_crf_q_channels"]], data[q])
        np.testing.assert_array_equal(out.argmax(0), data[result])


@pytest.mark.parametrize("name", CRFS)
def test_unaries_are_the_official_ones(name):
    """With no iteration the CRF returns softmax(-unary), which fixes the unary up to a constant of the pixel."""
    data = golden(name)
    params = replace(PRESETS["ppc_seed"], iterations=0)
    thin = np.s_[:, ::3, ::3]
    probability = crf_labels(data["image"], data["label_bg026"], num_labels=21, gt_prob=0.7, params=params)[thin]
    close(probability, np.exp(-data["unary_labels_gt07"]))  # sums to 1 over the labels
    out = crf_soft(data["image"], scores(data["cams"], 4), params=params)
    stored = np.exp(-data["unary_softmax_out"])
    np.testing.assert_allclose(stored, np.clip(data["unary_softmax_in"], 1e-5, 1), rtol=1e-5)
    close(out[thin], stored / stored.sum(0, keepdims=True))


@pytest.mark.parametrize("preset", ["ppc_seed", "ppc_aff"])
def test_labels_that_do_not_occur_run_as_one(preset):
    """The merged labels give what the plain CRF gives, here from a softmax with the same unary."""
    data = golden("crf_60x80")
    label = data["label_bg026"]
    prob = np.full((21, *label.shape), 0.3 / 20, np.float32)
    np.put_along_axis(prob, label[None].astype(np.int64), 0.7, axis=0)
    plain = crf_soft(data["image"], prob, params=PRESETS[preset])
    merged = crf_labels(data["image"], label, num_labels=21, gt_prob=0.7, params=PRESETS[preset])
    np.testing.assert_allclose(merged, plain, atol=1e-5)
    np.testing.assert_array_equal(merged.argmax(0), plain.argmax(0))
    few = crf_labels(data["image"], np.unique(label, return_inverse=True)[1], num_labels=3, gt_prob=0.7,
                     params=PRESETS[preset])  # fmt: skip
    assert np.abs(few - plain[np.unique(label)]).max() > 0.1, "the number of labels decides results"


def test_refined_seed_follows_the_preset():
    data = golden("crf_60x80")
    image, cams, keys = data["image"], data["cams"], data["keys"]
    names = np.r_[0, keys + 1]
    official = refine_seed(image, cams, keys, background=0.26, num_classes=21, params=PRESETS["ppc_seed"])
    assert official.dtype == np.uint8
    np.testing.assert_array_equal(official, data["infer_crf_label"])
    irn = refine_seed(image, cams, keys, background=0.3, num_classes=21, params=PRESETS["irn_label"])
    np.testing.assert_array_equal(irn, names[data["irn_crf_out_30"]])
    score = np.concatenate([np.full((1, *cams.shape[1:]), 0.26, np.float32), cams.astype(np.float32)])
    soft = refine_seed(image, cams[::-1], keys[::-1], background=0.26, num_classes=21, params=PRESETS["psa_soft"])
    np.testing.assert_array_equal(soft, names[crf_soft(image, score, params=PRESETS["psa_soft"]).argmax(0)])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_refines_any_image(preset):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)
    for k in (0, 1, 3):
        cam = rng.random((k, 17, 23), dtype=np.float32)
        out = refine_seed(image, cam, [4, 0, 2][:k], background=0.2, num_classes=6, params=PRESETS[preset])
        assert out.shape == (17, 23) and set(np.unique(out)) <= {0, *(x + 1 for x in [4, 0, 2][:k])}


def test_any_memory_layout_gives_the_same_and_stays_as_it_is():
    data = golden("crf_71x53")
    image, label = data["image"], data["label_bg026"]
    kwargs = {"num_labels": 21, "gt_prob": 0.7, "params": PRESETS["ppc_seed"]}
    want = crf_labels(image, label, **kwargs)
    frozen = np.asfortranarray(image)
    frozen.flags.writeable = False
    strided = np.repeat(image, 2, axis=1)[:, ::2]
    for view in (frozen, strided):
        np.testing.assert_array_equal(crf_labels(view, np.asfortranarray(label), **kwargs), want)
    prob = np.random.default_rng(0).random((3, *label.shape), dtype=np.float32)
    before = image.copy(), label.copy(), prob.copy()
    crf_soft(image, prob, params=PRESETS["psa_soft"])
    for array, old in zip((image, label, prob), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_what_does_not_fit_is_refused():
    image, label = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
    params = PRESETS["ppc_seed"]
    with pytest.raises(ValueError, match="uint8 image"):
        crf_labels(image.astype(np.float32), label, num_labels=3, gt_prob=0.7, params=params)
    with pytest.raises(ValueError, match=r"\(5, 4, 3\)"):
        crf_labels(image, label.T, num_labels=3, gt_prob=0.7, params=params)
    with pytest.raises(ValueError, match="label map holds 255"):
        crf_labels(image, label + np.uint8(255), num_labels=3, gt_prob=0.7, params=params)


def test_a_missing_library_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match="pip install pydensecrf2"):
        crf_soft(np.zeros((4, 5, 3), np.uint8), np.ones((2, 4, 5)), params=PRESETS["psa_soft"])


def test_presets_are_the_table_of_method_9() -> None:
    assert PRESETS == {
        "psa_soft": CrfParams("soft", "present", 3, 3, 80, 13, 10, 10),
        "eps_soft": CrfParams("soft", "present", 3, 3, 80, 13, 10, 5),
        "ppc_seed": CrfParams("labels", "all", 3, 3, 50, 5, 10, 10),
        "ppc_aff": CrfParams("labels", "all", 3, 3, 80, 13, 10, 10, "yx"),
        "irn_label": CrfParams("labels", "present", 3, 3, 50, 5, 10, 10),
        "seam_aff": CrfParams("soft", "all", 3, 3, 80, 13, 10, 1),
        "deeplab_test": CrfParams("soft", "all", 3, 3, 32, 13, 10, 1),
        "deeplab_v2": CrfParams("soft", "all", 1, 3, 67, 3, 4, 10),
    }

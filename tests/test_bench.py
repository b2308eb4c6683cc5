"""Both sides of every benchmark compute the same thing; nothing here looks at a clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import common
import contrast
import crf
import curve
import inference
import inputs
import many
import numpy as np
import pcm
import pytest
import seam
import torch

from ppc.cam import pcm as our_pcm
from ppc.checks import check_trial
from ppc.loading import load_study
from ppc.seeding import derive_rng
from ppc.study import expand


def test_contrast():
    case = contrast.make_case(3, 6)
    case = replace(
        case,
        feature_VNDHW=[x.detach().double().requires_grad_() for x in case.feature_VNDHW],
        map_VNCHW=[x.double() for x in case.map_VNCHW],
    )
    sides = [contrast.ours(case), contrast.reference(case, contrast.draws(case))]
    torch.testing.assert_close(sides[0], sides[1].double(), rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, case.feature_VNDHW) for loss in sides]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max()))


def test_curve(tmp_path):
    dataset = common.write_voc(tmp_path / "voc", 3, width=48)
    ids = dataset.ids("train")
    curve.write_cams(tmp_path, ids, width=48)
    ours = curve.ours(tmp_path, dataset, ids)
    np.testing.assert_allclose(ours, curve.reference(tmp_path, dataset, ids), rtol=1e-12)
    assert ours.shape == (60,) and ours.max() > ours.min()


def test_pcm(monkeypatch):
    inputs_ = pcm.make_inputs(7, 9)
    monkeypatch.setattr("ppc.cam.PCM_BLOCK", 100)
    with torch.inference_mode():
        torch.testing.assert_close(our_pcm(*inputs_), pcm.both_images(*inputs_), rtol=1e-5, atol=1e-6)


def test_seam():
    case = seam.make_case(3, 40, 24, 8)
    leaves = [*case.cam, *case.refined]
    sides = [seam.ours(case), seam.reference(case)]
    torch.testing.assert_close(*sides, rtol=1e-5, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in sides), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def test_crf():
    image, seed_HW = crf.make_case(64)
    plain = crf.all_labels(image, seed_HW)
    np.testing.assert_allclose(crf.ours(image, seed_HW), plain, atol=1e-5)
    assert np.abs(crf.occurring_alone(image, seed_HW) - plain).max() > 0.01, "leaving labels out is another CRF"


def test_inference():
    case = inference.make_case("tiny", 64)
    ours = inference.ours(*case)
    np.testing.assert_allclose(ours, inference.reference(*case), atol=1e-4)
    assert ours.max() > ours.min()


def test_inputs(tmp_path):
    dataset = common.write_voc(tmp_path / "voc", 4, width=64)
    samples = inputs.make_set(dataset, color_jitter=False)  # with it, the two sides draw in different orders
    for image_id in dataset.ids("train"):
        rng = derive_rng("augment", 0, 0, image_id)
        theirs = inputs.reference_image(dataset.image_path(image_id), rng, color_jitter=False)
        torch.testing.assert_close(samples.sample(0, image_id)["image_3HW"], theirs, rtol=1e-5, atol=1e-5)


def test_many_is_one_variant_of_many_seeds(tmp_path):
    study = load_study(many.write_study(tmp_path, 3))
    specs = expand(study, twin="tiny", check=check_trial)
    assert [(spec.variant, spec.seed) for spec in specs] == [("tiny", 0), ("tiny", 1), ("tiny", 2)]
    assert f"{study.name}-tiny" == many.NAME


def test_memory_of_a_call_is_what_it_adds():
    assert 190 < common.peak_mib(_holds, 200) < 230
    assert common.peak_mib(_holds, 1) < 20


def _holds(mib):
    return lambda: np.ones(mib * common.MIB, np.uint8).sum()


@pytest.mark.parametrize("number", range(6))
def test_scenes_have_the_asked_size(number):
    image, mask = common.scene(number, 64)
    assert image.shape == (48, 64, 3) and mask.shape == (48, 64)


def test_make_bench_runs_every_script():
    root = Path(__file__).parent.parent
    recipe = (root / "Makefile").read_text()
    scripts = {path.name for path in (root / "bench").glob("*.py")} - {"common.py", "training_step.py"}  # needs a GPU
    assert all(f"bench/{name}" in recipe for name in scripts)

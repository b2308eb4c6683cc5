"""The CAM's maths against the official code's stored values, slow loops, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from torch import Tensor

import ppc.cam
from ppc.cam import (
    fill_background,
    foreground,
    max_norm,
    merge_scales,
    minmax_norm,
    one_hot_max,
    pcm,
    pcm_input,
    seed_from_cam,
    strongest_class,
)

HEADS = ["seam_head_n2", "seam_head_n3_rect", "ppc_head_n2", "ppc_head_n2_rect"]
LOSSES = ["seam_loss_n1_64", "seam_loss_n2_40", "seam_loss_n3_c11_30x24", "ppc_seam_loss_n2_42", "ppc_seam_loss_n3_c15"]


def close(actual: Tensor, expected: np.ndarray, rtol: float) -> None:
    """Relative to the element, or to the array's largest where the element is nearly 0."""
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def resize(x_NCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x_NCHW, tuple(size), mode="bilinear", align_corners=True)


def head(data: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    """SEAM's head by the formulas of METHOD 4.1, its maps and their leaf tensors."""
    t = {k: torch.from_numpy(v).to(dtype) for k, v in data.items() if k[:4] in ("conv", "x") or k.startswith("w_")}
    for name in ("conv6", "w_f8_3_weight", "w_f8_4_weight", "w_f9_weight"):
        t[name].requires_grad_()
    t["low"] = F.conv2d(t["conv6"], t["w_fc8_weight"])
    small = resize(t["x"], t["conv6"].shape[2:])
    branches = [F.conv2d(t[f"conv{i}"], t[f"w_f8_{i - 1}_weight"]).relu() for i in (4, 5)]
    feature = F.conv2d(torch.cat([small, *branches], 1), t["w_f9_weight"])
    t["pcm_in"] = pcm_input(t["low"])
    t["refined"] = pcm(t["pcm_in"], feature)
    return t


@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-9)])
@pytest.mark.parametrize("name", HEADS)
def test_pcm_is_the_official_one(name, dtype, suffix, rtol):
    data = golden(name)
    t = head(data, dtype)
    close(t["pcm_in"], data["pcm_cam_in" + suffix], rtol)
    close(t["refined"], data["pcm_out" + suffix], rtol)
    if "cam_rv_down" in data:
        close(t["refined"], data["cam_rv_down" + suffix], rtol)
    cam, refined = resize(t["low"], data["x"].shape[2:]), resize(t["refined"], data["x"].shape[2:])
    if not suffix:
        close(cam, data["cam"], rtol)
        close(refined, data["cam_rv"], rtol)
    wave = torch.arange(cam.numel(), dtype=torch.float64).cos().to(dtype).view_as(cam)
    (refined * wave).sum().backward()
    assert t["conv6"].grad is None, "the refined map has no gradient to the CAM"
    (cam * wave).sum().backward()
    close(t["conv6"].grad, data["grad_cam_conv6" + suffix], rtol)
    for short in ("f9", "f8_3", "f8_4"):
        close(t[f"w_{short}_weight"].grad, data[f"grad_rv_{short}{suffix}"], rtol)


@pytest.mark.parametrize("name", LOSSES)
def test_helpers_are_the_official_ones(name):
    data = golden(name)
    cam2 = torch.from_numpy(data["cam2"])
    close(one_hot_max(cam2), data["max_onehot_of_cam2"], 1e-6)
    close(max_norm(cam2), data["max_norm_of_cam2"], 1e-5)
    close(minmax_norm(cam2), data["max_norm_np_of_cam2"], 1e-5)


def test_pcm_equals_its_loop_and_its_gradient_is_right():
    gen = torch.Generator().manual_seed(0)
    cam = torch.rand(2, 4, 2, 3, generator=gen, dtype=torch.float64)
    feature = torch.randn(2, 5, 2, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    out, fixed = pcm(cam, feature).detach(), feature.detach()
    for n in range(2):
        q = [fixed[n].flatten(1)[:, i] for i in range(6)]
        q = [v / (v.norm() + 1e-5) for v in q]
        for j in range(6):
            weight = [float((q[i] @ q[j]).clamp(min=0)) for i in range(6)]
            for c in range(4):
                want = sum(w * float(cam[n, c].flatten()[i]) for i, w in enumerate(weight)) / (sum(weight) + 1e-5)
                assert float(out[n, c].flatten()[j]) == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda f: pcm(cam, f), feature)


@pytest.mark.parametrize("block", [1, 30, 100])
def test_pcm_in_blocks_is_the_whole(monkeypatch, block):
    gen = torch.Generator().manual_seed(4)
    cam, feature = torch.rand(2, 4, 5, 6, generator=gen), torch.randn(2, 7, 5, 6, generator=gen)
    whole = pcm(cam, feature.clone().requires_grad_())
    columns = []
    monkeypatch.setattr("ppc.cam.PCM_BLOCK", block)
    monkeypatch.setattr("ppc.cam._spread", lambda *a, f=ppc.cam._spread: columns.append(a[2].shape[2]) or f(*a))
    torch.testing.assert_close(pcm(cam, feature), whole.detach(), rtol=1e-6, atol=1e-7)
    assert columns == {1: [1] * 30, 30: [1] * 30, 100: [3] * 10}[block], "a block holds no more than it may"
    pcm(cam, feature.clone().requires_grad_())
    assert columns[-1] == 30, "with a gradient all columns are kept anyway"


def test_the_gradient_of_the_pcm_is_summed_as_it_always_was():
    """Cutting the columns, even into one piece, changes its last bits: trainings would end elsewhere, under one key."""
    gen = torch.Generator().manual_seed(7)
    cam, seen = torch.rand(4, 5, 12, 12, generator=gen), torch.randn(4, 64, 12, 12, generator=gen)
    towards = torch.randn(cam.shape, generator=gen)

    def plain(feature):
        q = feature.flatten(2)
        q = q / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + 1e-5)
        similarity = F.relu(q.transpose(1, 2) @ q)
        return ((cam.flatten(2) @ similarity) / (similarity.sum(dim=1, keepdim=True) + 1e-5)).view_as(cam)

    gradients = []
    for function in (plain, lambda feature: pcm(cam, feature)):
        feature = seen.clone().requires_grad_()
        (function(feature) * towards).sum().backward()
        gradients.append(feature.grad)
    assert torch.equal(*gradients)


def test_max_norm_gradient():
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(max_norm, x)


def test_one_hot_keeps_ties_and_its_channel():
    x = torch.tensor([0.1, 0.7, 0.7, 0.2]).view(1, 4, 1, 1)
    assert one_hot_max(x).flatten().tolist() == pytest.approx([0.1, 0.7, 0.7, 0])
    assert one_hot_max(x, keep_channel=3).flatten().tolist() == pytest.approx([0, 0.7, 0.7, 0.2])


def test_background_may_be_last():
    x = torch.tensor([0.1, 0.7, 0.4]).view(1, 3, 1, 1)
    assert fill_background(x, bg_channel=2).flatten().tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert fill_background(x).flatten().tolist() == pytest.approx([0.3, 0.7, 0.4])
    assert foreground(x, bg_channel=2).flatten().tolist() == pytest.approx([0.1, 0.7])
    assert foreground(x, bg_channel=1).flatten().tolist() == pytest.approx([0.1, 0.4])


def test_a_silent_map_becomes_minus_one():
    assert torch.equal(minmax_norm(torch.full((1, 2, 3), -0.5)), torch.full((1, 2, 3), -1.0))


def test_inputs_stay_as_they_are():
    gen = torch.Generator().manual_seed(1)
    cam, feature = torch.randn(2, 5, 4, 4, generator=gen), torch.randn(2, 3, 4, 4, generator=gen)
    before = cam.clone(), feature.clone()
    for function in (fill_background, one_hot_max, max_norm, minmax_norm, pcm_input):
        function(cam)
    pcm(cam, feature)
    merge_scales([cam[0], cam[1]], size=(7, 9), rule="minmax")
    merge_scales([cam[0], cam[1]], size=(4, 4), rule="max")
    seed_from_cam(cam[0], [4, 3, 2, 1, 0], bg_score=0.1)
    assert torch.equal(cam, before[0]) and torch.equal(feature, before[1])


@pytest.mark.parametrize(("name", "rule"), [("infer_ppc_40x52", "minmax"), ("infer_psa_48x40", "max")])
def test_merged_scales_and_seed_are_the_official_ones(name, rule):
    data = golden(name)
    maps = [torch.from_numpy(data[f"map_{i}"]).float() for i in range(8)]
    merged = merge_scales(maps, size=tuple(data["size"].tolist()), rule=rule)
    assert merged.dtype == torch.float32
    close(merged, data["norm_cam"], 1e-5)
    seed = seed_from_cam(merged.numpy(), data["keys"], bg_score=float(data["meta_bg"]))
    assert seed.dtype == np.uint8
    np.testing.assert_array_equal(seed, data["pred"])


def test_the_mirror_is_undone():
    cam = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(2))
    twice = merge_scales([cam, cam.flip(-1)], size=(3, 5), rule="max")
    once = cam / (cam.amax((1, 2), keepdim=True) + 5e-6)
    torch.testing.assert_close(twice, once)


def test_an_image_without_classes_is_background():
    merged = merge_scales([torch.zeros(0, 2, 2)] * 2, size=(4, 6), rule="minmax")
    assert merged.shape == (0, 4, 6)
    assert seed_from_cam(merged, [], bg_score=0.0).tolist() == [[0] * 6] * 4


def test_seed_ties_and_float32():
    cam = np.array([[[0.3, 0.5, 0.26, np.nextafter(np.float32(0.26), 1)]], [[0.5, 0.5, 0.1, 0.0]]], np.float32)
    assert seed_from_cam(cam, [7, 2], bg_score=0.26).tolist() == [[3, 3, 0, 8]]  # the lower class wins a tie
    assert strongest_class(cam, [7, 2])[1].tolist() == [[3, 3, 8, 8]]


def test_seed_equals_the_stack_of_all_classes():
    rng = np.random.default_rng(0)
    for t in (0.0, 0.25, 0.5):
        cam = (rng.integers(-2, 5, (3, 9, 11)) / 4).astype(np.float32)  # many ties, negative values too
        keys = np.array([0, 4, 9])
        stack = np.zeros((12, 9, 11), np.float32)
        stack[keys + 1] = cam
        stack[0] = t
        np.testing.assert_array_equal(seed_from_cam(cam, keys, bg_score=t), stack.argmax(0))


def test_a_broken_cam_is_refused():
    with pytest.raises(ValueError, match="diverged"):
        seed_from_cam(np.full((1, 2, 2), np.nan), [0], bg_score=0.2)
    with pytest.raises(ValueError, match="keys"):
        seed_from_cam(np.zeros((2, 2, 2)), [0], bg_score=0.2)

"""Segmentation nets against the official networks' numbers (net_seg_*, net_aspp_*, manifests, param_groups_seg_*)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from test_nets import rule_weights
from tiny_run import tiny_config
from torch import Tensor, nn

from ppc.backbones import build_backbone
from ppc.batchnorm import GlobalBatchNorm2d
from ppc.deeplab import SEG_HEADS, Aspp, BatchNormMode, SegNet, official_momentum
from ppc.dropout import SeededDropout, set_dropout_seeds
from ppc.optim import param_groups
from ppc.stages import versions_of

OFFICIAL_NETS = {"resnet38": "resnet38d", "resnet101": "resnet101s"}


def seg_net(backbone: str, batch_norm: BatchNormMode = "statistics", head: str = "largefov", **changes: Any) -> SegNet:
    body = build_backbone(backbone, output_stride=8, weights=None, normalisation="auto", seed=0)
    knobs = {"num_classes": 21, "dropout": 0.5, "momentum_backbone": 0.1, "momentum_head": 0.2, "seed": 0} | changes
    return SegNet(body, head=head, batch_norm=batch_norm, **knobs)


def official_name(name: str) -> str:
    return name.removeprefix("head.").replace("backbone.net.", "backbone.", 1)


def read_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", OFFICIAL_NETS)
def test_the_official_nets(name: str) -> None:
    """Tensor names and shapes, groups of the optimiser, and logits of weights filled by rule."""
    manifest, groups = (read_json(f"{what}_seg_deeplabv1_{name}") for what in ("manifest", "param_groups"))
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        net = seg_net(OFFICIAL_NETS[name])
    net.to_empty(device="cpu")
    names = {official_name(own): own for own in net.state_dict()}
    assert {short: list(net.state_dict()[own].shape) for short, own in names.items()} == manifest["state"]

    by_id = {id(p): official_name(own) for own, p in net.named_parameters()}
    ours = param_groups(net, weight_decay=5e-4, new_layer_lr_mult=10, bias_lr_mult=2)
    for group, key in zip(ours, ("x1_weight", "x2_bias", "x10_weight", "x20_bias"), strict=True):
        assert [by_id[id(p)] for p in group["params"]] == groups[key], key

    net.load_state_dict({names[n]: v for n, v in rule_weights(manifest["state"]).items()}, strict=False)
    g = golden(f"net_seg_{name}_65x49")
    with torch.no_grad():
        logits = net.eval()(torch.from_numpy(g["x"].astype(np.float32)))
    logits = F.interpolate(logits, g["logits"].shape[2:], mode="bilinear", align_corners=True)
    np.testing.assert_allclose(logits, g["logits"], rtol=1e-5, atol=1e-5 * float(np.abs(g["logits"]).max()))


def test_the_official_aspp() -> None:
    state = read_json("manifest_seg_aspp_small")["state"]
    aspp = Aspp(12, 8, dropout=0.5).eval()
    assert {name: list(v.shape) for name, v in aspp.state_dict().items()} == state
    aspp.load_state_dict(rule_weights(state), strict=False)
    g = golden("net_aspp_30x33")
    with torch.no_grad():
        y = aspp(torch.from_numpy(g["x"].astype(np.float32)))
    np.testing.assert_allclose(y, g["y"], rtol=1e-5, atol=1e-5 * float(np.abs(g["y"]).max()))


@pytest.mark.parametrize("head", SEG_HEADS)
def test_a_head_fits_any_backbone_and_draws_nothing_from_the_global_generator(head: str) -> None:
    net = seg_net("tiny", head=head, num_classes=4)
    image = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    assert sum(isinstance(m, SeededDropout) for m in net.modules()) >= 1
    assert not any(isinstance(m, nn.Dropout | nn.BatchNorm2d) for m in net.head.modules())
    logits = []
    for seeds in ([1, 2], [1, 2], [1, 3]):
        torch.manual_seed(len(logits))
        set_dropout_seeds(net, seeds)
        logits.append(net(image))
    assert logits[0].shape == (2, 4, 5, 7) and torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0][1], logits[2][1])
    if head != "deeplabv3":  # it drops before a BatchNorm, by which all samples see what one has lost
        assert torch.equal(logits[0][0], logits[2][0])
    other, same = (seg_net("tiny", head=head, num_classes=4, seed=seed) for seed in (1, 0))
    weights = [dict(n.head.named_parameters()) for n in (net, same, other)]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    assert any(not torch.equal(v, weights[2][k]) for k, v in weights[0].items())


@pytest.mark.parametrize(("mode", "stored", "affine"), [("frozen", 0, 0), ("statistics", 1, 0), ("trained", 1, 1)])
def test_what_a_training_step_does_to_batch_norm(mode: BatchNormMode, stored: int, affine: int) -> None:
    net = seg_net("resnet50", mode, num_classes=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups = param_groups(net.train(), weight_decay=0.0, new_layer_lr_mult=10, bias_lr_mult=2)
    optimizer = torch.optim.SGD([p for group in groups for p in group["params"]], lr=1e-3)
    set_dropout_seeds(net, [1, 2])
    net(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    body = {"running_mean": "backbone.net.layer3.0.bn2.running_mean"}
    body |= {"weight": "backbone.net.layer3.0.bn2.weight", "conv": "backbone.net.conv1.weight"}
    assert (body["running_mean"] in moved) == bool(stored) and (body["weight"] in moved) == bool(affine)
    assert ("head.bn_fov.weight" in moved) == bool(affine)
    assert {"head.bn_fov.running_mean", body["conv"], "head.conv_fov.weight"} <= moved
    kinds = {type(m) for m in net.backbone.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == ({nn.BatchNorm2d} if mode == "frozen" else {GlobalBatchNorm2d})


def test_training_its_batch_norm_leaves_a_timm_net_the_net_that_it_is() -> None:
    """timm's nets have their activations within BatchNorm."""
    pytest.importorskip("timm")
    name = "timm:tf_efficientnet_lite0"
    body = build_backbone(name, output_stride=16, weights=None, normalisation="auto", seed=0).eval()
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    knobs = {"num_classes": 4, "dropout": 0.5, "momentum_backbone": 0.1, "momentum_head": 0.2, "seed": 0}
    with torch.no_grad():
        expected = body(image)
        assert expected.conv6.std() > 0
        for mode in ("frozen", "statistics", "trained"):
            same = build_backbone(name, output_stride=16, weights=None, normalisation="auto", seed=0)
            net = SegNet(same, head="largefov", batch_norm=mode, **knobs).eval()  # type: ignore[arg-type]
            assert all(torch.equal(*pair) for pair in zip(net.backbone(image), expected, strict=True)), mode


def test_batch_norm_momentum_is_the_official_one() -> None:
    assert [official_momentum(name, "backbone") for name in ("resnet38d", "resnet101s")] == [3e-4, 0.1]
    assert official_momentum("resnet101s", "head") == 3e-4
    net = seg_net("efficientnet_b0", momentum_backbone=0.03, momentum_head=0.05)
    momentum = {n.partition(".")[0]: m.momentum for n, m in net.named_modules() if isinstance(m, GlobalBatchNorm2d)}
    assert momentum == {"backbone": 0.03, "head": 0.05}


def test_an_unknown_head_is_named() -> None:
    with pytest.raises(ValueError, match=r"segmentation.head: no head 'psp'; there are largefov, aspp"):
        seg_net("tiny", head="psp")


def test_elementwise_dropout() -> None:
    layer = SeededDropout(0.3)
    ones = torch.ones(2, 64, 8, 8)
    set_dropout_seeds(layer, [5, 6])
    y: Tensor = layer(ones)
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (y == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert (y[0].amin((1, 2)) < y[0].amax((1, 2))).all(), "single values are dropped"
    set_dropout_seeds(layer, [6])
    assert torch.equal(layer(ones[:1])[0], y[1])


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, 1), ({"backbone.name": "timm:tf_efficientnet_lite0"}, 2),
        ({"backbone.name": "timm:tf_efficientnet_lite0", "segmentation.batch_norm": "frozen"}, 1),
        ({"segmentation.backbone.name": "timm:tf_efficientnet_lite0"}, 2),
    ],
)  # fmt: skip
def test_the_version_is_raised_for_the_timm_nets_that_had_no_activations(changes: dict[str, Any], version: int) -> None:
    stages = ["train_cam", "train_seg", "predict_seg"]
    assert versions_of(tiny_config({"stages": stages, **changes}))["train_seg"] == version

"""Parameter groups, poly schedule and SGD against the official optimiser's numbers (golden optim_poly)."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from tiny_run import tiny_config
from torch import nn

from ppc.backbones import build_backbone
from ppc.methods import build_net
from ppc.nets import CamNet
from ppc.optim import GROUPS, effective_momentum, make_sgd, param_groups, poly_lr, set_lr
from ppc.stages.training import optimizer_of

OFFICIAL: dict[str, Any] = {"weight_decay": 5e-4, "new_layer_lr_mult": 10.0, "bias_lr_mult": 2.0}


def group_names(net: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in param_groups(net, **OFFICIAL)}


def cam_net(backbone: str) -> CamNet:
    """Full-size nets without memory or initialisation: only names and shapes matter here."""
    with torch.device("meta"):
        parts = build_backbone(backbone, output_stride=8, weights=None, normalisation="auto", seed=0)
        return CamNet(parts, num_fg=20, background=True, pcm=True, projector_dim=128, dropout=0.5, seed=0)


def test_groups_are_the_official_ones() -> None:
    official = json.loads((GOLDEN / "param_groups_ppc_resnet38_contrast.json").read_text())
    ours = group_names(cam_net("resnet38d"))
    stripped = [[name.removeprefix("backbone.net.") for name in ours[group]] for group in GROUPS]
    assert stripped == [official["x1_weight"], official["x2_bias"], official["x10_weight"], official["x20_bias"]]


def test_group_settings() -> None:
    groups = param_groups(cam_net("tiny"), weight_decay=0.1, new_layer_lr_mult=7.0, bias_lr_mult=3.0)
    assert [group["lr_mult"] for group in groups] == [1.0, 3.0, 7.0, 21.0]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]


def test_biases_and_group_norm_of_the_backbone_are_biases() -> None:
    tiny = group_names(cam_net("tiny"))
    assert len(tiny["backbone_weight"]) == 5 and all(name.endswith(".0.weight") for name in tiny["backbone_weight"])
    assert len(tiny["backbone_bias"]) == 10 and all(".1." in name for name in tiny["backbone_bias"])
    squeezenet = group_names(cam_net("squeezenet1_1"))
    assert "backbone.net.features.12.squeeze.bias" in squeezenet["backbone_bias"]
    assert not any("features.0." in name for names in squeezenet.values() for name in names)


def test_batch_norm_is_in_no_group_even_in_new_layers() -> None:
    net = nn.Module()
    net.backbone = nn.Conv2d(3, 4, 1)
    net.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert group_names(net) == {
        "backbone_weight": ["backbone.weight"],
        "backbone_bias": ["backbone.bias"],
        "new_weight": ["head.0.weight"],
        "new_bias": ["head.0.bias"],
    }


def test_sgd_follows_the_official_run() -> None:
    g = golden("optim_poly")
    lr, wd, max_step = float(g["meta_lr"]), float(g["meta_wd"]), int(g["meta_max_step"])
    parameters = [nn.Parameter(torch.from_numpy(p0)) for p0 in g["p0"]]
    groups = param_groups(nn.Module(), weight_decay=wd, new_layer_lr_mult=10.0, bias_lr_mult=2.0)
    for group, parameter in zip(groups, parameters, strict=True):
        group["params"] = [parameter]
    momentum = effective_momentum("official", wd)
    np.testing.assert_allclose(g["effective_momentum"], momentum, rtol=1e-12)
    optimizer = make_sgd(groups, lr=lr, momentum=momentum)
    for step, grads in enumerate(g["grads"]):
        set_lr(optimizer, poly_lr(step, max_step=max_step, power=0.9))
        np.testing.assert_allclose([group["lr"] for group in optimizer.param_groups], g["lrs"][step], rtol=1e-9)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.from_numpy(grad)
        optimizer.step()
        for parameter, expected in zip(parameters, g["params"][step], strict=True):
            np.testing.assert_allclose(parameter.detach().double(), expected, rtol=1e-5)


def test_poly_is_frozen_after_the_end_and_starts_at_one() -> None:
    assert poly_lr(0, max_step=10, power=0.9) == 1.0
    assert poly_lr(12, max_step=10, power=0.9) == poly_lr(9, max_step=10, power=0.9) == pytest.approx(0.1**0.9)
    with pytest.raises(ValueError, match="max_step"):
        poly_lr(0, max_step=0, power=0.9)


def test_segmentation_schedule_is_poly_over_one_step_more() -> None:
    g = golden("optim_poly")
    max_step = int(g["meta_max_step"])
    factors = [poly_lr(step, max_step=max_step + 1, power=0.9) for step in range(max_step + 1)]
    np.testing.assert_allclose(float(g["meta_lr"]) * np.array(factors), g["seg_lrs"][:, 0], rtol=1e-9)


def test_momentum_is_official_or_a_number() -> None:
    assert effective_momentum("official", 5e-4) == 5e-4
    assert effective_momentum(0.9, 5e-4) == 0.9


def test_learning_rates_survive_a_checkpoint() -> None:
    def optimizer() -> torch.optim.SGD:
        net = build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=0)
        return make_sgd(param_groups(net, **OFFICIAL), lr=0.01, momentum=0.9)

    first, second = optimizer(), optimizer()
    set_lr(first, 0.5)
    second.load_state_dict(first.state_dict())
    set_lr(second, 0.25)
    assert [group["lr"] for group in second.param_groups] == pytest.approx([0.0025, 0.005, 0.025, 0.05])


def test_each_field_of_a_config_has_its_place_in_the_optimiser() -> None:
    cfg = tiny_config(
        {"train.weight_decay": 0.003, "train.new_layer_lr_mult": 7, "train.bias_lr_mult": 3, "train.momentum": 0.8}
    )
    groups = optimizer_of(build_net(cfg, 3, pretrained=False), cfg.train).param_groups
    assert {g["name"]: (g["lr_mult"], g["weight_decay"], g["momentum"]) for g in groups} == {
        "backbone_weight": (1, 0.003, 0.8),
        "backbone_bias": (3, 0, 0.8),
        "new_weight": (7, 0.003, 0.8),
        "new_bias": (21, 0, 0.8),
    }

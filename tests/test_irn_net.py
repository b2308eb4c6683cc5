"""IRNet and IRN's CAM net against the official networks' numbers, and IRNet over every backbone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from test_nets import rule_weights
from torch import Tensor, nn
from torch.nn import functional as F

from ppc.backbones import BACKBONES, build_backbone
from ppc.cam import merge_scales
from ppc.irn_net import IrnNet, edges, head_groups, levels_problem
from ppc.methods import class_maps
from ppc.nets import CamNet
from ppc.stages.make_seeds import infer_cam

STAGES = {
    "irn": {"conv1": "0.0", "bn1": "0.1", "layer1": "1.0", "layer2": "2.0", "layer3": "3.0", "layer4": "4.0"},
    "cam": {"conv1": "0.0", "bn1": "0.1", "layer1": "0.4", "layer2": "1.0", "layer3": "2.0", "layer4": "3.0"},
}


def manifest(which: str) -> dict[str, list[int]]:
    state: dict[str, list[int]] = json.loads((GOLDEN / f"manifest_irn_resnet50_{which}.json").read_text())["state"]
    return state


def last_name(name: str, stages: dict[str, str]) -> str:
    """The last of the names that the official code has for a tensor, from ours."""
    head, _, rest = name.removeprefix("backbone.net.").partition(".")
    if head in stages:
        return f"backbone.{stages[head]}.{rest}"
    if head == "fc8":
        return f"newly_added.0.{rest}"
    branch = "edge_layers" if head.startswith("fc_edge") else "dp_layers"
    return f"{branch}.{int(head.lstrip('fc_edgp')) - 1}.{rest}"


def with_official_weights(net: nn.Module, which: str) -> nn.Module:
    """The net with the golden files' weights; every tensor of ours has its official one, of its shape."""
    known, names = manifest(which), {name: last_name(name, STAGES[which]) for name in net.state_dict()}
    counters = {name: torch.zeros((), dtype=torch.int64) for name in names if name.endswith("num_batches_tracked")}
    drawn = rule_weights({names[name]: known[names[name]] for name in names})
    state = {name: drawn[official] for name, official in names.items() if official in drawn}
    net.load_state_dict({**state, **counters})
    return net.eval()


def irn_backbone() -> nn.Module:
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        return build_backbone("irn_resnet50", output_stride=16, weights=None, normalisation="auto", seed=0)


@pytest.fixture(scope="module")
def official() -> IrnNet:
    with torch.device("meta"):
        net = IrnNet(irn_backbone(), seed=0)
    return with_official_weights(net.to_empty(device="cpu"), "irn")


def test_names_and_shapes_are_the_official_ones(official: IrnNet) -> None:
    ours = {name.replace("backbone.net.", "resnet50."): list(v.shape) for name, v in official.state_dict().items()}
    known = manifest("irn")
    assert ours == {name: shape for name, shape in known.items() if name.startswith(("resnet50.", "fc_"))}


def test_irnet_gives_the_official_numbers(official: IrnNet) -> None:
    g = golden("net_irn_50x61")
    image, crop = torch.from_numpy(g["x"].astype(np.float32))[0], int(g["meta_crop"])
    edge_hw = edges(official, image, canvas_px=crop)
    np.testing.assert_allclose(edge_hw.numpy(), g["edge"][0], rtol=1e-5, atol=1e-5)
    canvas = torch.zeros(1, 3, crop, crop)
    canvas[0, :, :50, :61] = image
    with torch.no_grad():
        displacement = official(canvas).displacement[0, :, :13, :16]
    np.testing.assert_allclose(displacement.numpy(), g["dp"], rtol=1e-5, atol=1e-5 * float(np.abs(g["dp"]).max()))


def test_irns_cam_net_is_the_plain_one_over_its_backbone() -> None:
    g = golden("net_irn_cam_64x96")
    with torch.device("meta"):
        net = CamNet(irn_backbone(), num_fg=20, background=False, pcm=False, projector_dim=0, dropout=0.0, seed=0)
    with_official_weights(net.to_empty(device="cpu"), "cam")
    image = torch.from_numpy(g["x"].astype(np.float32))[0]
    with torch.no_grad():
        maps = class_maps("cam")(net(torch.stack([image, image.flip(-1)])), (64, 96))
    total = maps[0] + maps[1].flip(-1)
    np.testing.assert_allclose(total, g["cam_sum_of_flips"], rtol=1e-5, atol=1e-5 * float(total.max()))
    trained = {name.split(".")[2] for name, p in net.backbone.named_parameters("backbone") if p.requires_grad}
    assert trained == {"layer3", "layer4"}, "the output of the second stage is detached"
    cam = infer_cam(net, [image], np.array([3, 7]), (64, 96), class_maps("cam"), torch.device("cpu"), rule="irn")
    assert cam.shape == (2, 64, 96) and cam.max() > 0.9


def test_scales_merge_as_irns_do() -> None:
    g = golden("irn_cam_merge_90x120")
    keys, maps = g["valid_cat"], []
    for scale in range(4):
        map_Khw = torch.from_numpy(g[f"out_scale{scale}"].astype(np.float32))[keys]
        maps += [map_Khw, torch.zeros_like(map_Khw)]  # recorded with the mirror's added
    cam = merge_scales(maps, size=(90, 120), rule="irn")
    np.testing.assert_allclose(cam, g["highres_cam"], rtol=1e-5, atol=1e-5)
    mirrored = merge_scales([torch.zeros_like(maps[0]), maps[0].flip(-1)], size=(90, 120), rule="irn")
    assert torch.equal(mirrored, merge_scales([maps[0], torch.zeros_like(maps[0])], size=(90, 120), rule="irn"))
    # What the walk starts from here, the CAM brought to stride 4, against the official one made at that stride.
    ours = F.interpolate(merge_scales(maps, size=(90, 120), rule="max")[None], (23, 30), mode="bilinear")[0]
    assert np.abs(ours.numpy() - g["strided_cam"]).max() < 0.02


@pytest.mark.parametrize("name", BACKBONES)
def test_irnet_fits_every_backbone(name: str) -> None:
    stride = 16 if name == "irn_resnet50" else 8
    with torch.device("meta"):  # shapes alone
        backbone = build_backbone(name, output_stride=stride, weights=None, normalisation="auto", seed=0)
        out = IrnNet(backbone, seed=0).train()(torch.zeros(2, 3, 52, 65))
    assert out.edge.shape == (2, 1, 13, 17) and out.displacement.shape == (2, 2, 13, 17)


@pytest.mark.parametrize("name", ["tiny", "squeezenet1_1"])
def test_the_heads_are_trained_and_nothing_else(name: str) -> None:
    net = IrnNet(build_backbone(name, output_stride=8, weights=None, normalisation="auto", seed=0), seed=0).train()
    image = torch.randn(2, 3, 52, 65, generator=torch.Generator().manual_seed(0))
    out = net(image)
    (out.edge.sum() + out.displacement.square().sum()).backward()
    heads = {id(p) for group in head_groups(net, **RATES) for p in group["params"]}
    for parameter in net.parameters():
        assert (parameter.grad is not None) == (id(parameter) in heads)
    assert not any(m.training for m in net.backbone.modules())


RATES = {"weight_decay": 1e-4, "displacement_lr_mult": 10.0, "bias_lr_mult": 1.0}


def tiny(seed: int = 0) -> IrnNet:
    return IrnNet(build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=1), seed=seed)


def test_every_head_parameter_is_in_one_group_with_its_rate() -> None:
    net = tiny()
    groups = head_groups(net, **{**RATES, "bias_lr_mult": 2.0})
    rates = {g["name"]: g["lr_mult"] for g in groups}
    assert rates == {"edge_weight": 1, "edge_bias": 2, "displacement_weight": 10, "displacement_bias": 20}
    assert all(g["weight_decay"] == 1e-4 for g in groups)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for n, p in net.named_parameters() if not n.startswith("backbone."))
    by_name = {id(p): n for n, p in net.named_parameters()}
    assert {by_name[id(p)] for p in groups[1]["params"]} >= {"fc_edge1.1.weight", "fc_edge5.bias"}


def test_initialisation_follows_the_seed() -> None:
    state, first, again, other = torch.get_rng_state(), tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in first.state_dict().items())
    assert not torch.equal(first.fc_edge1[0].weight, other.fc_edge1[0].weight)
    assert not torch.equal(first.fc_dp1[0].weight[:32], first.fc_edge1[0].weight)


def edge_of(net: IrnNet, height: int, width: int, canvas_px: int) -> Tensor:
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(3))
    straight, mirrored = edges(net, image, canvas_px=canvas_px), edges(net, image.flip(-1), canvas_px=canvas_px)
    torch.testing.assert_close(mirrored.flip(-1), straight)
    return straight


def test_an_image_larger_than_the_canvas_is_whole() -> None:
    net = tiny().eval()
    assert edge_of(net, 40, 90, 64).shape == (10, 23)
    assert edge_of(net, 33, 21, 64).shape == (9, 6)
    assert edge_of(net, 1, 1, 64).shape == (1, 1)


def test_the_mean_displacement_counts_in_eval_mode_alone() -> None:
    net, image = tiny(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net.fc_dp6[4].running_mean += torch.tensor([1.0, -2.0])
    moved = net.train()(image).displacement - net.eval()(image).displacement
    torch.testing.assert_close(moved, torch.tensor([1.0, -2.0])[None, :, None, None].expand_as(moved))


def test_a_backbone_without_stride_4_is_refused() -> None:
    backbone = build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=0)
    backbone.level_info = backbone.level_info[1:]
    with pytest.raises(ValueError, match=r"irn\.backbone\.name: tiny has feature maps at strides \[8, 8, 8\].* 4"):
        IrnNet(backbone, seed=0)
    assert levels_problem(()) is not None

"""AffinityNet, and PSA's plain CAM net, against the official networks' numbers; our own choices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from test_nets import rule_weights
from torch import Tensor, nn

from ppc.affinity import pair_affinity
from ppc.affinity_net import AffinityNet
from ppc.backbones import build_backbone
from ppc.dropout import SeededDropout2d, set_dropout_seeds
from ppc.nets import CamNet
from ppc.optim import param_groups
from ppc.weights import load_state

MANIFESTS = {kind: json.loads((GOLDEN / f"manifest_psa_resnet38_{kind}.json").read_text()) for kind in ("aff", "cls")}


@pytest.fixture(scope="module")
def by_rule() -> dict[str, Tensor]:
    """The weights of both nets: drawing a hundred million takes seconds, and all but the heads are the same."""
    return rule_weights(MANIFESTS["aff"]["state"] | MANIFESTS["cls"]["state"])


def official(kind: str, weights: dict[str, Tensor]) -> nn.Module:
    """One of PSA's two nets over ResNet38 with the weights of the rule."""
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        backbone = build_backbone("resnet38d", output_stride=8, weights=None, normalisation="auto", seed=0)
        net: nn.Module = (
            AffinityNet(backbone, seed=0)
            if kind == "aff"
            else CamNet(backbone, num_fg=20, background=False, pcm=False, projector_dim=0, dropout=0.5, seed=0)
        )
    net.to_empty(device="cpu")
    mine = {name: weights[name] for name in MANIFESTS[kind]["state"] if name in weights}
    report = load_state(net, mine, ignored=(), source="the rule", target="this net")
    assert not report.left_over and all(name.endswith("num_batches_tracked") for name in report.missing)
    return net


def outputs(kind: str, net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    if kind == "aff":
        return {"aff": pair_affinity(net(image), radius=5).flatten(2)}
    cam = net(image).cam
    return {"cam": F.relu(cam), "logits": cam.mean((2, 3))}


@pytest.mark.parametrize(("kind", "file"), [("aff", "net_psa_aff_88x96"), ("cls", "net_psa_cls_40x40")])
def test_names_groups_and_outputs_are_the_official_ones(kind: str, file: str, by_rule: dict[str, Tensor]) -> None:
    net, manifest = official(kind, by_rule), MANIFESTS[kind]
    net.train()
    state = {name.removeprefix("backbone.net."): list(v.shape) for name, v in net.state_dict().items()}
    assert state == manifest["state"]
    assert sum(v.numel() for v in net.state_dict().values()) == manifest["n_params"]  # buffers counted too
    names = {id(p): name.removeprefix("backbone.net.") for name, p in net.named_parameters()}
    trainable = manifest["trainable_by_requires_grad"]
    assert [names[id(p)] for p in net.parameters() if p.requires_grad] == trainable
    groups = param_groups(net, weight_decay=5e-4, new_layer_lr_mult=10, bias_lr_mult=2)
    heads = [name for name in trainable if name.startswith("f")]
    backbone = [name for name in trainable if name not in heads]
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [backbone, [], heads, []]

    g = golden(file)
    with torch.no_grad():
        made = outputs(kind, net.eval(), torch.from_numpy(g["x"].astype(np.float32)))
    for key, value in made.items():
        np.testing.assert_allclose(value, g[key], rtol=1e-5, atol=1e-5 * float(np.abs(g[key]).max()), err_msg=key)


def tiny_net(name: str = "tiny", *, output_stride: int = 8, seed: int = 0) -> AffinityNet:
    backbone = build_backbone(name, output_stride=output_stride, weights=None, normalisation="auto", seed=1)
    return AffinityNet(backbone, seed=seed)


@pytest.mark.parametrize("name", ["tiny", "squeezenet1_1"])
@pytest.mark.parametrize("size", [(64, 48), (41, 87)])
def test_features_lie_on_the_grid_of_8_pixels(name: str, size: tuple[int, int]) -> None:
    """SqueezeNet's own maps are a cell smaller than that."""
    feature = tiny_net(name).eval()(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert feature.shape == (2, 448, -(-size[0] // 8), -(-size[1] // 8))
    assert -1.00001 < feature.min() < 0, "ELU"


def test_the_whole_net_learns_from_affinities() -> None:
    net = tiny_net()
    pair_affinity(net(torch.randn(1, 3, 48, 48)), radius=3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)


def test_initialisation_depends_on_seed_and_layer_alone() -> None:
    one, same, other = tiny_net(seed=3), tiny_net(seed=3), tiny_net(seed=4)
    assert torch.equal(one.f9.weight, same.f9.weight) and not torch.equal(one.f9.weight, other.f9.weight)
    bound = 4 * (6 / (448 + 448)) ** 0.5  # Xavier-uniform, gain 4
    assert 0.95 * bound < one.f9.weight.abs().max() <= bound
    assert float(one.f8_5.weight.detach().std()) == pytest.approx((2 / 128) ** 0.5, rel=0.05)  # Kaiming-normal


def test_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a backbone of stride 8, got 16"):
        tiny_net(output_stride=16)


def test_dropout_of_the_backbone_takes_seeds() -> None:
    with torch.device("meta"):
        backbone = build_backbone("resnet38d", output_stride=8, weights=None, normalisation="auto", seed=0)
        net = AffinityNet(backbone, seed=0)
    set_dropout_seeds(net, [1, 2])
    assert [m.p for m in net.modules() if isinstance(m, SeededDropout2d)] == [0.3, 0.3, 0.5, 0.5]

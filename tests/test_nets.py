"""CAM nets against the official networks' numbers: heads (seam_head_*, ppc_head_*) and the whole net (net_ppc_*)."""

import json
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from torch import Tensor, nn

from ppc.backbones import Features, build_backbone
from ppc.dropout import SeededDropout2d, set_dropout_seeds
from ppc.nets import CamNet, CamOutput
from ppc.weights import LoadReport, load_state

MANIFEST = json.loads((GOLDEN / "manifest_ppc_resnet38_contrast.json").read_text())


class FixedFeatures(nn.Module):
    """Stands in for a backbone: gives the stored taps."""

    def __init__(self, conv4: Tensor, conv5: Tensor, conv6: Tensor) -> None:
        super().__init__()
        self.features = Features(conv4, conv5, conv6)
        self.channels = (conv4.shape[1], conv5.shape[1], conv6.shape[1])

    def forward(self, image_N3HW: Tensor) -> Features:
        return self.features


def golden_head(g: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[CamNet, Tensor]:
    """A CAM net with the file's taps and head weights, and its conv6, a leaf that gathers gradients."""
    taps = [torch.from_numpy(g[name]).to(dtype).requires_grad_() for name in ("conv4", "conv5", "conv6")]
    projector_dim = g["w_fc_proj_weight"].shape[0] if "w_fc_proj_weight" in g else 0
    net = CamNet(
        FixedFeatures(*taps), num_fg=20, background=True, pcm=True, projector_dim=projector_dim, dropout=0.5, seed=0
    )
    for name in ("fc8", "fc_proj", "f8_3", "f8_4", "f9"):
        if f"w_{name}_weight" in g:
            weight = torch.from_numpy(g[f"w_{name}_weight"]).to(dtype)
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
            layer.weight = nn.Parameter(weight)
            setattr(net, name, layer)
    return net.eval(), taps


def upsampled(x: Tensor, like: np.ndarray) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


def cosine_sum(x: Tensor) -> Tensor:
    return (x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["seam_head_n2", "seam_head_n3_rect", "ppc_head_n2", "ppc_head_n2_rect"])
def test_head(name: str, dtype: torch.dtype) -> None:
    g = golden(name)
    net, taps = golden_head(g, dtype)
    suffix, rtol = ("_f64", 1e-9) if dtype == torch.float64 else ("", 1e-5)

    def check(actual: Tensor, key: str) -> None:
        stored = g.get(key + suffix)
        expected = g[key] if stored is None else stored  # some values exist in float32 only
        tolerance = 1e-5 if stored is None else rtol
        atol = tolerance * float(np.abs(expected).max())
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=atol, err_msg=key)

    out = net(torch.from_numpy(g["x"]).to(dtype))
    cam, refined = upsampled(out.cam, g["cam"]), upsampled(out.refined, g["cam_rv"])
    check(cam, "cam")
    check(refined, "cam_rv")
    check(out.refined, "pcm_out")
    if "f_proj" in g:
        check(out.projected, "f_proj")
        check(out.refined, "cam_rv_down")
    else:
        assert out.projected is None

    layers = ("f9", "f8_3", "f8_4")
    grads = torch.autograd.grad(
        cosine_sum(refined),
        [*(getattr(net, layer).weight for layer in layers), net.fc8.weight, *taps],
        allow_unused=True,
        retain_graph=True,
    )
    for layer, grad in zip(layers, grads, strict=False):
        check(grad, f"grad_rv_{layer}")
    assert all(grad is None for grad in grads[3:]), "the refined CAM trains f8_3, f8_4 and f9 only"
    check(torch.autograd.grad(cosine_sum(cam), taps[2])[0], "grad_cam_conv6")


# -------------------------------------------------------------------------------------------- the whole net, 106 M
def rule_weights(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights by the rule of the golden files: drawn by the tensor's name."""
    state = {}
    for name, shape in names.items():
        if name.endswith("num_batches_tracked"):
            continue
        rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        z = rng.standard_normal(shape)
        if len(shape) == 4:
            z *= np.sqrt(1 / (shape[1] * shape[2] * shape[3]))
        elif name.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        elif name.endswith(".weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        state[name] = torch.from_numpy(z.astype(np.float32))
    return state


def load_official(net: CamNet, state: Mapping[str, torch.Tensor]) -> LoadReport:
    """A flat checkpoint of the official code (conv1a.weight, ..., fc8.weight) into a net over ResNet38d."""
    return load_state(net, state, ignored=(), source="the official checkpoint", target="this CAM net")


@pytest.fixture(scope="module")
def official_net() -> Iterator[CamNet]:
    with torch.device("meta"):  # no time for an initialisation that is overwritten
        backbone = build_backbone("resnet38d", output_stride=8, weights=None, normalisation="auto", seed=0)
        net = CamNet(backbone, num_fg=20, background=True, pcm=True, projector_dim=128, dropout=0.5, seed=0)
    net.to_empty(device="cpu")
    report = load_official(net, rule_weights(MANIFEST["state"]))
    assert not report.left_over and all(name.endswith("num_batches_tracked") for name in report.missing)
    yield net.eval()


def test_names_shapes_and_trainable_set_are_the_official_ones(official_net: CamNet) -> None:
    official_net.train()
    state = {name.removeprefix("backbone.net."): list(v.shape) for name, v in official_net.state_dict().items()}
    assert state == MANIFEST["state"]
    parameters = {name.removeprefix("backbone.net."): p for name, p in official_net.named_parameters()}
    assert [name for name, p in parameters.items() if p.requires_grad] == MANIFEST["trainable_by_requires_grad"]
    assert sum(v.numel() for v in official_net.state_dict().values()) == MANIFEST["n_params"]  # buffers counted too
    assert not any(m.training for m in official_net.modules() if isinstance(m, nn.BatchNorm2d))
    assert [m.p for m in official_net.modules() if isinstance(m, SeededDropout2d)] == [0.3, 0.3, 0.5, 0.5, 0.5]


def test_official_net_forward(official_net: CamNet) -> None:
    g = golden("net_ppc_40x48")
    official_net.eval()
    image = torch.from_numpy(g["x"].astype(np.float32))
    with torch.no_grad():
        features = official_net.backbone(image)
        out = official_net(image)
    for tap in ("conv4", "conv5", "conv6"):
        # conv4 and conv5 were rounded to half precision when they were stored: half a step is 2^-11
        rtol = 1e-5 if tap == "conv6" else 2**-11 + 1e-5
        expected = g[tap]
        atol = 1e-5 * float(np.abs(expected).max())
        np.testing.assert_allclose(getattr(features, tap)[:, ::4], expected, rtol=rtol, atol=atol, err_msg=tap)
    actual = {
        "cam": upsampled(out.cam, g["cam"]),
        "cam_rv": upsampled(out.refined, g["cam_rv"]),
        "f_proj": out.projected,
        "cam_rv_down": out.refined,
    }
    for key, value in actual.items():
        atol = 1e-5 * float(np.abs(g[key]).max())
        np.testing.assert_allclose(value, g[key], rtol=1e-5, atol=atol, err_msg=key)


def test_another_checkpoint_is_refused_by_name(official_net: CamNet) -> None:
    with pytest.raises(ValueError, match=r"(?s)only in this CAM net: .*only in the file: fc9.weight"):
        load_official(official_net, {"conv1a.weight": torch.zeros(64, 3, 3, 3), "fc9.weight": torch.zeros(1)})


# --------------------------------------------------------------------------------------------------- our own choices
def tiny_net(
    *, background: bool = True, pcm: bool = True, projector_dim: int = 16, num_fg: int = 3, seed: int = 0
) -> CamNet:
    backbone = build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=1)
    return CamNet(
        backbone,
        num_fg=num_fg,
        background=background,
        pcm=pcm,
        projector_dim=projector_dim,
        dropout=0.5,
        seed=seed,
    )


def forward(net: CamNet, seeds: list[int], image: Tensor) -> CamOutput:
    set_dropout_seeds(net, seeds)
    return net(image)


def test_outputs_follow_the_options() -> None:
    image = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    full = tiny_net().eval()(image)
    assert full.cam.shape == full.refined.shape == (2, 4, 8, 6) and full.projected.shape == (2, 16, 8, 6)
    assert full.projected.min() >= 0 and full.cam.min() < 0
    plain = tiny_net(background=False, pcm=False, projector_dim=0)
    out = plain.eval()(image)
    assert out.cam.shape == (2, 3, 8, 6) and out.refined is None and out.projected is None
    assert not any("f8_" in name or "proj" in name for name in plain.state_dict())


def test_pcm_without_background_is_refused() -> None:
    with pytest.raises(ValueError, match="background"):
        tiny_net(background=False)


def test_initialisation_depends_on_seed_and_layer_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    full, bare, other = tiny_net(seed=3), tiny_net(seed=3, pcm=False, projector_dim=0), tiny_net(seed=4)
    assert torch.equal(torch.rand(1), expected), "building a net must not move the global RNG"
    assert all(torch.equal(v, full.state_dict()[name]) for name, v in bare.state_dict().items())
    assert not torch.equal(full.fc8.weight, other.fc8.weight)
    assert not torch.equal(full.f8_3.weight, full.f8_4.weight[: full.f8_3.weight.shape[0]])


def test_initial_spread() -> None:
    net = tiny_net(num_fg=20, projector_dim=128)
    for layer, gain in ((net.fc8, 1.0), (net.fc_proj, 1.0), (net.f9, 4.0)):
        bound = gain * (6 / sum(layer.weight.shape[:2])) ** 0.5  # Xavier-uniform
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    for layer in (net.f8_3, net.f8_4):
        std = float(layer.weight.detach().std())
        assert std == pytest.approx((2 / layer.weight.shape[1]) ** 0.5, rel=0.05)  # Kaiming-normal


def test_cam_and_projector_share_the_dropped_channels() -> None:
    net = tiny_net()
    with torch.no_grad():  # both layers read channel 0 alone
        for layer in (net.fc8, net.fc_proj):
            layer.weight.zero_()
            layer.weight[:, 0] = 1.0
    image = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = forward(net.train(), list(range(16)), image)
    dropped = out.cam.flatten(1).abs().sum(1) == 0
    assert 0 < dropped.sum() < 16
    assert torch.equal(out.projected.flatten(1).sum(1) == 0, dropped)


def test_dropout_does_not_depend_on_how_the_batch_is_split() -> None:
    net = tiny_net().train()
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = forward(net, [7, 8, 9, 7], image)
    torch.manual_seed(123)
    halves = [forward(net, seeds, half) for seeds, half in (([7, 8], image[:2]), ([9, 7], image[2:]))]
    for value, parts in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(parts), rtol=1e-5, atol=1e-6)
    other = forward(net, [7, 8, 10, 7], image)
    assert torch.equal(other.cam[[0, 1, 3]], whole.cam[[0, 1, 3]]) and not torch.equal(other.cam[2], whole.cam[2])


def test_dropout_masks() -> None:
    layers = nn.Sequential(SeededDropout2d(0.3), SeededDropout2d(0.3))
    ones = torch.ones(2, 4096, 2, 2)
    with pytest.raises(AssertionError, match="set_dropout_seeds"):
        layers(ones)
    set_dropout_seeds(layers, [1, 2])
    first, second = layers[0](ones), layers[1](ones)
    values = torch.tensor([0.0, 1 / 0.7])
    assert torch.equal(first.unique(), values)
    assert torch.equal(first.amin((2, 3)), first.amax((2, 3))), "a channel is dropped as a whole"
    assert (first[:, :, 0, 0] == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    with pytest.raises(AssertionError, match="2 dropout seeds for 3"):
        layers(torch.ones(3, 4, 1, 1))
    assert torch.equal(layers.eval()(ones), ones)
    with pytest.raises(ValueError, match="probability"):
        SeededDropout2d(1.0)

"""Every backbone keeps the same contract; normalisation presets; messages for what a user can get wrong."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import golden
from torch import nn

from ppc.backbones import BACKBONES, Backbone, Parts, backbone_problem, build_backbone
from ppc.dropout import set_dropout_seeds
from ppc.normalisation import NORMALISATIONS, Normalisation

FROZEN = {
    "resnet38d": ["conv1a", "b2", "b2_1", "b2_2"],
    "resnet50": ["conv1", "layer1"],
    "resnet101": ["conv1", "layer1"],
    "irn_resnet50": ["conv1", "layer1", "layer2"],
    "resnet101s": ["conv1", "layer1"],
    "squeezenet1_1": ["features.0"],
    "efficientnet_b0": ["features.0"],
    "tiny": [],
}


def build(name: str, output_stride: int | None = None, seed: int = 0) -> Backbone:
    output_stride = output_stride or (16 if name == "irn_resnet50" else 8)
    return build_backbone(name, output_stride=output_stride, weights=None, normalisation="auto", seed=seed)


@pytest.fixture(scope="module", params=list(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build(request.param)


def random_image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check_features(backbone: Backbone, height: int, width: int) -> None:
    with torch.no_grad():
        features = backbone.eval()(random_image(1, 3, height, width))
    size = features.conv6.shape[2:]
    for tap, channels in zip(features, backbone.channels, strict=True):
        assert tap.shape == (1, channels, *size) and torch.isfinite(tap).all()
    for cells, pixels in zip(size, (height, width), strict=True):
        assert 0 <= -(-pixels // backbone.output_stride) - cells <= 1


def test_features(backbone: Backbone) -> None:
    check_features(backbone, 32, 32)
    check_features(backbone, 48, 65)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "resnet38d"])
def test_stride_16(name: str) -> None:
    check_features(build(name, 16), 64, 49)


def check_levels(backbone: Backbone, height: int, width: int) -> None:
    backbone.eval()
    image = random_image(1, 3, height, width)
    with torch.no_grad():
        levels, last = backbone.levels(image), backbone(image).conv6
    strides = [level.stride for level in backbone.level_info]
    assert strides[0] == 4 and strides[-1] == backbone.output_stride and strides == sorted(strides)
    for level, map_NDhw in zip(backbone.level_info, levels, strict=True):
        assert map_NDhw.shape == (1, level.channels, -(-height // level.stride), -(-width // level.stride))
    if last.shape == levels[-1].shape:
        assert torch.equal(last, levels[-1])


def test_levels(backbone: Backbone) -> None:
    check_levels(backbone, 48, 65)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "resnet38d"])
def test_levels_at_stride_16(name: str) -> None:
    check_levels(build(name, 16), 64, 49)


def test_batch_norm_stays_frozen(backbone: Backbone) -> None:
    backbone.train()
    assert backbone.training and not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    set_dropout_seeds(backbone, [0, 1])
    backbone(random_image(2, 3, 32, 32)).conv6.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    batch_norm = {id(p) for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert all((p.grad is None) == (id(p) in batch_norm or not p.requires_grad) for p in backbone.parameters())
    backbone.zero_grad()


def test_frozen_stem_and_nothing_else(backbone: Backbone) -> None:
    kinds = nn.Conv2d | nn.GroupNorm
    convs = {name: m.weight.requires_grad for name, m in backbone.net.named_modules() if isinstance(m, kinds)}
    expected = [
        name for name in convs if any(name == stem or name.startswith(f"{stem}.") for stem in FROZEN[backbone.name])
    ]
    assert [name for name, trained in convs.items() if not trained] == expected
    assert bool(expected) == bool(FROZEN[backbone.name])


def test_training_does_not_depend_on_the_batch_split(backbone: Backbone) -> None:
    backbone.train()
    image = random_image(3, 3, 32, 32)
    with torch.no_grad():
        set_dropout_seeds(backbone, [4, 5, 6])
        whole = backbone(image).conv6
        set_dropout_seeds(backbone, [4])
        parts = [backbone(image[:1]).conv6]
        set_dropout_seeds(backbone, [5, 6])
        parts.append(backbone(image[1:]).conv6)
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_initialisation_follows_the_seed(backbone: Backbone) -> None:
    state = torch.get_rng_state()
    again = build(backbone.name).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "building a backbone must not move the global RNG"
    assert all(torch.equal(value, again[name]) for name, value in backbone.state_dict().items())
    other = build(backbone.name, seed=1).state_dict()
    assert all(not torch.equal(value, other[name]) for name, value in again.items() if value.ndim == 4)


def test_foreign_dropout_never_draws_from_the_global_rng() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x, x, self.drop(x)

    parts = Parts(Net(), (3, 3, 3), NORMALISATIONS["unit"], (), ())
    backbone = Backbone("dropping", parts, output_stride=1, normalisation=parts.normalisation).train()
    image = random_image(1, 3, 8, 8)
    assert torch.equal(backbone(image).conv6, image)


def test_tiny_learns_from_scratch() -> None:
    """Two textures of equal mean colour, told apart after 60 steps of plain SGD."""
    net, head = build("tiny"), nn.Linear(128, 2)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05)
    generator = torch.Generator().manual_seed(0)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.arange(n) % 2
        stripes = torch.sin(torch.arange(48) * 1.2)
        image = torch.randn(n, 3, 48, 48, generator=generator)
        image = image + torch.where(label[:, None, None, None] == 0, stripes[None, :], stripes[:, None])
        return image, label

    for _ in range(60):
        image, label = batch(8)
        loss = nn.functional.cross_entropy(head(net(image).conv6.mean((2, 3))), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, label = batch(64)
    with torch.no_grad():
        accuracy = (head(net(image).conv6.mean((2, 3))).argmax(1) == label).float().mean()
    assert accuracy > 0.95


# ----------------------------------------------------------------------------------------------------------- timm
def test_timm_models_by_name() -> None:
    pytest.importorskip("timm")
    lite = build("timm:tf_efficientnet_lite0")
    check_features(lite, 48, 65)
    assert lite.normalisation == NORMALISATIONS["half"]
    check_features(build("timm:tf_efficientnet_lite0", 16), 48, 65)
    check_levels(lite, 48, 65)
    check_levels(build("timm:tf_efficientnet_lite0", 16), 48, 65)


def test_timm_channels_last_model_has_its_own_stride() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="output_stride.* has stride 32 .* asked for stride 8"):
        build("timm:swin_tiny_patch4_window7_224")
    backbone = build("timm:swin_tiny_patch4_window7_224", 32)
    with torch.no_grad():
        assert backbone.eval()(random_image(1, 3, 224, 224)).conv4.shape == (1, 192, 7, 7)


def test_timm_unknown_model_names_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="did you mean resnet50"):
        build("timm:resnet5O")


def test_timm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[timm\]'"):
        build("timm:resnet50")


# -------------------------------------------------------------------------------------------------- normalisation
def test_normalisation_presets() -> None:
    image = np.array([[[255, 0, 51]]], dtype=np.uint8)
    expected = {
        "imagenet": [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225],
        "half": [1.0, -1.0, -0.6],
        "caffe_bgr": [51 - 103.939, 0 - 116.779, 255 - 123.68],
        "unit": [1.0, 0.0, 0.2],
    }
    assert expected.keys() == NORMALISATIONS.keys()
    for name, values in expected.items():
        x = NORMALISATIONS[name].apply(image)
        assert x.shape == (3, 1, 1) and x.dtype == torch.float32
        np.testing.assert_allclose(x.flatten(), values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert image.tolist() == [[[255, 0, 51]]], "the input is not changed"


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_survives_json(name: str) -> None:
    there = json.loads(json.dumps(NORMALISATIONS[name].to_dict()))
    assert Normalisation.from_dict(there) == NORMALISATIONS[name]


def test_normalisation_of_a_backbone() -> None:
    assert build("tiny").normalisation == NORMALISATIONS["imagenet"]
    chosen = build_backbone("tiny", output_stride=8, weights=None, normalisation="caffe_bgr", seed=0)
    assert chosen.normalisation == NORMALISATIONS["caffe_bgr"]


def test_user_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean resnet38d"):
        build("resnet38")
    with pytest.raises(ValueError, match=r"resnet38d can have \(8,\), got 16"):
        build("resnet38d", 16)
    with pytest.raises(ValueError, match="did you mean imagenet"):
        build_backbone("tiny", output_stride=8, weights=None, normalisation="imagnet", seed=0)
    with pytest.raises(ValueError, match=r"backbone\.weights: there is no file nowhere\.pth"):
        build_backbone("tiny", output_stride=8, weights="nowhere.pth", normalisation="auto", seed=0)


def test_normalisation_is_that_of_the_official_code() -> None:
    stored = golden("augment_50x36")
    normalised_HW3 = NORMALISATIONS["imagenet"].apply(stored["image"]).permute(1, 2, 0)
    assert torch.allclose(normalised_HW3, torch.from_numpy(stored["normalised"]).float(), rtol=1e-5, atol=1e-6)


def test_a_timm_model_that_cannot_be_built_is_said_so() -> None:
    pytest.importorskip("timm")
    problem = backbone_problem("timm:vgg16", 16)
    assert problem is not None and problem.startswith("backbone.name: timm:vgg16 cannot be built at stride 16")


def test_a_timm_transformer_takes_images_of_any_size_or_is_refused() -> None:
    pytest.importorskip("timm")
    assert backbone_problem("timm:vit_tiny_patch16_224", 16) is None
    check_features(build("timm:vit_tiny_patch16_224", 16), 48, 65)
    problem = backbone_problem("timm:vit_tiny_patch16_224", 8)
    assert problem is not None and problem.endswith("set it to 16 or take another model")
    for name, stride in (("swin_tiny_patch4_window7_224", 32), ("maxvit_tiny_tf_224", 32)):
        problem = backbone_problem(f"timm:{name}", stride)
        assert problem is not None and "takes images of some sizes only (AssertionError" in problem
        problem = backbone_problem(f"timm:{name}", 16)
        assert problem is not None and "has stride 32" in problem and problem.endswith("and 3; take another model")


def test_every_backbone_is_found_to_have_no_problem() -> None:
    for name in BACKBONES:
        assert backbone_problem(name, 16 if name == "irn_resnet50" else 8) is None

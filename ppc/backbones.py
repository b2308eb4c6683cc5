"""Backbones: nets that give three feature maps, each with its input normalisation.  N images, H W image size.

To add one: a builder that returns `Parts`, and a line in BACKBONES. BatchNorm runs on its stored statistics and is
never trained (METHOD.md 1.2), so nothing here depends on how a batch is split.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ppc.names import nearest
from ppc.normalisation import NORMALISATIONS, Normalisation
from ppc.resnet38 import ResNet38d
from ppc.timm_net import timm_net
from ppc.weights import KNOWN_NORMALISATIONS, LoadReport, load_weights


# -------------------------------------------------------------------------------------------------------- backbone
class Features(NamedTuple):
    """Two mid-level taps and the final one, all ceil(H/stride) x ceil(W/stride), or one less where a net pads less."""

    conv4: Tensor
    conv5: Tensor
    conv6: Tensor


class Level(NamedTuple):
    """A feature map by the name that the net's `levels` knows it by; stride in input pixels a feature pixel."""

    name: str
    channels: int
    stride: int


class Parts(NamedTuple):
    """What a builder gives: a net whose forward returns three maps, and what is known of it."""

    net: nn.Module
    channels: tuple[int, int, int]
    normalisation: Normalisation
    frozen: tuple[str, ...]  # prefixes of the parameters that are never trained
    ignored_weights: tuple[str, ...]  # prefixes of tensors that a weight file may have and this net has not
    levels: tuple[Level, ...] = ()  # stride 4 and more, finest first; `net.levels(image, names)` gives them


HEADS = ("fc8.", "fc_proj.", "f8_", "f9.")  # our own heads, in a checkpoint of a whole CAM net


class Backbone(nn.Module):
    """A net with its taps, channels, stride and normalisation; BatchNorm frozen, no randomness without a seed."""

    def __init__(self, name: str, parts: Parts, *, output_stride: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.name = name
        self.net = parts.net
        self.channels = parts.channels
        self.level_info = parts.levels
        self.output_stride = output_stride
        self.normalisation = normalisation
        self.ignored_weights = (*parts.ignored_weights, *HEADS)
        self.report: LoadReport | None = None  # of the pretrained weights, where there are any
        for parameter_name, parameter in self.net.named_parameters():
            if parameter_name.startswith(parts.frozen):
                parameter.requires_grad_(False)
        for module in self.net.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode for all but BatchNorm, and but the dropouts of other libraries, which use the global RNG."""
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, _BatchNorm | _DropoutNd) or type(module).__name__ in ("DropPath", "StochasticDepth"):
                module.eval()
        return self

    def forward(self, image_N3HW: Tensor) -> Features:
        """Normalised images to three taps; a tap of another size is brought to the final one's."""
        conv4, conv5, conv6 = self.net(image_N3HW)
        size = conv6.shape[2:]
        conv4, conv5 = (
            tap if tap.shape[2:] == size else F.interpolate(tap, size, mode="bilinear", align_corners=True)
            for tap in (conv4, conv5)
        )
        return Features(conv4, conv5, conv6)

    def levels(self, image_N3HW: Tensor) -> list[Tensor]:
        """Normalised images to the maps of `level_info`, each ceil(H/stride) x ceil(W/stride) of its own stride.

        For nets that read several strides (IRNet). A map of another size, of a net that pads less, is brought to that.
        """
        give: Callable[..., tuple[Tensor, ...]] = self.net.levels  # type: ignore[assignment]
        maps = give(image_N3HW, tuple(level.name for level in self.level_info))
        sized = []
        for level, map_NDhw in zip(self.level_info, maps, strict=True):
            size = tuple(-(-pixels // level.stride) for pixels in image_N3HW.shape[2:])
            if map_NDhw.shape[2:] != size:
                map_NDhw = F.interpolate(map_NDhw, size, mode="bilinear", align_corners=True)
            sized.append(map_NDhw)
        return sized


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Inside, layers initialise from `seed`; the CPU's global RNG is afterwards as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also seed CUDA
        yield


class _Taps(nn.Module):
    """Consecutive stages of a net, under the names they have in it; the outputs of three of them are the taps."""

    def __init__(self, stages: Mapping[str, nn.Module], taps: tuple[str, str, str], prefix: str = "") -> None:
        super().__init__()
        holder = nn.Module() if prefix else self
        for name, stage in stages.items():
            holder.add_module(name, stage)
        if prefix:
            self.add_module(prefix, holder)
        self.stage_names, self.taps, self.prefix = tuple(stages), taps, prefix

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.levels(x, self.taps)

    def levels(self, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        holder = self.get_submodule(self.prefix)
        outputs = {}
        for name in self.stage_names:
            x = holder.get_submodule(name)(x)
            if name in names:
                outputs[name] = x
        return tuple(outputs[name] for name in names)


def _dilate(modules: Iterable[nn.Module]) -> None:
    """Trade each stride 2 along a chain of modules for dilation: same receptive fields, a map as large as before it."""
    dilation = 1
    for module in modules:
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d):
            continue
        kernel = module.kernel_size[0] if isinstance(module.kernel_size, tuple) else module.kernel_size
        strided = module.stride in (2, (2, 2))
        if kernel > 1:
            module.dilation, module.padding = (dilation, dilation), (dilation * (kernel // 2),) * 2
        if strided:
            module.stride = (1, 1)
            dilation *= 2


# -------------------------------------------------------------------------------------------------------- builders
def _resnet38d(output_stride: int) -> Parts:
    """Taps and frozen stem as METHOD 2."""
    _check_stride("resnet38d", output_stride, (8,))
    net = ResNet38d()
    levels = Level("conv3", 256, 4), Level("conv4", 512, 8), Level("conv5", 1024, 8), Level("conv6", 4096, 8)
    return Parts(net, net.CHANNELS, NORMALISATIONS["imagenet"], net.FROZEN, ("linear1000",), levels)


def _torchvision_resnet(name: str) -> Callable[[int], Parts]:
    """Taps: layer2, layer3, layer4. Frozen: conv1 and layer1."""

    def build(output_stride: int) -> Parts:
        from torchvision.models import get_model

        _check_stride(name, output_stride, (8, 16, 32))
        dilated = [output_stride < 16, output_stride < 32]
        net = get_model(name, weights=None, replace_stride_with_dilation=[False, *dilated])
        return _resnet_parts(net, (4, 4, 8, min(16, output_stride), output_stride))

    return build


def _resnet_parts(net: nn.Module, strides: tuple[int, ...], *, stem: int = 64) -> Parts:
    stages = {stage: child for stage, child in net.named_children() if stage not in ("avgpool", "fc")}
    taps = _Taps(stages, ("layer2", "layer3", "layer4"))
    names, widths = ("maxpool", "layer1", "layer2", "layer3", "layer4"), (stem, 256, 512, 1024, 2048)
    levels = tuple(Level(*level) for level in zip(names, widths, strides, strict=True))
    return Parts(taps, widths[2:], NORMALISATIONS["imagenet"], ("conv1.", "layer1."), ("fc.",), levels)


def _irn_resnet50(output_stride: int) -> Parts:
    """IRN's ResNet50 (METHOD 10): strides 2, 2, 2, 1, no dilation; torchvision's weights fit it. Frozen: up to layer2.

    Its CAM net detaches there. The official one trains the affine parameters of BatchNorm above; ours never does.
    """
    from torchvision.models import get_model

    _check_stride("irn_resnet50", output_stride, (16,))
    net = get_model("resnet50", weights=None)
    for layer in (net.layer4[0].conv2, net.layer4[0].downsample[0]):
        layer.stride = (1, 1)
    return _resnet_parts(net, (4, 4, 8, 16, 16))._replace(frozen=("conv1.", "layer1.", "layer2."))


def _resnet101s(output_stride: int) -> Parts:
    """ResNet101 with a stem of three 3x3 convs, 128 channels (METHOD 11). Taps and frozen layers as torchvision's."""
    from torchvision.models import resnet101

    _check_stride("resnet101s", output_stride, (8, 16, 32))
    dilated = [output_stride < 16, output_stride < 32]
    net = resnet101(weights=None, replace_stride_with_dilation=[False, *dilated])
    deep: list[nn.Module] = []
    for in_ch, out_ch, stride in ((3, 64, 2), (64, 64, 1), (64, 128, 1)):
        deep += [_kaiming_conv(in_ch, out_ch, 3, stride=stride), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True)]
    net.conv1, net.bn1 = nn.Sequential(*deep[:-2]), nn.BatchNorm2d(128)
    first: Any = net.layer1[0]
    first.conv1, first.downsample[0] = _kaiming_conv(128, 64, 1), _kaiming_conv(128, 256, 1)
    return _resnet_parts(net, (4, 4, 8, min(16, output_stride), output_stride), stem=128)


def _kaiming_conv(in_ch: int, out_ch: int, kernel: int, *, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_ch, out_ch, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _squeezenet1_1(output_stride: int) -> Parts:
    """Taps: fire 7, 10 and 12. Frozen: the first conv. Maps are up to one pixel smaller than ceil(H/stride).

    That is its own unpadded geometry: with padding, half of its ImageNet top-1 classes on photographs change.
    """
    from torchvision.models import squeezenet1_1

    _check_stride("squeezenet1_1", output_stride, (8, 16))
    features = squeezenet1_1(weights=None).features
    if output_stride == 8:
        features[8] = nn.MaxPool2d(3, stride=2, padding=1)
        _dilate(module for stage in features[8:] for module in stage.modules())
    taps = _Taps(dict(features.named_children()), ("7", "10", "12"), prefix="features")
    fine = Level("2", 64, 4), Level("4", 128, 4), Level("7", 256, 8)
    levels = (*fine, Level("10", 384, output_stride), Level("12", 512, output_stride))
    return Parts(taps, (256, 384, 512), NORMALISATIONS["imagenet"], ("features.0.",), ("classifier.",), levels)


def _efficientnet_b0(output_stride: int) -> Parts:
    """Taps: stages 3 (stride 8), 5 (stride 16) and the last 1x1 conv. Frozen: the first conv."""
    from torchvision.models import efficientnet_b0

    _check_stride("efficientnet_b0", output_stride, (8, 16, 32))
    features = efficientnet_b0(weights=None).features
    if output_stride < 32:
        first = 4 if output_stride == 8 else 6
        _dilate(module for stage in features[first:] for module in stage.modules())
    taps = _Taps(dict(features.named_children()), ("3", "5", "8"), prefix="features")
    fine = Level("2", 24, 4), Level("3", 40, 8)
    levels = (*fine, Level("5", 112, min(16, output_stride)), Level("8", 1280, output_stride))
    return Parts(taps, (40, 112, 1280), NORMALISATIONS["imagenet"], ("features.0.",), ("classifier.",), levels)


def _tiny(output_stride: int) -> Parts:
    """0.27 M parameters, five layers of conv, GroupNorm, ReLU: learns from random weights on a CPU. Frozen: none."""
    _check_stride("tiny", output_stride, (8, 16))
    widths, strides, dilations = (3, 32, 64, 96, 96, 128), [2, 2, 2, 1, 1], [1, 1, 1, 2, 2]
    if output_stride == 16:
        strides[3], dilations[3:] = 2, [1, 1]
    stages: dict[str, nn.Module] = {}
    for i, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=dilation, dilation=dilation, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        stages[f"layer{i + 1}"] = nn.Sequential(conv, nn.GroupNorm(8, widths[i + 1]), nn.ReLU(inplace=True))
    taps = _Taps(stages, ("layer3", "layer4", "layer5"))
    deep = Level("layer4", 96, output_stride), Level("layer5", 128, output_stride)
    levels = (Level("layer2", 64, 4), Level("layer3", 96, 8), *deep)
    return Parts(taps, (96, 96, 128), NORMALISATIONS["imagenet"], (), (), levels)


BACKBONES: dict[str, Callable[[int], Parts]] = {
    "resnet38d": _resnet38d,
    "resnet50": _torchvision_resnet("resnet50"),
    "resnet101": _torchvision_resnet("resnet101"),
    "irn_resnet50": _irn_resnet50,
    "resnet101s": _resnet101s,
    "squeezenet1_1": _squeezenet1_1,
    "efficientnet_b0": _efficientnet_b0,
    "tiny": _tiny,
}
TIMM = "timm:"


def _timm(model: str, output_stride: int) -> Parts:
    """Taps: the model's last three feature maps; normalisation: of its published weights. Frozen: BatchNorm only."""
    net = timm_net(model, output_stride)
    ignored = ("classifier.", "head.", "head_", "fc.", "norm.", "conv_head.", "bn2.", "conv_norm.")
    found = enumerate(zip(net.channels, net.strides, strict=True))
    levels = tuple(Level(str(place), width, stride) for place, (width, stride) in found if stride >= 4)
    first, second, last = net.channels[-3:]
    return Parts(net, (first, second, last), net.normalisation, (), ignored, levels)


def build_backbone(
    name: str, *, output_stride: int, weights: str | Path | None, normalisation: str, seed: int
) -> Backbone:
    """A backbone of BACKBONES, or `timm:MODEL`, initialised from `seed` or from a weight file.

    normalisation: a name of NORMALISATIONS, or `auto`: that of the weight file when it is known, else that of the
    backbone's usual weights. ValueError for an unknown name, a stride it can not have, or weights that do not fit.
    """
    if not name.startswith(TIMM) and name not in BACKBONES:
        raise ValueError(f"backbone.name: there is no backbone {name!r}{nearest(name, BACKBONES)}, or timm:MODEL")
    if normalisation != "auto" and normalisation not in NORMALISATIONS:
        names = ("auto", *NORMALISATIONS)
        raise ValueError(f"backbone.normalisation: there is no {normalisation!r}{nearest(normalisation, names)}")
    with seeded_init(seed):
        if name.startswith(TIMM):
            parts = _timm(name.removeprefix(TIMM), output_stride)
        else:
            parts = BACKBONES[name](output_stride)
    chosen = parts.normalisation if normalisation == "auto" else NORMALISATIONS[normalisation]
    backbone = Backbone(name, parts, output_stride=output_stride, normalisation=chosen)
    if weights is not None:
        backbone.report = load_weights(backbone, weights)
        if normalisation == "auto" and (known := KNOWN_NORMALISATIONS.get(backbone.report.sha256)):
            backbone.normalisation = NORMALISATIONS[known]
    return backbone


@cache
def backbone_problem(name: str, output_stride: int) -> str | None:
    """Why a backbone cannot be built or takes images of some sizes only, None if nothing is wrong with it: it is built
    on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        try:
            backbone = build_backbone(name, output_stride=output_stride, weights=None, normalisation="auto", seed=0)
        except ValueError as error:
            return str(error)
        except Exception as error:  # of timm: some models assert what they can be built with
            return f"backbone.name: {name} cannot be built at stride {output_stride} ({type(error).__name__}: {error})"
        try:
            with torch.no_grad():
                backbone.eval()(torch.empty(1, 3, 97, 131))
        except Exception as error:
            return f"backbone.name: {name} takes images of some sizes only ({type(error).__name__}: {error})"
    return None


def _check_stride(name: str, output_stride: int, possible: tuple[int, ...]) -> None:
    if output_stride not in possible:
        raise ValueError(f"backbone.output_stride: {name} can have {possible}, got {output_stride}")

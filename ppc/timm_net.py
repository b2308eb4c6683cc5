"""Any timm model as a backbone's net: its feature maps, channels first.  N images, H W image size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ppc.names import nearest
from ppc.normalisation import NORMALISATIONS, Normalisation

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}  # what timm's transformers must be asked for


class TimmNet(nn.Module):
    """Gives the last three feature maps of a timm model; its levels are called by their place.

    `normalisation` is that of the model's published weights.
    """

    def __init__(self, features: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.model = features
        info: Any = features.feature_info
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides: tuple[int, ...] = tuple(info.reduction())
        self.normalisation = normalisation

    def forward(self, image_N3HW: Tensor) -> tuple[Tensor, ...]:
        return self._all(image_N3HW)[-3:]

    def levels(self, image_N3HW: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        maps = self._all(image_N3HW)
        return tuple(maps[int(name)] for name in names)

    def _all(self, image_N3HW: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.model(image_N3HW), self.channels, strict=True)
        return tuple(x if x.shape[1] == channels else x.permute(0, 3, 1, 2) for x, channels in pairs)


def timm_net(model: str, output_stride: int) -> TimmNet:
    """A timm model with random weights. ValueError when there is none of that name, or not with that stride."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"backbone.name: timm:{model} needs the package timm, which is not installed: pip install -e '.[timm]'"
        ) from error
    if not timm.is_model(model):
        raise ValueError(f"backbone.name: timm has no model {model!r}{nearest(model, timm.list_models())}")
    cfg = timm.get_pretrained_cfg(model)
    normalisation = NORMALISATIONS["imagenet"]
    if cfg is not None:
        normalisation = Normalisation(tuple(cfg.mean), tuple(cfg.std), 255.0, False)
    net = TimmNet(_features(timm, model, {"output_stride": output_stride}, ANY_SIZE, {}), normalisation)
    stride, maps = net.strides[-1], len(net.channels[-3:])
    if stride != output_stride or maps != 3:
        remedy = f"set it to {stride} or take another model" if stride in (8, 16) else "take another model"
        raise ValueError(
            f"backbone.output_stride: timm:{model} has stride {stride} and {maps} feature maps, "
            f"asked for stride {output_stride} and 3; {remedy}"
        )
    return net


def _features(timm: Any, model: str, *options: Mapping[str, Any]) -> nn.Module:
    """The model with the first of the options that it takes: a stride, or none of its choice but images of any size."""
    for taken in options[:-1]:
        try:
            return _built(timm, model, taken)
        except TypeError:  # it has no such argument
            continue
    return _built(timm, model, options[-1])


def _built(timm: Any, model: str, options: Mapping[str, Any]) -> nn.Module:
    net: nn.Module = timm.create_model(model, pretrained=False, features_only=True, **options)
    return net

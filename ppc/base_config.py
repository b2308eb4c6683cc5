"""What all sections of a config are made of: a frozen section, a backbone, how a net is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = float


class Section(BaseModel):
    """A frozen section: unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def unread(self) -> set[str]:
        """Fields that the rules chosen in this section never look at; see `TrialConfig.decisive`."""
        return set()


class BackboneConfig(Section):
    """The feature extractor (METHOD 2)."""

    name: str = Field("tiny", description="a name of BACKBONES, or timm:MODEL")
    output_stride: Literal[8, 16] = Field(8, description="input pixels a feature pixel, per axis")
    weights: str | None = Field(None, description="file of pretrained weights; null: random. Its sha256 enters the key")
    normalisation: Literal["auto", "imagenet", "half", "caffe_bgr", "unit"] = Field(
        "auto", description="input normalisation; auto: the backbone's own"
    )


class OptimConfig(Section):
    """How a net is trained (METHOD 1.2)."""

    epochs: int = Field(8, ge=1, description="times that each image is seen")
    batch_size: int = Field(8, ge=1, description="images of the global batch, over all workers")
    crop_px: int = Field(448, ge=32, description="side of a crop, pixels")
    learning_rate: float = Field(0.01, gt=0, description="of backbone weights; others: new_layer_lr_mult, bias_lr_mult")
    new_layer_lr_mult: float = Field(10.0, gt=0, description="learning rate of new layers, over learning_rate")
    bias_lr_mult: float = Field(2.0, gt=0, description="learning rate of biases, over that of their layer's weights")
    weight_decay: float = Field(5e-4, ge=0, description="of weights; biases have none")
    momentum: Literal["official"] | float = Field(
        "official", description="official: the official code's effective value, which is its weight_decay (METHOD 1.2)"
    )
    poly_power: float = Field(0.9, ge=0, description="the rate falls as (1 - step / steps)^poly_power")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: the nets' forward pass in bfloat16; weights and losses stay in fp32"
    )

    @field_validator("momentum")
    @classmethod
    def _momentum_range(cls, value: Any) -> Any:
        if value != "official" and not 0 <= value < 1:
            raise ValueError("momentum is `official` or a number in [0, 1)")
        return value

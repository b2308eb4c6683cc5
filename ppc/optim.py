"""The optimiser of every PSA-derived stage: four parameter groups, poly learning rate, SGD (METHOD.md section 1.2)."""

from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

GROUPS = ("backbone_weight", "backbone_bias", "new_weight", "new_bias")


def param_groups(
    net: nn.Module, *, weight_decay: float, new_layer_lr_mult: float, bias_lr_mult: float
) -> list[dict[str, Any]]:
    """Four groups in the order of GROUPS: what lies under `net.backbone`, and the new layers; weights, and biases.

    Biases, and the affine parameters of GroupNorm and LayerNorm with them, get `bias_lr_mult` and no weight decay.
    Frozen parameters and BatchNorm's affine ones are in no group.
    """
    batch_norm = {id(p) for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    groups: list[dict[str, Any]] = []
    for name in GROUPS:
        new, bias = name.startswith("new"), name.endswith("bias")
        lr_mult = (new_layer_lr_mult if new else 1.0) * (bias_lr_mult if bias else 1.0)
        decay = 0.0 if bias else weight_decay
        groups.append({"params": [], "name": name, "lr_mult": lr_mult, "weight_decay": decay})
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and id(parameter) not in batch_norm:
            index = 2 * (not name.startswith("backbone.")) + (parameter.ndim <= 1)
            groups[index]["params"].append(parameter)
    return groups


def effective_momentum(momentum: float | Literal["official"], weight_decay: float) -> float:
    """SGD's momentum; `official` is the value that the official code really uses: it passes weight_decay for it."""
    return weight_decay if momentum == "official" else float(momentum)


def poly_lr(step: int, *, max_step: int, power: float) -> float:
    """Factor (1 - step/max_step)^power of the update number `step`, counted from 0; the last value from max_step on."""
    if max_step < 1:
        raise ValueError(f"max_step must be at least 1, got {max_step}")
    return float((1 - min(step, max_step - 1) / max_step) ** power)


def make_sgd(groups: list[dict[str, Any]], *, lr: float, momentum: float) -> SGD:
    """Plain SGD over `param_groups`; each group's `base_lr` is lr times its multiplier."""
    return SGD(
        [{**group, "lr": lr * group["lr_mult"], "base_lr": lr * group["lr_mult"]} for group in groups],
        lr=lr,
        momentum=momentum,
    )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor

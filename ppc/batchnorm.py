"""BatchNorm whose training statistics are those of the global batch, over all workers.

N images, C channels, H W pixels, W workers. A worker's gradient is that of the sum of all workers' losses, as
everywhere in the training loop, where a loss is a share: so a batch gives the same numbers however it is split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Kinds of BatchNorm and the layers that each applies to what it has normalised, in this order; the second is timm's.
KNOWN_KINDS = {"BatchNorm2d": [], "BatchNormAct2d": ["drop", "act"]}


def _of_all_workers(row_X: Tensor) -> Tensor:
    """The row of every worker, (W, X). Gathered and not reduced: then each adds them up in the same order."""
    parts = [torch.empty_like(row_X) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, row_X.contiguous())
    return torch.stack(parts)


class _Standardise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) by the statistics of all workers; also gives mean, biased var and count."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x_NCHW if x_NCHW.dtype == torch.float64 else x_NCHW.float()  # half precision has too few digits
        var_C, mean_C = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        size = wide.new_tensor([wide.numel() / wide.shape[1]])
        rows_WX = _of_all_workers(torch.cat([mean_C, var_C, size]))
        mean_WC, var_WC = rows_WX[:, :-1].chunk(2, dim=1)
        share_W1 = rows_WX[:, -1:] / rows_WX[:, -1].sum()
        mean_C = (share_W1 * mean_WC).sum(0)
        # The spread within the workers' parts, and between them: no difference of large numbers, as of E[x^2] - mean^2.
        var_C = (share_W1 * (var_WC + (mean_WC - mean_C) ** 2)).sum(0)
        count = rows_WX[:, -1].sum()
        scale_C = (var_C + eps).rsqrt()
        y_NCHW = (wide - mean_C[:, None, None]) * scale_C[:, None, None]
        ctx.save_for_backward(y_NCHW, scale_C, count)
        ctx.mark_non_differentiable(mean_C, var_C, count)
        return y_NCHW.to(x_NCHW.dtype), mean_C, var_C, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y_NCHW, scale_C, count = ctx.saved_tensors
        grad_NCHW = grads[0].to(y_NCHW.dtype)
        sums = torch.cat([grad_NCHW.sum((0, 2, 3)), (grad_NCHW * y_NCHW).sum((0, 2, 3))])
        mean_C, slope_C = (_of_all_workers(sums).sum(0) / count).chunk(2)
        inner_NCHW = grad_NCHW - mean_C[:, None, None] - y_NCHW * slope_C[:, None, None]
        return (inner_NCHW * scale_C[:, None, None]).to(grads[0].dtype), None


class GlobalBatchNorm2d(nn.Module):
    """nn.BatchNorm2d with the same tensors, by the same names; several workers share their statistics.

    Alone it calls torch's own. No subclass of torch's: what freezes BatchNorm, and keeps it out of the optimiser, must
    not find this one. ValueError for a single value a channel, which has no spread. The layers that `like` has of its
    own (timm's has a dropout and the activation) come after it, under their names.
    """

    def __init__(self, like: _BatchNorm, *, momentum: float, affine_trained: bool) -> None:
        super().__init__()
        assert like.affine and like.track_running_stats, "a BatchNorm with affine parameters and stored statistics"
        self.eps, self.momentum = like.eps, momentum
        self.weight, self.bias = like.weight.requires_grad_(affine_trained), like.bias.requires_grad_(affine_trained)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(like, name))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        for name, layer in like.named_children():
            self.add_module(name, layer)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalise by the global batch in training, which updates the stored statistics; else by these."""
        x_NCHW = self._normalise(x_NCHW)
        for layer in self.children():
            x_NCHW = layer(x_NCHW)
        return x_NCHW

    def _normalise(self, x_NCHW: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_workers(x_NCHW)
        return F.batch_norm(
            x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _over_workers(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW, mean_C, var_C, count = _Standardise.apply(x_NCHW, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var_C * count / (count - 1)).to(self.running_var), self.momentum)
        scaled: Tensor = y_NCHW * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(x_NCHW.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, momentum={self.momentum}, affine_trained={self.weight.requires_grad}"


def train_batch_norm(module: nn.Module, *, momentum: float, affine_trained: bool) -> None:
    """Put a GlobalBatchNorm2d in the place of each BatchNorm under `module`, with its very tensors.

    ValueError for a kind of BatchNorm that this does not know: it may do more than normalise.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            own_layers = [layer for layer, _ in child.named_children()]
            if own_layers != KNOWN_KINDS.get(type(child).__name__):
                raise ValueError(
                    f"{name} is a {type(child).__name__}, which may do more than normalise: this backbone's BatchNorm "
                    "cannot be trained; set segmentation.batch_norm: frozen, or take another backbone"
                )
            setattr(module, name, GlobalBatchNorm2d(child, momentum=momentum, affine_trained=affine_trained))
        else:
            train_batch_norm(child, momentum=momentum, affine_trained=affine_trained)

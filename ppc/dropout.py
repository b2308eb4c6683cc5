"""Dropout whose masks belong to the sample, not to the process that holds it.  N images, C channels, H W pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppc.seeding import derive_seed


class SeededDropout2d(nn.Module):
    """Zero whole channels with probability p and scale the rest by 1/(1-p); each sample's mask from its own seed.

    A mask depends on (sample's seed, layer's index in the net) alone: not on the rest of the batch, on how the batch is
    split over workers, nor on the global RNG. Call `set_dropout_seeds` before each training forward.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability must be in [0, 1), got {p}")
        self.p = p
        self.layer_index = 0
        self.seeds: tuple[int, ...] | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x_NCHW
        N, shape = len(x_NCHW), self._mask_shape(x_NCHW)
        assert self.seeds is not None, "training forward without seeds: call set_dropout_seeds(net, seeds) first"
        assert len(self.seeds) == N, f"{len(self.seeds)} dropout seeds for {N} samples"
        mask = torch.empty(N, *shape)
        generator = torch.Generator()
        for n, seed in enumerate(self.seeds):
            generator.manual_seed(derive_seed(seed, self.layer_index))
            mask[n] = torch.rand(shape, generator=generator) >= self.p
        mask /= 1 - self.p
        return x_NCHW * mask.to(device=x_NCHW.device, dtype=x_NCHW.dtype)

    def _mask_shape(self, x_NCHW: Tensor) -> tuple[int, ...]:
        """Shape of one sample's mask."""
        return (x_NCHW.shape[1], 1, 1)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class SeededDropout(SeededDropout2d):
    """As SeededDropout2d, but for single values: a draw for each channel and pixel of a sample."""

    def _mask_shape(self, x_NCHW: Tensor) -> tuple[int, ...]:
        return tuple(x_NCHW.shape[1:])


def set_dropout_seeds(net: nn.Module, seeds: Sequence[int]) -> None:
    """Give every seeded dropout layer of `net` one seed a sample of the coming batch.

    The caller mixes whatever must change the mask (epoch, sample, view) into the seeds; layers are told apart by their
    order in `net.modules()`, which a DDP wrapper does not change.
    """
    layers = (module for module in net.modules() if isinstance(module, SeededDropout2d))
    for index, layer in enumerate(layers):
        layer.layer_index = index
        layer.seeds = tuple(int(seed) for seed in seeds)

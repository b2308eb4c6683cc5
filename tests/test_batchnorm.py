"""BatchNorm over workers: alone it is torch's, and any split of a batch gives the numbers of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ppc.batchnorm import GlobalBatchNorm2d, train_batch_norm
from ppc.deeplab import LargeFov
from ppc.dropout import set_dropout_seeds
from ppc.segmentation import segmentation_loss
from ppc.train import gather, sum_over_workers

SIZES = (2, 3)  # images of the two workers: unlike, so that counts matter


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed: int = 0) -> nn.Sequential:
    """A conv between two norms with affine parameters that are not 1 and 0."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)).double()
    for index, parameter in enumerate(net.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed + index)
    return net


def after_steps(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs and gradients of the last batch, and stored statistics after all."""
    for x, target in batches:
        net.zero_grad()
        x = x.clone().requires_grad_()
        y = net(x)
        (y * target).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "grad x": x.grad, **grads, **dict(net.named_buffers())}


def batches() -> list[tuple[Tensor, Tensor]]:
    whole = sum(SIZES)
    return [(5 + drawn(whole, 3, 4, 5, seed=s), drawn(whole, 4, 4, 5, seed=s + 9)) for s in (50, 60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alone_it_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = layers().to(dtype), layers().to(dtype)
    train_batch_norm(ours, momentum=0.1, affine_trained=True)
    assert isinstance(ours[0], GlobalBatchNorm2d) and isinstance(theirs[0], nn.BatchNorm2d)
    fed = [(x.to(dtype), t.to(dtype)) for x, t in batches()]
    one, two = after_steps(ours, fed), after_steps(theirs, fed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)
    assert torch.equal(ours.eval()(fed[0][0]), theirs.eval()(fed[0][0]))


def test_what_else_timms_batch_norm_does_is_still_done() -> None:
    """Its dropout and activation are layers of the norm itself: the same values, gradients and statistics as there."""
    timm = pytest.importorskip("timm.layers")
    ours, theirs = (
        nn.Sequential(timm.BatchNormAct2d(3, act_layer=nn.LeakyReLU, drop_layer=nn.Tanh, act_kwargs={"inplace": False}))
        for _ in range(2)
    )
    for net in (ours, theirs):
        net[0].weight.data, net[0].bias.data = drawn(3, seed=1), drawn(3, seed=2)
        net.double()
    train_batch_norm(ours, momentum=0.1, affine_trained=True)
    assert isinstance(ours[0], GlobalBatchNorm2d) and ours.state_dict().keys() == theirs.state_dict().keys()
    fed = [(5 + drawn(4, 3, 4, 5, seed=s), drawn(4, 3, 4, 5, seed=s + 9)) for s in (50, 60)]
    one, two = after_steps(ours, fed), after_steps(theirs, fed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)
    assert (one["y"] < 0).any() and one["y"].abs().max() < 1


class NormThenDouble(nn.BatchNorm2d):
    """A kind of BatchNorm that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_batch_norm_of_an_unknown_kind_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(NormThenDouble(4)))
    with pytest.raises(ValueError, match=r"0 is a NormThenDouble.*segmentation\.batch_norm: frozen"):
        train_batch_norm(net, momentum=0.1, affine_trained=False)


def test_affine_parameters_that_are_not_trained_have_no_gradient() -> None:
    net = layers()
    train_batch_norm(net, momentum=0.1, affine_trained=False)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"1.weight", "1.bias"}


# -- workers


class NarrowHead(LargeFov):
    """DeepLab-v1's head with few channels."""

    WIDTH = 6


def head_step(x: Tensor, label: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    """A step of a whole head: this worker's share of the loss, and its gradients."""
    torch.manual_seed(0)
    head = NarrowHead(3, 4, dropout=0.5).double()
    train_batch_norm(head, momentum=3e-4, affine_trained=True)
    set_dropout_seeds(head, seeds)
    count = gather((label != 255).sum().view(1)).sum()
    loss = segmentation_loss(head(x), label, num_pixels_global=count)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in head.named_parameters()}}


def head_batch() -> tuple[Tensor, Tensor, list[int]]:
    label = torch.arange(sum(SIZES) * 16 * 16).view(-1, 16, 16) * 7 % 4
    label[0, :9], label[3] = 255, 255  # labelled pixels are shared unevenly
    return drawn(sum(SIZES), 3, 6, 6, seed=3), label, [11, 12, 13, 14, 15]


def gloo_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    net = layers()
    train_batch_norm(net, momentum=0.1, affine_trained=True)
    found = after_steps(net, [(x[mine], t[mine]) for x, t in batches()])
    sum_over_workers([value for name, value in found.items() if name.startswith("grad ") and name != "grad x"])
    x, label, seeds = head_batch()
    step = head_step(x[mine], label[mine], seeds[mine])
    sum_over_workers(list(step.values()))
    half = GlobalBatchNorm2d(nn.BatchNorm2d(3), momentum=0.1, affine_trained=False)(batches()[0][0][mine].bfloat16())
    torch.save({"norm": found, "step": step, "half": half.detach()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one(tmp_path: Path) -> None:
    """Values, gradients and stored statistics, in float64; a loss step with dropout and unlabelled pixels."""
    mp.spawn(gloo_worker, args=(str(tmp_path),), nprocs=len(SIZES))  # type: ignore[attr-defined, no-untyped-call]
    parts: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SIZES))]
    net = layers()
    train_batch_norm(net, momentum=0.1, affine_trained=True)
    whole = after_steps(net, batches())
    for name, expected in whole.items():
        norms = [part["norm"][name] for part in parts]
        if name in ("y", "grad x"):
            norms = [torch.cat(norms)]
        for actual in norms:
            torch.testing.assert_close(
                actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert all(torch.equal(actual, norms[0]) for actual in norms), f"workers disagree on {name}"
    for name, expected in head_step(*head_batch()).items():
        torch.testing.assert_close(parts[0]["step"][name], expected, rtol=1e-10, atol=1e-12, msg=name)
    half = torch.cat([part["half"] for part in parts])
    assert half.dtype == torch.bfloat16
    alone = GlobalBatchNorm2d(nn.BatchNorm2d(3), momentum=0.1, affine_trained=False)(batches()[0][0].bfloat16())
    torch.testing.assert_close(half, alone, rtol=2**-7, atol=2**-7)  # a step of its seven bits

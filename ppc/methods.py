"""Methods: from a net and a batch to named loss terms, and from a net to the class maps of an image.

N images of this worker, K foreground classes, C = K+1 with background first, H W input pixels, h w a feature grid.
A method is a line in METHODS; contrast is a regulariser that any of them can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppc.backbones import build_backbone
from ppc.cam import NormRule, foreground
from ppc.config import SALIENCY, ContrastConfig, MethodConfig, TrialConfig, ViewsConfig
from ppc.contrast import View, contrast_losses
from ppc.dropout import set_dropout_seeds
from ppc.losses import ViewMaps, classification_loss, seam_losses
from ppc.mining import pixel_keys
from ppc.nets import CamNet, CamOutput
from ppc.normalisation import Normalisation
from ppc.prototypes import Workers
from ppc.resizing import resize
from ppc.saliency import saliency_loss
from ppc.seeding import derive_seed
from ppc.views import Warp, draw_warp

BG = 0  # channel of the background

ClassMaps = Callable[[CamOutput, tuple[int, int]], Tensor]  # of the net's input size, to (N,K,.,.), foreground alone


@dataclass(frozen=True)
class Step:
    """The two views of one batch, as the net sees them, and what is needed to compare them."""

    source: CamOutput
    target: CamOutput | None  # None when the method looks at one view only
    source_size: tuple[int, int]  # of the input, pixels
    target_size: tuple[int, int]
    warp: Warp
    label_NK: Tensor
    num_images_global: int
    saliency: tuple[Tensor, Tensor | None] | None = None  # (N,1,H,W) of both views in [0, 1], where the method has them
    max_tags: int | None = None  # the most classes of one image; None: counted, for which a GPU is waited for


@dataclass(frozen=True)
class Method:
    """A baseline: what its net has, its loss terms, and how its class maps are made and merged at inference."""

    background: bool
    pcm: bool
    dropout: bool
    two_views: bool
    merge_rule: NormRule
    names: tuple[str, ...]  # of the terms; each has a field method.NAME_weight
    terms: Callable[[Step, MethodConfig], dict[str, Tensor]]
    class_maps: ClassMaps


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32: too few digits for losses, and for the coordinates of a warp."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cam_terms(step: Step, cfg: MethodConfig) -> dict[str, Tensor]:
    """Plain CAM: classification of the source view (METHOD 3); a target view is the contrast's alone."""
    pred_NK = _wide(step.source.cam).mean((2, 3))
    return {"cls": classification_loss(pred_NK, step.label_NK, num_images_global=step.num_images_global)}


def seam_terms(step: Step, cfg: MethodConfig) -> dict[str, Tensor]:
    """SEAM (METHOD 4.2), on maps brought to the size of each view's input."""
    assert step.target is not None and step.source.refined is not None and step.target.refined is not None
    source = ViewMaps(_wide(step.source.cam), _wide(step.source.refined), step.source_size)
    target = ViewMaps(_wide(step.target.cam), _wide(step.target.refined), step.target_size)
    return seam_losses(
        source,
        target,
        step.label_NK,
        to_target=lambda x: step.warp.apply(resize(x, step.target_size)),
        bg_channel=BG,
        keep_channel=BG,
        num_images_global=step.num_images_global,
        valid_Nhw=step.warp.grid_valid(*step.target_size, like=source.cam_NChw),
        max_tags=step.max_tags,
    )


def eps_terms(step: Step, cfg: MethodConfig) -> dict[str, Tensor]:
    """EPS (METHOD 5): classification and saliency of the source view; a target view is the contrast's alone."""
    pred_NK = foreground(_wide(step.source.cam)).mean((2, 3))
    return {
        "cls": classification_loss(pred_NK, step.label_NK, num_images_global=step.num_images_global),
        "saliency": _saliency(step, cfg, [step.source.cam]),
    }


def eps_seam_terms(step: Step, cfg: MethodConfig) -> dict[str, Tensor]:
    """EPS with SEAM's terms at the size of the features, as PPC-EPS has them (METHOD 7)."""
    assert step.target is not None and step.source.refined is not None and step.target.refined is not None
    h, w = step.target.cam.shape[2:]
    source_h, source_w = step.source.cam.shape[2:]
    source = ViewMaps(_wide(step.source.cam), _wide(step.source.refined), (source_h, source_w))
    target = ViewMaps(_wide(step.target.cam), _wide(step.target.refined), (h, w))
    keep = BG if cfg.ecr_keeps == "background" else BG + 1
    return {
        **seam_losses(
            source,
            target,
            step.label_NK,
            to_target=lambda x: step.warp.apply(resize(x, (h, w))),
            bg_channel=BG,
            keep_channel=keep,
            num_images_global=step.num_images_global,
            valid_Nhw=step.warp.grid_valid(h, w, like=target.cam_NChw),
            max_tags=step.max_tags,
        ),
        "saliency": _saliency(step, cfg, [source.cam_NChw, target.cam_NChw]),
        "saliency_refined": _saliency(step, cfg, [source.refined_NChw, target.refined_NChw]),
    }


def _saliency(step: Step, cfg: MethodConfig, maps: list[Tensor]) -> Tensor:
    """Mean of the saliency losses of the views' maps; the target's is over what the warp left in sight."""
    assert step.saliency is not None
    losses = []
    for index, map_NChw in enumerate(maps):
        saliency = step.saliency[index]
        assert saliency is not None
        h, w = map_NChw.shape[2:]
        losses.append(
            saliency_loss(
                _wide(map_NChw),
                saliency,
                step.label_NK,
                overlap_from=cfg.saliency_overlap,
                fg_weight=cfg.saliency_fg_weight,
                bg_channel=BG,
                num_images_global=step.num_images_global,
                valid_Nhw=step.warp.grid_valid(h, w, like=_wide(map_NChw)) if index else None,
            )
        )
    return torch.stack(losses).mean()


def _cam_maps(out: CamOutput, size: tuple[int, int]) -> Tensor:
    return F.relu(out.cam)


def _seam_maps(out: CamOutput, size: tuple[int, int]) -> Tensor:
    assert out.refined is not None
    return resize(out.refined[:, 1:], size)


def _eps_maps(out: CamOutput, size: tuple[int, int]) -> Tensor:
    return out.cam.float().softmax(dim=1)[:, 1:]


METHODS: dict[str, Method] = {
    "cam": Method(
        background=False, pcm=False, dropout=True, two_views=False, merge_rule="max", names=("cls",), terms=cam_terms,
        class_maps=_cam_maps,
    ),
    "seam": Method(
        background=True, pcm=True, dropout=True, two_views=True, merge_rule="minmax",
        names=("cls", "min_pool", "er", "ecr"), terms=seam_terms, class_maps=_seam_maps,
    ),
    "eps": Method(
        background=True, pcm=False, dropout=False, two_views=False, merge_rule="max", names=("cls", "saliency"),
        terms=eps_terms, class_maps=_eps_maps,
    ),
    "eps_seam": Method(
        background=True, pcm=True, dropout=False, two_views=True, merge_rule="max",
        names=("cls", "min_pool", "er", "ecr", "saliency", "saliency_refined"), terms=eps_seam_terms,
        class_maps=_eps_maps,
    ),
}  # fmt: skip


def class_maps(method: str, *, plain: bool = False) -> ClassMaps:
    """How class maps are read out of a method's net; `plain`: the CAM itself, before a PCM or a softmax (METHOD 3)."""
    chosen = METHODS[method]
    if not plain:
        return chosen.class_maps
    return _foreground_maps if chosen.background else _cam_maps


def _foreground_maps(out: CamOutput, size: tuple[int, int]) -> Tensor:
    return F.relu(foreground(out.cam, bg_channel=BG))


def journal_metrics(cfg: TrialConfig) -> list[str]:
    """Names of the losses that the journal of a trial's training has at every step."""
    own = METHODS[cfg.method.name].names
    contrast = CONTRAST_TERMS if cfg.contrast.active else ()
    return [f"train/{name}" for name in ("loss", *own, *contrast)]


def build_net(cfg: TrialConfig, num_fg: int, *, pretrained: bool) -> CamNet:
    """The trial's CAM net, initialised from its seed; `pretrained` loads the backbone's weight file."""
    method = METHODS[cfg.method.name]
    backbone = build_backbone(
        cfg.backbone.name,
        output_stride=cfg.backbone.output_stride,
        weights=cfg.backbone.weights if pretrained else None,
        normalisation=cfg.backbone.normalisation,
        seed=derive_seed("backbone", cfg.seed),
    )
    return CamNet(
        backbone,
        num_fg=num_fg,
        background=method.background,
        pcm=method.pcm,
        projector_dim=cfg.contrast.projector_dim if cfg.contrast.active else 0,
        dropout=cfg.method.dropout if method.dropout else 0.0,
        seed=derive_seed("head", cfg.seed),
    )


def net_normalisation(net: CamNet) -> Normalisation:
    """The input normalisation that travels with the net's weights."""
    normalisation: Normalisation = net.backbone.normalisation
    return normalisation


@dataclass(frozen=True)
class Losses:
    """The loss of one batch, as `train.fit` wants it: this worker's share of the weighted sum and of each term.

    Before step `contrast_from` the contrast's terms are told and do not count.
    """

    cfg: TrialConfig
    workers: Workers
    num_workers: int
    contrast_from: int = 0

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward both views, and add up the terms with the weights of the config."""
        cfg, method = self.cfg, METHODS[self.cfg.method.name]
        seeds = [int(s) for s in batch["sample_seed_N"]]
        device = next(net.parameters()).device
        image = batch["image_N3HW"].to(device, non_blocking=True)
        label_NK = batch["label_NK"].to(device, non_blocking=True)
        set_dropout_seeds(net, [derive_seed(s, "source") for s in seeds])
        source = net(image)
        target, warp, size = None, Warp(None, None), tuple(image.shape[2:])
        saliency: tuple[Tensor, Tensor | None] | None = None
        if cfg.method.name in SALIENCY:
            saliency = (batch["saliency_N1HW"].to(device, non_blocking=True), None)
        if method.two_views or cfg.contrast.active:
            image_t, warp = target_view(image, seeds, cfg.views)
            size = tuple(image_t.shape[2:])
            set_dropout_seeds(net, [derive_seed(s, "target") for s in seeds])
            target = net(image_t)
            if saliency is not None and method.two_views:
                saliency = (saliency[0], warp.apply(resize(saliency[0], size)))
        made = Step(
            source,
            target,
            source_size=tuple(image.shape[2:]),
            target_size=size,
            warp=warp,
            label_NK=label_NK,
            num_images_global=len(image) * self.num_workers,
            saliency=saliency,
            max_tags=int(batch["label_NK"].sum(dim=1).max()),
        )
        with torch.autocast(device.type, enabled=False):
            terms = method.terms(made, cfg.method)
            weights = {name: getattr(cfg.method, f"{name}_weight") for name in terms}
            if cfg.contrast.active:
                counts = step >= self.contrast_from
                with nullcontext() if counts else torch.no_grad():
                    terms |= contrast_terms_of(made, cfg.contrast, cfg.seed, step, self.workers)
                weights |= {n: counts * getattr(cfg.contrast, f"{n}_weight") for n in CONTRAST_TERMS}
            if not any(weights.values()):
                late = cfg.contrast.active and step < self.contrast_from
                until = f" before step {self.contrast_from} (contrast.start_after)" if late else ""
                raise ValueError(
                    f"method.name {cfg.method.name}: all loss weights are 0, so there is nothing to train{until}"
                )
            total = torch.stack([weights[n] * terms[n] for n in weights if weights[n] > 0]).sum()
        return total, terms


CONTRAST_TERMS = ("cross_prototype", "cross_cam", "intra_view")


def target_view(image_N3HW: Tensor, seeds: list[int], cfg: ViewsConfig) -> tuple[Tensor, Warp]:
    """The target view of a batch and how it was moved; each image's draw comes from its own seed."""
    height, width = image_N3HW.shape[2:]
    size = (height, width) if cfg.target_px is None else (cfg.target_px, cfg.target_px)
    warp = draw_warp(
        [derive_seed(s, "view") for s in seeds],
        size_px=size[1],
        flip=cfg.flip,
        rotate_deg=cfg.rotate_deg,
        translate_px=cfg.translate_px,
    )
    return warp.apply(resize(image_N3HW, size)), warp


def contrast_terms_of(made: Step, cfg: ContrastConfig, seed: int, step: int, workers: Workers) -> dict[str, Tensor]:
    """The three contrast terms and their diagnostics, on the grid of the target view's features (METHOD 6)."""
    assert made.target is not None
    N, h, w = len(made.label_NK), made.target.cam.shape[2], made.target.cam.shape[3]
    C = made.label_NK.shape[1] + 1
    views = []
    for name, out in (("source", made.source), ("target", made.target)):
        assert out.projected is not None
        projected, maps = _wide(out.projected), _wide(_contrast_map(out, cfg, C))
        if name == "source":
            projected, maps = (made.warp.apply(resize(x, (h, w))) for x in (projected, maps))
        generator = torch.Generator().manual_seed(derive_seed("contrast", seed, step, name))
        keys = pixel_keys(
            generator,
            num_images_global=made.num_images_global,
            first_image=workers.rank * N,
            num_images_local=N,
            num_classes=C,
            height=h,
            width=w,
        )
        views.append(View(projected, maps, made.warp.grid_valid(h, w, like=maps), keys))
    present_NC = torch.cat([torch.ones_like(made.label_NK[:, :1]), made.label_NK], dim=1)
    first = min(round(cfg.negative_rank_from * C), C - 1)
    return contrast_losses(
        views[0],
        views[1],
        present_NC,
        map_norm=cfg.map_norm,
        bg_score=cfg.bg_score,
        bg_index=BG,
        top_k=cfg.prototype_top_k,
        tie_rule=cfg.tie_rule,
        prototype_pixels=cfg.prototype_pixels,
        prototype_features=cfg.prototype_features,
        bg_prototype_weight=cfg.bg_prototype_weight,
        absent_classes=cfg.absent_classes,
        temperature=cfg.temperature,
        negatives=cfg.negatives,
        rank_start=first,
        rank_end=max(first + 1, round(cfg.negative_rank_to * C)),
        pool_fraction=cfg.negative_pool,
        sample_fraction=cfg.negative_sample,
        hard_pixels=cfg.hard_pixels,
        hard_pool_fraction=cfg.hard_pool,
        intra_mean=cfg.intra_mean,
        view_reduction=cfg.view_reduction,
        workers=workers,
    )


def _contrast_map(out: CamOutput, cfg: ContrastConfig, num_channels: int) -> Tensor:
    """The map that labels and weighs pixels, with a background channel (which the contrast overwrites)."""
    if cfg.map_source == "refined" and out.refined is not None:
        return out.refined.detach()
    cam = out.cam.detach()
    return cam if cam.shape[1] == num_channels else torch.cat([torch.zeros_like(cam[:, :1]), cam], dim=1)

"""EPS, and PPC on it, against the official values; tiny trials of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden
from test_contrast import MINE, OFFICIAL, PREPARE
from tiny_run import SCENES, scenes_root, tiny_config
from torch import Tensor

from ppc.artifacts import Storage
from ppc.cam import merge_scales, seed_from_cam
from ppc.contrast import View, contrast_terms, prepare_views
from ppc.data import make_scenes
from ppc.losses import ViewMaps, seam_losses
from ppc.methods import METHODS
from ppc.mining import Keys
from ppc.nets import CamOutput
from ppc.planning import Planner
from ppc.prototypes import ALONE, normalise_map, pseudo_label, weighted_prototypes
from ppc.runtime import LocalRuntime, prepare_process
from ppc.trial import run_trial

LAST = 20  # the official code's channel of the background
F64_GRADIENT = 2e-7  # computed in float64, stored in float32
# By the number of images: the pixels that top-k takes of a tie on a CPU, for a batch this small.
TIED = {2: list(range(336, 352)), 3: [*range(505, 517), *range(522, 526)]}


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("ppc_eps_er_*.npz")))
def test_equivariance_on_eps_is_the_official_one(name: str) -> None:
    g = golden(name)
    names = {"cam1": "cam1", "rv1": "cam_rv1", "cam2": "cam2", "rv2": "cam_rv2"}
    t = {k: torch.from_numpy(g[v]).double().requires_grad_() for k, v in names.items()}
    size = t["cam2"].shape[2:]
    losses = seam_losses(
        *(ViewMaps(t[f"cam{v}"], t[f"rv{v}"], tuple(t[f"cam{v}"].shape[2:])) for v in "12"),
        torch.from_numpy(g["label_bg_last"][:, :LAST]),
        to_target=lambda x: F.interpolate(x, size, mode="bilinear", align_corners=True),
        num_images_global=len(t["cam1"]), valid_Nhw=None, bg_channel=LAST, keep_channel=0,
    )  # fmt: skip
    close(losses["er"], g["loss_er_f64"], 1e-9)
    close(losses["ecr"], g["loss_ecr_f64"], 1e-9)
    close(2 * losses["min_pool"], g["loss_min1_f64"] + g["loss_min2_f64"], 1e-9)
    wanted = {"er": ("cam1", "cam2"), "ecr": ("rv1", "rv2"), "min_pool": ("rv1", "rv2")}
    for term, leaves in wanted.items():
        value = losses[term] * (2 if term == "min_pool" else 1)
        found = torch.autograd.grad(value, [t[n] for n in leaves], retain_graph=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            official = g[f"grad_{term.removesuffix('_pool')}_{leaf}_f64"]
            if term == "min_pool":  # two classes with the same top response share its gradient, or one takes it all
                gradient, official = gradient.sum(dim=1), official.sum(axis=1)
            close(gradient, official, F64_GRADIENT)


def test_merged_scales_and_seed_are_the_official_ones() -> None:
    g = golden("infer_eps_48x64")
    keys = np.flatnonzero(g["label"])
    maps = []
    for i in range(8):
        logits = torch.from_numpy(g[f"logits_{i}"]).float()
        background_first = torch.cat([logits[:, LAST:], logits[:, :LAST]], dim=1)
        out = CamOutput(background_first, None, None)
        maps.append(METHODS["eps"].class_maps(out, (48, 64))[0, keys])
    merged = merge_scales(maps, size=tuple(g["size"].tolist()), rule=METHODS["eps"].merge_rule)
    close(merged, g["norm_cam"], 1e-5)
    np.testing.assert_array_equal(seed_from_cam(merged.numpy(), keys, bg_score=float(g["meta_thr"])), g["pred"])


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("ppc_eps_contrast_*.npz")))
def test_contrast_on_eps_is_the_official_one(name: str) -> None:
    g = golden(name)
    knobs = OFFICIAL | {"bg_index": LAST, "bg_score": float(g["meta_bg"]), "top_k": 16, "rank_start": 3, "rank_end": 13}
    leaves = [torch.from_numpy(g[f"f_proj{v}"]).double().requires_grad_() for v in "12"]
    maps = [torch.from_numpy(g[f"cam{v}"]).double() for v in "12"]
    label_NC = torch.cat([torch.from_numpy(g["label"]), torch.ones(len(leaves[0]), 1)], dim=1)
    features, cams = (
        [F.interpolate(x, (16, 16), mode="bilinear", align_corners=True) for x in y] for y in (leaves, maps)
    )
    draws = iter([g[key] for key in sorted(key for key in g if key.startswith("draw_"))])
    views, weights = [], []
    for feature, cam in zip(features, cams, strict=True):
        norm = normalise_map(cam, None, map_norm="minmax", bg_score=knobs["bg_score"], bg_index=LAST)
        labels_P = pseudo_label(norm, label_NC).numpy().ravel()
        hard_P = np.ones(labels_P.size)
        for members in (np.flatnonzero(labels_P == c) for c in range(LAST + 1)):
            if len(members) >= 2:
                hard_P[members[next(draws)]] = 0.0
        hard = torch.from_numpy(hard_P).view(len(feature), 16, 16)
        views.append(View(feature, cam, None, Keys(hard, hard, hard[..., None])))
        weights.append(norm.transpose(0, 1).flatten(1))
    assert next(draws, None) is None, "all recorded draws were used"

    prepared = prepare_views(*views, label_NC, workers=ALONE, **{knob: knobs[knob] for knob in PREPARE})
    # All pixels tie for the background, and the recorder's top-k took a block of them in the middle, not the first.
    tied = torch.zeros(len(leaves[0]) * 256, dtype=torch.bool)
    tied[TIED[len(leaves[0])]] = True
    chosen = torch.stack([torch.where(tied, w, 0.0) for w in weights])
    background, _ = weighted_prototypes(features, chosen, prototype_features="raw", workers=ALONE)
    is_background = (torch.arange(LAST + 1) == LAST)[:, None]
    prepared = replace(prepared, proto_VCD=torch.where(is_background, background, prepared.proto_VCD))

    losses = contrast_terms(prepared, workers=ALONE, **{knob: knobs[knob] for knob in MINE})
    total = float(g["meta_gamma"]) * sum(losses[name].mean() for name in ("cross_prototype", "cross_cam", "intra_view"))
    close(total, g["loss_f64"], 1e-9)
    for gradient, v in zip(torch.autograd.grad(total, leaves), "12", strict=True):
        close(gradient, g[f"grad_f{v}_f64"], F64_GRADIENT)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    prepare_process(1)


@pytest.mark.parametrize("method", ["eps", "eps_seam"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_a_tiny_trial(tmp_path: Path, method: str, top_k: int) -> None:
    root = scenes_root(tmp_path)
    changes = {
        "method.name": method,
        "contrast.prototype_top_k": top_k,
        "stages": ["train_cam", "make_seeds", "evaluate"],
    }
    storage = Storage(tmp_path)
    plan = Planner(storage).plan(tiny_config(changes, root))
    result = run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    assert 0 <= result["metrics"]["seed_miou_train"] <= 1


def test_saliency_maps_are_part_of_the_key_where_they_are_read_and_missing_ones_are_told(tmp_path: Path) -> None:
    root = make_scenes(tmp_path / "own", **SCENES)
    keys = {}
    for when in ("before", "after"):
        for name in ("seam", "eps"):
            keys[when, name] = (
                Planner(Storage(tmp_path)).plan(tiny_config({"method.name": name, "data.name": "voc"}, root)).key
            )
        saliency = sorted((root / "SALImages").iterdir())
        saliency[0].write_bytes(saliency[1].read_bytes())
    assert keys["before", "seam"] == keys["after", "seam"] and keys["before", "eps"] != keys["after", "eps"]
    train = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    (root / f"SALImages/{train[3]}.png").unlink()
    with pytest.raises(ValueError, match=f"{train[3]}.png.*missing.*a method with saliency needs one map an image"):
        Planner(Storage(tmp_path)).plan(tiny_config({"method.name": "eps", "data.name": "voc"}, root))
    (root / "SALImages").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="method.name: eps needs saliency maps: a folder SALImages in"):
        Planner(Storage(tmp_path)).plan(tiny_config({"method.name": "eps", "data.name": "voc"}, root))

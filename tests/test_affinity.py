"""AffinityNet's pairs, labels and loss, and the random walk: official values, slow oracles, properties (METHOD 8)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from torch import Tensor

from ppc.affinity import (
    PairLabels,
    Transition,
    affinity_label,
    affinity_losses,
    affinity_transition,
    constant_background,
    displacements,
    fit_radius,
    mask_from_scores,
    pad_to_grid,
    pair_affinity,
    pair_labels,
    power_background,
    power_coefficients,
    random_walk,
    transition,
    walk_scores,
)
from ppc.prototypes import ALONE, Workers

AFFINITY = ["psa_aff_n1_20", "psa_aff_n2_14"]
LABEL = ["psa_label_112", "psa_label_96"]
# Whether the radius shrinks on a small grid: SEAM's and PPC's code does it, PSA's does not.
WALK = {
    "psa_rw_75x93": False, "psa_rw_120x80_a4": False, "seam_rw_80x100": True, "seam_rw_small_60x70_radius3": True,
    "ppc_rw_100x76_const27": True,
}  # fmt: skip
HEAD = ("f8_3", "f8_4", "f8_5", "f9")
PRECISION = [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-9)]
STORED_F32 = 2e-7  # computed in float64, stored in float32


def close(actual: Tensor, expected: np.ndarray, rtol: float) -> None:
    """Relative to the element, or to the array's largest where the element is nearly 0."""
    want = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def head(data: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """AffinityNet's features of the stored backbone features, and the leaves that they come from."""
    leaf = {f"w_{name}_weight": torch.from_numpy(data[f"w_{name}_weight"]) for name in HEAD}
    leaf |= {name: torch.from_numpy(data[name]) for name in ("conv4", "conv5", "conv6")}
    leaf = {name: value.to(dtype).requires_grad_() for name, value in leaf.items()}
    inputs = {"f8_3": "conv4", "f8_4": "conv5", "f8_5": "conv6"}
    mid = [F.elu(F.conv2d(leaf[inputs[name]], leaf[f"w_{name}_weight"])) for name in inputs]
    return F.elu(F.conv2d(torch.cat(mid, 1), leaf["w_f9_weight"])), leaf


def batch(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features and labels of 4 images on a grid of 6 x 9."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn((4, 5, 6, 9), generator=generator, dtype=dtype)
    choice = torch.randint(4, (4, 6, 9), generator=generator)
    return feature, torch.tensor([0, 1, 2, 255], dtype=torch.uint8)[choice]


# --- pairs and labels ---


def test_pairs_of_radius_5_are_the_official_34():
    data = golden(AFFINITY[0])
    assert np.array_equal(displacements(5), data["search_dist"])


@pytest.mark.parametrize(("radius", "count"), [(1, 0), (2, 4), (3, 12), (5, 34), (10, 152)])
def test_pairs_are_half_of_the_open_disk(radius, count):
    pairs = displacements(radius)
    disk = {(y, x) for y in range(-10, 11) for x in range(-10, 11) if 0 < math.hypot(y, x) < radius}
    assert len(pairs) == count
    assert set(pairs) | {(-y, -x) for y, x in pairs} == disk
    assert len(disk) == 2 * count


@pytest.mark.parametrize("name", AFFINITY)
def test_pairs_join_the_official_pixels(name):
    data = golden(name)
    h, w = data["label_map"].shape[1:]
    index = torch.arange(h * w).reshape(1, h, w)  # labels that tell the pixel
    for pixel_from, pixels_to in zip(data["ind_from"], data["ind_to"].T, strict=True):
        marked = torch.full((1, h, w), 255)
        marked[index == pixel_from] = 1
        for position, pixel_to in enumerate(pixels_to):
            found = torch.where(index == pixel_to, 2, marked)
            pairs = pair_labels(found, radius=5).neg[0].flatten(1)
            assert pairs[position, list(data["ind_from"]).index(pixel_from)]
            assert pairs.sum() == 1
        if pixel_from > data["ind_from"][3]:
            break  # four pixels tell


@pytest.mark.parametrize(
    ("h", "w", "radius", "fitted"),
    [(11, 30, 5, 5), (10, 30, 5, 4), (40, 8, 5, 3), (2, 9, 5, 1), (1, 1, 5, 1), (7, 7, 3, 3), (6, 7, 3, 2)],
)
def test_radius_shrinks_on_a_small_grid_only(h, w, radius, fitted):
    assert fit_radius(h, w, radius=radius) == fitted
    assert pair_affinity(torch.zeros(1, 2, h, w), radius=fitted).shape[1] == len(displacements(fitted))


def test_too_small_a_grid_is_refused():
    with pytest.raises(ValueError, match="8 x 8 cells has no pairs of radius 5"):
        pair_affinity(torch.zeros(1, 2, 8, 8), radius=5)


@pytest.mark.parametrize("name", LABEL)
def test_labels_from_scores_are_the_official_ones(name):
    data = golden(name)
    label = affinity_label(torch.from_numpy(data["la"]).float(), torch.from_numpy(data["ha"]).float())
    assert label.dtype == torch.uint8
    assert np.array_equal(label, data["label_map"])
    pairs = pair_labels(label[None], radius=5)
    for kind, mask in pairs._asdict().items():
        assert np.array_equal(mask[0].flatten(1), data[f"{kind}_label"])


def test_sure_and_unsure_cells():
    #           bg in low      fg in low, bg in high   fg in both     nothing  bg in both
    low = [[0.6, 0.4], [0.4, 0.6], [0.1, 0.9], [0.0, 0.0], [0.9, 0.1]]
    high = [[0.2, 0.8], [0.9, 0.1], [0.0, 1.0], [0.0, 0.0], [0.8, 0.1]]

    def cells(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows).T[:, None].repeat_interleave(8, 1).repeat_interleave(8, 2)

    assert affinity_label(cells(low), cells(high)).tolist() == [[255, 0, 1, 255, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_pair_labels_partition_the_known_pairs(seed):
    _, label = batch(seed)
    pairs = pair_labels(label, radius=3)
    slow = {kind: torch.zeros(pairs.bg.shape, dtype=torch.bool) for kind in pairs._fields}
    for n in range(4):
        for e, (dy, dx) in enumerate(displacements(3)):
            for y in range(4):
                for x in range(5):
                    a, b = int(label[n, y, x + 2]), int(label[n, y + dy, x + 2 + dx])
                    if 255 not in (a, b):
                        slow["neg" if a != b else "fg" if a else "bg"][n, e, y, x] = True
    for kind, mask in pairs._asdict().items():
        assert torch.equal(mask, slow[kind])
        assert mask.any()


# --- affinity and loss ---


@pytest.mark.parametrize(("dtype", "suffix", "rtol"), PRECISION)
@pytest.mark.parametrize("name", AFFINITY)
def test_affinity_losses_and_gradients_are_the_official_ones(name, dtype, suffix, rtol):
    data = golden(name)
    feature, leaf = head(data, dtype)
    affinity = pair_affinity(feature, radius=5)
    close(affinity.flatten(2), data["aff"], 1e-5)  # stored from float32 alone
    pairs = pair_labels(torch.from_numpy(data["label_map"]), radius=5)
    for kind, mask in pairs._asdict().items():
        assert np.array_equal(mask.flatten(2), data[f"{kind}_label"])
    terms = affinity_losses(affinity, pairs, workers=ALONE)
    for kind, weight in {"bg": 1 / 4, "fg": 1 / 4, "neg": 1 / 2}.items():
        close(terms[kind] / weight, data[f"{kind}_loss{suffix}"], rtol)
    loss = sum(terms.values())
    close(loss, data[f"loss{suffix}"], rtol)
    loss.backward()
    for layer in HEAD:
        close(leaf[f"w_{layer}_weight"].grad, data[f"grad_{layer}_weight{suffix}"], rtol)
    close(leaf["conv6"].grad, data["grad_conv6_f64"], STORED_F32 if suffix else rtol)


@pytest.mark.parametrize("radius", [2, 3])
def test_gradient_of_the_affinity(radius):
    feature = batch(5)[0][:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: pair_affinity(f, radius=radius), feature)


@pytest.mark.parametrize("seed", range(3))
def test_loss_against_loops(seed):
    feature, label = batch(seed)
    total = {"bg": 0.0, "fg": 0.0, "neg": 0.0}
    count = dict.fromkeys(total, 0)
    for f_Dhw, l_hw in zip(feature.numpy(), label.numpy().astype(int), strict=True):
        for y in range(4):
            for x in range(2, 7):
                for dy, dx in displacements(3):
                    a, b = l_hw[y, x], l_hw[y + dy, x + dx]
                    if 255 in (a, b):
                        continue
                    affinity = math.exp(-np.abs(f_Dhw[:, y, x] - f_Dhw[:, y + dy, x + dx]).mean())
                    kind = "neg" if a != b else "fg" if a else "bg"
                    count[kind] += 1
                    total[kind] -= math.log(1 + 1e-5 - affinity if kind == "neg" else affinity + 1e-5)
    slow = sum(w * total[k] / (count[k] + 1e-5) for k, w in (("bg", 0.25), ("fg", 0.25), ("neg", 0.5)))
    terms = affinity_losses(pair_affinity(feature, radius=3), pair_labels(label, radius=3), workers=ALONE)
    assert sum(terms.values()).item() == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("split", [(0, 2, 4), (0, 1, 4), (0, 1, 3, 4)])
def test_shares_of_the_workers_add_up(split):
    feature, label = batch(7)
    label[0, :, 4:] = 0  # workers with unlike counts
    parts = [slice(a, b) for a, b in zip(split, split[1:], strict=False)]
    counts = torch.stack([torch.stack([m.sum() for m in pair_labels(label[p], radius=3)]) for p in parts])

    def share(images: slice, workers: Workers) -> tuple[dict[str, Tensor], Tensor]:
        leaf = feature[images].clone().requires_grad_()
        terms = affinity_losses(pair_affinity(leaf, radius=3), pair_labels(label[images], radius=3), workers=workers)
        return terms, torch.autograd.grad(sum(terms.values()), leaf)[0]

    def gather(rank: int):
        def all_counts(mine: Tensor) -> Tensor:
            assert torch.equal(mine[0], counts[rank])  # what this worker sends
            return counts

        return all_counts

    whole, whole_gradient = share(slice(0, 4), ALONE)
    shares = [share(p, Workers(rank, gather(rank))) for rank, p in enumerate(parts)]
    for kind, value in whole.items():
        torch.testing.assert_close(sum(terms[kind] for terms, _ in shares), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in shares]), whole_gradient, rtol=1e-12, atol=0)


def test_a_batch_without_pairs_costs_nothing():
    feature = batch(0, dtype=torch.float32)[0].requires_grad_()
    pairs = pair_labels(torch.full((4, 6, 9), 255, dtype=torch.uint8), radius=3)
    loss = sum(affinity_losses(pair_affinity(feature, radius=3), pairs, workers=ALONE).values())
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, feature)[0].any()


def test_extreme_features_give_finite_losses():
    feature = torch.zeros(1, 2, 6, 9)
    feature[..., 4:] = 1e4  # affinities of 0 and 1 to the last bit
    feature.requires_grad_()
    everything = torch.ones(1, len(displacements(3)), 4, 5, dtype=torch.bool)
    terms = affinity_losses(pair_affinity(feature, radius=3), PairLabels(*[everything] * 3), workers=ALONE)
    gradient = torch.autograd.grad(sum(terms.values()), feature)[0]
    assert all(torch.isfinite(v) for v in terms.values())
    assert torch.isfinite(gradient).all()


# --- the random walk ---


def walk_case(name: str, dtype: torch.dtype):
    """The scores, features and knobs of a stored walk."""
    data = golden(name)
    cam = torch.from_numpy(data["cam_values"]).to(dtype)
    power = float(data["meta_alpha"])
    score = (
        power_background(cam, bg_power=power)
        if power > 0
        else constant_background(cam, bg_score=float(data["meta_const_bg"]))
    )
    h, w = data["grid_hw"].tolist()
    knobs = {
        "radius": fit_radius(h, w, radius=5) if WALK[name] else 5,
        "beta": float(data["meta_beta"]),
        "log2_steps": int(data["meta_logt"]),
    }
    return data, score, head(data, dtype)[0][0].detach(), knobs


@pytest.mark.parametrize(("dtype", "suffix", "rtol"), PRECISION)
@pytest.mark.parametrize("name", WALK)
def test_walk_is_the_official_one(name, dtype, suffix, rtol):
    data, score, feature, knobs = walk_case(name, dtype)
    channels = [0, *(data["cam_keys"] + 1)]
    assert channels == data["channels_kept_in_cam_rw_up"].tolist()
    absent = np.setdiff1d(np.arange(21), channels)
    assert not data["cam_rw_low_f64"][absent].any()  # so they may be left out

    grid = F.avg_pool2d(pad_to_grid(score), 8)
    close(grid.flatten(1), data[f"cam_vec{suffix}"][channels], rtol)
    affinity = pair_affinity(feature[None], radius=knobs["radius"])[0]
    step = affinity_transition(affinity, radius=knobs["radius"], beta=knobs["beta"])
    low = random_walk(grid, step, log2_steps=knobs["log2_steps"])
    # Against the float64 values in both precisions: the official float32 run is off by up to 1.4e-5, by squaring.
    close(low.flatten(1), data["cam_rw_low_f64"][channels], rtol)

    up = walk_scores(score, feature, **knobs)
    H, W = data["image_hw"]
    close(up, data["cam_rw_up_f64"][:, :H, :W], max(rtol, STORED_F32))
    assert np.array_equal(mask_from_scores(up, data["cam_keys"]), data[f"result{suffix}"])


@pytest.mark.parametrize("name", WALK)
def test_transition_is_the_official_matrix(name):
    data, _, feature, knobs = walk_case(name, torch.float64)
    affinity = pair_affinity(feature[None], radius=knobs["radius"])[0]
    step = affinity_transition(affinity, radius=knobs["radius"], beta=knobs["beta"])
    h, w = data["grid_hw"].tolist()
    units = torch.eye(h * w, dtype=torch.float64).reshape(-1, h, w)
    one_step = random_walk(units, step, log2_steps=0).flatten(1)
    dense = torch.from_numpy(data["aff_beta"]).double()
    close(one_step, (dense / dense.sum(0)).numpy(), 1e-5)  # stored from float32 alone
    assert torch.equal(one_step > 0, dense > 0)
    walked = random_walk(units, step, log2_steps=knobs["log2_steps"]).flatten(1)
    close(walked.sum(0), data["trans_colsum_f64"], 1e-9)
    close(walked, torch.linalg.matrix_power(one_step, 2 ** knobs["log2_steps"]).numpy(), 1e-9)


@pytest.mark.parametrize("beta", [1, 8, 2.5])
@pytest.mark.parametrize("log2_steps", [0, 1, 4])
def test_walk_against_a_dense_matrix_on_4x4(beta, log2_steps):
    generator = torch.Generator().manual_seed(3)
    feature = torch.randn((5, 4, 4), generator=generator, dtype=torch.float64)
    value = torch.rand((2, 4, 4), generator=generator, dtype=torch.float64)
    radius = 2
    matrix = np.eye(16)
    for y in range(0, 3):  # the last row and the outer columns start no pair
        for x in range(1, 3):
            for dy, dx in displacements(radius):
                gap = (feature[:, y, x] - feature[:, y + dy, x + dx]).abs().mean()
                p, q = 4 * y + x, 4 * (y + dy) + x + dx
                matrix[p, q] = matrix[q, p] = math.exp(-gap) ** beta
    columns = matrix / matrix.sum(0)
    for _ in range(log2_steps):
        columns = columns @ columns
    step = affinity_transition(pair_affinity(feature[None], radius=radius)[0], radius=radius, beta=beta)
    close(random_walk(value, step, log2_steps=log2_steps).flatten(1), value.flatten(1).numpy() @ columns, 1e-12)


def random_step(seed: int, *, radius: int = 3) -> tuple[Tensor, Transition]:
    feature, _ = batch(seed)
    value = torch.rand((3, 6, 9), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value, affinity_transition(pair_affinity(feature[:1], radius=radius)[0], radius=radius, beta=8)


@pytest.mark.parametrize("steps", [1, 2, 3, 64, 256, 4096])
def test_coefficients_are_those_of_the_power(steps):
    x = np.linspace(-1, 1, 2001)
    found = np.polynomial.chebyshev.chebval(x, power_coefficients(steps))
    np.testing.assert_allclose(found, x**steps, rtol=0, atol=1e-13)
    assert steps < 256 or len(power_coefficients(steps)) < steps / 2  # where the walk makes use of it


def test_many_steps_are_those_taken_one_by_one():
    value, step = random_step(1)
    one_by_one = value
    for _ in range(256):
        one_by_one = random_walk(one_by_one, step, log2_steps=0)
    torch.testing.assert_close(random_walk(value, step, log2_steps=8), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_walk_keeps_constants_and_the_range(seed):
    value, step = random_step(seed)
    torch.testing.assert_close(step.weight_Ohw.sum(0), torch.ones(6, 9, dtype=torch.float64), rtol=1e-12, atol=0)
    constant = torch.full_like(value, 0.3)
    torch.testing.assert_close(random_walk(constant, step, log2_steps=8), constant, rtol=1e-12, atol=0)
    walked = random_walk(value, step, log2_steps=6)
    assert walked.min() > value.min()
    assert walked.max() < value.max()


def test_walk_treats_each_map_alone_and_leaves_its_input():
    value, step = random_step(4)
    before = value.clone()
    together = random_walk(value, step, log2_steps=5)
    assert torch.equal(value, before)
    for k in range(3):
        assert torch.equal(random_walk(value[k : k + 1], step, log2_steps=5)[0], together[k])


def test_walk_does_not_cross_a_zero_affinity():
    value = torch.zeros(1, 6, 9)
    value[..., :4] = 1
    feature = torch.zeros(1, 2, 6, 9)
    feature[..., 4:] = 1e6
    step = affinity_transition(pair_affinity(feature, radius=3)[0], radius=3, beta=8)
    assert torch.equal(random_walk(value, step, log2_steps=6).round(decimals=12), value.double())


def test_a_transition_from_any_list_of_pairs():
    pairs = [(1, -1), (0, 1)]  # another order, as IRN groups them by path
    affinity = torch.zeros(2, 2, 2)
    affinity[0, 0, 1] = 0.5  # (0,1)-(1,0)
    affinity[1, 1, 0] = 0.25  # (1,0)-(1,1)
    dense = np.eye(4)
    dense[1, 2] = dense[2, 1] = 0.5**2
    dense[2, 3] = dense[3, 2] = 0.25**2
    value = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    walked = random_walk(value, transition(affinity, pairs, beta=2), log2_steps=0)
    close(walked.flatten(), value.flatten().numpy() @ (dense / dense.sum(0)), 1e-12)


# --- backgrounds, padding, masks ---


def test_backgrounds():
    cam = torch.tensor([[[0.25, 0.5]], [[0.5, 0.0]]])
    assert power_background(cam, bg_power=2).tolist() == [[[0.25, 0.25]], *cam.tolist()]
    assert constant_background(cam, bg_score=0.5).tolist() == [[[0.5, 0.5]], *cam.tolist()]
    assert power_background(cam[:0], bg_power=4).tolist() == [[[1, 1]]]
    assert constant_background(cam[:0], bg_score=0.5).tolist() == [[[0.5, 0.5]]]


@pytest.mark.parametrize(("size", "padded"), [((9, 16), (16, 16)), ((8, 8), (8, 8)), ((1, 7), (8, 8))])
def test_padding_goes_right_and_below(size, padded):
    out = pad_to_grid(torch.ones(3, *size))
    assert out.shape == (3, *padded)
    assert out[:, : size[0], : size[1]].all()
    assert out.sum() == 3 * size[0] * size[1]


def test_mask_takes_keys_in_any_order_and_ties_to_the_lowest():
    score = torch.tensor([[[0.1, 0.5, 0.2]], [[0.7, 0.5, 0.4]], [[0.7, 0.2, 0.3]]])
    assert mask_from_scores(score, [11, 4]).tolist() == [[5, 0, 12]]
    assert mask_from_scores(score, [11, 4]).dtype == np.uint8
    with pytest.raises(ValueError, match="background and 1 keys"):
        mask_from_scores(score, [11])


def test_an_image_without_a_class_is_background():
    score = power_background(torch.zeros(0, 20, 30), bg_power=6)
    feature = torch.randn((4, 3, 4), generator=torch.Generator().manual_seed(0))
    up = walk_scores(score, feature, radius=fit_radius(3, 4, radius=5), beta=8, log2_steps=4)
    assert not mask_from_scores(up, []).any()


def test_features_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"expected \(3, 4\); pad the image"):
        walk_scores(torch.zeros(2, 20, 30), torch.zeros(4, 2, 3), radius=1, beta=8, log2_steps=0)

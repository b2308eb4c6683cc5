"""The target view: what a warp does to images, maps and the cells that it leaves without a source."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import tiny_config
from torch import Tensor

from ppc.methods import target_view
from ppc.resizing import resize, resized_mean
from ppc.views import Warp, draw_warp

LIKE = torch.zeros((), dtype=torch.float64)


def waves(n: int = 2, c: int = 3, h: int = 12, w: int = 12) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    grid = torch.stack([torch.sin(0.7 * x * (k + 1) + 0.4 * y) for k in range(c)]).double()
    return torch.stack([grid + 0.1 * i for i in range(n)])


def coordinates(h: int, w: int, n: int = 1) -> Tensor:
    """An image whose two channels are x and y in [-1, 1], pixel centres of the corners at the ends."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([x, y]).double()[None].repeat(n, 1, 1, 1)


def moved(angle_deg: float, dx: float, dy: float) -> Warp:
    a = math.radians(angle_deg)
    theta = [[math.cos(a), -math.sin(a), dx], [math.sin(a), math.cos(a), dy]]
    return Warp(None, torch.tensor([theta], dtype=torch.float64))


@pytest.mark.parametrize("size", [(5, 7), (12, 30), (3, 2), (1, 1)])
def test_the_mean_of_a_resized_map_is_that_of_the_map_which_was_resized(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(resized_mean(x, size), resize(x, size).mean((2, 3)), rtol=1e-12, atol=1e-15)


def test_resize_to_the_same_size_is_the_input_itself() -> None:
    x = waves()
    assert resize(x, (12, 12)) is x
    assert torch.equal(x[..., [0, -1]], resize(x, (12, 30))[..., [0, -1]]), "corners stay corners"
    torch.testing.assert_close(resize(coordinates(5, 9), (16, 16)), coordinates(16, 16), rtol=0, atol=1e-6)


def test_a_warp_that_does_nothing_is_the_input_itself() -> None:
    warp = draw_warp([1, 2], size_px=12, flip=False, rotate_deg=0, translate_px=0)
    x = waves()
    assert warp.apply(x) is x and warp.grid_valid(12, 12, LIKE) is None


def test_a_flip_is_exact_and_each_images_own() -> None:
    x = waves(8)
    warp = draw_warp(range(8), size_px=12, flip=True, rotate_deg=0, translate_px=0)
    assert warp.flip_N is not None and 0 < int(warp.flip_N.sum()) < 8
    y = warp.apply(x)
    for image, out, flipped in zip(x, y, warp.flip_N, strict=True):
        assert torch.equal(out, image.flip(-1) if flipped else image)
    assert torch.equal(warp.apply(y), x), "twice is none"
    assert warp.grid_valid(12, 12, LIKE) is None, "all cells have a source"


@pytest.mark.parametrize(("angle", "dx", "dy"), [(0, 0.25, -0.125), (20, 0, 0), (-13, 0.1, 0.2), (90, 0, 0)])
@pytest.mark.parametrize("size", [(17, 17), (9, 9)])
def test_apply_moves_points_as_the_matrix_says(angle: float, dx: float, dy: float, size: tuple[int, int]) -> None:
    warp = moved(angle, dx, dy)
    got = warp.apply(coordinates(*size))[0]
    x, y = coordinates(*size)[0]
    a = math.radians(angle)
    wanted = torch.stack([math.cos(a) * x - math.sin(a) * y + dx, math.sin(a) * x + math.cos(a) * y + dy])
    inside = (wanted.abs() <= 1 + 1e-9).all(0)
    assert inside.any()
    torch.testing.assert_close(got[:, inside], wanted[:, inside], rtol=0, atol=1e-6)


def test_a_shift_of_whole_pixels_is_a_roll_with_zeros() -> None:
    x = waves(1)
    right = Warp(None, torch.tensor([[[1, 0, -2 * 3 / 11], [0, 1, 2 * 2 / 11]]], dtype=torch.float64))
    y = right.apply(x)  # content moves 3 pixels right and 2 up
    torch.testing.assert_close(y[:, :, :10, 3:], x[:, :, 2:, :9], rtol=0, atol=1e-12)
    # the first column that has no source at all; the column beside the border may mix with what is outside
    assert (y[:, :, :, :3].abs() < 1e-12).all() and (y[:, :, 10:].abs() < 1e-12).all()


@pytest.mark.parametrize(("angle", "dx", "dy"), [(0, 0, 0), (0, 0.25, -0.125), (20, 0, 0), (-13, 0.1, 0.2), (45, 0, 0)])
@pytest.mark.parametrize("size", [4, 9, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_valid_cells_are_exactly_those_with_a_source(
    angle: float, dx: float, dy: float, size: int, dtype: torch.dtype
) -> None:
    valid = moved(angle, dx, dy).grid_valid(size, size, LIKE.to(dtype))
    assert valid is not None and valid.shape == (1, size, size)
    a = math.radians(angle)
    for row in range(size):
        for column in range(size):
            x, y = 2 * column / (size - 1) - 1, 2 * row / (size - 1) - 1
            at = (math.cos(a) * x - math.sin(a) * y + dx, math.sin(a) * x + math.cos(a) * y + dy)
            assert bool(valid[0, row, column]) == all(abs(v) <= 1 + 1e-6 for v in at), (row, column)
    ones = moved(angle, dx, dy).apply(torch.ones(1, 1, size, size, dtype=torch.float64))
    assert (ones[0, 0][valid[0]] > 1 - 1e-4).all(), "nothing from outside is mixed into a valid cell"


@pytest.mark.parametrize("seed", range(5))
def test_features_of_the_moved_image_are_the_moved_features(seed: int) -> None:
    """For a net that looks at single pixels, source maps brought to the target are the target's own."""
    warp = draw_warp([seed, seed + 50], size_px=12, flip=True, rotate_deg=20, translate_px=2)
    x, weight = waves(2), torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 2.0]], dtype=torch.float64)

    def net(image: Tensor) -> Tensor:
        return torch.einsum("kc,nchw->nkhw", weight, image)

    torch.testing.assert_close(net(warp.apply(x)), warp.apply(net(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_warp_says_the_same_at_every_resolution(seed: int) -> None:
    """Image moved at 65 px, then seen on a 9 x 9 grid = the map of the grid moved, where the source is inside."""
    warp = draw_warp([seed], size_px=65, flip=True, rotate_deg=20, translate_px=8)
    big, small = coordinates(65, 65), coordinates(9, 9)
    seen, aligned = resize(warp.apply(big), (9, 9)), warp.apply(small)
    valid = warp.grid_valid(9, 9, LIKE)
    assert valid is not None and 20 < int(valid.sum()) < 81
    torch.testing.assert_close(seen[:, :, valid[0]], aligned[:, :, valid[0]], rtol=0, atol=1e-6)


def test_draws_depend_on_the_images_own_seed_alone() -> None:
    def draw(seeds: list[int]) -> Warp:
        return draw_warp(seeds, size_px=128, flip=True, rotate_deg=20, translate_px=16)

    together, apart = draw([5, 6, 7]), [draw([seed]) for seed in (5, 6, 7)]
    assert together.flip_N is not None and together.affine_N23 is not None
    assert torch.equal(together.flip_N, torch.cat([w.flip_N for w in apart]))
    assert torch.equal(together.affine_N23, torch.cat([w.affine_N23 for w in apart]))
    assert torch.equal(draw([7, 5]).affine_N23, together.affine_N23[[2, 0]])


def test_one_transformation_does_not_change_the_draw_of_another() -> None:
    seeds = list(range(20))
    every = draw_warp(seeds, size_px=128, flip=True, rotate_deg=20, translate_px=16)
    turned = draw_warp(seeds, size_px=128, flip=False, rotate_deg=20, translate_px=0)
    mirrored = draw_warp(seeds, size_px=128, flip=True, rotate_deg=0, translate_px=0)
    assert torch.equal(every.affine_N23[..., :2], turned.affine_N23[..., :2])
    assert torch.equal(every.flip_N, mirrored.flip_N)


def test_draws_keep_to_their_ranges() -> None:
    warp = draw_warp(range(2000), size_px=129, flip=True, rotate_deg=20, translate_px=16)
    angle = torch.rad2deg(torch.atan2(warp.affine_N23[:, 1, 0], warp.affine_N23[:, 0, 0]))
    shift_px = warp.affine_N23[:, :, 2] * 128 / 2
    for drawn, limit in ((angle, 20), (shift_px[:, 0], 16), (shift_px[:, 1], 16)):
        assert drawn.abs().max() <= limit and drawn.max() > 0.98 * limit and drawn.min() < -0.98 * limit
        assert drawn.mean().abs() < 0.05 * limit
    assert 900 < int(warp.flip_N.sum()) < 1100
    assert torch.det(warp.affine_N23[:, :, :2]).sub(1).abs().max() < 1e-12, "no scaling, no shear"


def test_target_view_is_resized_then_moved_in_its_own_pixels() -> None:
    views = tiny_config({"views.target_px": 24, "views.translate_px": 6}).views
    image = waves(3, 3, 48, 48)
    view, warp = target_view(image, [1, 2, 3], views)
    assert view.shape == (3, 3, 24, 24)
    torch.testing.assert_close(view, warp.apply(resize(image, (24, 24))))
    assert (warp.affine_N23[:, :, 2] * 23 / 2).abs().max() <= 6
    same, _ = target_view(image, [1, 2, 3], tiny_config({"views.target_px": None}).views)
    assert same is image, "no rescaling, no move: the source itself"

"""Palette PNGs, overlays and rows of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppc.figures import VOC_PALETTE, heat, overlay, palette_png, picture_grid, read_palette_png, square


def test_palette_has_vocs_colours() -> None:
    assert VOC_PALETTE[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len({tuple(colour) for colour in VOC_PALETTE.tolist()}) == 256


def test_palette_png_keeps_every_label(tmp_path: Path) -> None:
    label_HW = np.arange(256, dtype=np.int64).reshape(8, 32)
    palette_png(label_HW, tmp_path / "a" / "x.png")
    assert (read_palette_png(tmp_path / "a" / "x.png") == label_HW).all()
    with Image.open(tmp_path / "a" / "x.png") as image:
        assert image.mode == "P"
        assert (np.asarray(image.convert("RGB")) == VOC_PALETTE[label_HW]).all()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


@pytest.mark.parametrize("label_HW", [np.full((2, 2), 256), np.full((2, 2), -1), np.zeros((2, 2, 3), int)])
def test_palette_png_refuses_what_it_cannot_hold(label_HW: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.png"):
        palette_png(label_HW, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_reading_a_colour_image_as_labels_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="mode P or L"):
        read_palette_png(tmp_path / "rgb.png")


def test_heat_gets_lighter_all_the_way() -> None:
    luma = heat(np.linspace(0, 1, 101)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) > -0.5).all()
    assert luma[-1] - luma[0] > 150


def test_overlay_changes_only_where_the_cam_answers() -> None:
    image_HW3 = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    before = image_HW3.copy()
    cam_HW = np.zeros((6, 9))
    cam_HW[2:4, 3:6] = 1.0
    out_HW3 = overlay(image_HW3, cam_HW, strength=1.0)
    assert (out_HW3[cam_HW == 0] == image_HW3[cam_HW == 0]).all()
    assert (out_HW3[cam_HW == 1] == heat(np.ones((1, 1)))[0, 0]).all()
    assert (image_HW3 == before).all()


def test_overlay_stretches_a_small_cam_and_survives_nan() -> None:
    out_HW3 = overlay(np.zeros((8, 12, 3), np.uint8), np.array([[np.nan, 1.0], [0.0, 2.0]]))
    assert out_HW3.shape == (8, 12, 3)
    assert out_HW3[0, 0].sum() == 0 < out_HW3[-1, -1].sum()


def test_overlay_refuses_a_float_image() -> None:
    with pytest.raises(ValueError, match="uint8"):
        overlay(np.zeros((4, 4, 3)), np.zeros((4, 4)))


def test_square_keeps_the_whole_image() -> None:
    image_HW3 = np.random.default_rng(1).integers(0, 255, (4, 10, 3), dtype=np.uint8)
    out = square(image_HW3)
    assert out.shape == (10, 10, 3)
    assert (out[3:7] == image_HW3).all()
    assert (out[:3] == 255).all()


def test_a_grid_holds_each_picture_in_its_place_under_a_title_and_names_the_classes_seen() -> None:
    red = np.zeros((10, 20, 3), np.uint8)
    red[..., 0] = 255
    label = np.full((30, 30), 1)
    legend = {1: "disc", 2: "ring", 255: "not scored"}
    grid = picture_grid([[red, label], [red, None]], ["image", "seed"], legend=legend, box_px=(60, 200), gap_px=5)
    top = 5 + 18  # one line of titles
    assert grid.shape == (top + 2 * (60 + 5) + 18 + 5 + 5, 5 + 120 + 5 + 110 + 5, 3)
    assert (grid[top : top + 60, 5:125] == [255, 0, 0]).all() and (
        grid[top + 65 : top + 125, 5:125] == [255, 0, 0]
    ).all()
    left = 130 + (110 - 60) // 2  # in the middle of a column that is as wide as a title needs
    assert (grid[top : top + 60, left : left + 60] == VOC_PALETTE[1]).all()
    assert (grid[top : top + 60, 130:left] == 255).all()
    for column in (slice(5, 125), slice(130, 240)):
        assert (grid[:top, column] < 128).any(), "a title"
    bottom = grid[top + 130 :].reshape(-1, 3)
    assert (bottom == VOC_PALETTE[1]).all(1).any(), "the class that is seen"
    assert not (bottom == VOC_PALETTE[2]).all(1).any(), "one that is not"
    assert 20 < (grid[top + 65 : top + 125, 130:240] < 200).any(-1).sum() < 400, "a word in the empty cell"


def test_a_wide_picture_is_scaled_into_its_box_and_a_long_title_is_broken() -> None:
    wide = np.full((10, 400, 3), [7, 99, 200], np.uint8)
    title = "preset=official,prototype_top_k=32,cross_prototype_weight=0.1"
    grid = picture_grid([[wide]], [title], box_px=(60, 200), gap_px=5)
    assert grid.shape[1] == 210 and (grid == [7, 99, 200]).all(-1).sum() == 5 * 200
    dark = np.flatnonzero((grid < 100).any(-1)[:, :5].any(1) | (grid < 100).any(-1)[:, -5:].any(1))
    assert len(dark) == 0, "nothing is written over the edges"
    assert grid.shape[0] >= 5 + 3 * 18 + 5, "in three lines at least"
    short = picture_grid([[wide]], ["CAM"], box_px=(60, 200), gap_px=5)
    assert grid.shape[0] - short.shape[0] in (36, 54)
    twice = picture_grid([[wide]], ["CAM\nof K = 4"], box_px=(60, 200), gap_px=5)
    assert twice.shape[0] - short.shape[0] == 18 and (twice == [7, 99, 200]).all(-1).sum() == 5 * 200
    for top in (5, 5 + 18):
        assert (twice[top : top + 18] < 128).any(), "each line has its words"


def test_a_legend_that_does_not_fit_is_counted() -> None:
    label = np.arange(64).reshape(8, 8)
    names = {i: f"a class of number {i}" for i in range(64)}
    full = picture_grid([[label]], ["truth"], legend=names, box_px=(60, 200))
    bare = picture_grid([[label]], ["truth"], box_px=(60, 200))
    assert full.shape[0] - bare.shape[0] == 8 + 4 * 18


def test_a_grid_refuses_titles_that_do_not_match() -> None:
    label = np.zeros((3, 3), int)
    with pytest.raises(ValueError, match="2 titles"):
        picture_grid([[label]], ["a", "b"])
    with pytest.raises(ValueError, match="2 names"):
        picture_grid([[label]], ["a"], row_names=["x", "y"])


def test_a_label_map_that_was_cut_is_named_with_the_folder_to_delete(tmp_path: Path) -> None:
    path = tmp_path / "key" / "masks" / "a.png"
    path.parent.mkdir(parents=True)
    palette_png(np.arange(200, dtype=np.uint8).reshape(10, 20) % 5, path)
    whole = path.read_bytes()
    for size in (0, 4, 60, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"masks/a.png is not a whole PNG; delete .*/key, so that it is made again"
        ):
            read_palette_png(path)

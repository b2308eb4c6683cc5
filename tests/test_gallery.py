"""Figures of a study: what they must show, what they refuse, and that a launch draws and sends them."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_study import QUIET, make_study

from ppc import cli
from ppc.artifacts import Storage
from ppc.figures import VOC_PALETTE, overlay, palette_png
from ppc.gallery import (
    TITLES,
    best_variant,
    cams_figure,
    compared,
    draw_study,
    gallery,
    pick_rows,
    predictions_figure,
)
from ppc.launch import Where, run_study
from ppc.ledger import TrialRow, read_rows
from ppc.stages.make_seeds import read_cam
from ppc.stages.products import PRODUCTS

HERE = Where(local=True, tracking="none")
K0, K4 = "prototype_top_k=0", "prototype_top_k=4"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A tiny study of two variants, run; nothing is changed in it but its figures."""
    storage = Storage(tmp_path_factory.mktemp("storage"))
    make_study(storage, k=[0, 4], seeds=[0])
    assert run_study(storage, "k", HERE, QUIET) == 0
    return storage


def rows_of(storage: Storage) -> list[TrialRow]:
    return read_rows(storage, storage.study("k").definition())


def shows(figure: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture, scaled as `picture_grid` does, is somewhere in a figure."""
    is_labels = picture.ndim == 2
    picture = VOC_PALETTE[picture] if is_labels else picture
    scale = min(160 / picture.shape[0], 240 / picture.shape[1])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    how = Image.Resampling.NEAREST if is_labels else Image.Resampling.BICUBIC
    tile = np.asarray(Image.fromarray(picture).resize(size, how))
    height, width = tile.shape[:2]
    rows, columns = figure.shape[0] - height + 1, figure.shape[1] - width + 1
    places = np.indices((rows, columns)).reshape(2, -1)
    for y, x in np.random.default_rng(0).integers(0, [height, width], (40, 2)):  # most differ at one of these
        places = places[:, (figure[places[0] + y, places[1] + x] == tile[y, x]).all(-1)]
    return any((figure[y : y + height, x : x + width] == tile).all() for y, x in places.T)


def stage_folder(storage: Storage, row: TrialRow, name: str) -> Path:
    key = next(stage["key"] for stage in row.stages if stage["name"] == name)
    return Path(storage.stage(name, key).path)


def pieces(storage: Storage, row: TrialRow, image_id: str) -> dict[str, np.ndarray]:
    """Image, truth and CAM of an image, read without the gallery."""
    root = next((Path(storage.root) / "data").iterdir())
    image = np.asarray(Image.open(next((root / "JPEGImages").glob(f"{image_id}.*"))).convert("RGB"))
    truth = np.asarray(Image.open(root / "SegmentationClass" / f"{image_id}.png"))
    loaded = read_cam(stage_folder(storage, row, "make_seeds") / "cams" / f"{image_id}.npz")
    assert loaded is not None
    return {"image": image, "truth": truth, "CAM": overlay(image, loaded[1].max(0))}


def test_cams_shows_image_truth_and_the_cam_of_each_variant(ran: Storage) -> None:
    rows = rows_of(ran)
    assert rows[0].result is not None
    chosen = rows[0].result["overlays"]
    figure = cams_figure(ran, rows)
    found = [pieces(ran, row, chosen[0]) for row in rows]
    assert not (found[0]["CAM"] == found[1]["CAM"]).all()
    for picture in (found[0]["image"], found[0]["truth"], found[0]["CAM"], found[1]["CAM"]):
        assert shows(figure, picture)
    one = cams_figure(ran, rows[:1], chosen)
    assert not shows(one, found[1]["CAM"]) and one.shape[1] < figure.shape[1]
    with pytest.raises(ValueError, match="no CAM of image val_00000 in trial prototype_top_k=0 s=0.*train"):
        cams_figure(ran, [with_product(ran, rows[0], "seg")], ["val_00000"])


def with_product(storage: Storage, row: TrialRow, product: str) -> TrialRow:
    """The row as if its trial had a stage more, whose label maps are of one class of their own."""
    stage, folder = PRODUCTS[product]
    if all(entry["name"] != stage for entry in row.stages):
        key = f"{stage}-{row.key}"[:40]
        row = replace(row, stages=[*row.stages, {"name": stage, "key": key}])
        label = list(PRODUCTS).index(product)
        ids = ["val_00000", "val_00001"] if product == "seg" else ["train_00000", "train_00001"]
        for image_id in ids:
            label_HW = np.zeros((48, 48), np.uint8)
            label_HW[5:20, 10:30] = label
            palette_png(label_HW, storage.stage(stage, key) / folder / f"{image_id}.png")
    return row


def test_stages_shows_every_label_map_of_the_trial(ran: Storage) -> None:
    row = rows_of(ran)[0]
    two = gallery(ran, row, ["train_00000"])
    for product in PRODUCTS:
        row = with_product(ran, row, product)
        assert product in TITLES
    figure = gallery(ran, row, ["train_00000", "val_00000"])
    mine = pieces(ran, row, "train_00000")
    for picture in mine.values():
        assert shows(figure, picture) and shows(two, picture)
    for product, (stage, folder) in PRODUCTS.items():
        image_id = "val_00000" if product == "seg" else "train_00000"
        label = np.asarray(Image.open(stage_folder(ran, row, stage) / folder / f"{image_id}.png"))
        assert shows(figure, label), product


def test_predictions_are_of_the_last_product_or_of_the_one_that_is_named(ran: Storage) -> None:
    plain = rows_of(ran)[0]
    row = with_product(ran, plain, "seg")
    predicted = np.asarray(Image.open(stage_folder(ran, row, "predict_seg") / "masks" / "val_00000.png"))
    assert shows(predictions_figure(ran, [row], None, ["val_00000"]), predicted)
    seed = np.asarray(Image.open(stage_folder(ran, row, "make_seeds") / "seeds" / "train_00000.png"))
    assert shows(predictions_figure(ran, [row], "seed", ["train_00000"]), seed)
    with pytest.raises(ValueError, match="no seg of image train_00000 .* val"):
        predictions_figure(ran, [row], "seg", ["train_00000"])
    with pytest.raises(ValueError, match="product psa_mask: trial prototype_top_k=0 s=0 makes seed, mask"):
        predictions_figure(ran, [plain], "psa_mask")


def test_an_image_without_a_mask_has_an_empty_cell_or_no_column(ran: Storage, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    shutil.copytree(ran.root, tmp_path, dirs_exist_ok=True)
    row = rows_of(storage)[0]
    root = next((tmp_path / "data").iterdir())  # by its folder: what generated scenes lack is made again
    row = replace(row, config={**row.config, "data": {**row.config["data"], "name": "voc", "root": str(root)}})
    ids = ["train_00000", "train_00001"]
    whole = cams_figure(storage, [row], ids)
    masks = root / "SegmentationClass"
    (masks / "train_00001.png").unlink()
    partly = cams_figure(storage, [row], ids)
    assert partly.shape[1] == whole.shape[1] and shows(partly, pieces(storage, row, "train_00000")["truth"])
    (masks / "train_00000.png").unlink()
    assert cams_figure(storage, [row], ids).shape[1] < whole.shape[1]


def test_the_best_and_what_is_compared() -> None:
    def row(variant: str, seed: int, value: float | None) -> Any:
        result = None if value is None else {"metrics": {"m": value}}
        empty: Any = dict.fromkeys(TrialRow.__dataclass_fields__)
        state = "FAILED" if value is None else "FINISHED"
        return TrialRow(**{**empty, "variant": variant, "seed": seed, "result": result, "state": state})

    study = {"metric": "m", "baseline": "a"}
    rows = [
        row("a", 0, 0.9),
        row("a", 1, 0.1),
        row("b", 0, 0.4),
        row("b", 1, None),
        row("c", 0, None),
        row("c", 1, 0.3),
    ]
    assert best_variant(study, rows) == "a"
    assert compared(study, rows) == ["a", "b"]
    assert [(r.variant, r.seed) for r in pick_rows(rows, ["a", "c"], None)] == [("a", 1), ("c", 1)]
    assert [(r.variant, r.seed) for r in pick_rows(rows, ["b", "c"], None)] == [("b", 0), ("c", 1)]
    assert compared(study, rows[2:]) == ["b"] and compared(study, rows[4:5]) == []
    with pytest.raises(ValueError, match="variant b, seed 1; finished: a s=0, a s=1"):
        pick_rows(rows, ["a", "b"], 1)


# -- the command


def ppc(*words: str | Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["ppc", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out + err


@pytest.mark.parametrize("kind", ["stages", "cams", "predictions"])
def test_the_command_draws_each_kind(
    kind: str, ran: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["figure", "k", tmp_path / "big.png", "--kind", kind, "--storage", ran.root]
    code, said = ppc(*words, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0 and f"{tmp_path / 'big.png'}: prototype_top_k=" in said
    assert (f"{K0} s=0, {K4} s=0" in said) == (kind == "cams")
    words = ["figure", "k", tmp_path / "x.png", "--kind", kind, "--image", "train_00003", "--variant", K4, "--small"]
    code, said = ppc(*words, "--storage", ran.root, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0 and f"x.png: {K4} s=0" in said
    with Image.open(tmp_path / "x.png") as small, Image.open(tmp_path / "big.png") as big:
        assert small.mode == "P" and small.height < big.height


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "2007_000032"], "no image 2007_000032 in train"),
        (["--kind", "cams", "--image", "../x"], "image '../x'"),
        (["--kind", "cams", "--variant", "prototype_top_k=9"], "no finished trial of variant prototype_top_k=9"),
        (["--seed", "7"], f"no finished trial of seed 7; finished: {K0} s=0, {K4} s=0"),
        (["--kind", "predictions", "--product", "seg"], "makes seed, mask"),
        (["--product", "mask"], "for kind predictions alone"),
        (["--kind", "table"], "there are stages, cams, predictions"),
        (["--variant", K0, "--variant", K4], "name one variant"),
        (["--seed", "7", "--kind", "cams"], "no finished trial of variant"),
    ],
)
def test_what_cannot_be_drawn_is_one_error(
    words: list[str],
    said: str,
    ran: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.png"
    code, text = ppc("figure", "k", out, *words, "--storage", ran.root, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and said in text and "Traceback" not in text, text
    assert not out.exists()


@pytest.mark.parametrize("name", ["x.txt", "x", "folder", "folder.png"])
def test_a_picture_goes_into_a_png(
    name: str, ran: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    words = ["figure", "k", tmp_path / name, "--storage", ran.root]
    code, said = ppc(*words, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2 and f"{tmp_path / name}: a picture is written as PNG; name a file that ends in .png" in said


# -- at the end of a launch


def test_a_launch_leaves_its_figures_beside_the_report(ran: Storage) -> None:
    report = Path(ran.study("k").path) / "report"
    with Image.open(report / "cams.png") as cams, Image.open(report / "predictions.png") as predictions:
        drawn = np.asarray(cams), np.asarray(predictions)
    rows, study = rows_of(ran), ran.study("k").definition()
    assert (drawn[0] == cams_figure(ran, rows)).all()
    best = next(row for row in rows if row.variant == best_variant(study, rows))
    assert (drawn[1] == predictions_figure(ran, [best])).all()


def test_figures_that_cannot_be_drawn_are_told_and_cost_nothing(ran: Storage, tmp_path: Path) -> None:
    storage, said = Storage(tmp_path), io.StringIO()
    shutil.copytree(ran.root, tmp_path, dirs_exist_ok=True)
    row = rows_of(storage)[0]
    for path in (stage_folder(storage, row, "make_seeds") / "cams").iterdir():
        path.write_bytes(b"")
    for path in (tmp_path / "studies" / "k" / "report").iterdir():
        path.unlink()
    assert run_study(storage, "k", HERE, Console(file=said, width=200)) == 0
    assert "cams.png was not drawn: ValueError: no CAM of image" in said.getvalue()
    report = tmp_path / "studies" / "k" / "report"
    written = {f"report.{ending}" for ending in ("md", "csv", "json", "tex", "html")}
    assert {path.name for path in report.iterdir()} == {*written, "predictions.png"}
    page = (report / "report.html").read_text()
    assert page.count('alt="') > 8 and 'id="variant"' in page, "the overlays are drawn already, and images and truth"


def test_a_study_without_results_or_without_label_maps_has_no_figures(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[0], seeds=[0])
    assert draw_study(storage, study, read_rows(storage, study), tmp_path / "out") == ([], [])
    (row,) = read_rows(storage, study)
    done = replace(row, state="FINISHED", result={"metrics": {"mask_miou_train": 0.5}}, stages=row.stages[:1])
    assert draw_study(storage, study, [done], tmp_path / "out") == ([], [])
    with pytest.raises(ValueError, match="trial prototype_top_k=0 s=0 makes no label maps"):
        gallery(storage, done)


def test_a_trial_of_a_segmentation_net_alone_is_drawn(ran: Storage, tmp_path: Path) -> None:
    study, plain = ran.study("k").definition(), rows_of(ran)[0]
    row = with_product(ran, replace(plain, stages=plain.stages[:1]), "seg")
    for image_id in Storage(ran.root).root.glob("data/*/JPEGImages/val_*"):
        label_HW = np.full((48, 48), 2, np.uint8)
        palette_png(label_HW, stage_folder(ran, row, "predict_seg") / "masks" / f"{image_id.stem}.png")
    row = replace(row, result={**(row.result or {}), "overlays": []})
    files, problems = draw_study(ran, study, [row], tmp_path)
    assert ([path.name for path in files], problems) == (["predictions.png"], [])
    assert shows(gallery(ran, row), np.full((48, 48), 2)) and not shows(gallery(ran, row), np.full((48, 48), 3))

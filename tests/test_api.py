"""The Python API against a study whose files are written by hand, and the notebook that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_study import FakeStudy

import ppc
import ppc.api
from ppc.figures import palette_png

pd = pytest.importorskip("pandas")
K0, K4 = "prototype_top_k=0", "prototype_top_k=4"


@pytest.fixture
def fake(tmp_path: Path) -> FakeStudy:
    """Seed 0 of both variants is finished, and has a CAM and a seed of one image; one trial failed, one never began."""
    study = FakeStudy(tmp_path, name="scenes_k")
    for index, miou in ((0, 0.4), (2, 0.5)):
        study.journal(index, range(3))
        study.finish(index, miou)
        folder = study.storage.stage("make_seeds", study.entry(index)["stages"][1]["key"])
        (folder / "cams").mkdir()
        np.savez(folder / "cams" / "img.npz", keys=np.array([1]), cam=np.full((1, 2, 3), 0.25, np.float32))
        palette_png(np.array([[0, 2, 255]], np.uint8), folder / "seeds" / "img.png")
        (folder / "cams" / ".half.tmp").write_text("")
    study.start(1)
    study.fail(1)
    return study


@pytest.fixture
def study(fake: FakeStudy) -> ppc.Study:
    return ppc.load_study("scenes_k", storage=fake.storage.root)


def test_trials_are_a_row_each_with_factors_metrics_state_and_keys(study: ppc.Study) -> None:
    trials = study.trials
    assert list(zip(trials.variant, trials.seed, strict=True)) == [(K0, 0), (K0, 1), (K4, 0), (K4, 1)]
    assert list(trials.state) == ["FINISHED", "FAILED", "FINISHED", "PENDING"]
    assert list(trials["contrast.prototype_top_k"]) == [0, 0, 4, 4]
    assert trials.mask_miou_train.dropna().tolist() == [0.4, 0.5] and trials.mask_miou_train.isna().sum() == 2
    assert trials.error[1] == "no memory left\non the device"
    assert trials.key[2] == "scenes_k-k4-s0" and trials.stage_keys[2]["make_seeds"] == "m-scenes_k-k4-s0"
    assert trials.generated.all() and trials.wall_s[0] == 30.0
    assert trials.groupby("variant")[study.metric].mean()[K4] == 0.5


def test_an_open_study_is_seen_as_its_files_are_now(fake: FakeStudy, study: ppc.Study) -> None:
    fake.finish(3, 0.6)
    assert study.trials.state[3] == "FINISHED"


def test_files_cams_masks_and_history(study: ppc.Study) -> None:
    files = study.stage_files(K4, 0, "make_seeds")
    assert {"cams/img.npz", "seeds/img.png", "manifest.json", "overlays/2007_0.png"} == set(files) - {
        "overlays/2007_1.png"
    }
    assert files["cams/img.npz"].stat().st_size > 0
    assert study.stage_files(K4, 1, "make_seeds") == {}
    cam = study.cam(K4, 0, "img")
    assert cam.keys.tolist() == [1] and cam.cam_KHW.shape == (1, 2, 3)
    assert study.class_names(K4, 0)[cam.keys[0] + 1] == "ring"
    assert study.mask(K4, 0, "img").tolist() == [[0, 2, 255]]
    history = study.history(K4, 0)
    assert history.index.tolist() == [0, 1, 2] and history["train/loss"][1] == 0.5
    assert study.history(K4, 1).empty


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda study: study.cam("k=4", 0, "img"), "its trials: prototype_top_k=0 s=0;"),
        (lambda study: study.stage_files(K4, 0, "train_seg"), "its stages: train_cam, make_seeds"),
        (lambda study: study.cam(K4, 0, "none"), "no whole CAM of image none"),
        (lambda study: study.cam(K4, 0, "../../trials/x"), "image"),
        (lambda study: study.mask(K4, 0, "img", "mask"), "makes seed"),
        (lambda study: study.mask(K4, 1, "img"), r"\(pending\) has no seed of image img"),
        (lambda study: study.class_names(K4, 1), "pending"),
    ],
)
def test_what_is_not_there_is_named(study: ppc.Study, ask: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ask(study)


def test_no_such_study_names_the_others(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPC_STORAGE", str(fake.storage.root))
    assert ppc.study_names() == ["scenes_k"]
    with pytest.raises(ValueError, match="launched studies: scenes_k"):
        ppc.load_study("scene")


def test_the_report_is_markdown_that_notebooks_show(study: ppc.Study) -> None:
    text = study.report()
    assert "| prototype_top_k=4 | " in text and text._repr_markdown_() == str(text)


def test_ppc_hands_out_the_api_and_nothing_else() -> None:
    assert set(ppc.__all__) == {*ppc.api.__all__, "__version__"}
    assert {name: getattr(ppc, name) for name in ppc.api.__all__} == {n: getattr(ppc.api, n) for n in ppc.api.__all__}
    with pytest.raises(AttributeError, match="no attribute 'launch_study'"):
        ppc.launch_study  # noqa: B018


def test_import_and_load_bring_neither_torch_nor_pandas(fake: FakeStudy) -> None:
    code = (
        "import sys, ppc; assert not any(name.startswith('ppc.') for name in sys.modules);"
        "study = ppc.load_study('scenes_k', sys.argv[1]); study.stage_files('prototype_top_k=0', 0, 'train_cam');"
        "print([name for name in ('torch', 'pandas', 'numpy', 'ray', 'mlflow', 'matplotlib') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, str(fake.storage.root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_notebook_runs(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPC_STORAGE", str(fake.storage.root))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    notebook = json.loads((Path(__file__).parents[1] / "docs" / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "outputs of a run are not committed"
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    assert names["by_seed"].loc[0, K4] == 0.5
    names["plt"].close("all")

"""The archive for VOC's evaluation server: a round trip from a study, and each complaint of the check."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import TINY, layout, scenes_root
from tiny_study import QUIET
from typer.testing import CliRunner

from ppc.artifacts import Storage
from ppc.checks import check_trial
from ppc.cli import app
from ppc.config import TrialConfig
from ppc.data import VocLayout
from ppc.data.labels import read_label_file
from ppc.definition import define, save
from ppc.figures import VOC_PALETTE, read_palette_png
from ppc.launch import Where, run_study
from ppc.ledger import read_rows
from ppc.loading import override_all
from ppc.runtime import LocalRuntime
from ppc.study import baseline, expand
from ppc.study_config import StudyConfig
from ppc.submission import check_submission, competition_of, write_submission
from ppc.trial import run_trial

INSIDE = "results/VOC2012/Segmentation/comp5_test_cls"
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose split test has neither masks nor tags, as VOC's."""
    root = scenes_root(tmp_path_factory.mktemp("data"))
    ids = layout(root).ids("val")
    lists = root / "ImageSets/Segmentation"
    (lists / "test.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    (lists / "val.txt").unlink()
    for image_id in ids:
        (root / "SegmentationClass" / f"{image_id}.png").unlink()
    labels = read_label_file(root / "cls_labels.npy", layout(root).num_classes)
    np.save(root / "cls_labels.npy", {key: value for key, value in labels.items() if key not in ids})
    return root


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Storage:
    """A study of one trial that predicted the split without tags."""
    storage = Storage(tmp_path_factory.mktemp("storage"))
    changes = {
        **TINY, "data.name": "voc", "data.root": str(root), "stages": ["train_seg", "predict_seg", "evaluate"],
        "segmentation.masks": "truth", "segmentation.train.epochs": 1, "segmentation.test.splits": ["train", "test"],
        "segmentation.test.crf": None, "data.on_broken": "skip",
    }  # fmt: skip
    study = StudyConfig.model_validate(
        {"name": "seg", "base": override_all({}, list(changes.items())), "metric": "seg_miou_train",
         "design": {"kind": "list", "variants": [{"name": "one"}]}, "trial_seeds": [0]}
    )  # fmt: skip
    specs = expand(study, check=check_trial)
    save(define(study, specs, baseline(study, specs), storage), storage)
    for row in read_rows(storage, storage.study("seg").definition()):
        stages = [(stage["name"], stage["key"]) for stage in row.stages]
        run_trial(TrialConfig.model_validate(row.config), row.key, stages, storage, LocalRuntime())
    return storage


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_what_a_trial_predicted_arrives_in_the_servers_layout(storage: Storage, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tgz"
    code, said = command("export", "submission", "seg", out, "--storage", storage.root)
    assert code == 0 and INSIDE in said
    row = read_rows(storage, storage.study("seg").definition())[0]
    assert row.result is not None and set(row.result["metrics"]) == {"seg_miou_train"} and not row.result.get("skipped")
    predicted = storage.stage("predict_seg", dict((s["name"], s["key"]) for s in row.stages)["predict_seg"]) / "masks"
    with tarfile.open(out, "r:gz") as archive:
        assert archive.getnames() == [f"{INSIDE}/{image_id}.png" for image_id in sorted(layout(root).ids("test"))]
        for image_id in layout(root).ids("test"):
            file = archive.extractfile(f"{INSIDE}/{image_id}.png")
            assert file is not None
            image = Image.open(io.BytesIO(file.read()))
            assert image.mode == "P" and image.getpalette() == VOC_PALETTE.reshape(-1).tolist()
            np.testing.assert_array_equal(np.array(image), read_palette_png(predicted / f"{image_id}.png"))
    code, said = command("data", "check-submission", out, "--data", root)
    assert code == 0 and said == f"{out}: 0 problem(s)\n"
    again = tmp_path / "again.tgz"
    assert write_submission(storage, row, again, split="test", competition="comp6").endswith("comp6_test_cls")
    write_submission(storage, row, again, split="test", competition=None)
    assert again.read_bytes() == out.read_bytes()


def test_the_competition_follows_the_weights() -> None:
    assert competition_of(TrialConfig()) == "comp5"
    of_seg: dict[str, Any] = {"segmentation": {"backbone": {"name": "tiny", "weights": "x"}}}
    assert competition_of(TrialConfig.model_validate(of_seg)) == "comp5", "no net begins from it"
    for changes in ({"backbone": {"weights": "x"}}, {**of_seg, "stages": ["train_seg", "predict_seg"]}):
        assert competition_of(TrialConfig.model_validate(changes)) == "comp6"


def test_a_split_that_was_not_predicted_and_a_lost_prediction_are_named(
    storage: Storage, tmp_path: Path, root: Path
) -> None:
    own = Storage(tmp_path / "own")
    shutil.copytree(storage.root, own.root)
    row = read_rows(own, own.study("seg").definition())[0]
    with pytest.raises(ValueError, match=r"predicted \[train, test\], not val: add it to segmentation.test.splits"):
        write_submission(own, row, tmp_path / "o.tgz", split="val", competition=None)
    image_id = layout(root).ids("test")[1]
    next(own.root.rglob(f"predict_seg/*/masks/{image_id}.png")).unlink()
    with pytest.raises(ValueError, match=f"there is no prediction of {image_id}; delete .*, then resume") as lost:
        write_submission(own, row, tmp_path / "o.tgz", split="test", competition=None)
    assert not (tmp_path / "o.tgz").exists()
    follow(str(lost.value))
    assert run_study(own, "seg", Where(local=True, tracking="none"), QUIET) == 0
    assert write_submission(own, row, tmp_path / "o.tgz", split="test", competition=None)


def follow(message: str) -> None:
    """Do what the message says."""
    folder, _, result = message.partition("; delete ")[2].partition(", then")[0].partition(" and ")
    shutil.rmtree(folder)
    Path(result).unlink()


# -- complaints


def png(label_HW: np.ndarray[Any, Any], mode: str = "P") -> bytes:
    image = Image.fromarray(label_HW.astype(np.uint8))
    if mode == "P":
        image.putpalette(VOC_PALETTE.tobytes())
    data = io.BytesIO()
    image.convert(mode).save(data, "PNG")
    return data.getvalue()


def good(data: VocLayout) -> Files:
    return {f"{INSIDE}/{i}.png": png(np.zeros(data.image_size(i))) for i in data.ids("test")}


def pack(files: list[tuple[str, bytes]], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("results")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


Spoil = Callable[[str, Files, VocLayout], list[tuple[str, bytes]]]


def replaced(make: Callable[[tuple[int, int]], bytes]) -> Spoil:
    def spoil(name: str, files: Files, data: VocLayout) -> list[tuple[str, bytes]]:
        return list({**files, name: make(data.image_size(Path(name).stem))}.items())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (replaced(lambda size: png(np.full(size, 4))), "index 4; classes are 0 to 3, and 255 is no prediction"),
        (replaced(lambda size: png(np.full(size, 255))), "index 255;"),
        (replaced(lambda size: png(np.zeros((size[0] + 1, size[1])))), " pixels, its image has 4"),
        (replaced(lambda size: png(np.zeros(size), "L")), "a PNG of mode L; the server takes palette PNGs"),
        (replaced(lambda size: png(np.zeros(size), "RGB")), "a PNG of mode RGB"),
        (replaced(lambda size: png(np.zeros(size))[:40]), "not readable as a PNG"),
        (lambda name, files, data: [(n, d) for n, d in files.items() if n != name],
         "1 of the 4 images of test are missing: "),
        (lambda name, files, data: [*files.items(), (name, files[name])], "1 images are there more than once"),
        (lambda name, files, data: [*files.items(), (f"{INSIDE}/2099_000001.png", files[name])],
         "its image is not on the list"),
        (lambda name, files, data: [*files.items(), ("readme.txt", b"x")], "readme.txt: does not belong there"),
        (lambda name, files, data: [*files.items(), (f"../{name}", files[name])], "does not belong there"),
        (lambda name, files, data: [(n.replace("comp5_test", "comp5_val"), d) for n, d in files.items()],
         "expected results/VOC2012/Segmentation/(comp5|comp6)_test_cls/ID.png alone"),
        (lambda name, files, data: [(n.replace("comp5", "comp6") if n == name else n, d) for n, d in files.items()],
         "an archive is for one competition"),
    ],
)  # fmt: skip
def test_each_complaint(spoil: Spoil, words: str, root: Path, tmp_path: Path) -> None:
    data = layout(root)
    files = good(data)
    assert check_submission(pack(list(files.items()), tmp_path / "good.tgz"), data, "test") == []
    problems = check_submission(pack(spoil(sorted(files)[1], files, data), tmp_path / "bad.tgz"), data, "test")
    assert any(words in problem for problem in problems), problems


def test_a_link_a_torn_archive_and_no_archive(root: Path, tmp_path: Path) -> None:
    data, path = layout(root), tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(f"{INSIDE}/{data.ids('test')[0]}.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    assert "a link or a device, not a file" in check_submission(path, data, "test")[0]
    pack(list(good(data).items()), path)
    path.write_bytes(path.read_bytes()[:-300])
    assert "not a whole tar archive" in check_submission(path, data, "test")[-1]
    path.write_bytes(b"no archive")
    assert "not a whole tar archive" in check_submission(path, data, "test")[0]
    code, said = command("data", "check-submission", path, "--data", root)
    assert code == 1 and "1 problem(s)" in said
    with pytest.raises(ValueError, match="there is no such file"):
        check_submission(tmp_path / "none.tgz", data, "test")

"""A folder of one's own: names, two forms of the table, splits, and every error with its line."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from own_data import CLASSES, TAGS, VAL, make_folder
from PIL import Image

from ppc.data import DataError, open_dataset
from ppc.data.check import check_dataset, fingerprint
from ppc.data.folder import FolderLayout

TRAIN = [stem for stem in TAGS if stem not in VAL]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "mine")


def write(root: Path, *lines: str) -> None:
    (root / "tags.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def labels(data: FolderLayout) -> dict[str, list[float]]:
    return {stem: data.image_label(stem).tolist() for stem in TAGS}


def one_hot(root: Path) -> list[str]:
    order = [CLASSES[2], CLASSES[0], CLASSES[1]]  # columns in any order
    rows = [f"{stem},{','.join(str(int(c in names.split(';'))) for c in order)}" for stem, names in TAGS.items()]
    return ["image," + ",".join(order), *rows]


def test_a_good_folder(root: Path) -> None:
    data = open_dataset("folder", root)
    assert data.class_names == CLASSES and data.splits() == ["train", "val"]
    assert data.ids("train") == TRAIN and data.ids("val") == list(VAL)
    assert data.image_label("two words").tolist() == [1, 0, 1] and data.image_label("日本").tolist() == [0, 1, 1]
    assert data.image("a.jpg").shape == data.mask("a.jpg").shape + (3,) and data.has_masks("val") and data.has_saliency
    assert check_dataset(data, ["train", "val"], with_saliency=True) == []
    copy = pickle.loads(pickle.dumps(data))
    assert copy.ids("train") == TRAIN and len(pickle.dumps(data)) < 1000, "the table does not travel"


def test_one_hot_columns_say_the_same(root: Path) -> None:
    wanted = labels(FolderLayout(root))
    write(root, *one_hot(root))
    data = FolderLayout(root)
    assert labels(data) == wanted and data.splits() == ["train"] and data.ids("train") == list(TAGS)
    assert labels(FolderLayout(root, labels="masks")) == wanted


def test_lists_make_splits(root: Path) -> None:
    write(root, *one_hot(root))
    (root / "train.txt").write_text("two words.png\n日本\n", encoding="utf-8")
    (root / "all of it.txt").write_text("plain\nv1.2.final.jpg\n")
    data = FolderLayout(root)
    assert data.splits() == ["all of it", "train"] and data.ids("train") == ["two words", "日本"]
    assert data.ids("all of it") == ["plain", "v1.2.final"]
    write(root, "image,classes,split", "plain,plum,train")
    with pytest.raises(DataError, match=r"train.txt: there is a list of split `train`, and rows of it in tags.csv"):
        FolderLayout(root)


def test_all_errors_come_at_once_in_the_order_of_the_lines(root: Path) -> None:
    write(
        root,
        "image,classes,split",
        "plain,plum,train",
        "gone,plum,train",
        "two words,Äpfel;cherry,train",
        "plain.jpg,plum,val",
        "käse,,train",
        "日本,plum",
        ".hidden,plum,train",
        "zz,plum,",
    )
    with pytest.raises(DataError) as caught:
        FolderLayout(root)
    lines = str(caught.value).splitlines()
    path = root / "tags.csv"
    assert lines[0] == "7 errors:"
    wanted = [
        "line 3: no image `gone` in images/; put the image there or delete the row",
        "line 4: unknown class `cherry`; classes.txt has 3: Äpfel, pear tree, plum",
        "line 5: image `plain` is in line 2 already; keep one row an image",
        "line 6: image `käse` has no class; name its classes, or write - if it shows none of them",
        "line 7: 2 cells, but the header has 3; quote a cell that holds a comma",
        "line 8: image '.hidden': a name does not begin with a dot, and holds no slash, backslash or control character"
        "; rename it",
        "line 9: split: the name is empty; rename it",
    ]
    assert [line.strip() for line in lines[1:]] == [f"{path}: {one}" for one in wanted]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_concerns_one_image_can_be_left_out(root: Path) -> None:
    write(root, "image,classes,split", "plain,plum,train", "gone,plum,train", "käse,,train", "日本,-,train")
    data = FolderLayout(root)
    assert data.image_label("日本").tolist() == [0, 0, 0]
    problems = [(problem.path, problem.what) for problem in check_dataset(data, ["train"])]
    table = str(root / "tags.csv")
    assert (table, "line 3: no image `gone` in images/") in problems
    assert (table, "line 4: image `käse` has no class") in problems
    assert (str(root / "images/zz.png"), "has no row in tags.csv") in problems
    for read, image_id in ((data.image, "gone"), (data.image_label, "käse")):
        with pytest.raises(DataError) as caught:
            read(image_id)
        assert caught.value.of_image


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("file,classes", "line 1: no column `image`"),
        ("image,plum,cherry", "line 1: column `cherry` is none of the 3 classes of classes.txt"),
        ("image,plum,Äpfel", "line 1: no column for class `pear tree`"),
        ("image,plum,plum", "line 1: column `plum` comes twice"),
        ("image,Äpfel,pear tree,plum", "line 2: `yes` in column `Äpfel`; write 0 or 1"),
    ],
)
def test_a_wrong_header_or_cell(root: Path, header: str, said: str) -> None:
    write(root, header, "plain,yes,0,1"[: 9 + 4 * (header.count(",") == 3)])
    with pytest.raises(DataError, match=rf"tags.csv: {said}"):
        FolderLayout(root)


def test_other_bad_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it looks like data.name folder"):
        open_dataset("voc", root)
    Image.new("RGB", (4, 4)).save(root / "images/plain.png")
    with pytest.raises(DataError, match=r"images/plain.png: plain.jpg is named `plain` too; rename one"):
        FolderLayout(root)
    (root / "tags.csv").write_bytes(b"image,classes\n\xff\xfe,plum\n")
    with pytest.raises(DataError, match=r"tags.csv: not readable as a table"):
        FolderLayout(root)
    (root / "classes.txt").write_text("")
    with pytest.raises(DataError, match=r"classes.txt: 0 names"):
        FolderLayout(root)
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"has no classes.txt; data.root must be"):
        FolderLayout(root)


def test_maps_of_another_size_or_class_name_both_sides(root: Path) -> None:
    data = FolderLayout(root)
    Image.new("L", (5, 6)).save(root / "saliency/plain.png")
    with pytest.raises(DataError, match=r"saliency/plain.png: 5x6 pixels but its image has 48x36; .*images/plain.jpg"):
        data.saliency("plain")
    Image.fromarray(np.full((36, 48), 4, np.uint8)).save(root / "masks/plain.png")
    with pytest.raises(DataError, match=r"masks/plain.png: unknown class 4 \(there are 3 classes\); .*classes.txt"):
        data.mask("plain")


def test_the_fingerprint_holds_tags_and_class_names(root: Path) -> None:
    def prints() -> str:
        return fingerprint(FolderLayout(root), ["train"], with_masks=True, with_saliency=False)

    seen = {prints()}
    table = (root / "tags.csv").read_text(encoding="utf-8")
    (root / "tags.csv").write_text(table.replace("käse,Äpfel", "käse,plum"), encoding="utf-8")
    seen.add(prints())
    (root / "tags.csv").write_text(table.replace("plum", "prune"), encoding="utf-8")
    (root / "classes.txt").write_text("Äpfel\npear tree\nprune\n", encoding="utf-8")
    seen.add(prints())
    assert len(seen) == 3


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_8_bits_is_named_and_not_cut_off(mode: str, root: Path) -> None:
    values = np.full((40, 50), 3000, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    path = FolderLayout(root).image_path("a.jpg")
    Image.fromarray(values).save(path, format="TIFF")
    with pytest.raises(DataError, match=r"more than 8 bits a pixel.*8-bit grey or RGB") as caught:
        FolderLayout(root).image("a.jpg")
    assert caught.value.of_image


def test_an_image_too_large_to_open_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = FolderLayout(root)
    for read in (data.image, data.image_size):
        with pytest.raises(DataError, match=r"a\.jpg\S*: not readable as an image .*pixels.*store it smaller"):
            read("a.jpg")


def test_a_disk_that_does_not_answer_is_no_broken_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict on an image is kept: one day's network must not leave it out for ever."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jpg\S*: cannot be read \(Input/output error\)") as caught:
        FolderLayout(root).image("a.jpg")
    assert not caught.value.of_image


@pytest.mark.parametrize("name", ["README", "readme.roboflow", "LICENSE", "Licence"])
def test_texts_about_the_folder_are_no_splits(name: str, root: Path) -> None:
    before = FolderLayout(root).splits()
    (root / f"{name}.txt").write_text("See https://example.org/x y\n")
    assert FolderLayout(root).splits() == before

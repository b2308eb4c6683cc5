"""The COCO reader: masks against a drawing by hand, tags, splits, the index that workers share, bad files."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_data import HEIGHT, NUM_CLASSES, WIDTH, annotation, box, make_coco, rle
from PIL import Image

from ppc.data import DataError, coco_index, open_dataset
from ppc.data.check import broken_images, check_dataset, fingerprint
from ppc.data.coco import CocoLayout, draw_mask

TRAIN = [f"COCO_train2014_{n:012d}" for n in range(9, 18)]
VAL = [f"COCO_val2014_{n:012d}" for n in range(500, 503)]


@pytest.fixture(autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of this test's own for indexes."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.setattr(coco_index, "HERE", folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def change(root: Path, edit: Any, part: str = "train2014") -> Path:
    """Rewrite an annotation file."""
    path = root / f"annotations/instances_{part}.json"
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))
    return path


def test_classes_splits_tags_and_sizes(root: Path) -> None:
    data = open_dataset("coco", root)
    assert data.class_names == tuple(f"thing {k:02d}" for k in range(1, NUM_CLASSES + 1)), "in the order of their ids"
    assert data.splits() == ["train", "train2014", "val", "val2014"]
    assert data.ids("train") == TRAIN[:8] and data.ids("train2014") == TRAIN and data.ids("val") == VAL
    tags = {image_id: np.flatnonzero(data.image_label(image_id)) + 1 for image_id in TRAIN}
    assert [tags[one].tolist() for one in TRAIN[:3]] == [[3, 40], [80], [40, 80]], "a crowd is a tag too"
    assert tags[TRAIN[8]].tolist() == [] and data.label_source == "annotations"
    assert data.image(TRAIN[0]).shape == (HEIGHT, WIDTH, 3) and data.image_size(TRAIN[0]) == (HEIGHT, WIDTH)
    assert data.has_masks("val") and data.has_saliency and data.saliency(VAL[0]).shape == (HEIGHT, WIDTH)


def test_masks_are_polygons_rles_and_crowds_the_smaller_above(root: Path) -> None:
    data = open_dataset("coco", root)
    first, second, third = (np.zeros((HEIGHT, WIDTH), np.uint8) for _ in range(3))
    first[4:24, 4:40] = 3
    first[10:20, 12:24] = 40  # smaller, though it comes first in the file
    second[:, 4:9] = 80
    third[28:] = 255
    third[2:12, 2:12] = 40
    third[14:30, 20:44] = 40  # an object is above a crowd
    for image_id, wanted in zip(TRAIN, (first, second, third), strict=False):
        np.testing.assert_array_equal(data.mask(image_id), wanted)
    assert not data.mask(TRAIN[8]).any()


def test_a_compressed_rle_a_line_and_a_hole() -> None:
    from pycocotools import mask as library

    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[3:9, 7:30] = inside[20:22] = True
    packed = library.encode(np.asfortranarray(inside.astype(np.uint8)))
    segmentation = {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}
    np.testing.assert_array_equal(draw_mask([(7, False, 1.0, segmentation)], HEIGHT, WIDTH), inside * 7)
    np.testing.assert_array_equal(draw_mask([(7, False, 1.0, rle(inside))], HEIGHT, WIDTH), inside * 7)
    assert not draw_mask([(7, False, 1.0, [[1, 1, 5, 5]]), (7, False, 1.0, [])], HEIGHT, WIDTH).any()


def test_lists_of_ones_own_in_three_ways_to_name_an_image(root: Path) -> None:
    (root / "ImageSets").mkdir()
    (root / "ImageSets/few.txt").write_text(f"{TRAIN[3]}\n12\n000000000500\n{VAL[1]}.jpg\ntrain2014/{TRAIN[0]}.jpg\n")
    data = open_dataset("coco", root)
    assert "few" in data.splits() and data.ids("few") == [TRAIN[3], TRAIN[3], VAL[0], VAL[1], TRAIN[0]]
    with pytest.raises(DataError, match="no split `test`; this data set has: few, train, train2014, val, val2014"):
        data.ids("test")
    (root / "ImageSets/few.txt").write_text("77\n")
    with pytest.raises(DataError, match="no image `77` in instances_train2014.json and instances_val2014.json"):
        data.image(data.ids("few")[0])


def test_the_file_is_parsed_once_and_a_copy_for_a_worker_is_small(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset("coco", root)
    wanted = data.mask(TRAIN[0])
    data.leave_out("train", [TRAIN[1]])
    sent = pickle.dumps(data)
    assert len(sent) < 4000, "neither tables nor annotations travel"
    coco_index.open_index.cache_clear()  # as in a process of its own
    monkeypatch.setattr(coco_index, "_parse", None)
    copy = pickle.loads(sent)
    np.testing.assert_array_equal(copy.mask(TRAIN[0]), wanted)
    assert copy.ids("train") == [one for one in TRAIN[:8] if one != TRAIN[1]]


def test_pngs_are_taken_where_there_are_any(root: Path) -> None:
    drawn = open_dataset("coco", root)
    before = fingerprint(drawn, ["val"], with_masks=True, with_saliency=False)
    (root / "SegmentationClass/val2014").mkdir(parents=True)
    for image_id in VAL:
        mask = drawn.mask(image_id)
        Image.fromarray(np.where(mask == 3, 4, mask)).save(root / f"SegmentationClass/val2014/{image_id}.png")
    data = open_dataset("coco", root)
    assert set(data.mask(VAL[0]).flat) == {0, 4}
    assert fingerprint(data, ["val"], with_masks=True, with_saliency=False) != before
    Image.fromarray(np.full((HEIGHT, WIDTH), 90, np.uint8)).save(root / f"SegmentationClass/val2014/{VAL[0]}.png")
    with pytest.raises(
        DataError, match=r"unknown class 90 \(there are 80 classes\); .*json, in the order of their ids"
    ):
        data.mask(VAL[0])


def test_masks_without_pycocotools_are_an_error_before_a_trial_begins(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppc.data.coco.find_spec", lambda name: None)
    data = open_dataset("coco", root)
    assert data.image_label(TRAIN[0]).sum() == 2
    for ask in (data.has_masks, partial(broken_images, data)):
        with pytest.raises(DataError, match=r"pip install -e '\.\[coco\]', or put PNGs into .*SegmentationClass"):
            ask("train")


def test_the_check_and_the_fingerprint(root: Path, tmp_path: Path) -> None:
    data = open_dataset("coco", root)
    assert check_dataset(data, ["train2014", "val"], with_saliency=True) == []
    args = {"with_masks": True, "with_saliency": False}
    before = fingerprint(data, ["train"], **args)
    copy = open_dataset("coco", make_coco(tmp_path / "copy"))
    assert fingerprint(copy, ["train"], **args) == before
    change(tmp_path / "copy", lambda whole: whole["annotations"][0]["segmentation"][0].__setitem__(0, 13))
    changed = open_dataset("coco", tmp_path / "copy")
    assert fingerprint(changed, ["train"], **args) != before
    assert fingerprint(changed, ["train"], with_masks=False, with_saliency=False) == fingerprint(
        data, ["train"], with_masks=False, with_saliency=False
    ), "tags are as before"
    (tmp_path / f"copy/train2014/{TRAIN[0]}.jpg").unlink()
    assert [problem.what for problem in check_dataset(changed, ["train"])][0] == "missing"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop("images"), "something has no field 'images'"),
        (lambda w: w["annotations"][0].update(category_id=999), "is of category 999, which is not among its"),
        (lambda w: w["annotations"][0].update(image_id=999), "annotations of image 999, which is not among its images"),
        (lambda w: w["categories"].pop(), "its 79 classes are not the 80 of instances_val2014.json"),
        (lambda w: w["images"][0].update(file_name=".jpg"), "a name does not begin with a dot"),
    ],
)
def test_a_bad_annotation_file_is_named(root: Path, edit: Any, said: str) -> None:
    def both(whole: dict[str, Any]) -> None:
        whole["annotations"] = [one for one in whole["annotations"] if one["category_id"] != 7]
        edit(whole)

    change(root, both)
    with pytest.raises(DataError, match=rf"instances_train2014.json.*{said}"):
        open_dataset("coco", root)


def test_two_entries_of_one_file_name_would_hide_each_others_annotations(root: Path) -> None:
    path = change(root, lambda w: w["images"][3].update(file_name=w["images"][1]["file_name"]))
    with pytest.raises(DataError, match=f"{path}: images 10 and 12 are both named {TRAIN[1]}, .* give each"):
        open_dataset("coco", root)


def test_an_annotation_that_cannot_be_drawn_or_fits_no_image(root: Path) -> None:
    def edit(whole: dict[str, Any]) -> None:
        whole["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6, 7]]
        whole["annotations"][2]["segmentation"]["size"] = [5, 5]
        whole["images"][3]["height"] = 99

    change(root, edit)
    data = CocoLayout(root)
    found = {problem.what for problem in check_dataset(data, ["train"])}
    assert found == {
        f"an annotation of {TRAIN[0]} cannot be drawn (a polygon with an odd number of coordinates)",
        f"an annotation of {TRAIN[1]} cannot be drawn (an RLE of [5, 5] in an image of [36, 48])",
        "48x99 pixels but its image has 48x36",
    }


def test_what_is_no_coco_folder_is_told(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DataError, match="no annotations/instances_train2014.json"):
        open_dataset("coco", tmp_path)
    with pytest.raises(DataError, match="it looks like data.name coco"):
        open_dataset("voc", root)
    with pytest.raises(ValueError, match=r"data.labels: `xml`"):
        open_dataset("coco", root, labels="xml")
    assert annotation(1, [box(0, 0, 1, 1)], 1.0)["category_id"] == 7

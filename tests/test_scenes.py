"""The generated data set: deterministic, what its README says, and never half there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppc.data import VocLayout, open_dataset
from ppc.data import scenes as S
from ppc.data.check import check_dataset, fingerprint
from ppc.data.scene_draw import draw_scene
from ppc.data.scenes import make_scenes

PARAMETERS = {"num_classes": 5, "num_train": 30, "num_val": 6, "image_px": 96, "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set", **PARAMETERS)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def draw(index: int, *, num_classes: int = 5, image_px: int = 96):
    rng = np.random.default_rng(index)
    return draw_scene(rng, num_classes=num_classes, image_px=image_px, first_class=index % num_classes)


def test_the_same_parameters_give_the_same_bytes(root, tmp_path):
    assert contents(make_scenes(tmp_path / "again", **PARAMETERS)) == contents(root)


def test_an_image_does_not_depend_on_how_many_there_are(root, tmp_path):
    fewer = contents(make_scenes(tmp_path / "fewer", **{**PARAMETERS, "num_train": 4, "num_val": 2}))
    images = [name for name in fewer if name.endswith((".jpg", ".png"))]
    assert len(images) == 6 * 3
    assert all(fewer[name] == contents(root)[name] for name in images)


def test_the_seed_changes_every_image(root, tmp_path):
    other = contents(make_scenes(tmp_path / "other", **{**PARAMETERS, "num_train": 4, "seed": 4}))
    assert all(other[n] != contents(root)[n] for n in other if n.endswith(".jpg"))
    names = [name for name in contents(root) if name.endswith(".jpg")]
    assert len({contents(root)[name] for name in names}) == len(names) == 36


def test_it_says_that_it_is_generated(root):
    assert (root / "README.txt").read_text().startswith("GENERATED")
    assert json.loads((root / "dataset.json").read_text())["num_train"] == 30


def test_nothing_is_wrong_with_it(root):
    layout = VocLayout(root)
    assert layout.label_source == "cls_labels" and layout.num_classes == 5
    assert (len(layout.ids("train")), len(layout.ids("val"))) == (30, 6)
    assert check_dataset(layout, ["train", "val"], with_saliency=True) == []


def test_labels_are_what_the_masks_show(root):
    from_file, from_masks = VocLayout(root), VocLayout(root, labels="masks")
    for image_id in from_file.ids("train"):
        np.testing.assert_array_equal(from_file.image_label(image_id), from_masks.image_label(image_id))


def test_classes_are_balanced_and_images_have_one_to_three_objects():
    labels = []
    for index in range(120):
        present = set(np.unique(draw(index).mask_HW)) - {0, 255}
        assert 1 <= len(present) <= 3 and 1 + index % 5 in present
        labels.append([float(k in present) for k in range(1, 6)])
    share = np.array(labels).mean(0)
    assert share.min() > 0.2 and share.max() < 0.5
    counts = np.array(labels).sum(1)
    assert (counts == 1).any() and (counts == 2).any() and (counts == 3).any()


def test_the_rim_lies_on_every_border_and_is_thin():
    for index in range(20):
        mask = draw(index).mask_HW.astype(int)
        for first, second in ((mask[:, :-1], mask[:, 1:]), (mask[:-1], mask[1:])):
            touch = (first != second) & (first != 255) & (second != 255)
            assert not touch.any()
        rim = mask == 255
        assert rim.any()
        # No 5x5 block of rim: it is 1 px on either side of a border (corners of three regions are a little wider).
        blocks = np.lib.stride_tricks.sliding_window_view(rim, (5, 5))
        assert not blocks.all((2, 3)).any()


def test_the_telling_part_is_much_smaller_than_the_object():
    shares = []
    for index in range(40):
        scene = draw(index)
        objects = (scene.mask_HW > 0) & (scene.mask_HW < 255)
        assert scene.part_HW.any()
        shares.append(scene.part_HW.sum() / objects.sum())
    assert 0.05 < np.median(shares) < 0.3 and max(shares) < 0.5


def test_the_part_tells_the_class_and_the_body_less():
    """Nearest class mean of the colour: over the part it is mostly right, over the body it is not."""
    part_colors, body_colors, classes = [], [], []
    for index in range(160):
        scene = draw(index)
        inside = (scene.mask_HW > 0) & (scene.mask_HW < 255)
        present = set(scene.mask_HW[inside].tolist())
        part, body = scene.part_HW & inside, inside & ~scene.part_HW
        if len(present) == 1 and part.any():
            classes.append(present.pop())
            # The most vivid pixels of a part are its own hue, the others are ink.
            vivid = scene.image_HW3[part].astype(float)
            spread = vivid.max(1) - vivid.min(1)
            part_colors.append(vivid[spread >= np.median(spread)].mean(0))
            body_colors.append(scene.image_HW3[body].astype(float).mean(0))
    label = np.array(classes)

    def accuracy(colors: list[np.ndarray]) -> float:
        x = np.array(colors)
        means = np.array([x[label == k].mean(0) for k in range(1, 6)])
        guess = 1 + ((x[:, None] - means) ** 2).sum(2).argmin(1)
        return float((guess == label).mean())

    assert len(label) > 60
    assert accuracy(part_colors) > 0.9
    assert 0.3 < accuracy(body_colors) < 0.75


def test_objects_stand_out_from_the_background():
    gaps = []
    for index in range(40):
        scene = draw(index)
        gray = scene.image_HW3.astype(float).mean(2)
        gaps.append(gray[(scene.mask_HW > 0) & (scene.mask_HW < 255)].mean() - gray[scene.mask_HW == 0].mean())
    assert min(gaps) > 0 and np.median(gaps) > 40


def test_saliency_is_good_but_not_perfect():
    hit = union = 0
    for index in range(40):
        scene = draw(index)
        sure, object_ = scene.mask_HW != 255, scene.mask_HW > 0
        salient = scene.saliency_HW > 127
        hit += (salient & object_ & sure).sum()
        union += ((salient | object_) & sure).sum()
    assert 0.8 < hit / union < 0.99


@pytest.mark.parametrize(("num_classes", "image_px"), [(1, 32), (2, 48), (12, 128)])
def test_any_number_of_classes_and_small_images(num_classes, image_px):
    for index in range(24):
        scene = draw(index, num_classes=num_classes, image_px=image_px)
        assert max(scene.image_HW3.shape[:2]) == image_px
        assert scene.image_HW3.shape[:2] == scene.mask_HW.shape == scene.saliency_HW.shape
        present = set(np.unique(scene.mask_HW)) - {0, 255}
        assert 1 + index % num_classes in present and max(present) <= num_classes


def test_made_twice_nothing_is_written_again(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    make_scenes(root, **PARAMETERS)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert not [p for p in root.parent.iterdir() if p != root]


@pytest.mark.parametrize("damage", ["image", "empty image", "parameters", "list"])
def test_a_half_written_one_is_made_anew(root, tmp_path, damage):
    parameters = {**PARAMETERS, "num_train": 4, "num_val": 2}
    made = make_scenes(tmp_path / "set", **parameters)
    whole = contents(made)
    victim = {
        "image": "JPEGImages/train_00002.jpg",
        "empty image": "SALImages/val_00001.png",
        "parameters": "dataset.json",
        "list": "ImageSets/Segmentation/val.txt",
    }[damage]
    if damage == "empty image":
        (made / victim).write_bytes(b"")
    elif damage == "parameters":
        (made / victim).write_text('{"num_cl')
    else:
        (made / victim).unlink()
    make_scenes(made, **parameters)
    assert contents(made) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_killed_while_writing_leaves_no_data_set(tmp_path, monkeypatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(S, "_write_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "set", **PARAMETERS)
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_writers_takes_the_others_work(tmp_path, monkeypatch):
    parameters = {**PARAMETERS, "num_train": 2, "num_val": 0}
    write = S._write

    def overtaken(work: Path, wanted: dict[str, str | int]) -> None:
        monkeypatch.setattr(S, "_write", write)
        make_scenes(tmp_path / "set", **parameters)
        write(work, wanted)

    monkeypatch.setattr(S, "_write", overtaken)
    make_scenes(tmp_path / "set", **parameters)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert VocLayout(tmp_path / "set").splits() == ["train"]


def test_another_set_in_the_same_folder_is_refused(root):
    with pytest.raises(ValueError, match=r"dataset.json: made with num_train 30 instead of 31; .*another folder"):
        make_scenes(root, **{**PARAMETERS, "num_train": 31})


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a folder made by the generator"):
        make_scenes(tmp_path, **PARAMETERS)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    make_scenes(tmp_path / "set", **{**PARAMETERS, "num_train": 2, "num_val": 0})
    assert len(VocLayout(tmp_path / "set").ids("train")) == 2


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"num_classes": 13}, {"num_train": 0}, {"image_px": 8}])
def test_parameters_out_of_range_name_their_key(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"data.scenes.*{next(iter(wrong))}"):
        make_scenes(tmp_path / "set", **{**PARAMETERS, **wrong})


def test_fingerprint_is_the_contents_and_not_the_place(root, tmp_path):
    args = {"with_masks": True, "with_saliency": True}
    other = make_scenes(tmp_path / "copy", **PARAMETERS)
    before = fingerprint(VocLayout(root), ["train", "val"], **args)
    assert fingerprint(VocLayout(other), ["val", "train"], **args) == before
    assert fingerprint(VocLayout(root), ["train"], **args) != before


def test_masks_are_visible_in_a_viewer(root):
    with Image.open(root / "SegmentationClass/train_00000.png") as mask:
        palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert palette[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]


def test_open_dataset_makes_the_scenes(tmp_path):
    small = {**PARAMETERS, "num_train": 2, "num_val": 0}
    layout = open_dataset("scenes", tmp_path / "set", labels="masks", scenes=small)
    assert layout.label_source == "masks" and layout.splits() == ["train"]
    with pytest.raises(ValueError, match="`coc` is none of voc, coco, folder, scenes"):
        open_dataset("coc", tmp_path)

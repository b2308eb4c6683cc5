"""The VOC reader, the checker, the fingerprint, seeds and the loader."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppc.data import open_dataset
from ppc.data.check import check_dataset, fingerprint
from ppc.data.labels import DataError
from ppc.data.loader import CamTrainSet, Loader, epoch_order, rank_positions
from ppc.data.voc import VOC_CLASSES, VocLayout
from ppc.seeding import derive_seed

SHARED = Path(os.environ.get("PPC_SHARED", Path(__file__).parents[2] / "shared"))
TAGS = {"cat1": [1, 0, 0], "x-2": [0, 1, 1], "2007_000032": [0, 0, 1], "4": [1, 1, 0]}


def label_dict() -> dict[str, np.ndarray]:
    return {key: np.array(value, np.float32) for key, value in TAGS.items()}


def write_xml(path: Path, names: list[str]) -> None:
    objects = "".join(
        f"<object><name>{n}</name><part><name>head</name></part><difficult>0</difficult></object>" for n in names
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<annotation><filename>x</filename>{objects}</annotation>")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images of three classes: train has three, val one; ids of four different forms."""
    root = tmp_path / "set"
    for folder in ("JPEGImages", "SegmentationClass", "SALImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nbee\ncow\n")
    (root / "ImageSets/Segmentation/train.txt").write_text("cat1\nx-2\n2007_000032\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("4\n")
    rng = np.random.default_rng(0)
    for image_id, tags in TAGS.items():
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{image_id}.jpg")
        mask = np.zeros((30, 40), np.uint8)
        mask[:2] = 255
        for k, tag in enumerate(tags, 1):
            mask[4 * k : 4 * k + 3, 5:30] = k * tag
        picture = Image.fromarray(mask)
        picture.putpalette(bytes(rng.integers(0, 256, 768, dtype=np.uint8)))
        picture.save(root / f"SegmentationClass/{image_id}.png")
        Image.fromarray((mask > 0).astype(np.uint8) * 200).save(root / f"SALImages/{image_id}.png")
    np.save(root / "cls_labels.npy", np.array(label_dict(), dtype=object))
    return root


def write_list(root: Path, text: str, split: str = "train") -> None:
    (root / f"ImageSets/Segmentation/{split}.txt").write_text(text)


# -- lists


@pytest.mark.parametrize(
    "text",
    [
        "cat1\nx-2\n2007_000032\n",
        "\ufeffcat1\r\nx-2  \r\n\r\n2007_000032",
        "/JPEGImages/cat1.jpg /SegmentationClassAug/cat1.png\n/JPEGImages/x-2.jpg /SegmentationClassAug/x-2.png\n"
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n",
        "JPEGImages/cat1.jpg\nJPEGImages/x-2.JPG\nJPEGImages/2007_000032.jpg\n",
        "cat1.jpg\nx-2.jpg\n2007000032\n",
    ],
)
def test_every_list_format_gives_the_same_ids(root, text):
    (root / "ImageSets/Segmentation/train.txt").write_bytes(text.encode())
    assert VocLayout(root).ids("train") == ["cat1", "x-2", "2007_000032"]


def test_an_integer_id_that_is_a_file_is_kept(root):
    shutil.copy(root / "JPEGImages/cat1.jpg", root / "JPEGImages/2007000032.jpg")
    write_list(root, "2007000032\n1234567890\na.b\nmy image\n")
    assert VocLayout(root).ids("train") == ["2007000032", "1234567890", "a.b", "my image"]


def test_an_unknown_split_lists_the_known_ones(root):
    with pytest.raises(ValueError, match=r"train_aug.txt: no split `train_aug`; this data set has: train, val"):
        VocLayout(root).ids("train_aug")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the list is empty"), (b"\n \n", "the list is empty"), (b"\xff\xfe\x00", "UTF-8"), (b"a\nb/c\n", "line 2")],
)
def test_a_bad_list_names_its_file(root, content, message):
    (root / "ImageSets/Segmentation/train.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.txt.*{message}"):
        VocLayout(root).ids("train")


def test_a_folder_that_is_no_voc_root(root, tmp_path):
    with pytest.raises(ValueError, match=r"no folder JPEGImages; did you mean .*set\?"):
        VocLayout(tmp_path)
    shutil.rmtree(root / "ImageSets")
    with pytest.raises(ValueError, match="no folder ImageSets/Segmentation; data.root"):
        VocLayout(root)


# -- images, masks, saliency


def test_contents(root):
    layout = VocLayout(root)
    assert layout.class_names == ("ant", "bee", "cow") and layout.num_classes == 3
    image, mask, saliency = layout.image("x-2"), layout.mask("x-2"), layout.saliency("x-2")
    assert (image.shape, image.dtype) == ((30, 40, 3), np.uint8)
    assert (mask.shape, sorted(set(mask.flat))) == ((30, 40), [0, 2, 3, 255])
    assert sorted(set(saliency.flat)) == [0, 200]
    assert layout.image_size("x-2") == (30, 40)


def test_a_gray_image_becomes_rgb_and_a_colour_saliency_map_gray(root):
    Image.new("L", (40, 30), 77).save(root / "JPEGImages/cat1.jpg")
    Image.new("RGB", (40, 30), (30, 60, 93)).save(root / "SALImages/cat1.png")
    assert VocLayout(root).image("cat1").tolist()[0][0] == [77, 77, 77]
    assert set(VocLayout(root).saliency("cat1").flat) == {61}


def test_train_aug_alone_reads_the_augmented_masks(root):
    (root / "SegmentationClassAug").mkdir()
    Image.new("L", (40, 30), 1).save(root / "SegmentationClassAug/cat1.png")
    layout = VocLayout(root)
    assert set(layout.mask("cat1", split="train_aug").flat) == {1}
    for split in (None, "train", "val"):
        assert set(layout.mask("cat1", split=split).flat) == {0, 1, 255}
    with pytest.raises(ValueError, match=r"SegmentationClassAug/x-2.png: missing; .*SBD"):
        layout.mask("x-2", split="train_aug")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "read", "message"),
    [
        (lambda r: (r / "JPEGImages/cat1.jpg").unlink(), "image", r"JPEGImages/cat1.jpg: missing; put"),
        (lambda r: truncate(r / "JPEGImages/cat1.jpg"), "image", r"cat1.jpg: not readable .*; truncated"),
        (lambda r: (r / "JPEGImages/cat1.jpg").write_bytes(b"<html>"), "image", r"cat1.jpg: not readable"),
        (lambda r: (r / "SegmentationClass/cat1.png").unlink(), "mask", r"SegmentationClass/cat1.png: missing"),
        (lambda r: truncate(r / "SegmentationClass/cat1.png"), "mask", r"Class/cat1.png: not readable"),
        (
            lambda r: Image.new("L", (40, 29)).save(r / "SegmentationClass/cat1.png"),
            "mask",
            r"Class/cat1.png: 40x29 pixels but its image has 40x30; resize",
        ),
        (
            lambda r: Image.new("L", (40, 30), 4).save(r / "SegmentationClass/cat1.png"),
            "mask",
            r"Class/cat1.png: unknown class 4 \(there are 3 classes\); .*classes.txt",
        ),
        (
            lambda r: Image.new("RGB", (40, 30)).save(r / "SegmentationClass/cat1.png"),
            "mask",
            r"Class/cat1.png: a mask of mode RGB; store class indices",
        ),
        (lambda r: (r / "SALImages/cat1.png").unlink(), "saliency", r"SALImages/cat1.png: missing"),
        (
            lambda r: Image.new("L", (41, 30)).save(r / "SALImages/cat1.png"),
            "saliency",
            r"SALImages/cat1.png: 41x30 pixels but its image has 40x30",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_remedy(root, damage, read, message):
    damage(root)
    layout = VocLayout(root)
    with pytest.raises(ValueError, match=message):
        getattr(layout, read)("cat1")
    problems = [str(p) for p in check_dataset(layout, ["train", "val"], with_saliency=True)]
    assert len(problems) == 1, problems
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0])


# -- image-level labels


def test_all_sources_agree(root):
    for image_id, tags in TAGS.items():
        write_xml(root / f"Annotations/{image_id}.xml", [n for n, t in zip("abc", tags, strict=True) if t])
    (root / "classes.txt").write_text("a\nb\nc\n")
    for source in ("auto", "cls_labels", "xml", "masks"):
        layout = VocLayout(root, labels=source)
        for image_id, tags in TAGS.items():
            label = layout.image_label(image_id)
            assert label.dtype == np.float32 and label.tolist() == tags, source


def test_auto_takes_the_first_that_exists(root):
    write_xml(root / "Annotations/cat1.xml", ["bee"])
    assert VocLayout(root).label_source == "cls_labels"
    (root / "cls_labels.npy").unlink()
    assert VocLayout(root).label_source == "xml"
    assert VocLayout(root).image_label("cat1").tolist() == [0, 1, 0]
    shutil.rmtree(root / "Annotations")
    assert VocLayout(root).label_source == "masks"
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(ValueError, match="no image-level labels; add cls_labels.npy"):
        VocLayout(root)
    with pytest.raises(ValueError, match="data.labels is `xml` but its files are missing; there is: none"):
        VocLayout(root, labels="xml")
    with pytest.raises(ValueError, match="data.labels: `tags` is none of auto, cls_labels"):
        VocLayout(root, labels="tags")


def test_labels_from_the_masks_of_train_aug(root):
    (root / "SegmentationClassAug").mkdir()
    Image.new("L", (40, 30), 2).save(root / "SegmentationClassAug/cat1.png")
    layout = VocLayout(root, labels="masks")
    assert layout.image_label("cat1", split="train_aug").tolist() == [0, 1, 0]
    assert layout.image_label("cat1", split="train").tolist() == [1, 0, 0]


def as_npy(value: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(buffer, header)
    array = np.empty((), object)
    array[()] = value
    return buffer.getvalue() + pickle.dumps(array, protocol=protocol)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("form", ["npy", "pickle"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_a_label_file_of_any_kind_is_read(root, protocol, form, dtype):
    labels = {key: value.astype(dtype) for key, value in label_dict().items()}
    blob = as_npy(labels, protocol) if form == "npy" else pickle.dumps(labels, protocol=protocol)
    (root / "cls_labels.npy").write_bytes(blob)
    label = VocLayout(root).image_label("x-2")
    assert label.dtype == np.float32 and label.tolist() == TAGS["x-2"]


def test_names_of_numpys_older_core_module_are_read(root):
    blob = as_npy(label_dict(), 3)
    assert b"numpy._core.multiarray" in blob
    (root / "cls_labels.npy").write_bytes(blob.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert VocLayout(root).image_label("x-2").tolist() == TAGS["x-2"]


def test_integer_keys_of_irn_are_read(root):
    (root / "cls_labels.npy").write_bytes(as_npy({2007000032: np.array([0, 1, 0.0])}, 4))
    assert VocLayout(root).image_label("2007_000032").tolist() == [0, 1, 0]


class Attack:
    """Unpickled without care, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"mkdir {self.target}",)


@pytest.mark.parametrize("form", ["npy", "pickle"])
@pytest.mark.parametrize("place", ["whole", "value"])
def test_a_pickle_with_code_is_refused_and_not_run(root, tmp_path, form, place):
    attack = Attack(tmp_path / "owned")
    value = attack if place == "whole" else {**label_dict(), "x-2": attack}
    (root / "cls_labels.npy").write_bytes(as_npy(value, 4) if form == "npy" else pickle.dumps(value))
    layout = VocLayout(root)
    with pytest.raises(DataError, match=r"cls_labels.npy: refused: it asks for (posix|os)\.system; expected"):
        layout.image_label("x-2")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(attack))  # the attack is a real one
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, pickle.loads])
def test_no_other_function_is_admitted(root, function):
    (root / "cls_labels.npy").write_bytes(pickle.dumps({"x-2": function}))
    with pytest.raises(DataError, match="refused: it asks for"):
        VocLayout(root).image_label("x-2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable"),
        (b"\x93NUMPY\x01", "not readable"),
        (pickle.dumps([1, 2]), "holds a list without labels"),
        (pickle.dumps({}), "holds a dict without labels"),
        (pickle.dumps({"cat1": [1, 0, 0]}), "label of cat1 is list, not 3 numbers"),
        (pickle.dumps({"cat1": np.ones(20)}), r"label of cat1 is \(20,\), not 3 numbers"),
        (pickle.dumps({"cat1": np.array([0, 1, 255])}), "label of cat1 holds other values"),
        (pickle.dumps({"cat1": np.array([0, 1, np.nan])}), "label of cat1 holds other values"),
        (pickle.dumps({"cat1": np.zeros(3)}), "no label for x-2; add it, or set data.labels"),
    ],
)
def test_a_bad_label_file_is_named(root, content, message):
    (root / "cls_labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"cls_labels.npy: .*{message}"):
        VocLayout(root).image_label("x-2")


def test_a_plain_array_is_not_a_label_file(root):
    np.save(root / "cls_labels.npy", np.zeros((4, 3)))
    with pytest.raises(DataError, match="it holds an array of float64, not a dict"):
        VocLayout(root).image_label("x-2")


def test_bad_annotations_are_named(root):
    write_xml(root / "Annotations/cat1.xml", ["ant", "head"])
    (root / "Annotations/x-2.xml").write_text("<annotation><obj")
    layout = VocLayout(root, labels="xml")
    with pytest.raises(DataError, match=r"cat1.xml: unknown class `head`; known: ant, bee, cow"):
        layout.image_label("cat1")
    with pytest.raises(DataError, match=r"x-2.xml: not readable as XML"):
        layout.image_label("x-2")
    with pytest.raises(DataError, match=r"Annotations/4.xml: missing; add it, or set data.labels"):
        layout.image_label("4")


def test_class_names(root):
    (root / "classes.txt").write_text("ant\nant\n")
    with pytest.raises(DataError, match=r"classes.txt: 2 names, 1 different"):
        VocLayout(root)
    (root / "classes.txt").unlink()
    assert VocLayout(root).class_names == VOC_CLASSES == tuple(sorted(VOC_CLASSES)) and len(VOC_CLASSES) == 20


# -- check and fingerprint


def test_a_good_set_has_no_problems(root):
    assert check_dataset(VocLayout(root), ["train", "val"], with_saliency=True) == []


def test_missing_saliency_is_a_problem_only_where_it_is_needed(root):
    shutil.rmtree(root / "SALImages")
    layout = VocLayout(root)
    assert not layout.has_saliency and check_dataset(layout, ["train"]) == []
    assert len(check_dataset(layout, ["train"], with_saliency=True)) == 3


def test_list_problems(root):
    write_list(root, "cat1\nx-2\ncat1\n4\n")
    problems = check_dataset(VocLayout(root), ["train", "val", "test"])
    assert [(Path(p.path).name, p.what) for p in problems] == [
        ("test.txt", "no split `test`"),
        ("train.txt", "cat1 is listed 2 times"),
        ("train.txt", "4 is in train and in val"),
    ]


def test_masks_are_missed_where_other_images_of_the_split_have_them(root):
    (root / "SegmentationClass/4.png").unlink()
    assert check_dataset(VocLayout(root), ["train", "val"]) == [], "val is a split without masks"
    (root / "SegmentationClass/x-2.png").unlink()
    assert [(Path(p.path).name, p.what) for p in check_dataset(VocLayout(root), ["train", "val"])] == [
        ("x-2.png", "missing")
    ]


@pytest.mark.parametrize("suffix", [".JPG", ".PNG", ".webp", ".tif"])
def test_a_file_of_another_suffix_is_named(root, suffix):
    (root / "JPEGImages/cat1.jpg").rename(root / f"JPEGImages/cat1{suffix}")
    message = rf"cat1.jpg: missing, but there is cat1\{suffix}; store it as .jpg or .jpeg or .png"
    with pytest.raises(DataError, match=message):
        VocLayout(root).image("cat1")


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_that_a_tag_alone_turns_is_told(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/cat1.jpg", exif=exif)
    Image.new("L", (30, 40)).save(root / "SegmentationClass/cat1.png")
    told = "turned by an EXIF tag alone.*JPEGImages/cat1.jpg turned" if orientation == 6 else "resize or replace one"
    with pytest.raises(DataError, match=f"30x40 pixels but its image has 40x30; .*{told}"):
        VocLayout(root).mask("cat1")


def test_labels_that_disagree_with_the_mask(root):
    labels = {**label_dict(), "x-2": np.array([1, 1, 0], np.float32)}
    del labels["4"]
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))
    problems = check_dataset(VocLayout(root), ["train", "val"])
    assert [p.what for p in problems] == ["the mask shows bee, cow but x-2 is tagged ant, bee", "no label for 4"]


def test_every_broken_file_is_listed_not_just_the_first(root):
    (root / "JPEGImages/cat1.jpg").unlink()
    truncate(root / "SegmentationClass/x-2.png")
    Image.new("L", (7, 7)).save(root / "SegmentationClass/4.png")
    names = [Path(p.path).name for p in check_dataset(VocLayout(root), ["train", "val"])]
    assert names == ["cat1.jpg", "x-2.png", "4.png"]


def prints(root: Path, **options: bool) -> str:
    args = {"with_masks": True, "with_saliency": False, **options}
    return fingerprint(VocLayout(root), ["train", "val"], **args)


def test_fingerprint_is_of_the_contents_alone(root, tmp_path):
    before = prints(root)
    copy = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copy)
    (copy / "JPEGImages/not_listed.jpg").write_bytes(b"x")
    os.utime(copy / "JPEGImages/cat1.jpg", (0, 0))
    assert prints(copy) == before


@pytest.mark.parametrize("file", ["JPEGImages/4.jpg", "SegmentationClass/4.png", "SALImages/4.png"])
def test_fingerprint_sees_every_byte_it_should(root, file):
    options = [{}, {"with_masks": False}, {"with_saliency": True}]
    before = [prints(root, **o) for o in options]
    assert len(set(before)) == 3
    with (root / file).open("ab") as handle:
        handle.write(b"\0")
    changed = [prints(root, **o) != b for o, b in zip(options, before, strict=True)]
    assert (
        changed
        == {
            "JPEGImages/4.jpg": [True, True, True],
            "SegmentationClass/4.png": [True, False, True],
            "SALImages/4.png": [False, False, True],
        }[file]
    )


def test_fingerprint_sees_lists_labels_and_names(root):
    seen = {prints(root)}
    write_list(root, "x-2\ncat1\n2007_000032\n")
    seen.add(prints(root))
    np.save(root / "cls_labels.npy", np.array({**label_dict(), "4": np.zeros(3)}, dtype=object))
    seen.add(prints(root))
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    seen.add(prints(root))
    assert len(seen) == 4
    (root / "JPEGImages/4.jpg").unlink()
    with pytest.raises(ValueError, match="JPEGImages/4.jpg: missing"):
        prints(root)


# -- seeds and order


def test_seeds_are_the_same_everywhere_and_differ_by_part():
    assert derive_seed("augment", 0, 3, "2007_000032") == 8120324692486126565
    parts = [("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, 0), ("a", 11), ("a", 1, 1), ("a'", 1)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(np.int64(7)) == derive_seed(7)
    with pytest.raises(TypeError):
        derive_seed(1.5)  # type: ignore[arg-type]


def test_order_is_a_permutation_that_seed_and_epoch_change():
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(50, seed=1, epoch=2) == epoch_order(50, seed=1, epoch=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_global_batch(world_size):
    parts = [rank_positions(19, batch_size=8, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [[p for rank in batch for p in rank] for batch in zip(*parts, strict=True)]
    assert batches == [list(range(8)), list(range(8, 16))]  # 3 images are left out
    assert all(len(batch) == 8 // world_size for part in parts for batch in part)


def test_a_batch_that_does_not_fit_names_the_keys():
    with pytest.raises(ValueError, match=r"train.batch_size 8 .* multiple of runtime.workers 3"):
        rank_positions(20, batch_size=8, rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"train.batch_size is 8 but the split has 7 images"):
        rank_positions(7, batch_size=8, rank=0, world_size=1)


# -- loader


def normalise(image_HW3: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image_HW3.copy()).permute(2, 0, 1).float() / 255 + 1


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> VocLayout:
    parameters = {"num_classes": 3, "num_train": 18, "num_val": 0, "image_px": 48, "seed": 0}
    return open_dataset("scenes", tmp_path_factory.mktemp("loader") / "set", scenes=parameters)


def train_set(layout: VocLayout, **changes: object) -> CamTrainSet:
    arguments = {
        "crop_px": 40, "resize_long_px": (32, 64), "color_jitter": True, "normalise": normalise, "seed": 5,
        "with_saliency": True, **changes,
    }  # fmt: skip
    return CamTrainSet(layout, "train", **arguments)


def batches(layout: VocLayout, epoch: int, *, rank: int = 0, world_size: int = 1, num_workers: int = 0, **changes):
    loader = Loader(
        train_set(layout, **changes), batch_size=8, rank=rank, world_size=world_size, num_workers=num_workers
    )
    assert len(loader) == 2
    return list(loader.epoch(epoch))


def same(first, second) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and one["ids"] == other["ids"]
        for key in one.keys() - {"ids"}:
            assert torch.equal(one[key], other[key]), key


def test_a_batch(big):
    batch = batches(big, 0)[0]
    assert batch["image_N3HW"].shape == (8, 3, 40, 40) and batch["image_N3HW"].dtype == torch.float32
    assert batch["saliency_N1HW"].shape == (8, 1, 40, 40) and batch["saliency_N1HW"].dtype == torch.float32
    assert 0 <= batch["saliency_N1HW"].min() and 0.5 < batch["saliency_N1HW"].max() <= 1
    assert batch["sample_seed_N"].dtype == torch.int64 and len(set(batch["sample_seed_N"].tolist())) == 8
    for image_id, label_K in zip(batch["ids"], batch["label_NK"], strict=True):
        assert label_K.dtype == torch.float32 and label_K.tolist() == big.image_label(image_id).tolist()


def test_padding_is_zero_after_normalisation(big):
    """`normalise` never gives less than 1, so zeros are padding: with small images, some of it in every one."""
    image = batches(big, 0, resize_long_px=(20, 20))[0]["image_N3HW"]
    inside = image != 0
    assert image[inside].min() >= 1
    assert (inside.sum((1, 2, 3)) <= 20 * 20 * 3).all() and (inside.sum((1, 2, 3)) >= 20 * 14 * 3).all()


def test_saliency_is_optional(big):
    assert "saliency_N1HW" not in batches(big, 0, with_saliency=False)[0]


def test_an_epoch_has_no_image_twice_and_epochs_differ(big):
    orders, images = set(), set()
    for epoch in range(3):
        ids = [i for batch in batches(big, epoch) for i in batch["ids"]]
        assert len(set(ids)) == 16 and set(ids) <= set(big.ids("train"))
        orders.add(tuple(ids))
    assert len(orders) == 3
    for epoch in range(3):
        dataset = train_set(big)
        position = next(p for p in range(18) if dataset.id_at(epoch, p) == "train_00003")
        sample = dataset[epoch, position]
        images.add((sample["image_3HW"].sum().item(), sample["sample_seed"]))
    assert len(images) == 3
    assert [b["ids"] for b in batches(big, 0, seed=6)] != [b["ids"] for b in batches(big, 0)]


def test_augmentation_depends_on_seed_epoch_and_sample_alone(big, tmp_path):
    """The same image in a split of another size and order is augmented the same way."""
    copy = shutil.copytree(big.root, tmp_path / "other")
    write_list(copy, "train_00009\ntrain_00003\n")
    other, dataset = train_set(VocLayout(copy)), train_set(big)
    position = next(p for p in range(18) if dataset.id_at(4, p) == "train_00003")
    place = next(p for p in range(2) if other.id_at(4, p) == "train_00003")
    assert torch.equal(dataset[4, position]["image_3HW"], other[4, place]["image_3HW"])
    assert dataset[4, position]["sample_seed"] == other[4, place]["sample_seed"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_worker_is_the_concatenation_of_many(big, world_size):
    whole = batches(big, 1)
    parts = [batches(big, 1, rank=r, world_size=world_size) for r in range(world_size)]
    for number, batch in enumerate(whole):
        assert sum((part[number]["ids"] for part in parts), []) == batch["ids"]
        for key in ("image_N3HW", "label_NK", "sample_seed_N", "saliency_N1HW"):
            assert torch.equal(torch.cat([part[number][key] for part in parts]), batch[key]), key


def test_loading_processes_change_nothing(big):
    same(batches(big, 1, num_workers=2), batches(big, 1))


def test_an_epoch_does_not_depend_on_those_before_it(big):
    loader = Loader(train_set(big), batch_size=8, rank=0, world_size=1)
    list(loader.epoch(0)), list(loader.epoch(1))
    same(list(loader.epoch(2)), batches(big, 2))


def test_loading_leaves_the_global_generator_alone(big):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(big, 0)
    assert torch.equal(torch.get_rng_state(), before)


# -- real images, where there are any


def test_the_shared_voc_subset_opens():
    if not (SHARED / "voc/JPEGImages").is_dir():
        pytest.skip("no VOC images here: set PPC_SHARED to the folder that holds voc/")
    layout = VocLayout(SHARED / "voc")
    assert (len(layout.ids("train")), len(layout.ids("val"))) == (952, 400)
    assert layout.class_names == VOC_CLASSES and layout.label_source == "cls_labels"
    masks = VocLayout(SHARED / "voc", labels="masks")
    for image_id in layout.ids("train")[:20]:
        image, mask = layout.image(image_id), layout.mask(image_id)
        assert image.shape[:2] == mask.shape == layout.saliency(image_id).shape and max(mask.shape) == 320
        assert layout.image_label(image_id).sum() >= masks.image_label(image_id).sum() > 0

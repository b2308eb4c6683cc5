"""What of this machine a study can use, and what of it strangers can."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from dataclasses import dataclass

from ppc.artifacts import Storage
from ppc.exposure import mlflow_exposures, ray_exposures
from ppc.places import is_remote

NEEDED = (
    "torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "pydensecrf2", "pydantic", "ruamel.yaml",
    "typer", "rich", "filelock", "scipy", "jinja2",
)  # fmt: skip
EXTRAS = {  # what pip installs by that name, and what for
    "ray": ("ray", "studies on a cluster"),
    "mlflow": ("mlflow", "the tracker and its UI"),
    "s3": ("s3fs", "storage on s3://"),
    "timm": ("timm", "backbones named timm:MODEL"),
    "search": ("optuna", "designs of kind search"),
    "api": ("pandas", "tables of ppc.load_study"),
    "coco": ("pycocotools", "masks of COCO"),
}
MIN_FREE_GB = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    ok: bool
    text: str
    optional: bool = False
    word: str = "MISSING"  # said of it when it is not ok


def examine(storage: Storage) -> list[Finding]:
    """Packages, CPUs, memory, GPUs, storage, servers that are open to others. Imports what it reports on."""
    findings = [_package(name, "needed", f"pip install {name}", optional=False) for name in NEEDED]
    findings += [
        _package(name, use, f"pip install -e '.[{extra}]'", optional=True) for extra, (name, use) in EXTRAS.items()
    ]
    try:
        importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        findings.append(Finding(False, f"pydensecrf does not import ({error}): pip install pydensecrf2"))
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    findings.append(Finding(bool(gpus), f"GPUs: {', '.join(gpus) or 'none; training runs on CPUs'}", optional=True))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    findings.append(Finding(True, f"{os.cpu_count()} CPUs, {memory_gb:.0f} GB memory"))
    try:
        storage.check_writable()
        if is_remote(storage.root):
            findings.append(Finding(True, f"storage {storage.root}: it can be written"))
        else:
            free_gb = shutil.disk_usage(storage.here).free / 1e9
            enough = free_gb >= MIN_FREE_GB
            findings.append(Finding(enough, f"storage {storage.root}: {free_gb:.0f} GB free", optional=True))
    except ValueError as error:
        findings.append(Finding(False, str(error)))
    exposures = [*mlflow_exposures(storage), *ray_exposures()]
    return findings + [Finding(found.ok, found.text, optional=True, word="WARNING") for found in exposures]


def _package(name: str, use: str, remedy: str, *, optional: bool) -> Finding:
    try:
        return Finding(True, f"{name} {importlib.metadata.version(name)}", optional)
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, f"{name} ({use}): {remedy}", optional)

"""Manifests of cluster/kubernetes as `kubectl apply -k` sends them, and the field names of KubeRay's kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

CLUSTER = Path(__file__).parents[1] / "cluster"
KUBERNETES = CLUSTER / "kubernetes"


def documents(path: Path) -> list[Any]:
    return [doc for doc in YAML(typ="safe").load_all(path.read_text()) if doc is not None]


# -- kustomize, as far as our overlays go


def apply_patch(target: Any, operations: list[dict[str, Any]]) -> None:
    """JSON patch (RFC 6902) in place: add, replace, remove."""
    for op in operations:
        *way, last = op["path"].strip("/").split("/")
        place = target
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        key: Any = int(last) if isinstance(place, list) else last
        if op["op"] != "add":
            place[key]  # noqa: B018  (has to be there)
        if op["op"] == "remove":
            del place[key]
        else:
            place[key] = op["value"]


def rendered(name: str) -> list[dict[str, Any]]:
    """The manifests that `kubectl apply -k` sends for a folder."""
    folder = KUBERNETES / name
    (kustomization,) = documents(folder / "kustomization.yaml")
    found: list[dict[str, Any]] = []
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        found += rendered(path.name) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", []):
        (target,) = [m for m in found if (m["kind"], m["metadata"]["name"]) == tuple(patch["target"].values())]
        change = YAML(typ="safe").load(patch["patch"])
        if isinstance(change, dict):
            assert change["$patch"] == "delete"
            found.remove(target)
        else:
            apply_patch(target, change)
    return found


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [m for m in manifests if m["kind"] == kind]


# -- the KubeRay kinds: names of the fields of ray.io/v1 as its API reference lists them (KubeRay 1.5.1)

POD = {"spec": dict, "metadata": dict}
WORKER_GROUP = {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
    "rayStartParams": dict, "template": POD, "scaleStrategy": dict, "numOfHosts": int, "suspend": bool,
    "resources": dict, "labels": dict,
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion": str, "enableInTreeAutoscaling": bool, "suspend": bool, "managedBy": str,
    "headServiceAnnotations": dict, "gcsFaultToleranceOptions": dict, "upgradeStrategy": dict,
    "authOptions": {"mode": str},
    "autoscalerOptions": {
        "resources": dict, "image": str, "imagePullPolicy": str, "securityContext": dict, "idleTimeoutSeconds": int,
        "upscalingMode": str, "version": str, "env": list, "envFrom": list, "volumeMounts": list,
    },
    "headGroupSpec": {
        "template": POD, "headService": dict, "enableIngress": bool, "resources": dict, "labels": dict,
        "rayStartParams": dict, "serviceType": str,
    },
    "workerGroupSpecs": [WORKER_GROUP],
}  # fmt: skip
RAY_JOB = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "rayClusterSpec": RAY_CLUSTER, "submitterPodTemplate": POD,
    "metadata": dict, "clusterSelector": dict, "submitterConfig": {"backoffLimit": int}, "managedBy": str,
    "deletionStrategy": dict, "entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "submissionMode": str,
    "entrypointResources": str, "entrypointNumCpus": (int, float), "entrypointNumGpus": (int, float),
    "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool, "preRunningDeadlineSeconds": int,
}  # fmt: skip
ALLOWED = {
    "mode": {"disabled", "token"}, "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
}  # fmt: skip


def problems_of(value: Any, shape: Any, path: str) -> list[str]:
    """Where a manifest differs from a table of field names and types."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [p for i, item in enumerate(value) for p in problems_of(item, shape[0], f"{path}[{i}]")]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        unknown = [f"{path}.{name}: no such field" for name in value if name not in shape]
        return unknown + [p for n, v in value.items() if n in shape for p in problems_of(v, shape[n], f"{path}.{n}")]
    name = path.rpartition(".")[2]
    if not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        return [f"{path}: {value!r} is of the wrong type"]
    return [f"{path}: {value!r}"] if name in ALLOWED and value not in ALLOWED[name] else []


def ray_specs(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def pod_specs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] in ("RayCluster", "RayJob"):
        spec = ray_specs(manifest)
        return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [manifest["spec"]["template"]["spec"]] if "template" in manifest.get("spec", {}) else []


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}

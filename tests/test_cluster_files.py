"""Manifests, launcher files and the image of cluster/: against schemas, and against each other."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kube_manifests import (
    CLUSTER,
    KUBERNETES,
    RAY_CLUSTER,
    RAY_JOB,
    as_pod,
    documents,
    of_kind,
    pod_specs,
    problems_of,
    ray_specs,
    rendered,
)
from ruamel.yaml import YAML

from ppc import __version__

ROOT = Path(__file__).parents[1]
IMAGE = f"ppc:{__version__}"
YAMLS = sorted(CLUSTER.rglob("*.yaml"))
OVERLAYS = ["base", "s3", "job", "job-s3"]
K8S_VERSION = "1.32"


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", OVERLAYS)
def test_kubernetes_manifests_fit_their_schemas(name: str) -> None:
    for manifest in rendered(name):
        if manifest["apiVersion"].startswith("ray.io/"):
            assert manifest["apiVersion"] == "ray.io/v1"
            shape = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}[manifest["kind"]]
            assert problems_of(manifest["spec"], shape, manifest["kind"]) == []
            for pod in pod_specs(manifest):  # what the table calls a mapping is a pod of Kubernetes itself
                kubernetes_validate.validate(as_pod(pod), K8S_VERSION, strict=True)
        else:
            kubernetes_validate.validate(manifest, K8S_VERSION, strict=True)


def test_the_table_of_fields_finds_mistakes() -> None:
    (good,) = of_kind(rendered("base"), "RayCluster")
    bad = {**good["spec"], "autoscalerOption": {}, "enableInTreeAutoscaling": "yes", "authOptions": {"mode": "tokens"}}
    assert len(problems_of(bad, RAY_CLUSTER, "RayCluster")) == 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_pod({"containers": [{"name": "x", "imag": "y"}]}), K8S_VERSION, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed; the overlays are rendered here")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_renders_the_overlays_as_these_tests_do(name: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs = [doc for doc in YAML(typ="safe").load_all(done.stdout) if doc is not None]

    def key(manifest: dict[str, Any]) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(theirs, key=key) == sorted(rendered(name), key=key)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_refer_to_what_there_is(name: str) -> None:
    manifests = rendered(name) + (rendered("s3" if name.endswith("s3") else "base") if "job" in name else [])
    names = {
        kind: {m["metadata"]["name"] for m in of_kind(manifests, kind)} for kind in ("ConfigMap", "ServiceAccount")
    }
    names["ConfigMap"].add("ppc-experiment")  # made from the user's files
    claims = {m["metadata"]["name"] for m in of_kind(manifests, "PersistentVolumeClaim")}
    (secret,) = documents(KUBERNETES / "secrets.template.yaml")
    for manifest in manifests:
        assert manifest["metadata"].get("namespace", "ppc") == "ppc"
        for pod in pod_specs(manifest):
            volumes = {v["name"]: v for v in pod.get("volumes", [])}
            assert {
                v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
            } <= claims
            assert pod.get("serviceAccountName") in {None, *names["ServiceAccount"]}
            volumes |= {c["metadata"]["name"]: c for c in manifest["spec"].get("volumeClaimTemplates", [])}
            for container in pod["containers"]:
                assert {m["name"] for m in container.get("volumeMounts", [])} <= set(volumes)
                assert all(e["configMapRef"]["name"] in names["ConfigMap"] for e in container.get("envFrom", []))
                for variable in container.get("env", []):
                    if "valueFrom" in variable:
                        reference = variable["valueFrom"]["secretKeyRef"]
                        assert (
                            reference["name"] == secret["metadata"]["name"] and reference["key"] in secret["stringData"]
                        )


@pytest.mark.parametrize("name", OVERLAYS)
def test_s3_or_a_shared_volume_and_never_half_of_both(name: str) -> None:
    manifests = rendered(name)
    mounts = [
        mount["mountPath"]
        for manifest in manifests
        for pod in pod_specs(manifest)
        for container in pod["containers"]
        for mount in container.get("volumeMounts", [])
    ]
    if name.endswith("s3"):
        assert "/storage" not in mounts and not of_kind(manifests, "PersistentVolumeClaim")
        pods = [pod for m in manifests if m["metadata"]["name"] != "ppc-postgres" for pod in pod_specs(m)]
        assert pods and all(p["serviceAccountName"] == "ppc-s3" and p["automountServiceAccountToken"] for p in pods)
    else:
        assert mounts.count("/storage") == {"base": 4, "job": 3}[name]
    for settings in of_kind(manifests, "ConfigMap"):
        assert settings["data"]["PPC_STORAGE"] == ("s3://BUCKET/ppc" if name == "s3" else "/storage")
    for deployment in of_kind(manifests, "Deployment"):
        env = {e["name"]: e.get("value") for e in pod_specs(deployment)[0]["containers"][0]["env"]}
        assert env["PPC_ARTIFACTS"] == ("s3://BUCKET/mlflow" if name == "s3" else "/storage/mlflow-artifacts")


@pytest.mark.parametrize("name", ["base", "job"])
def test_ray_on_kubernetes_is_closed_scales_and_is_what_the_image_holds(name: str) -> None:
    manifest = next(m for m in rendered(name) if m["kind"].startswith("Ray"))
    spec = ray_specs(manifest)
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    gpu = groups["gpu"]["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert gpu["tolerations"][0]["key"] == "nvidia.com/gpu"
    for group in groups.values():
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pod_specs(manifest):
        assert pod["containers"][0]["image"] == IMAGE
        assert {"configMapRef": {"name": "ppc-settings"}} in pod["containers"][0]["envFrom"]
    if name == "job":
        words = shlex.split(manifest["spec"]["entrypoint"])
        assert words[:3] == ["ppc", "study", "launch"] and words[-2:] == ["--address", "auto"]
        file = Path(words[3])
        assert (ROOT / "experiments" / file.name).is_file() and str(file.parent) == "/experiment"
        assert json.loads(manifest["spec"]["entrypointResources"]) == {"node:__internal_head__": 0.001}
        assert "RAY_JOB_STOP_SIGNAL: SIGINT" in manifest["spec"]["runtimeEnvYAML"]


def test_mlflow_on_kubernetes_answers_to_the_names_it_is_called_by() -> None:
    manifests = rendered("base")
    (settings,) = of_kind(manifests, "ConfigMap")
    (deployment,) = of_kind(manifests, "Deployment")
    container = pod_specs(deployment)[0]["containers"][0]
    env = {e["name"]: e.get("value") for e in container["env"]}
    host = settings["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = env["PPC_ALLOWED_HOSTS"].split(",")
    for name in (host, "ppc-mlflow.ppc.svc.cluster.local:5000", "localhost:5000"):
        assert any(fnmatch(name, pattern) for pattern in allowed), name
    assert not any(fnmatch("evil.example:5000", pattern) for pattern in allowed)
    service, database = host.split(":")[0], env["PGHOST"]
    assert {service, database} <= {m["metadata"]["name"] for m in of_kind(manifests, "Service")}
    assert container["command"] == ["ppc-mlflow"] and container["image"] == IMAGE
    assert pod_specs(deployment)[0]["enableServiceLinks"] is False
    (postgres,) = of_kind(manifests, "StatefulSet")
    connections = int(pod_specs(postgres)[0]["containers"][0]["args"][1].partition("=")[2])
    assert connections > int(env["PPC_MLFLOW_WORKERS"]) * 80
    assert settings["data"]["MLFLOW_DISABLE_TELEMETRY"] == "true" and settings["data"]["RAY_USAGE_STATS_ENABLED"] == "0"


# -- nothing secret, nothing of this machine


def test_no_file_holds_a_password_or_a_key() -> None:
    for path in sorted(CLUSTER.rglob("*")):
        if not path.is_file():
            continue
        text = path.read_text()
        assert not re.search(r"://[^/\s\"'$]+:[^@/\s\"'$]+@", text), f"{path}: a password in a URI"
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), path
        if path.suffix == ".yaml":
            for document in documents(path):
                for name, value in secrets_in(document):
                    assert isinstance(value, str) and re.fullmatch(r"\$\{\w+\}", value), f"{path}: {name}"
        else:
            for name, value in re.findall(r"\b(\w*(?:PASSWORD|SECRET_KEY|ACCESS_KEY))=(\S*)", text):
                assert re.match(r"$|[\"]?\$|\.\.\.", value), f"{path}: {name}={value}"


def secrets_in(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Values of a document that are named like a secret, or of a variable that is."""
    if isinstance(value, list):
        return [found for item in value for found in secrets_in(item)]
    if not isinstance(value, dict):
        return [(name, value)] if re.search(r"password|secret_key|access_key", name, re.IGNORECASE) else []
    if isinstance(value.get("name"), str) and "value" in value:
        return secrets_in(value["value"], value["name"])
    return [found for key, item in value.items() for found in secrets_in(item, str(key))]


def test_the_search_for_secrets_finds_them() -> None:
    assert secrets_in({"env": [{"name": "PGPASSWORD", "value": "hunter2"}]}) == [("PGPASSWORD", "hunter2")]
    assert secrets_in({"stringData": {"ADMIN_PASSWORD": "hunter2"}}) == [("ADMIN_PASSWORD", "hunter2")]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_yaml_parses(path: Path) -> None:
    assert documents(path)


def test_every_folder_has_a_readme_of_a_page_and_the_first_one_leads_to_all() -> None:
    table = (CLUSTER / "README.md").read_text()
    for folder in sorted(p for p in CLUSTER.iterdir() if p.is_dir()):
        lines = (folder / "README.md").read_text().splitlines()
        assert len(lines) <= 50, folder
        assert any(line.startswith("Needs: ") for line in lines) and "| it fails | look at |" in lines, folder
        assert f"]({folder.name})" in table
    for folder, word in {"slurm": "Not run", "vm": "not run", "kubernetes": "not run"}.items():
        assert word in (CLUSTER / folder / "README.md").read_text()


def test_files_named_in_the_readmes_exist() -> None:
    for path in CLUSTER.rglob("README.md"):
        for name in re.findall(r"\b((?:cluster|experiments|tests)/[\w./-]*\w)", path.read_text()):
            assert (ROOT / name).exists(), f"{path}: {name}"


# -- the image


def test_the_dockerfile_copies_files_that_exist_and_reach_the_builder() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    kept = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("COPY") and "--from" not in line]
    sources = [word for words in copies for word in words[:-1] if not word.startswith("--")]
    assert {"ppc", "pyproject.toml", "constraints.txt", "cluster/mlflow/serve.sh"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and source in kept, source
    assert "--constraint constraints.txt" in text and '".[ray,mlflow,s3,search,timm,coco]"' in text
    for need in ("psycopg2-binary", "Flask-WTF", "boto3", "USER ppc", "MLFLOW_DISABLE_TELEMETRY=true", "wget"):
        assert need in text
    assert f"-t {IMAGE} ." in text and "/etc/profile.d" in text  # login shells of KubeRay find ray


def test_the_readme_names_where_to_name_a_registry_of_ones_own() -> None:
    for place in ("base", "job"):  # the overlays of S3 build on these two
        (line,) = re.findall(r"^# (images: .*)$", (KUBERNETES / place / "kustomization.yaml").read_text(), re.MULTILINE)
        (named,) = YAML(typ="safe").load(line)["images"]
        assert IMAGE == f"{named['name']}:{named['newTag']}" and named["newName"].endswith(f"/{named['name']}")
        assert f"`{place}/kustomization.yaml`" in (KUBERNETES / "README.md").read_text()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", OVERLAYS)
def test_a_registry_of_ones_own_reaches_every_container(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    for path in folder.rglob("kustomization.yaml"):
        path.write_text(path.read_text().replace("# images: ", "images: "))
    done = subprocess.run(["kubectl", "kustomize", folder / name], capture_output=True, text=True, timeout=60)
    ours = [image for image in re.findall(r"image: (\S+)", done.stdout) if image.endswith(IMAGE)]
    assert len(ours) >= 2 and set(ours) == {f"registry.example.org/{IMAGE}"}, done.stderr


# -- Ray's cluster launcher


@pytest.mark.parametrize("name", ["aws", "onprem"])
@pytest.mark.filterwarnings("ignore")
def test_ray_s_own_checks_accept_the_launcher_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(CLUSTER / "vm" / f"{name}.yaml")
    full = prepare_config(config)
    validate_config(full)
    assert full["docker"]["image"].endswith(f"/{IMAGE}")
    assert "--env RAY_AUTH_MODE=token" in full["docker"]["run_options"] and "~/.ray/auth_token" in full["file_mounts"]
    head = full["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    port = re.search(r"--port=(\d+)", head)
    assert port is not None and f"--address=$RAY_HEAD_IP:{port[1]}" in full["worker_start_ray_commands"][-1]

"""The files of cluster/: manifests against schemas, scripts against shellcheck and stub commands, all against each other."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from ppc import __version__

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
IMAGE = f"ppc:{__version__}"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
YAMLS = sorted(CLUSTER.rglob("*.yaml"))
OVERLAYS = ["base", "s3", "job", "job-s3"]
K8S_VERSION = "1.32"


def documents(path: Path) -> list[Any]:
    return [doc for doc in YAML(typ="safe").load_all(path.read_text()) if doc is not None]


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


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


# -- the KubeRay kinds: names of the fields of ray.io/v1 as its API reference lists them (KubeRay 1.5)

POD = {"spec": dict, "metadata": dict}
WORKER_GROUP = {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
    "rayStartParams": dict, "template": POD, "scaleStrategy": dict, "numOfHosts": int, "suspend": bool,
    "resources": dict, "labels": dict,
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion": str, "enableInTreeAutoscaling": bool, "suspend": bool, "managedBy": str, "headServiceAnnotations": dict,
    "gcsFaultToleranceOptions": dict, "upgradeStrategy": dict, "authOptions": {"mode": str},
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
    assert "--constraint constraints.txt" in text and '".[ray,mlflow,timm]"' in text
    for need in ("psycopg2-binary", "Flask-WTF", "boto3", "USER ppc", "MLFLOW_DISABLE_TELEMETRY=true", "wget"):
        assert need in text
    assert f"-t {IMAGE} ." in text and "/etc/profile.d" in text  # login shells of KubeRay find ray


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


# -- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck_and_stop_at_errors(path: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not any("ray stop" in line for line in code)  # it ends every Ray of the machine


STUB = """#!/usr/bin/env bash
# records its arguments, then does what the test told
{ printf '%s' "${0##*/}"; printf '\\t%s' "$@"; printf '\\n'; } >> "$STUB_LOG"
"""


class Stubs:
    """Commands of a PATH of our own that write down how they were called."""

    def __init__(self, folder: Path, **bodies: str) -> None:
        self.log, self.bin, self.out = folder / "calls", folder / "bin", folder / "out"
        self.bin.mkdir()
        for name, body in bodies.items():
            (self.bin / name).write_text(STUB + body + "\n")
            (self.bin / name).chmod(0o755)

    def env(self, **variables: str) -> dict[str, str]:
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "STUB_LOG": str(self.log), "HOME": str(self.bin), **variables}

    def start(self, script: Path, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        with self.out.open("ab") as out:
            return subprocess.Popen([script, *words], env=self.env(**variables), stdout=out, stderr=out)

    def run(self, script: Path, *words: str, **variables: str) -> int:
        return self.start(script, *words, **variables).wait(timeout=30)

    def calls(self) -> list[list[str]]:
        return [line.split("\t") for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def said(self) -> str:
        return self.out.read_text()


SLURM = {
    "SLURM_JOB_ID": "7012",
    "SLURM_JOB_NODELIST": "gpu[1-3]",
    "SLURM_CPUS_PER_TASK": "8",
    "PPC_STORAGE": "/shared/s",
}
SBATCH = CLUSTER / "slurm" / "ppc.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> Stubs:
    return Stubs(
        tmp_path,
        scontrol='[[ $1 == show ]] && printf "gpu1\\ngpu2\\ngpu3\\n"; exit 0',
        # a step lasts until it is told to end, as `ray start --block` does
        srun='trap "echo ended >> $STUB_LOG; exit 0" TERM; for _ in $(seq 300); do sleep 0.1; done',
        hostname="echo 10.0.0.1 192.168.0.1 fe80::1",
        python="cat > $STUB_LOG.py",
        ray="",
        ppc="exit ${PPC_EXIT:-0}",
    )


def steps(calls: list[list[str]]) -> list[list[str]]:
    return [call for call in calls if call[0] in ("srun", "python", "ppc")]


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def test_slurm_starts_the_head_then_workers_that_join_it_then_the_study(slurm: Stubs) -> None:
    assert slurm.run(SBATCH, "experiments/scenes_k.yaml", "--tiny", **SLURM) == 0, slurm.said
    calls = slurm.calls()
    assert calls[0] == ["ray", "get-auth-token", "--generate"]
    head, first, *workers, both, launch = [c for c in steps(calls) if c != ["ended"]]
    assert head[0] == "srun" and "--nodelist=gpu1" in head and "--head" in head and "--block" in head
    address = f"{option(head, '--node-ip-address')}:{option(head, '--port')}"
    assert address == "10.0.0.1:24024" and option(head, "--dashboard-host") == "127.0.0.1"
    assert first[:4] == ["python", "-", address, "1"] and both[:4] == ["python", "-", address, "3"]
    assert sorted(w[4] for w in workers) == ["--nodelist=gpu2", "--nodelist=gpu3"]
    for worker in workers:
        assert option(worker, "--address") == address and "--head" not in worker and "--block" in worker
    for call in (head, *workers):
        assert "--cpus-per-task=8" in call and option(call, "--num-cpus") == "8"
    assert launch == [
        "ppc", "study", "launch", "experiments/scenes_k.yaml", "--tiny", "--address", "auto", "--storage", "/shared/s",
    ]  # fmt: skip
    assert not any(call[:2] == ["scontrol", "requeue"] for call in calls)
    compile((slurm.log.parent / "calls.py").read_text(), "wait_for_nodes", "exec")
    wait_for(lambda: slurm.calls().count(["ended"]) == 3)  # the cluster goes with the job


def wait_for(holds: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slurm_on_one_node_and_with_little_memory(slurm: Stubs) -> None:
    (slurm.bin / "scontrol").write_text(STUB + "echo gpu1\n")
    env = {**SLURM, "SLURM_MEM_PER_NODE": "10240", "PPC_HEAD_IP": "10.9.9.9"}
    assert slurm.run(SBATCH, "a.yaml", **env) == 0
    (head,) = [call for call in slurm.calls() if call[0] == "srun"]
    assert option(head, "--object-store-memory") == str(2 << 30) and option(head, "--node-ip-address") == "10.9.9.9"


def test_slurm_tells_the_study_to_stop_requeues_it_and_goes_on(slurm: Stubs) -> None:
    (slurm.bin / "ppc").write_text(
        STUB + 'trap "echo saved >> $STUB_LOG; exit 1" TERM; for _ in $(seq 300); do sleep 0.1; done\n'
    )
    process = slurm.start(SBATCH, "a.yaml", **SLURM)
    wait_for(lambda: any(call[0] == "ppc" for call in slurm.calls()))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 1
    calls = slurm.calls()
    assert ["scontrol", "requeue", "7012"] in calls and "back to the queue" in slurm.said
    assert calls.index(["saved"]) < calls.index(["scontrol", "requeue", "7012"])

    (slurm.bin / "ppc").write_text(STUB)
    slurm.log.unlink()
    assert slurm.run(SBATCH, "a.yaml", SLURM_RESTART_COUNT="1", **SLURM) == 0
    assert "restart 1: the study goes on where it stopped" in slurm.said
    assert [call for call in slurm.calls() if call[0] == "ppc"] == [
        ["ppc", "study", "launch", "a.yaml", "--address", "auto", "--storage", "/shared/s"]
    ]


def test_slurm_gives_up_requeueing_at_its_limit_and_never_for_a_failed_trial(slurm: Stubs) -> None:
    assert slurm.run(SBATCH, "a.yaml", PPC_EXIT="1", **SLURM) == 1
    assert not any(call[:2] == ["scontrol", "requeue"] for call in slurm.calls())
    (slurm.bin / "ppc").write_text(STUB + "kill -TERM $PPID; sleep 0.5; exit 1\n")
    assert slurm.run(SBATCH, "a.yaml", SLURM_RESTART_COUNT="20", **SLURM) == 1
    assert "after 20 restarts" in slurm.said
    assert not any(call[:2] == ["scontrol", "requeue"] for call in slurm.calls())


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "PPC_STORAGE", "file"])
def test_slurm_says_what_is_missing(slurm: Stubs, missing: str) -> None:
    env = {name: value for name, value in SLURM.items() if name != missing}
    assert slurm.run(SBATCH, *([] if missing == "file" else ["a.yaml"]), **env) != 0
    assert ("usage: sbatch" if missing == "file" else missing) in slurm.said
    assert not any(call[0] == "srun" for call in slurm.calls())


def test_the_local_head_has_a_token_and_its_job_server_on_loopback(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, ray='echo "mode $RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED" >> "$STUB_LOG"')
    assert stubs.run(CLUSTER / "local" / "start.sh", "--num-gpus", "1", PPC_DASHBOARD_PORT="9000") == 0
    token, mode, start, again = stubs.calls()
    assert token == ["ray", "get-auth-token", "--generate"] and mode == again == ["mode token 0"]
    assert start[:4] == ["ray", "start", "--head", "--block"] and start[-2:] == ["--num-gpus", "1"]
    assert option(start, "--dashboard-host") == "127.0.0.1" and option(start, "--dashboard-port") == "9000"


SECRETS = {
    "PGPASSWORD": "hunter2hunter2", "MLFLOW_AUTH_ADMIN_PASSWORD": "correct-horse-1", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
}  # fmt: skip
SERVE = CLUSTER / "mlflow" / "serve.sh"


@pytest.fixture
def mlflow(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path, mlflow='env > "$STUB_LOG.env"; cat "$MLFLOW_AUTH_CONFIG_PATH" > "$STUB_LOG.ini"')


def test_the_mlflow_server_is_started_with_auth_hosts_and_no_password_in_sight(mlflow: Stubs, tmp_path: Path) -> None:
    assert mlflow.run(SERVE, str(CLUSTER / "mlflow" / "mlflow.env"), **SECRETS) == 0, mlflow.said
    (call,) = mlflow.calls()
    assert call[:4] == ["mlflow", "server", "--app-name", "basic-auth"]
    assert option(call, "--host") == "127.0.0.1" and option(call, "--workers") == "4"
    assert "mlflow.example.org" in option(call, "--allowed-hosts").split(",")
    assert option(call, "--cors-allowed-origins") == "https://mlflow.example.org"
    env = dict(line.split("=", 1) for line in (tmp_path / "calls.env").read_text().splitlines() if "=" in line)
    ini = (tmp_path / "calls.ini").read_text()
    database = "postgresql+psycopg2://mlflow@localhost:5432/mlflow"
    assert env["MLFLOW_BACKEND_STORE_URI"] == database and f"database_uri = {database}" in ini
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true" and env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert env["MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"] == env["MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"] == "20"
    for secret in SECRETS.values():
        assert secret not in "\t".join(call) and secret not in ini and secret not in mlflow.said


@pytest.mark.parametrize("name", [*SECRETS, "PGHOST", "PPC_ARTIFACTS", "PPC_ALLOWED_HOSTS"])
def test_the_mlflow_server_refuses_to_start_without(mlflow: Stubs, name: str) -> None:
    env = {**SECRETS, "PGHOST": "db", "PPC_ARTIFACTS": "/a", "PPC_ALLOWED_HOSTS": "x"}
    env.pop(name)
    assert mlflow.run(SERVE, **env) == 2
    assert mlflow.said == f"serve.sh: set {name}\n" and mlflow.calls() == []


def test_the_mlflow_server_refuses_secrets_in_files_and_short_passwords(mlflow: Stubs, tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("PGHOST=db\nexport PGPASSWORD=hunter2hunter2\n")
    assert mlflow.run(SERVE, str(tmp_path / "my.env"), **SECRETS) == 2
    assert "holds PGPASSWORD; secrets belong in the environment" in mlflow.said
    env = {
        **SECRETS,
        "MLFLOW_AUTH_ADMIN_PASSWORD": "short",
        "PGHOST": "db",
        "PPC_ARTIFACTS": "/a",
        "PPC_ALLOWED_HOSTS": "x",
    }
    assert mlflow.run(SERVE, **env) == 2 and mlflow.calls() == []


def test_kubernetes_secrets_are_random_complete_and_made_once(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, kubectl='[[ $* != *"get secret"* ]] || exit ${THERE:-1}; cat >> "$STUB_LOG.yaml"')
    script = KUBERNETES / "secrets.sh"
    assert stubs.run(script) == 0, stubs.said
    assert stubs.run(script, PGPASSWORD="my-own-password") == 0
    first, second = (
        YAML(typ="safe").load(part) for part in (tmp_path / "calls.yaml").read_text().split("# Filled")[1:]
    )
    for manifest in (first, second):
        kubernetes_validate.validate(manifest, K8S_VERSION, strict=True)
        assert all(len(value) >= 12 and "$" not in value for value in manifest["stringData"].values())
    values = first["stringData"]
    assert values["MLFLOW_TRACKING_PASSWORD"] == values["MLFLOW_AUTH_ADMIN_PASSWORD"] and len(set(values.values())) == 3
    assert second["stringData"]["PGPASSWORD"] == "my-own-password" and not set(values.values()) & set(
        second["stringData"].values()
    )
    shown = stubs.said + stubs.log.read_text()
    assert not any(value in shown for value in values.values())
    assert stubs.run(script, THERE="0") == 1 and "nothing is changed" in stubs.said
    assert stubs.run(script, PGPASSWORD='quote"quote"quote') == 2

"""Scripts of cluster/: shellcheck, and dry runs against stub commands that write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

CLUSTER = Path(__file__).parents[1] / "cluster"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck_and_stop_at_errors(path: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not any("ray stop" in line for line in code)  # it ends every Ray of the machine


STUB = """#!/usr/bin/env bash
# records its arguments, in one write because steps start side by side, then does what the test told
printf -v words '\\t%s' "$@"
printf '%s\\n' "${0##*/}$words" >> "$STUB_LOG"
"""


class Stubs:
    """Commands of a PATH of our own that write down how they were called."""

    def __init__(self, folder: Path, **bodies: str) -> None:
        self.log, self.bin, self.out = folder / "calls", folder / "bin", folder / "out"
        self.bin.mkdir()
        for name, body in bodies.items():
            self.put(name, body)

    def put(self, name: str, body: str, first: str = "") -> None:
        """Make a command; `first` runs before it writes down its call."""
        shebang, rest = STUB.split("\n", 1)
        (self.bin / name).write_text(f"{shebang}\n{first}\n{rest}{body}\n")
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
    stubs = Stubs(
        tmp_path,
        scontrol='[[ $1 == show ]] && printf "gpu1\\ngpu2\\ngpu3\\n"; exit 0',
        # a step lasts until it is told to end, as `ray start --block` does
        srun='trap "echo ended >> $STUB_LOG; exit 0" TERM; for _ in $(seq 300); do sleep 0.1; done',
        hostname="echo 10.0.0.1 192.168.0.1 fe80::1",
        ray="",
        ppc="exit ${PPC_EXIT:-0}",
    )
    # called to wait for so many nodes; steps start in the background, so their calls are written down by then
    joined = 'for _ in $(seq 200); do (($(grep -c ^srun "$STUB_LOG") >= $3)) && break; sleep 0.05; done'
    stubs.put("python", "cat > $STUB_LOG.py", first=joined)
    return stubs


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


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slurm_on_one_node_and_with_little_memory(slurm: Stubs) -> None:
    slurm.put("scontrol", "echo gpu1")
    env = {**SLURM, "SLURM_MEM_PER_NODE": "10240", "PPC_HEAD_IP": "10.9.9.9"}
    assert slurm.run(SBATCH, "a.yaml", **env) == 0
    (head,) = [call for call in slurm.calls() if call[0] == "srun"]
    assert option(head, "--object-store-memory") == str(2 << 30) and option(head, "--node-ip-address") == "10.9.9.9"


def test_slurm_tells_the_study_to_stop_requeues_it_and_goes_on(slurm: Stubs) -> None:
    slurm.put("ppc", 'trap "echo saved >> $STUB_LOG; exit 1" TERM; for _ in $(seq 300); do sleep 0.1; done')
    process = slurm.start(SBATCH, "a.yaml", **SLURM)
    wait_for(lambda: any(call[0] == "ppc" for call in slurm.calls()))
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)  # as --signal asks for it
    assert "#SBATCH --signal=B:USR1@" in SBATCH.read_text()
    assert process.wait(timeout=20) == 1
    calls = slurm.calls()
    assert ["scontrol", "requeue", "7012"] in calls and "back to the queue" in slurm.said
    assert calls.index(["saved"]) < calls.index(["scontrol", "requeue", "7012"])

    slurm.put("ppc", "")
    slurm.log.unlink()
    assert slurm.run(SBATCH, "a.yaml", SLURM_RESTART_COUNT="1", **SLURM) == 0
    assert "restart 1: the study goes on where it stopped" in slurm.said
    assert [call for call in slurm.calls() if call[0] == "ppc"] == [
        ["ppc", "study", "launch", "a.yaml", "--address", "auto", "--storage", "/shared/s"]
    ]


def test_slurms_scancel_saves_the_study_and_ends_the_job_for_good(slurm: Stubs) -> None:
    slurm.put("ppc", 'trap "echo saved >> $STUB_LOG; exit 1" TERM; for _ in $(seq 300); do sleep 0.1; done')
    process = slurm.start(SBATCH, "a.yaml", **SLURM)
    wait_for(lambda: any(call[0] == "ppc" for call in slurm.calls()))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 1
    assert ["saved"] in slurm.calls() and not any(call[:2] == ["scontrol", "requeue"] for call in slurm.calls())


def test_slurm_gives_up_requeueing_at_its_limit_and_never_for_a_failed_trial(slurm: Stubs) -> None:
    assert slurm.run(SBATCH, "a.yaml", PPC_EXIT="1", **SLURM) == 1
    assert not any(call[:2] == ["scontrol", "requeue"] for call in slurm.calls())
    slurm.put("ppc", "trap '' TERM; kill -USR1 $PPID; sleep 0.5; exit 1")
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
    "PGPASSWORD": "hunter2hunter2", "MLFLOW_AUTH_ADMIN_PASSWORD": "correct-horse-1",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
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
    stubs = Stubs(
        tmp_path, kubectl='[[ $* != *"get secret"* ]] || exit ${THERE:-1}; { echo ---; cat; } >> "$STUB_LOG.yaml"'
    )
    script = CLUSTER / "kubernetes" / "secrets.sh"
    assert stubs.run(script) == 0, stubs.said
    assert stubs.run(script, PGPASSWORD="my-own-password") == 0
    first, second = YAML(typ="safe").load_all((tmp_path / "calls.yaml").read_text())
    for manifest in (first, second):
        kubernetes_validate.validate(manifest, "1.32", strict=True)
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

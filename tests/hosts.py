"""Hosts of their own on this machine, by network namespaces: their own network, name, processes and Ray folder.

What they share is the file system, which plays a cluster's shared storage. Only processes that were started here are
ended: the first process of a host takes all others of that host with it. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).parents[1]
PORT, DASHBOARD = 6379, 8265
# A host that stops answering is dead after about 2 + 3 * 1 s, and its own Ray gives up 10 s later; by default these
# are about 45 s and 60 s.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}  # fmt: skip


def sh(*words: str, check: bool = True) -> str:
    """Run a command of the system, bounded; what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@cache
def missing() -> str | None:
    """One word for what keeps this machine from having hosts; None when it can. Found by trying."""
    if os.geteuid() != 0:
        return "root"
    if absent := [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]:
        return absent[0]
    name = f"ppc{secrets.token_hex(3)}"
    try:
        sh("ip", "netns", "add", name)
        sh("ip", "link", "add", name, "type", "bridge")
        isolate = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "hostname", name)
        sh("ip", "netns", "exec", name, *isolate)
    except (RuntimeError, OSError, subprocess.TimeoutExpired):
        return "namespaces"
    finally:
        sh("ip", "link", "del", name, check=False)
        sh("ip", "netns", "del", name, check=False)
    return None


class Host:
    """A host: its first process keeps it alive, and ends with all others by SIGKILL."""

    def __init__(self, cluster: Hosts, name: str, number: int) -> None:
        self.cluster, self.name = cluster, name
        self.address = f"{cluster.subnet}.{number}"
        self._space = self._link = f"{cluster.tag}{name}"
        self._ray_folder = cluster.folder / f"ray-{name}-{number}"
        self._ray_folder.mkdir()
        bridge = cluster.tag
        sh("ip", "netns", "add", self._space)
        sh("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._space)
        sh("ip", "link", "set", self._link, "master", bridge, "up")
        sh("ip", "-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self._space, "link", "set", "eth0", "up")
        sh("ip", "-n", self._space, "link", "set", "lo", "up")
        Path("/tmp/ray").mkdir(exist_ok=True)  # a host has a folder of its own in this place
        # bash reaps what loses its parent, as the first process of a host does
        script = 'hostname "$0" && mount --bind "$1" /tmp/ray && echo up && while :; do sleep 1000 & wait $!; done'
        isolate = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._space, *isolate]
        words += ["bash", "-c", script, name, str(self._ray_folder)]
        self._outer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != "up\n":
            raise RuntimeError(f"host {name} does not start")
        (first,) = psutil.Process(self._outer.pid).children()
        self.first = first
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, words: Sequence[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on this host; it writes `NAME.log` in the folder of the cluster."""
        enter = ["nsenter", "--target", str(self.first.pid), "--mount", "--uts", "--net", "--pid"]
        with (self.cluster.folder / f"{log}.log").open("ab") as out:
            process = subprocess.Popen(
                [*enter, *words], env={**self.cluster.environment, **environment}, stdout=out, stderr=out
            )
        self._started.append(process)
        return process

    def ppc(self, *words: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start our command line on this host."""
        return self.start([sys.executable, "-c", "from ppc.cli import main; main()", *words], log, **environment)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """What runs on this host and has the word in its title or command line."""
        found = []
        for process in self.first.children(recursive=True) + self._entered():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _entered(self) -> list[psutil.Process]:
        found = []
        for process in self._started:
            with suppress(psutil.Error):
                found += psutil.Process(process.pid).children(recursive=True)
        return found

    def cut(self) -> None:
        """Pull the network cable: nothing arrives, and nobody is told."""
        sh("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        """Plug it in again."""
        sh("ip", "link", "set", self._link, "up")

    def kill(self) -> None:
        """The whole host is gone at once."""
        with suppress(psutil.NoSuchProcess):
            self.first.send_signal(signal.SIGKILL)  # psutil knows a reused pid from this one
        for process in (self._outer, *self._started):
            process.wait(timeout=20)
        if self._outer.stdout is not None:
            self._outer.stdout.close()
        sh("ip", "netns", "del", self._space, check=False)
        sh("ip", "link", "del", self._link, check=False)


class Hosts:
    """Hosts on one bridge, with an address range, names and a token that no other run has. Logs stay in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tag = f"p{secrets.token_hex(3)}"
        self.subnet = f"10.{random.randint(64, 127)}.{random.randint(0, 255)}"
        self.hosts: list[Host] = []
        self.token = secrets.token_hex(32)
        kept = ("PATH", "LANG", "PYTHONWARNINGS")
        self.environment = {
            **{name: os.environ[name] for name in kept if name in os.environ}, **HEALTH,
            "HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token,
            "GLOO_SOCKET_IFNAME": "eth0", "PPC_PEER_TIMEOUT_S": "30", "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200",
            "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"

    def __enter__(self) -> Hosts:
        sh("ip", "link", "add", self.tag, "type", "bridge")
        try:
            sh("ip", "addr", "add", f"{self.subnet}.254/24", "dev", self.tag)
            sh("ip", "link", "set", self.tag, "up")
        except BaseException:
            sh("ip", "link", "del", self.tag, check=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = []
        for host in self.hosts:
            try:
                host.kill()
            except (OSError, RuntimeError, subprocess.TimeoutExpired) as problem:
                problems.append(f"{host.name}: {problem}")
        sh("ip", "link", "del", self.tag, check=False)
        assert not problems, problems

    def add(self, name: str) -> Host:
        """One more host."""
        host = Host(self, name, len(self.hosts) + 1)
        self.hosts.append(host)
        return host

    # -- Ray on them

    @property
    def address(self) -> str:
        """Where Ray's processes of the cluster find its head."""
        return f"{self.hosts[0].address}:{PORT}"

    @property
    def url(self) -> str:
        """The job server, as a user's machine sees it."""
        return f"http://{self.hosts[0].address}:{DASHBOARD}"

    def ray(self, host: Host, *, cpus: int, head: bool = False) -> None:
        """Start Ray on a host; it joins some seconds later."""
        where = ["--head", f"--port={PORT}", "--dashboard-host=0.0.0.0"] if head else [f"--address={self.address}"]
        sizes = [f"--num-cpus={cpus}", f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
        host.start(
            ["ray", "start", "--block", f"--node-ip-address={host.address}", *where, *sizes], log=f"ray-{host.name}"
        )

    def alive(self) -> set[str]:
        """Addresses of the hosts that the head holds to be alive; none when it does not answer."""
        request = urllib.request.Request(f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    def wait_alive(self, *hosts: Host, timeout_s: float = 90) -> None:
        """Wait until exactly these hosts make the cluster."""
        wanted, deadline = {host.address for host in hosts}, time.monotonic() + timeout_s
        while (now := self.alive()) != wanted:
            assert time.monotonic() < deadline, f"alive: {sorted(now)}, wanted: {sorted(wanted)}; {self.folder}"
            time.sleep(0.5)

    def log(self, name: str) -> str:
        """What a command wrote so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

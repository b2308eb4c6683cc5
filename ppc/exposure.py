"""Which MLflow and Ray servers other machines can use without a login. Found by asking them, as a stranger would."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from ppc.artifacts import Storage
from ppc.mlflow_embedded import DIRECT, running
from ppc.redact import safe_uri

ASK_S = 3.0
# What a server that asks for no login answers with a JSON object; Ray's port takes jobs, that is code, as well.
MLFLOW, RAY = "/api/2.0/mlflow/experiments/search?max_results=1", "/api/version"
_SIOCGIFADDR, _LISTEN = 0x8915, "0A"  # of Linux: address of an interface; state in /proc/net/tcp


class Exposure(NamedTuple):
    """What is known of one server; `ok` when a stranger cannot use it."""

    ok: bool
    text: str


class Listener(NamedTuple):
    """A socket of this machine that takes connections."""

    address: str
    port: int
    inode: str


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one of this machine that no other can reach."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ip_address(address.partition("%")[0]).is_loopback for address in found)


def open_to_others(host: str) -> str | None:
    """What to say to somebody who serves MLflow at an address that is not loopback; None when it is."""
    if is_loopback(host):
        return None
    return (
        f"the server at {host} asks for no login: whoever reaches this machine can read and change all runs. Use "
        "127.0.0.1 and an ssh tunnel, or the server with logins of cluster/mlflow"
    )


# -- this machine


def listeners() -> list[Listener]:
    """All TCP sockets of this machine that listen; none where the system does not tell."""
    found = []
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN:
                    place, port = words[1].split(":")
                    found.append(Listener(_address(place), int(port, 16), words[9]))
    return found


def _address(place: str) -> str:
    """An address as /proc writes it: words of four bytes in the machine's own order."""
    data = b"".join(int(place[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(place), 8))
    if len(data) == 4:
        return socket.inet_ntoa(data)
    address = IPv6Address(data)
    return str(address.ipv4_mapped or address)


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine at which others may reach it."""
    found = []
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in dict.fromkeys(found) if not ip_address(address).is_loopback]


def reached_at(port: int, there: list[Listener] | None = None) -> list[str]:
    """Addresses of this machine, other than loopback, at which something listens on a port."""
    places: list[str] = []
    for listener in listeners() if there is None else there:
        if listener.port == port:
            address = ip_address(listener.address)
            if address.is_unspecified:
                places += own_addresses()
            elif not address.is_loopback:
                places.append(listener.address)
    return list(dict.fromkeys(places))


# -- asking


def answers_strangers(url: str, path: str, *, local: bool) -> bool | None:
    """Whether a server answers without credentials; None when nothing answers.

    At an address of this machine it is called localhost, since a stranger may call it as he likes too.
    """
    request = urllib.request.Request(url + path, headers={"Host": "localhost"} if local else {})
    try:
        with (DIRECT if local else urllib.request.build_opener()).open(request, timeout=ASK_S) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError:  # 401, 403
        return False
    except (OSError, http.client.HTTPException):
        return None
    except ValueError:  # the page of a login
        return False
    return isinstance(found, dict)


def _one(what: str, url: str, path: str, remedy: str) -> Exposure:
    """What a stranger gets at a URI, or at the other addresses of this machine when it is one of loopback."""
    parts = urlsplit(safe_uri(url))
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    if not is_loopback(parts.hostname or ""):
        said = answers_strangers(base, path, local=False)
        if said is None:
            return Exposure(False, f"{what} {base}: nothing answers there")
        return Exposure(not said, f"{what} {base}: " + (f"asks for no login; {remedy}" if said else "asks for a login"))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return _of_port(what, port, path, remedy)


def _of_port(what: str, port: int, path: str, remedy: str, there: list[Listener] | None = None) -> Exposure:
    places = reached_at(port, there)
    for place in places:
        url = f"http://[{place}]:{port}" if ":" in place else f"http://{place}:{port}"
        if answers_strangers(url, path, local=True):
            return Exposure(False, f"{what} at {url}: other machines can reach it and it asks for no login; {remedy}")
    where = "asks for a login" if places else "listens at loopback only"
    return Exposure(True, f"{what} on port {port}: {where}")


def mlflow_exposures(storage: Storage, environ: Mapping[str, str] = os.environ) -> Iterator[Exposure]:
    """The server of MLFLOW_TRACKING_URI, and the one that runs for a storage on this host."""
    remedy = "bind it to 127.0.0.1, or serve it with logins: cluster/mlflow"
    named = environ.get("MLFLOW_TRACKING_URI", "")
    if named.startswith(("http://", "https://")):
        yield _one("MLflow", named, MLFLOW, remedy)
    if (found := running(storage)) is not None and found[0] != named.rstrip("/"):
        yield _one("MLflow of this storage", found[0], MLFLOW, remedy)


def ray_exposures(environ: Mapping[str, str] = os.environ) -> Iterator[Exposure]:
    """The job servers that RAY_ADDRESS and PPC_ADDRESS name, and the dashboards that run on this machine."""
    remedy = "start Ray with RAY_AUTH_MODE=token, or its dashboard at 127.0.0.1: it runs whatever code it is sent"
    for name in ("RAY_ADDRESS", "PPC_ADDRESS"):
        if environ.get(name, "").startswith(("http://", "https://")):
            yield _one("Ray job server", environ[name], RAY, remedy)
    there = listeners()
    inodes = _dashboard_sockets()
    for port in sorted({listener.port for listener in there if listener.inode in inodes}):
        found = _of_port("Ray dashboard", port, RAY, remedy, there)
        if not found.ok or answers_strangers(f"http://127.0.0.1:{port}", RAY, local=True) is not None:
            yield found


def _dashboard_sockets() -> set[str]:
    """Inodes of the sockets of all Ray dashboards among the processes that we may look at."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it ended, or is another user's
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"/ray/dashboard/dashboard.py") for word in words):
                links = [os.readlink(link) for link in (folder / "fd").iterdir()]
                found |= {link[8:-1] for link in links if link.startswith("socket:[")}
    return found

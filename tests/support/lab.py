"""A site in network namespaces: a switch, nodes with links of a rate, and a registry behind an uplink. Needs root.

    wan (registry, proxy) ==uplink==> switch ==down==> node-i
                                      switch <==up==== node-i

Each link is a veth pair, shaped by tbf where it is entered. Nothing of it is visible outside of the namespaces, and
leaving the context removes them. Sockets may be made in any namespace from this process (`Namespace.entered`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.support.leftovers import Forget, taken_away_by

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000

NETWORK = "198.18"
"""RFC 2544 keeps these addresses for measurements of networks."""
WAN = f"{NETWORK}.255.1"
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
CONGESTION_CONTROL = "reno"
"""At these rates cubic, which registries mostly use and which a namespace may often not choose, does the same."""
BURST_BYTES = 64 << 10
"""One GSO packet."""
QUEUE_MS = 50
"""What a switch or a modem holds before it drops: tbf's limit."""


class NoLabError(Exception):
    """Network namespaces can't be had here; the text says why and what to do."""


def check_lab() -> None:
    """Raises NoLabError."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NoLabError(f"{program} is not installed: apt-get install iproute2")
    if os.geteuid() != 0:
        raise NoLabError("network namespaces need root: run this as root")


def _run(*command: str, lines: str = "") -> None:
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLabError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str

    @property
    def prefix(self) -> list[str]:
        """Put before a command, it runs here."""
        return ["ip", "netns", "exec", self.name]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes meanwhile belong here for their life: setns(2). No await may stand inside."""
        with (
            contextlib.closing(_File(f"/proc/self/task/{threading.get_native_id()}/ns/net")) as own,
            contextlib.closing(_File(f"/run/netns/{self.name}")) as there,
        ):
            _setns(there.fd)
            try:
                yield
            finally:
                _setns(own.fd)

    async def connect(self, host: str, port: int, *, receive_buffer: int = 0) -> trio.SocketStream:
        """A connection from here. `receive_buffer` in bytes: small ones make a client slow to take."""
        with self.entered():
            sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        await sock.connect((host, port))
        return trio.SocketStream(sock)

    def listener(self, host: str, port: int) -> trio.SocketListener:
        with self.entered():
            sock = trio.socket.socket()
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        sock._sock.bind((host, port))  # at once, as the address is one
        sock.listen(128)
        return trio.SocketListener(sock)


class _File:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NoLabError(f"cannot enter a network namespace: {os.strerror(number)}")


@dataclass(frozen=True, slots=True)
class Rates:
    """Bits per second: of each node's link, both ways, and of the site's uplink towards the site."""

    node: float
    uplink: float


class Lab:
    """Made by `lab`. `nodes[i]` has the address `address(i)`."""

    def __init__(self, name: str, count: int, rates: Rates) -> None:
        self.rates = rates
        self.switch = Namespace(f"{name}-switch")
        self.wan = Namespace(f"{name}-wan")
        self.nodes = [Namespace(f"{name}-{i}") for i in range(count)]
        self._forget: list[Forget] = []

    def address(self, index: int) -> str:
        return f"{NETWORK}.{index // 200}.{index % 200 + 10}"

    def build(self) -> None:
        for one in (self.switch, self.wan, *self.nodes):
            self._forget.append(taken_away_by("ip", "netns", "delete", one.name))
            _run("ip", "netns", "add", one.name)
            _run("ip", "-n", one.name, "link", "set", "lo", "up")
            with one.entered(), contextlib.suppress(OSError):
                CONGESTION.write_text(CONGESTION_CONTROL)  # not every kernel lets a namespace choose
        _run("ip", "-n", self.switch.name, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self.switch.name, "link", "set", "switch", "up")
        self._plug(self.wan, "wan", WAN)
        for index, node in enumerate(self.nodes):
            self._plug(node, f"node{index}", self.address(index))
            self.set_node_rate(index, self.rates.node)
        self.set_uplink(self.rates.uplink)
        self._introduce()

    def _plug(self, one: Namespace, port: str, address: str) -> None:
        switch, mac = self.switch.name, _mac(address)
        _run(
            "ip", "-n", switch, "link", "add", port, "type", "veth",
            "peer", "name", "eth0", "address", mac, "netns", one.name,
        )  # fmt: skip
        _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
        _run("ip", "-n", one.name, "address", "add", f"{address}/16", "dev", "eth0")
        _run("ip", "-n", one.name, "link", "set", "eth0", "up")

    def _introduce(self) -> None:
        """Nobody asks for hardware addresses: the kernel finds room for 1024 that it was told, over all namespaces,
        and with 33 nodes some would not reach each other. What is written down does not count."""
        addresses = [WAN, *map(self.address, range(len(self.nodes)))]
        lines = "".join(f"neigh replace {ip} lladdr {_mac(ip)} dev eth0 nud permanent\n" for ip in addresses)
        for one in (self.wan, *self.nodes):
            _run("ip", "-n", one.name, "-batch", "-", lines=lines)

    def set_node_rate(self, index: int, bits: float) -> None:
        _shape(self.nodes[index], "eth0", bits)
        _shape(self.switch, f"node{index}", bits)

    def set_uplink(self, bits: float) -> None:
        _shape(self.wan, "eth0", bits)
        _shape(self.switch, "wan", bits)

    def received(self, index: int) -> int:
        """Bytes that the node's link carried to it, Ethernet and TCP headers included."""
        with self.nodes[index].entered():
            lines = Path(f"/proc/self/task/{threading.get_native_id()}/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("eth0:"))

    def remove(self) -> None:
        for one in (*self.nodes, self.wan, self.switch):
            subprocess.run(["ip", "netns", "delete", one.name], capture_output=True, check=False)
        for forget in self._forget:
            forget()


def _mac(address: str) -> str:
    """Locally administered, and different for each address."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _shape(one: Namespace, device: str, bits: float) -> None:
    burst = max(BURST_BYTES, int(bits / 8 / 1000))
    _run(
        "tc", "-n", one.name, "qdisc", "replace", "dev", device, "root", "tbf",
        "rate", f"{int(bits)}bit", "burst", str(burst), "latency", f"{QUEUE_MS}ms",
    )  # fmt: skip


@contextlib.contextmanager
def lab(count: int, rates: Rates) -> Iterator[Lab]:
    """Raises NoLabError where the machine or the user does not allow it."""
    check_lab()
    made = Lab(f"shoal{os.getpid()}", count, rates)
    try:
        made.build()
        yield made
    finally:
        made.remove()

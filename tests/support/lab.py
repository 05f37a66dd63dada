"""A site in network namespaces: a switch, nodes with links of a rate, and a registry behind an uplink. Needs root.

    wan (registry, proxy) ==uplink==> switch ==down==> node-i
                                      switch <==up==== node-i

Each link is a veth pair, and tbf shapes each direction at its sender. Nothing is visible outside the namespaces, and
the end of the context removes them. This process can open sockets in each of them (`Namespace.entered`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
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
"""RFC 2544 reserves these addresses for network benchmarks."""
WAN = f"{NETWORK}.255.1"
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
CONGESTION_CONTROL = "reno"
"""Most registries use cubic, which many kernels do not let a namespace choose. At these rates both are equally fast."""
BURST_BYTES = 64 << 10
"""One GSO packet."""
QUEUE_MS = 50
"""The queue of a switch or a modem, at the link's rate; tbf drops the packets beyond it."""


class NoLabError(Exception):
    """This machine or user cannot make network namespaces. The text says why, and how to change that."""


def check_lab() -> None:
    """Raises NoLabError."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NoLabError(f"{program} is not installed: apt-get install iproute2")
    if os.geteuid() != 0:
        raise NoLabError("network namespaces need root: run this as root")


def _run(command: str, lines: str = "") -> None:
    """Run a command of words without spaces."""
    done = subprocess.run(command.split(), input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLabError(f"{command}: {done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str

    @property
    def prefix(self) -> list[str]:
        """Words to put before a command, which then runs in this namespace."""
        return ["ip", "netns", "exec", self.name]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread opens in the context belong to this namespace (setns(2)). Do not await inside."""
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
        """Connect from this namespace. A small `receive_buffer` (bytes) leaves unread data with the sender."""
        with self.entered():
            sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        await sock.connect((host, port))
        return trio.SocketStream(sock)

    def listener(self, host: str, port: int) -> trio.SocketListener:
        with self.entered():
            sock = socket.create_server((host, port), backlog=128)
        sock.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


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
    """Bits per second in each direction: of every node's link, and of the site's uplink."""

    node: float
    uplink: float


class Lab:
    """The namespaces of a site, made by `lab`. `nodes[i]` has the address `address(i)`."""

    def __init__(self, name: str, count: int, rates: Rates) -> None:
        self.rates = rates
        self.switch = Namespace(f"{name}-switch")
        self.wan = Namespace(f"{name}-wan")
        self.nodes = [Namespace(f"{name}-{i}") for i in range(count)]
        self._forget: list[Forget] = []

    def address(self, index: int) -> str:
        return f"{NETWORK}.{index // 200}.{index % 200 + 10}"

    def build(self) -> None:
        for namespace in (self.switch, self.wan, *self.nodes):
            self._forget.append(taken_away_by("ip", "netns", "delete", namespace.name))
            _run(f"ip netns add {namespace.name}")
            _run(f"ip -n {namespace.name} link set lo up")
            with namespace.entered(), contextlib.suppress(OSError):
                CONGESTION.write_text(CONGESTION_CONTROL)  # not every kernel lets a namespace choose
        _run(f"ip -n {self.switch.name} link add switch type bridge")
        _run(f"ip -n {self.switch.name} link set switch up")
        self._plug(self.wan, "wan", WAN)
        for index, node in enumerate(self.nodes):
            self._plug(node, f"node{index}", self.address(index))
            self.set_node_rate(index, self.rates.node)
        self.set_uplink(self.rates.uplink)
        self._write_neighbours()

    def _plug(self, namespace: Namespace, port: str, address: str) -> None:
        name, switch = namespace.name, self.switch.name
        _run(f"ip -n {switch} link add {port} type veth peer name eth0 address {_mac(address)} netns {name}")
        _run(f"ip -n {switch} link set {port} master switch up")
        _run(f"ip -n {name} address add {address}/16 dev eth0")
        _run(f"ip -n {name} link set eth0 up")

    def _write_neighbours(self) -> None:
        """Write all hardware addresses into each namespace. The kernel keeps at most 1024 that it learned by ARP, over
        all namespaces, so that some of 33 nodes would not reach each other. Permanent entries do not count."""
        addresses = [WAN, *map(self.address, range(len(self.nodes)))]
        lines = "".join(f"neigh replace {ip} lladdr {_mac(ip)} dev eth0 nud permanent\n" for ip in addresses)
        for namespace in (self.wan, *self.nodes):
            _run(f"ip -n {namespace.name} -batch -", lines)

    def set_node_rate(self, index: int, bits: float) -> None:
        _shape(self.nodes[index], "eth0", bits)
        _shape(self.switch, f"node{index}", bits)

    def set_uplink(self, bits: float) -> None:
        _shape(self.wan, "eth0", bits)
        _shape(self.switch, "wan", bits)

    def received(self, index: int) -> int:
        """Bytes that arrived on the node's link, Ethernet and TCP headers included."""
        with self.nodes[index].entered():
            lines = Path(f"/proc/self/task/{threading.get_native_id()}/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("eth0:"))

    def remove(self) -> None:
        for namespace in (*self.nodes, self.wan, self.switch):
            subprocess.run(["ip", "netns", "delete", namespace.name], capture_output=True, check=False)
        for forget in self._forget:
            forget()


def _mac(address: str) -> str:
    """A locally administered hardware address, different for each address."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _shape(namespace: Namespace, device: str, bits: float) -> None:
    queue = f"rate {int(bits)}bit burst {max(BURST_BYTES, int(bits / 8 / 1000))} latency {QUEUE_MS}ms"
    _run(f"tc -n {namespace.name} qdisc replace dev {device} root tbf {queue}")


@contextlib.contextmanager
def lab(count: int, rates: Rates) -> Iterator[Lab]:
    """Build the lab, and remove it afterwards. Raises NoLabError."""
    check_lab()
    made = Lab(f"shoal{os.getpid()}", count, rates)
    try:
        made.build()
        yield made
    finally:
        made.remove()

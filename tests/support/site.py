"""A site of p2pd processes on this machine, each with its own folder, ports, and loopback address or namespace."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from node.cli.client import ControlClient
from protocol.errors import ShoalError
from tests.support.lab import Lab, Namespace
from tests.support.leftovers import ended_with_the_run
from tests.support.processes import PATIENCE_S, free_ports, tail, terminate, wait_for

ROOT = Path(__file__).parents[2]
UPSTREAM = "origin.test"
"""The default name of the registry, as in the mirror's paths and in `ns=`."""
PORTS = (5050, 4501, 4502)
"""The ports of mirror, libp2p and bulk, for a node in a namespace of its own."""

CONFIG = """\
[node]
name = "{name}"
site = "loopback"
data_dir = "{folder}/data"
[mirror]
listen = "{host}:{mirror}"
[peers]
listen = "/ip4/{host}/tcp/{libp2p}"
bulk = "{host}:{bulk}"
bootstrap = {bootstrap}
mdns = false
[[upstream]]
name = "{upstream}"
url = "{url}"
[cluster]
key = "{key}"
[cache]
memory = "{memory}"
disk = "4GiB"
min_free = "1%"
containerd_store = "{containerd_store}"
[control]
socket = "{folder}/p2pd.sock"
metrics = "{metrics}"
"""


DEFAULTS = {"key": "", "memory": "64MiB", "containerd_store": "", "upstream": UPSTREAM, "metrics": ""}
"""Configuration values that a test may change: `key` is the path of the cluster's key."""


def program(name: str, module: str) -> list[str]:
    """The installed program of this environment, or the module if the program is not installed. PYTHONPATH decides
    which code it runs; -P keeps the working folder out of that."""
    installed = Path(sys.executable).with_name(name)
    return (
        [str(installed)] if installed.exists() else [sys.executable, "-P", "-c", f"from {module} import main; main()"]
    )


P2PD = program("p2pd", "node.daemon")
P2PCTL = program("p2pctl", "node.cli.main")


def run(command: Sequence[str], *, timeout: float = PATIENCE_S, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a short command, and capture its output as text. The caller checks the exit status."""
    env = {**os.environ, "PYTHONPATH": str(code)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)


def cpu_s(pid: int, thread: int | None = None) -> float:
    """Processor time of a process, or of one of its threads, kernel included."""
    task = Path(f"/proc/{pid}") if thread is None else Path(f"/proc/{pid}/task/{thread}")
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Node:
    """A daemon with its folder, running or not."""

    def __init__(
        self,
        name: str,
        host: str,
        folder: Path,
        url: str,
        *,
        namespace: Namespace | None = None,
        code: Path = ROOT,
        **values: object,
    ) -> None:
        """`values` replace some of DEFAULTS. `code`: the folder of the packages that the daemon runs."""
        assert values.keys() <= DEFAULTS.keys(), values
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.host = host
        self.folder = folder
        self.config = folder / "p2pd.toml"
        self.socket = folder / "p2pd.sock"
        self.log = folder / "log"
        self.ready_s = 0.0
        self.program: Sequence[str] = P2PD
        self.code = code
        self._process: subprocess.Popen[bytes] | None = None
        self._namespace = namespace
        self.mirror_port, self.libp2p_port, self.bulk_port = PORTS if namespace else free_ports(host, 3)
        self._values = DEFAULTS | values | {"name": name, "host": host, "folder": folder, "url": url}
        self._values |= {"mirror": self.mirror_port, "libp2p": self.libp2p_port, "bulk": self.bulk_port}
        self.bootstrap([])

    def bootstrap(self, addresses: Sequence[str]) -> None:
        """Write the configuration, with these seeds."""
        self.config.write_text(CONFIG.format(**self._values, bootstrap=json.dumps(list(addresses))))

    @property
    def mirror(self) -> str:
        return f"http://{self.host}:{self.mirror_port}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    def peer_id(self) -> str:
        """The output of `p2pd --print-peer-id`, which creates the node's key if it has none."""
        answer = run([*P2PD, "--print-peer-id", "--config", str(self.config)], code=self.code)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def address(self) -> str:
        return f"/ip4/{self.host}/tcp/{self.libp2p_port}/p2p/{self.peer_id()}"

    def launch(self) -> None:
        """Start the process without waiting for it."""
        env = {**os.environ, "PYTHONPATH": str(self.code)}
        self._started = time.monotonic()
        with self.log.open("ab") as log:
            prefix = self._namespace.prefix if self._namespace else []
            command = [*prefix, *self.program, "--config", str(self.config)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        ended_with_the_run(self._process)

    def wait_ready(self, seconds: float = PATIENCE_S) -> None:
        """Wait until the mirror answers `GET /v2/`. `ready_s` is then the time since `launch`."""
        wait_for(f"{self.name} answers /v2/", self._answers, seconds=seconds)
        self.ready_s = time.monotonic() - self._started

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{tail(self.log)}")
        connection = http.client.HTTPConnection(self.host, self.mirror_port, timeout=PATIENCE_S)
        inside = self._namespace.entered() if self._namespace else contextlib.nullcontext()
        with inside, contextlib.closing(connection):
            try:
                connection.request("GET", "/v2/")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        return terminate(self.process)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Stop the process, if it runs or is paused."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self.stop()

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run([*P2PCTL, "--socket", str(self.socket), *arguments])

    def status(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(ControlClient(self.socket).get("/status"))
        except ShoalError as error:
            raise AssertionError(f"{self.name}: {error}\n{tail(self.log)}") from error
        return document

    def cpu_s(self) -> float:
        """Processor time used so far, kernel included."""
        return cpu_s(self.process.pid)

    def loop_s(self) -> float:
        """The part of the main thread, which runs the loop."""
        return cpu_s(self.process.pid, self.process.pid)

    def rss_bytes(self, field: str = "VmRSS") -> int:
        """Resident memory, as the kernel counts it; its maximum is the `field` VmHWM."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"{self.name}: no {field}")

    def forget(self) -> None:
        """Delete everything in the data folder of a stopped daemon, except its keys and certificates."""
        for path in self.data.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix in (".sqlite", ".msgpack", ".json") or path.name.endswith(("-wal", "-shm")):
                path.unlink()


@contextlib.contextmanager
def site(
    folder: Path,
    url: str,
    count: int = 5,
    *,
    start: bool = True,
    lab: Lab | None = None,
    program: Sequence[str] = P2PD,
    **values: Any,
) -> Iterator[list[Node]]:
    """`count` daemons of one cluster; the first two are seeds for the others. `folder` needs a short path (sockets).

    In a lab each daemon has a namespace. `values` replace some of DEFAULTS, or are those of `Node`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "cluster.key"
    answer = run([*P2PCTL, "cluster", "init", str(key)])
    assert answer.returncode == 0, answer.stderr

    def node(index: int) -> Node:
        name = f"node-{index + 1}"
        if lab is None:
            return Node(name, f"127.0.0.{index + 1}", folder / name, url, key=key, **values)
        return Node(name, lab.address(index), folder / name, url, key=key, namespace=lab.nodes[index], **values)

    nodes = [node(index) for index in range(count)]
    for member in nodes:
        member.program = program
    try:
        seeds: Mapping[Node, str] = {node: node.address() for node in nodes[:2]} if count > 1 else {}
        for member in nodes:
            member.bootstrap([address for seed, address in seeds.items() if seed is not member])
        if start:
            start_all(nodes)
        yield nodes
    finally:
        for member in nodes:
            member.end()


def start_all(nodes: Sequence[Node], joined: int | None = None) -> None:
    """Start `nodes`, and wait until each sees all other members; the site has `joined`, or just these."""
    for node in nodes:
        node.launch()
    for node in nodes:
        node.wait_ready(PATIENCE_S + len(nodes))  # they all start at the same time
    wait_joined(nodes, joined if joined is not None else len(nodes))


def wait_joined(nodes: Sequence[Node], joined: int, seconds: float = PATIENCE_S) -> None:
    for node in nodes:
        wait_for(
            f"{node.name} sees {joined - 1} others",
            lambda node=node: node.status()["peers_alive"] >= joined - 1,  # type: ignore[misc]
            seconds=seconds,
            every=0.2,
        )

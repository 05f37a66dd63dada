"""A private containerd for a test. It shares no folder, socket or configuration with the machine's containerd."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.image import ARCHITECTURE
from tests.support.processes import running, tail, wait_for

CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.aufs"]
[grpc]
address = "{folder}/containerd.sock"
[ttrpc]
address = "{folder}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{folder}/certs.d"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{folder}/cni"
bin_dir = "{folder}/cni"
"""

HOSTS = """\
server = "{server}"
[host."{mirror}"]
capabilities = ["pull", "resolve"]
"""


@dataclass(frozen=True, slots=True)
class Containerd:
    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def hosts(self) -> Path:
        """The certs.d folder."""
        return self.folder / "certs.d"

    @property
    def content_store(self) -> Path:
        return self.folder / "root" / "io.containerd.content.v1.content"

    def use_mirror(self, registry: str, server: str, mirror: str) -> None:
        """Images of `registry` come through `mirror`, and from `server` if the mirror does not answer."""
        (self.hosts / registry).mkdir(parents=True, exist_ok=True)
        (self.hosts / registry / "hosts.toml").write_text(HOSTS.format(server=server, mirror=mirror))

    def ctr(self, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", str(self.socket), "--namespace", "test", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def pull(self, reference: str, *, user: str = "") -> subprocess.CompletedProcess[str]:
        """`user` is `name:password`."""
        options = ["--hosts-dir", str(self.hosts), "--platform", f"linux/{ARCHITECTURE}"]
        command = ["images", "pull", *options, *(["--user", user] if user else []), reference]
        return self.ctr(*command)

    def fetch(self, reference: str) -> subprocess.CompletedProcess[str]:
        """Fetch an image, all its layers at once, without unpacking it."""
        options = ["--hosts-dir", str(self.hosts), "--platform", f"linux/{ARCHITECTURE}"]
        return self.ctr("content", "fetch", *options, reference)

    def run(self, reference: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a container without network and without a cgroup; it is removed when it ends."""
        options = ["--rm", "--cgroup", "", reference, "shoal-test"]
        return self.ctr("run", *options, *command)


@contextlib.contextmanager
def containerd(folder: Path) -> Iterator[Containerd]:
    """Needs root. `folder` must be new, and have a short path (sockets)."""
    folder.mkdir(parents=True)
    config, log = folder / "config.toml", folder / "log"
    config.write_text(CONFIG.format(folder=folder))
    daemon = Containerd(folder)
    with running(["containerd", "--config", config, "--log-level", "warn"], log) as process:

        def ready() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"containerd ended with {process.returncode}:\n{tail(log)}")
            return daemon.socket.exists() and daemon.ctr("version").returncode == 0

        wait_for("containerd answers", ready, every=0.1)
        yield daemon

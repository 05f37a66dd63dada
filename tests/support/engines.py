"""The container clients of operators, each in a folder of its own, with its configuration file from deploy/.

Only the mirror's address in that file is changed. Their registry is docker.io, which tests/support/hub.py replaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.containerd import containerd
from tests.support.hub import NAME, Hub
from tests.support.image import ARCHITECTURE, blob_path
from tests.support.processes import running, tail, wait_for
from tests.support.pull import Pull
from tests.support.site import ROOT

MIRROR = "127.0.0.1:5050"
"""The mirror's address in deploy/."""
TIMEOUT_S = 60.0
DEBIAN = "/usr/sbin:/usr/bin:/sbin:/bin"
"""The folders of Debian's programs: its docker includes BuildKit's client, other builds may need a plugin for that."""
DOCKERS_OWN = {".dockerenv", "dev", "proc", "sys", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"}
"""Paths that Docker puts into every container."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Held:
    """A pulled image: the digests that the client shows, and the content of the root file system by path."""

    digests: frozenset[str]
    tree: Mapping[str, str]


class Engine(Protocol):
    def pull(self, reference: str, user: str = "") -> Pull:
        """Start a pull with the credentials `user` (`name:password`) for docker.io."""

    def held(self, reference: str) -> Held:
        """The image that was pulled by this reference."""


Start = Callable[[Path, Hub, str], AbstractContextManager[Engine]]
"""Arguments: a new folder, docker.io, and the mirror's `host:port`, or "" for no mirror."""


def tree_of(root: Path, without: Collection[str] = ()) -> Mapping[str, str]:
    """A description of each path: mode and hash of a file, target of a link, mode of a folder."""
    paths = {str(path.relative_to(root)): path for path in root.rglob("*")}
    return {
        name: _described(path)
        for name, path in paths.items()
        if name not in without and name.partition("/")[0] not in without
    }


def _tree_in(archive: Path, without: Collection[str] = ()) -> Mapping[str, str]:
    root = archive.with_suffix("")
    with tarfile.open(archive) as tar:
        tar.extractall(root)
    return tree_of(root, without)


def _described(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    mode = f"{path.stat().st_mode & 0o7777:o}"
    return f"{mode}/" if path.is_dir() else f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _deployed(name: str, mirror: str) -> str:
    text = (ROOT / "deploy" / name).read_text()
    assert MIRROR in text
    return text.replace(MIRROR, mirror)


@dataclass(frozen=True, slots=True)
class _Shell:
    """Runs a client's commands in its folder, where `hub` stands for docker.io. Commands are split as a shell does."""

    folder: Path
    hub: Hub
    mirror: str
    env: Mapping[str, str]

    def start(self, name: str, command: str, **env: str) -> Pull:
        return Pull([*self.hub.prefix, *shlex.split(command)], self.folder / name, {**self.env, **env})

    def run(self, command: str) -> str:
        words = [*self.hub.prefix, *shlex.split(command)]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


# skopeo, podman, buildah: registries.conf


def _containers(folder: Path, hub: Hub, mirror: str) -> _Shell:
    """Write every configuration file that github.com/containers' libraries read: they use none of the machine's."""
    folder.mkdir(parents=True)
    files = {
        "registries.conf": _deployed("registries.conf", mirror) if mirror else "",
        "policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
        "storage.conf": f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/root"\n',
        "containers.conf": f'[engine]\nevents_logger = "none"\ntmp_dir = "{folder}/tmp"\n'
        f'[network]\nnetwork_config_dir = "{folder}/networks"\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "home").mkdir()
    env = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "TMPDIR"), f"{folder}/home")
    env |= {f"CONTAINERS_{name.upper()}_CONF": f"{folder}/{name}.conf" for name in ("registries", "storage")}
    return _Shell(folder, hub, mirror, {**hub.env, **env, "CONTAINERS_CONF": f"{folder}/containers.conf"})


@dataclass(frozen=True, slots=True)
class Skopeo:
    """skopeo copies all platforms to an OCI layout, and umoci unpacks this machine's platform from it."""

    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        creds = f"--src-creds {user}" if user else ""
        return self.shell.start("copy", f"{self._copy} {creds} --all docker://{reference} {self._layout('all')}")

    def held(self, reference: str) -> Held:
        self.shell.run(f"{self._copy} {self._layout('all')} {self._layout('one')}")
        folder = self.shell.folder
        self.shell.run(f"umoci unpack --image {folder}/one:held {folder}/bundle")
        index, manifest = (_named(folder / name) for name in ("all", "one"))
        config = json.loads(blob_path(folder / "one", manifest).read_bytes())["config"]["digest"]
        return Held(frozenset((index, manifest, config)), tree_of(folder / "bundle" / "rootfs"))

    @property
    def _copy(self) -> str:
        folder = self.shell.folder
        return f"skopeo --policy={folder}/policy.json --registries-conf={folder}/registries.conf copy --quiet"

    def _layout(self, name: str) -> str:
        return f"oci:{self.shell.folder / name}:held"


def _named(layout: Path) -> str:
    """The digest of a layout's only image."""
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    return str(entry["digest"])


@dataclass(frozen=True, slots=True)
class Podman:
    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        return _pull(self.shell, "podman", reference, user)

    def held(self, reference: str) -> Held:
        (image,) = json.loads(self.shell.run(f"podman image inspect {reference}"))
        digests = _DIGEST.findall(f"sha256:{image['Id']} {image['Digest']} {image['RepoDigests']}")
        root = self.shell.run(f"podman image mount {reference}").strip()
        return Held(frozenset(digests), tree_of(Path(root)))


@dataclass(frozen=True, slots=True)
class Buildah:
    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        return _pull(self.shell, "buildah", reference, user)

    def held(self, reference: str) -> Held:
        container = self.shell.run(f"buildah from --pull-never {reference}").strip()
        (image,) = json.loads(self.shell.run("buildah images --json"))
        origin = json.loads(self.shell.run(f"buildah inspect {container}"))
        digests = (image["digest"], origin["FromImageDigest"], f"sha256:{origin['FromImageID']}")
        return Held(frozenset(digests), tree_of(Path(self.shell.run(f"buildah mount {container}").strip())))


def _pull(shell: _Shell, program: str, reference: str, user: str) -> Pull:
    creds = f"--creds {user}" if user else ""
    return shell.start("pull", f"{program} pull --signature-policy {shell.folder}/policy.json {creds} {reference}")


def _started(kind: Callable[[_Shell], Engine]) -> Start:
    """Returns a function that starts a client without a daemon."""

    @contextlib.contextmanager
    def start(folder: Path, hub: Hub, mirror: str) -> Iterator[Engine]:
        yield kind(_containers(folder, hub, mirror))

    return start


# Docker and the BuildKit in it: daemon.json


@dataclass(frozen=True, slots=True)
class Docker:
    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        _log_in(self.shell, user, NAME)
        return self.shell.start("pull", f"docker pull {reference}")

    def held(self, reference: str) -> Held:
        (image,) = json.loads(self.shell.run(f"docker image inspect {reference}"))
        digests = _DIGEST.findall(f"{image['Id']} {image['RepoDigests']}")
        container = self.shell.run(f"docker create {reference}").strip()
        archive = self.shell.folder / "export.tar"
        self.shell.run(f"docker export --output {archive} {container}")
        return Held(frozenset(digests), _tree_in(archive, DOCKERS_OWN))


@dataclass(frozen=True, slots=True)
class BuildKit:
    """A build that adds nothing to its base image, and writes the result into a folder.

    BuildKit looks up credentials by the host name of the server that asks for them, also if that is a mirror.
    """

    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        _log_in(self.shell, user, NAME, self.shell.mirror)
        context = self.shell.folder / "context"
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(f"FROM {reference}\n")
        output = f"type=local,dest={self.shell.folder / 'export'}"
        command = f"docker build --progress plain --output {output} {context}"
        return self.shell.start("build", command, DOCKER_BUILDKIT="1")

    def held(self, reference: str) -> Held:
        log = (self.shell.folder / "build.log").read_text()
        digests = re.findall(r"^#\d+ (sha256:[0-9a-f]{64}) .* done", log, re.MULTILINE)
        return Held(frozenset(digests), tree_of(self.shell.folder / "export"))


def _log_in(shell: _Shell, user: str, *servers: str) -> None:
    name, _, password = user.partition(":")
    for server in servers if user else ():
        shell.run(f"docker login --username {name} --password {password} {server}")


def _docker(kind: Callable[[_Shell], Engine]) -> Start:
    @contextlib.contextmanager
    def start(folder: Path, hub: Hub, mirror: str) -> Iterator[Engine]:
        folder.mkdir(parents=True)
        config, socket, log = folder / "daemon.json", folder / "docker.sock", folder / "log"
        config.write_text(_deployed("daemon.json", mirror) if mirror else "{}")
        env = {**hub.env, "PATH": DEBIAN, "DOCKER_HOST": f"unix://{socket}", "DOCKER_CONFIG": str(folder)}
        shell = _Shell(folder, hub, mirror, env)
        # One download attempt for a layer: the default of five takes 75 s with a dead mirror.
        command = (
            f"dockerd --config-file={config} --data-root={folder}/root --exec-root={folder}/exec --storage-driver=vfs"
            f" --pidfile={folder}/pid --host=unix://{socket} --bridge=none --iptables=false --ip6tables=false"
            " --ip-forward=false --max-download-attempts=1"
        )
        with running([*hub.prefix, *command.split()], log, dict(env)) as process:

            def ready() -> bool:
                assert process.poll() is None, f"dockerd ended with {process.returncode}:\n{tail(log)}"
                return socket.exists()

            wait_for("dockerd answers", ready)
            yield kind(shell)

    return start


# containerd: hosts.toml


@dataclass(frozen=True, slots=True)
class Ctr:
    shell: _Shell

    def pull(self, reference: str, user: str = "") -> Pull:
        options = f"--hosts-dir {self.shell.folder}/certs.d --platform linux/{ARCHITECTURE}"
        creds = f"--user {user}" if user else ""
        return self.shell.start("pull", f"{self._ctr} images pull {options} {creds} {reference}")

    def held(self, reference: str) -> Held:
        digests = self.shell.run(f"{self._ctr} content list --quiet").split()
        place = self.shell.folder / "mounted"
        place.mkdir()
        archive = self.shell.folder / "mounted.tar"
        # Every command runs in a mount namespace of its own, so that the same command must mount and read.
        script = (
            f"{self._ctr} images mount {reference} {place} >&2 && tar --create --file={archive} --directory={place} ."
        )
        self.shell.run(f"sh -c '{script}'")
        return Held(frozenset(digests), _tree_in(archive))

    @property
    def _ctr(self) -> str:
        return f"ctr --address {self.shell.folder}/containerd.sock"


@contextlib.contextmanager
def _containerd(folder: Path, hub: Hub, mirror: str) -> Iterator[Engine]:
    with containerd(folder) as daemon:
        hosts = daemon.hosts / NAME
        hosts.mkdir(parents=True)
        if mirror:
            (hosts / "hosts.toml").write_text(_deployed("hosts.toml", mirror))
        yield Ctr(_Shell(folder, hub, mirror, hub.env))


ENGINES: Mapping[str, Start] = {
    "skopeo": _started(Skopeo),
    "podman": _started(Podman),
    "buildah": _started(Buildah),
    "docker": _docker(Docker),
    "buildkit": _docker(BuildKit),
    "containerd": _containerd,
}
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "skopeo": ("skopeo", "umoci"),
    "podman": ("podman",),
    "buildah": ("buildah",),
    "docker": ("dockerd", "docker"),
    "buildkit": ("dockerd", "docker"),
    "containerd": ("containerd", "ctr"),
}

"""docker's config.json: credentials by registry, and the helper programs that have others (docker/cli, cli/config)."""

from __future__ import annotations

import logging
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from node.oci.challenges import IDENTITY, Credentials
from node.oci.references import canonical
from protocol.errors import UNDECODABLE

log = logging.getLogger(__name__)

MAX_CONFIG = 1 << 20
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_DOCKER_HUB_KEYS = {"docker.io": "https://index.docker.io/v1/"}
"""The keys under which docker's programs store credentials, for registries whose key differs from their name."""


class _Entry(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _ConfigFile(msgspec.Struct, rename="camel"):
    auths: dict[str, _Entry] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


@dataclass(frozen=True, slots=True)
class DockerCredentials:
    """Credentials and helpers by registry host. `store` is the helper for all other hosts, or ""."""

    auths: Mapping[str, Credentials] = field(default_factory=dict)
    helpers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The helper's name, and the registry as the file spells it."""
    store: str = ""

    def of(self, names: Sequence[str]) -> Credentials | None:
        """The credentials for the first of `names` that has any."""
        return next((self.auths[host] for name in names if (host := _host(name)) in self.auths), None)

    def helper(self, names: Sequence[str]) -> tuple[str, str] | None:
        """The helper to ask, and the registry to ask it for."""
        helper = next((self.helpers[host] for name in names if (host := _host(name)) in self.helpers), None)
        return helper or ((self.store, _DOCKER_HUB_KEYS.get(_host(names[0]), names[0])) if self.store else None)


def parse_docker_config(text: bytes) -> DockerCredentials:
    """Raises ValueError, whose text contains no part of the file."""
    try:
        config = msgspec.json.decode(text, type=_ConfigFile)
    except UNDECODABLE:
        raise ValueError("not a docker config.json") from None
    for helper in filter(None, (config.creds_store, *config.cred_helpers.values())):
        if not _HELPER.fullmatch(helper):
            raise ValueError("a credential helper's name may have letters, digits, dots, - and _")
    auths = {_host(key): _credentials(entry) for key, entry in config.auths.items()}
    return DockerCredentials(
        {host: credentials for host, credentials in auths.items() if credentials},
        {_host(key): (helper, key) for key, helper in config.cred_helpers.items() if helper},
        config.creds_store,
    )


def _host(key: str) -> str:
    return canonical(key.split("://", 1)[-1].split("/", 1)[0])


def _credentials(entry: _Entry) -> Credentials | None:
    if entry.identitytoken:
        return Credentials(IDENTITY, entry.identitytoken)
    if entry.username:
        return Credentials(entry.username, entry.password)
    try:
        username, colon, password = b64decode(entry.auth, validate=True).decode().partition(":")
    except (Base64Error, ValueError):
        return None
    return Credentials(username, password.rstrip("\0")) if colon and username else None


class DockerConfig:
    """A docker config.json, read again when it changes. Reads block the loop: the file is small and in page cache."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int] | None = None
        self._reported: tuple[int, int] | None = None
        self._content = DockerCredentials()

    def read(self) -> DockerCredentials:
        if self._path is None:
            return self._content
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._stamp, self._content = stamp, DockerCredentials()
                self._content = parse_docker_config(self._path.read_bytes() if status.st_size <= MAX_CONFIG else b"")
        except (OSError, ValueError) as error:
            stamp = (0, 0) if isinstance(error, OSError) else stamp
            if self._reported != stamp:
                log.warning("docker_config %s is not used: %s", self._path, error)
            self._stamp, self._reported, self._content = stamp, stamp, DockerCredentials()
        return self._content

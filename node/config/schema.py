"""The configuration file: one struct for each part, every key with a default, read once.

`load` names the file, the key and what is accepted when something is wrong. docs/OPERATIONS.md tells the trade-offs.
"""

from __future__ import annotations

import re
import socket
import tomllib
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from node.config.tag_policy import TagPolicies, TagPolicy
from node.config.uplink_policy import UplinkPolicy
from node.oci.references import check_upstream
from node.runtime.time_windows import TimeWindow
from protocol.errors import BadInputError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.ASCII)
_UNITS = {
    None: 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_DURATION = re.compile(r"(\d{1,15}(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PORT = re.compile(r"\d{1,5}", re.ASCII)

MAX_PATTERN = 512
MAX_URLS = 8

Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class NodePart(_Part, frozen=True):
    name: str = msgspec.field(default_factory=socket.gethostname)
    site: str = "default"
    data_dir: str = "/var/lib/p2pd"
    log: str = "info"


class MirrorPart(_Part, frozen=True):
    listen: str = "127.0.0.1:5050"
    tag_ttl: str = "60s"
    tag_max_age: str = "7d"


class TagsPart(_Part, frozen=True):
    match: str
    ttl: str = ""
    max_age: str = ""
    cache: bool = True


class PeersPart(_Part, frozen=True):
    listen: str = "/ip4/0.0.0.0/tcp/4501"
    bulk: str = "0.0.0.0:4502"
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    plain: bool = False
    k: Annotated[int, msgspec.Meta(ge=1, le=32)] = 4
    m: Annotated[int, msgspec.Meta(ge=0, le=8)] = 1


class UpstreamPart(_Part, frozen=True):
    name: str
    url: str | tuple[str, ...] = ""
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 6
    access: Literal["public", "relay", "node"] = "relay"
    access_grace: str = "1h"
    docker_config: str = ""
    ca: str = ""
    rate: str = ""
    daily: str = ""
    daily_spent: Literal["refuse", "allow"] = "refuse"
    hours: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()

    @property
    def urls(self) -> tuple[str, ...]:
        """In the order in which they are asked: mirrors first, the registry itself last."""
        return (self.url,) if isinstance(self.url, str) else self.url


class ClusterPart(_Part, frozen=True):
    key: str = ""
    open: bool = False


class CachePart(_Part, frozen=True):
    memory: str = "64MiB"
    disk: str = "10GiB"
    min_free: str = "5%"
    containerd_store: str = ""


class ControlPart(_Part, frozen=True):
    socket: str = "/run/p2pd/p2pd.sock"
    metrics: str = "127.0.0.1:5051"


DEFAULT_UPSTREAMS = (
    UpstreamPart(name="docker.io", url="https://registry-1.docker.io"),
    UpstreamPart(name="ghcr.io", url="https://ghcr.io"),
    UpstreamPart(name="quay.io", url="https://quay.io"),
    UpstreamPart(name="registry.k8s.io", url="https://registry.k8s.io"),
)


class Config(_Part, frozen=True):
    node: NodePart = NodePart()
    mirror: MirrorPart = MirrorPart()
    tags: Annotated[tuple[TagsPart, ...], msgspec.Meta(max_length=256)] = ()
    peers: PeersPart = PeersPart()
    upstream: tuple[UpstreamPart, ...] = DEFAULT_UPSTREAMS
    cluster: ClusterPart = ClusterPart()
    cache: CachePart = CachePart()
    control: ControlPart = ControlPart()


@dataclass(frozen=True, slots=True)
class HostPort:
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; of names only `localhost` is known to be."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_size(text: str, key: str) -> int:
    """`64MiB`, `10 GB`, `1000` to bytes."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise BadInputError(f'{key} = "{text}": not a size; write for example "64MiB" or "10GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


def parse_duration(text: str, key: str) -> float:
    """`500ms`, `60s`, `7d` to seconds."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise BadInputError(f'{key} = "{text}": not a duration; write for example "60s", "5m" or "7d"')
    return float(match[1]) * _SECONDS[match[2]]


def parse_hours(text: str, key: str) -> TimeWindow:
    """`22:00-06:00` of the local day; up to 24:00."""
    try:
        return TimeWindow.parse(text)
    except BadInputError as error:
        raise BadInputError(f"{key}: {error}") from error


def parse_floor(text: str, key: str) -> tuple[float, int]:
    """`5%` to (0.05, 0); `1GiB` to (0.0, bytes): the part, or the bytes, of the file system to keep free."""
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise BadInputError(f'{key} = "{text}": not a percentage from 0% to 99%')
        return share, 0
    return 0.0, parse_size(text, key)


def parse_host_port(text: str, key: str) -> HostPort:
    """`127.0.0.1:5050`, `[::1]:5050`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise BadInputError(f'{key} = "{text}": not an address; write for example "127.0.0.1:5050"')
    return HostPort(host, int(port))


def load(path: Path | None) -> Config:
    """Read and check a configuration file; None gives the defaults. Raises BadInputError."""
    if path is None:
        return Config()
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInputError(f"{path} is not TOML: {error}") from error
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{path}: {error}") from error
    try:
        check(config)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    return config


def check(config: Config) -> None:
    """Everything that types do not say. Raises BadInputError naming the key."""
    parse_host_port(config.mirror.listen, "mirror.listen")
    parse_host_port(config.peers.bulk, "peers.bulk")
    if config.control.metrics:
        parse_host_port(config.control.metrics, "control.metrics")
    tag_policies(config)
    parse_size(config.cache.memory, "cache.memory")
    parse_size(config.cache.disk, "cache.disk")
    parse_floor(config.cache.min_free, "cache.min_free")
    if config.cluster.key and config.cluster.open:
        raise BadInputError("cluster.open: a cluster that anybody may enter has no key; remove cluster.key")
    names = [upstream.name for upstream in config.upstream]
    for upstream in config.upstream:
        check_upstream(upstream.name)
        _check_urls(upstream)
        parse_duration(upstream.access_grace, f'upstream "{upstream.name}": access_grace')
        if upstream.docker_config and upstream.access != "node":
            raise BadInputError(
                f'upstream "{upstream.name}": docker_config needs access = "node", by which whoever reaches the mirror'
                f' reads what its credentials can; with access = "{upstream.access}" it would not be used'
            )
        uplink_policy(upstream)
    if len(set(names)) != len(names):
        raise BadInputError(f"upstream: a name stands twice in {names}")
    for key, value in (("name", config.node.name), ("site", config.node.site), ("data_dir", config.node.data_dir)):
        if not value:
            raise BadInputError(f'node.{key} = "": must not be empty')
    if config.node.log not in ("debug", "info", "warning", "error"):
        raise BadInputError(f'node.log = "{config.node.log}": one of debug, info, warning, error')


def uplink_policy(part: UpstreamPart) -> UplinkPolicy:
    """Raises BadInputError naming the key."""
    key = f'upstream "{part.name}"'
    rate, daily = (
        parse_size(text, f"{key}: {name}") if text else 0 for name, text in (("rate", part.rate), ("daily", part.daily))
    )
    if (part.rate and not rate) or (part.daily and not daily):
        raise BadInputError(f"{key}: rate and daily: empty for no limit; nothing at all is what leaving it out is for")
    hours = tuple(parse_hours(text, f"{key}: hours") for text in part.hours)
    return UplinkPolicy(rate, daily, hours, part.daily_spent == "refuse")


def access_grace_s(config: Config) -> dict[str, float]:
    """Of the upstreams that relay, by name."""
    return {one.name: parse_duration(one.access_grace, one.name) for one in config.upstream if one.access == "relay"}


def tag_policies(config: Config) -> TagPolicies:
    """Raises BadInputError naming the key."""
    default = TagPolicy(
        "",
        parse_duration(config.mirror.tag_ttl, "mirror.tag_ttl"),
        parse_duration(config.mirror.tag_max_age, "mirror.tag_max_age"),
    )
    return TagPolicies(default, [_tag_policy(part, default) for part in config.tags])


def _tag_policy(part: TagsPart, default: TagPolicy) -> TagPolicy:
    key = f'tags "{part.match[:200]}"'
    if not part.match.startswith("*") and "/" not in part.match:
        raise BadInputError(f'{key}: match: begin with the registry, or "*": "docker.io/library/*:latest"')
    if len(part.match) > MAX_PATTERN:
        raise BadInputError(f"{key}...: match: longer than {MAX_PATTERN} characters")
    if not part.cache:
        if part.ttl or part.max_age:
            raise BadInputError(f"{key}: cache = false leaves nothing for ttl and max_age to say")
        return TagPolicy(part.match, 0.0, 0.0)
    return TagPolicy(
        part.match,
        parse_duration(part.ttl, f"{key}: ttl") if part.ttl else default.ttl_s,
        parse_duration(part.max_age, f"{key}: max_age") if part.max_age else default.max_age_s,
    )


def _check_urls(upstream: UpstreamPart) -> None:
    key, urls = f'upstream "{upstream.name}": url', [url.rstrip("/") for url in upstream.urls]
    if not 1 <= len(urls) <= MAX_URLS or len(set(urls)) != len(urls):
        raise BadInputError(f"{key}: from 1 to {MAX_URLS} of them, none twice")
    for url in urls:
        if "@" in url:
            raise BadInputError(f"{key}: credentials belong into docker_config, not into a URL")
        if not _is_registry_url(url):
            raise BadInputError(f'{key} = "{url}": write for example "https://{upstream.name}"')


def _is_registry_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 # checks it
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment

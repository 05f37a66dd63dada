"""The configuration file: one struct for each part, with defaults, decoded once into typed values.

An error names the file, the key and the accepted values. docs/OPERATIONS.md explains the trade-offs.
"""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from node.config import quantities
from node.config.tag_policy import TagPolicies, TagPolicy
from node.oci.references import check_upstream
from protocol.errors import BadInputError
from protocol.ids import MAX_OBJECT_SIZE

_PATH = re.compile(r"(\w+)(?:\[(\d+)\])?\.(\w+)(?:\[\d+\])?`")
"""The end of msgspec's message: `cache.disk`, `upstream[0].rate` or `upstream[0].hours[1]`."""

_HOST_PATTERN = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|[0-9a-f:]+", re.ASCII | re.IGNORECASE)
MAX_PATTERN = 512
MAX_URLS = 8
MAX_WITNESSES = 64
"""As many as are asked at a time: more would never be found at once."""
MAX_KEYS = 16
"""Public keys for one pattern: each is tried on each signature of an image."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class NodePart(_Part, frozen=True):
    name: str = msgspec.field(default_factory=socket.gethostname)
    site: str = "default"
    data_dir: str = "/var/lib/p2pd"
    log: str = "info"


class MirrorPart(_Part, frozen=True):
    listen: quantities.HostPort = quantities.HostPort("127.0.0.1", 5050)
    tag_ttl: quantities.Duration = quantities.Duration("60s")
    tag_max_age: quantities.Duration = quantities.Duration("7d")
    max_object: quantities.Size = quantities.Size("64GiB")
    tag_witnesses: Annotated[int, msgspec.Meta(ge=1, le=MAX_WITNESSES)] = 2


class TagsPart(_Part, frozen=True):
    match: str
    ttl: quantities.OptionalDuration = quantities.OptionalDuration()
    max_age: quantities.OptionalDuration = quantities.OptionalDuration()
    cache: bool = True
    verify: str | Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_KEYS)] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Paths of public keys in PEM."""
        return (self.verify,) if isinstance(self.verify, str) else self.verify


class PeersPart(_Part, frozen=True):
    listen: str = "/ip4/0.0.0.0/tcp/4501"
    bulk: quantities.HostPort = quantities.HostPort("0.0.0.0", 4502)
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
    access_grace: quantities.Duration = quantities.Duration("1h")
    docker_config: str = ""
    ca: str = ""
    rate: quantities.OptionalSize = quantities.OptionalSize()
    daily: quantities.OptionalSize = quantities.OptionalSize()
    daily_spent: Literal["refuse", "allow"] = "refuse"
    hours: Annotated[tuple[quantities.Window, ...], msgspec.Meta(max_length=16)] = ()
    redirects: Annotated[tuple[str, ...], msgspec.Meta(max_length=32)] = ()
    prefer: Literal["site", "fastest"] = "site"

    @property
    def urls(self) -> tuple[str, ...]:
        """In the order in which they are asked: mirrors first, the registry last."""
        return (self.url,) if isinstance(self.url, str) else self.url


class ClusterPart(_Part, frozen=True):
    key: str = ""
    open: bool = False


class CachePart(_Part, frozen=True):
    memory: quantities.Size = quantities.Size("64MiB")
    disk: quantities.Size = quantities.Size("10GiB")
    min_free: quantities.Floor = quantities.Floor("5%")
    containerd_store: str = ""


class ControlPart(_Part, frozen=True):
    socket: str = "/run/p2pd/p2pd.sock"
    metrics: quantities.OptionalHostPort = quantities.OptionalHostPort("127.0.0.1:5051")


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
        return config_of(document)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error


def config_of(document: Mapping[str, Any]) -> Config:
    """The checked configuration of a decoded TOML document. Raises BadInputError naming the key."""
    try:
        config = msgspec.convert(document, Config, dec_hook=_quantity)
    except msgspec.ValidationError as error:
        raise BadInputError(_with_key(error, document)) from error
    check(config)
    return config


def _quantity(kind: type[quantities.Quantity], text: object) -> quantities.Quantity:
    if not isinstance(text, str):
        raise TypeError(f"Expected `str`, got `{type(text).__name__}`")
    try:
        return kind.parse(text)
    except BadInputError as error:
        raise ValueError(error) from error  # msgspec adds the path to a ValueError


def _with_key(error: msgspec.ValidationError, document: Mapping[str, Any]) -> str:
    """A quantity's error as `upstream "x": rate = "fast": not a size`; msgspec's own errors end with the path."""
    text, _, path = str(error).rpartition(" - at `$.")
    place = _PATH.fullmatch(path)
    if not isinstance(error.__cause__, ValueError) or not place:
        return str(error)
    part, index, key = place.groups()
    if index is None:
        return f"{part}.{key} = {text}"
    row = document[part][int(index)]
    return f'{part} "{str(row.get("name", row.get("match")))[:200]}": {key} = {text}'


def check(config: Config) -> None:
    """Check the rules that the types do not express. Raises BadInputError naming the key."""
    tag_policies(config)
    if config.cluster.key and config.cluster.open:
        raise BadInputError("cluster.open: an open cluster admits every node and has no key; remove cluster.key")
    names = [upstream.name for upstream in config.upstream]
    for upstream in config.upstream:
        check_upstream(upstream.name)
        _check_urls(upstream)
        _check_redirects(upstream)
        if upstream.docker_config and upstream.access != "node":
            raise BadInputError(
                f'upstream "{upstream.name}": docker_config needs access = "node", with which every client may read'
                f' what these credentials can read; with access = "{upstream.access}" they are not used'
            )
        uplink_policy(upstream)
    if len(set(names)) != len(names):
        raise BadInputError(f"upstream: a name occurs twice in {names}")
    for key, value in (("name", config.node.name), ("site", config.node.site), ("data_dir", config.node.data_dir)):
        if not value:
            raise BadInputError(f'node.{key} = "": must not be empty')
    if not 0 < config.mirror.max_object.bytes <= MAX_OBJECT_SIZE:
        raise BadInputError(f'mirror.max_object = "{config.mirror.max_object}": from 1 B to 1 TiB')
    if config.node.log not in ("debug", "info", "warning", "error"):
        raise BadInputError(f'node.log = "{config.node.log}": one of debug, info, warning, error')


@dataclass(frozen=True, slots=True)
class UplinkPolicy:
    """Limits of the whole site: `rate` in bytes a second, `daily` in bytes a day, 0 for no limit.

    `refuse`: once the day's bytes are used up, foreground bodies are refused too. During `hours` neither limit holds
    and no bytes are counted. If there are any hours, background reads are made only in them.
    """

    rate: int = 0
    daily: int = 0
    hours: tuple[quantities.Window, ...] = ()
    refuse: bool = True

    @property
    def limited(self) -> bool:
        return bool(self.rate or self.daily)

    def free(self, when: datetime) -> bool:
        return any(not hours.opens_in(when) for hours in self.hours)


def uplink_policy(part: UpstreamPart) -> UplinkPolicy:
    """Raises BadInputError naming the key."""
    key = f'upstream "{part.name}"'
    if any(limit and not limit.bytes for limit in (part.rate, part.daily)):
        raise BadInputError(
            f"{key}: rate and daily: must not be 0; leave them empty for no limit, or omit the upstream"
        )
    return UplinkPolicy(part.rate.bytes, part.daily.bytes, part.hours, refuse=part.daily_spent == "refuse")


def access_grace_s(config: Config) -> dict[str, float]:
    """`access_grace` in seconds, by the name of each upstream with `access = "relay"`."""
    return {part.name: part.access_grace.seconds for part in config.upstream if part.access == "relay"}


def tag_policies(config: Config) -> TagPolicies:
    """Raises BadInputError naming the key."""
    default = TagPolicy("", config.mirror.tag_ttl.seconds, config.mirror.tag_max_age.seconds)
    rules = [_tag_policy(part, default) for part in config.tags]
    return TagPolicies(default, rules, config.mirror.tag_witnesses)


def _tag_policy(part: TagsPart, default: TagPolicy) -> TagPolicy:
    key = f'tags "{part.match[:200]}"'
    if not part.match.startswith("*") and "/" not in part.match:
        raise BadInputError(f'{key}: match: begin with the registry, or "*": "docker.io/library/*:latest"')
    if len(part.match) > MAX_PATTERN:
        raise BadInputError(f"{key}...: match: longer than {MAX_PATTERN} characters")
    if not part.cache:
        if part.ttl or part.max_age:
            raise BadInputError(f"{key}: ttl and max_age have no effect with cache = false; remove them")
        return TagPolicy(part.match, 0.0, 0.0, part.keys)
    ttl_s = part.ttl.seconds if part.ttl else default.ttl_s
    max_age_s = part.max_age.seconds if part.max_age else default.max_age_s
    return TagPolicy(part.match, ttl_s, max_age_s, part.keys)


def _check_urls(upstream: UpstreamPart) -> None:
    key, urls = f'upstream "{upstream.name}": url', [url.rstrip("/") for url in upstream.urls]
    if not 1 <= len(urls) <= MAX_URLS or len(set(urls)) != len(urls):
        raise BadInputError(f"{key}: from 1 to {MAX_URLS} URLs, none twice")
    for url in urls:
        if "@" in url:
            raise BadInputError(f"{key}: credentials belong in docker_config, not in a URL")
        if not _is_registry_url(url):
            raise BadInputError(f'{key} = "{url}": write for example "https://{upstream.name}"')


def _check_redirects(upstream: UpstreamPart) -> None:
    for entry in upstream.redirects:
        try:
            valid = bool(ip_network(entry)) if "/" in entry else bool(_HOST_PATTERN.fullmatch(entry))
        except ValueError:
            valid = False
        if not valid:
            raise BadInputError(
                f'upstream "{upstream.name}": redirects = "{entry[:255]}": a host, "*." and a suffix of hosts,'
                ' or a network such as "10.0.0.0/8"'
            )


def _is_registry_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 # raises ValueError for a malformed port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment

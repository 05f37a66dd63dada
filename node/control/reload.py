"""The configuration read again while the daemon runs: by SIGHUP, and by `p2pctl reload` (POST /reload).

All of a file or nothing: it is read and checked as at a start, then each part says whether it can take what is new for
it, and only then it takes it, in one turn of the loop. Keys that are not in LIVE stay as they were until a restart.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from cache.disk import DiskStore
from cache.memory import MemoryStore
from node.api.documents import ReloadReport
from node.config.schema import (
    Config,
    UpstreamPart,
    access_grace_s,
    load,
    parse_duration,
    parse_floor,
    parse_size,
    tag_policies,
    uplink_policy,
)
from node.content.known_names import KnownNames
from node.content.listings import Listings
from node.control.routes import Routes, document
from node.images.pins import Pins
from node.membership.addresses import parse_listen
from node.mirror.access import Access
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from node.runtime.logs import set_level
from node.runtime.systemd import Notifier
from node.web.server import Request, Response
from protocol.errors import BadInputError

log = logging.getLogger(__name__)

LIVE = frozenset(
    {
        "node.log", "mirror.tag_ttl", "mirror.tag_max_age", "tags", "peers.bootstrap", "upstream", "cache.memory",
        "cache.disk", "cache.min_free",
    }
)  # fmt: skip

Change = Callable[[], None]


@dataclass(frozen=True, slots=True)
class LiveParts:
    """What takes a new configuration. `uplink_of` gives the one uplink that there is for an upstream; `bootstrap` is
    told whom the configuration names."""

    upstreams: Upstreams
    uplink_of: Callable[[str], Uplink]
    names: KnownNames
    access: Access
    listings: Listings
    bootstrap: Callable[[Sequence[str]], Change]
    pins: Pins
    memory: MemoryStore
    disk: DiskStore

    def prepared(self, config: Config) -> Change:
        """What applies a configuration that was checked; it does not fail. Raises BadInputError."""
        self.pins.check_fits(parse_size(config.cache.disk, "cache.disk"))
        uplinks = [self.uplink_of(part.name) for part in config.upstream]
        registries = self.upstreams.prepared(config.upstream, uplinks)
        seeds = self.bootstrap(config.peers.bootstrap)

        def change() -> None:
            registries()
            seeds()
            for uplink, part in zip(uplinks, config.upstream, strict=True):
                uplink.change(uplink_policy(part))
            self._apply(config)

        return change

    def _apply(self, config: Config) -> None:
        set_level(config.node.log)
        max_age_s = parse_duration(config.mirror.tag_max_age, "mirror.tag_max_age")
        self.names.policies = tag_policies(config)
        self.access.change(access_grace_s(config), max_age_s)
        self.listings.max_age_s = max_age_s
        self.memory.resize(parse_size(config.cache.memory, "cache.memory"))
        share, least = parse_floor(config.cache.min_free, "cache.min_free")
        self.disk.resize(parse_size(config.cache.disk, "cache.disk"), free_share=share, free_bytes=least)


class Reloader:
    """`config` is what the daemon runs with."""

    def __init__(
        self, path: Path | None, config: Config, prepared: Callable[[Config], Change], notifier: Notifier
    ) -> None:
        self._path, self.config, self._prepared, self._notifier = path, config, prepared, notifier

    def reload(self) -> ReloadReport:
        """Raises BadInputError: then nothing has changed."""
        self._notifier.reloading()
        status = "the configuration was read again"
        try:
            return self._reload()
        except BadInputError as error:
            status = f"the configuration is not taken, and the former one holds: {error}"
            log.error("%s", status)  # noqa: TRY400 # the text says it all
            raise
        finally:
            self._notifier.ready(status)

    def _reload(self) -> ReloadReport:
        if self._path is None:
            raise BadInputError("p2pd was started without --config: there is nothing to read again")
        wanted = load(self._path)
        parse_listen(wanted.peers.listen)
        config = _with_live(self.config, wanted)
        change = self._prepared(config)
        report = ReloadReport(
            changed=tuple(differences(self.config, config)), needs_restart=tuple(differences(config, wanted))
        )
        change()
        self.config = config
        for line in report.changed:
            log.info("changed %s", line)
        for line in report.needs_restart:
            log.warning("needs a restart: %s", line)
        return report

    async def on_signals(self, hang_ups: AsyncIterator[int]) -> None:
        async for _ in hang_ups:
            log.info("%s", signal.SIGHUP.name)
            try:
                self.reload()
            except BadInputError:
                continue  # it was logged

    def routes(self) -> Routes:
        async def answer(_: Request) -> Response:
            await trio.lowlevel.checkpoint()
            return document(self.reload())

        return {"/reload": ("POST", answer)}


def _with_live(running: Config, wanted: Config) -> Config:
    """`running` with the LIVE keys of `wanted`."""
    parts = {}
    for name, part in _fields(wanted):
        if isinstance(part, msgspec.Struct):
            live = {key: value for key, value in _fields(part) if f"{name}.{key}" in LIVE}
            parts[name] = msgspec.structs.replace(getattr(running, name), **live)
        elif name in LIVE:
            parts[name] = part
    return msgspec.structs.replace(running, **parts)


def differences(before: Config, after: Config) -> Iterable[str]:
    """One line for each key, `cache.disk: "10GiB" -> "20GiB"`."""
    for (name, one), (_, other) in zip(_fields(before), _fields(after), strict=True):
        if isinstance(one, msgspec.Struct):
            yield from _changed(f"{name}.", one, other)
        elif name == "upstream":
            yield from _of_upstreams({part.name: part for part in one}, {part.name: part for part in other})
        elif one != other:
            yield f"{name}: {_text(one)} -> {_text(other)}"


def _of_upstreams(before: Mapping[str, UpstreamPart], after: Mapping[str, UpstreamPart]) -> Iterable[str]:
    for name in {**before, **after}:
        if name not in after:
            yield f'upstream "{name}": removed'
        elif name not in before:
            yield f'upstream "{name}": added'
        else:
            yield from _changed(f'upstream "{name}": ', before[name], after[name])


def _changed(prefix: str, before: msgspec.Struct, after: msgspec.Struct) -> Iterable[str]:
    for (key, old), (_, new) in zip(_fields(before), _fields(after), strict=True):
        if old != new:
            yield f"{prefix}{key}: {_text(old)} -> {_text(new)}"


def _fields(struct: msgspec.Struct) -> Iterable[tuple[str, Any]]:
    return [(name, getattr(struct, name)) for name in struct.__struct_fields__]


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()

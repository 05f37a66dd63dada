"""Reloading the configuration while the daemon runs: at SIGHUP, and at `p2pctl reload` (POST /reload).

A file is applied as a whole or not at all. It is read and checked as at a start. Then each component prepares its
change, and may refuse it. When all have prepared, the changes are applied, without an await between them. Keys that are
not in LIVE keep their values until a restart.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from node.api.documents import ReloadReport
from node.config.schema import Config, UpstreamPart, access_grace_s, load, tag_policies, uplink_policy
from node.content.signatures import load_keys
from node.control.routes import Route, document_of
from node.membership.addresses import parse_listen
from node.runtime.logs import set_level
from node.runtime.systemd import Notifier
from node.stages import Node
from node.web.server import Request
from protocol.errors import BadInputError

log = logging.getLogger(__name__)

LIVE = frozenset(
    {"node.log", "mirror.tag_ttl", "mirror.tag_max_age", "mirror.tag_witnesses", "tags", "peers.bootstrap", "upstream"}
    | {"cache.memory", "cache.disk", "cache.min_free"}
)

Change = Callable[[], None]


def prepared(node: Node, config: Config) -> Change:
    """Returns the function that applies `config` and cannot fail. Raises BadInputError if a component refuses it."""
    storage, clients, cache = node.storage, node.clients, config.cache
    storage.pins.check_fits(cache.disk.bytes)
    uplinks = [node.registry.uplink(part.name) for part in config.upstream]
    registries = node.registry.upstreams.prepared(config.upstream, uplinks)
    addresses = [*config.peers.bootstrap, *node.admitted.place.bootstrap]
    bootstrap = node.network.introducer.bootstrap.prepared(addresses)
    keys = load_keys(config.tags)

    def change() -> None:
        registries()
        bootstrap()
        for uplink, part in zip(uplinks, config.upstream, strict=True):
            uplink.change(uplink_policy(part))
        set_level(config.node.log)
        node.member.resolver.known.policies, clients.library.keys = tag_policies(config), keys
        clients.access.change(access_grace_s(config), config.mirror.tag_max_age.seconds)
        clients.listings.max_age_s = config.mirror.tag_max_age.seconds
        storage.memory.resize(cache.memory.bytes)
        storage.disk.resize(cache.disk.bytes, free_share=cache.min_free.share, free_bytes=cache.min_free.bytes)

    return change


class Reloader:
    """`config` is the configuration in force."""

    def __init__(
        self, path: Path | None, config: Config, prepare: Callable[[Config], Change], notifier: Notifier
    ) -> None:
        self._path, self.config, self._prepare, self._notifier = path, config, prepare, notifier

    def reload(self) -> ReloadReport:
        """Read and apply the file. Raises BadInputError, and then nothing has changed."""
        self._notifier.reloading()
        status = "the configuration was read again"
        try:
            return self._reload()
        except BadInputError as error:
            status = f"the new configuration is refused, and the previous one stays in force: {error}"
            log.error("%s", status)  # noqa: TRY400 # the text names the cause
            raise
        finally:
            self._notifier.ready(status)

    def _reload(self) -> ReloadReport:
        if self._path is None:
            raise BadInputError("p2pd was started without --config: there is no file to read again")
        wanted = load(self._path)
        parse_listen(wanted.peers.listen)
        config = _with_live(self.config, wanted)
        change = self._prepare(config)
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
                continue  # `reload` logged it

    def routes(self) -> Iterable[Route]:
        async def answer(_: Request) -> ReloadReport:
            await trio.lowlevel.checkpoint()
            return self.reload()

        return (Route("POST", "/reload", document_of(answer)),)


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
    for (name, old), (_, new) in zip(_fields(before), _fields(after), strict=True):
        if isinstance(old, msgspec.Struct):
            yield from _changed(f"{name}.", old, new)
        elif name == "upstream":
            yield from _of_upstreams({part.name: part for part in old}, {part.name: part for part in new})
        elif old != new:
            yield f"{name}: {_text(old)} -> {_text(new)}"


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
    return msgspec.json.encode(value, enc_hook=str).decode()

"""What may be wrong with a node: facts are gathered by the few functions with I/O, and judged by pure ones.

The daemon tells what only it knows (`examine`); p2pctl adds what is seen from outside (`check_socket`, `check_mirror`,
`check_hosts`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import trio

from node.status import Check, DoctorReport, Level

PROBE_S = 5.0
"""For one registry to say anything at all."""
SKEW_WARN_S = 30.0
SKEW_FAIL_S = 300.0
"""Registry tokens live 5 minutes: with a larger skew they are expired, or not yet valid, when they come."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of asking a registry for /v2/. `error` is empty where it answered; `skew_s` is our clock less its."""

    error: str = ""
    skew_s: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """`floor` is `(share, bytes)` as in `node.config.parse_floor`; names are those of members.

    `upstreams` by name are the registries themselves, `mirrors` by `name by url` what is asked before them. `spent` are
    the upstreams whose bytes of the day are used up.
    """

    upstreams: Mapping[str, Probe]
    alive: int
    bootstrap: int
    mdns: bool
    quarantined: Mapping[str, str]
    bulk_unreachable: Sequence[str]
    data_dir: Path
    data_dir_error: str
    free_bytes: int
    total_bytes: int
    floor: tuple[float, int]
    mirrors: Mapping[str, Probe] = field(default_factory=dict)
    spent: Sequence[str] = ()
    extra: Sequence[Check] = field(default=())


def examine(facts: Facts) -> DoctorReport:
    checks = [
        *(check_upstream(name, probe) for name, probe in facts.upstreams.items()),
        *(check_upstream_mirror(name, probe) for name, probe in facts.mirrors.items()),
        *(check_spent(name) for name in facts.spent),
        check_clock({**facts.upstreams, **facts.mirrors}),
        check_peers(facts.alive, facts.bootstrap, mdns=facts.mdns),
        check_quarantine(facts.quarantined),
        check_bulk(facts.bulk_unreachable),
        check_data_dir(facts.data_dir, facts.data_dir_error),
        check_disk(facts.free_bytes, facts.total_bytes, facts.floor),
        *facts.extra,
    ]
    return DoctorReport(checks=tuple(checks))


def check_upstream(name: str, probe: Probe) -> Check:
    title = f"upstream {name}"
    if not probe.error:
        return Check(name=title, level="ok", text="answers")
    hint = "what the site holds is still served; check the network, the proxy and [[upstream]] url"
    return Check(name=title, level="fail", text=probe.error, hint=hint)


def check_upstream_mirror(name: str, probe: Probe) -> Check:
    title = f"upstream {name}"
    if not probe.error:
        return Check(name=title, level="ok", text="answers")
    return Check(name=title, level="warn", text=probe.error, hint="the next [[upstream]] url is asked instead")


def check_spent(name: str) -> Check:
    hint = "what the site holds is still served; raise daily of the [[upstream]], or wait for the next day or its hours"
    return Check(name=f"uplink {name}", level="warn", text="the bytes of the day are used up", hint=hint)


def check_clock(probes: Mapping[str, Probe]) -> Check:
    """One registry may be wrong; so the smallest skew of all is believed."""
    skews = [probe.skew_s for probe in probes.values() if probe.skew_s is not None]
    if not skews:
        return Check(name="clock", level="warn", text="no registry told the time, so it was not compared")
    skew = min(skews, key=abs)
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the registries"
    if abs(skew) < SKEW_WARN_S:
        return Check(name="clock", level="ok", text="agrees with the registries")
    level: Level = "fail" if abs(skew) >= SKEW_FAIL_S else "warn"
    return Check(
        name="clock", level=level, text=text, hint="set the time (timedatectl): tokens and certificates need it"
    )


def check_peers(alive: int, bootstrap: int, *, mdns: bool) -> Check:
    if alive:
        return Check(name="peers", level="ok", text=f"{alive} alive in this site")
    if not bootstrap and not mdns:
        return Check(name="peers", level="ok", text="none: a node of its own, by its configuration")
    where = f"{bootstrap} bootstrap addresses" if bootstrap else "mDNS"
    if bootstrap and mdns:
        where += " and mDNS"
    hint = "do they run, share the cluster key and the site, and let peers.listen and peers.bulk through?"
    return Check(name="peers", level="fail" if bootstrap else "warn", text=f"none found by {where}", hint=hint)


def check_quarantine(quarantined: Mapping[str, str]) -> Check:
    if not quarantined:
        return Check(name="quarantine", level="ok", text="no peer")
    text = "; ".join(f"{name}: {reason}" for name, reason in quarantined.items())
    return Check(name="quarantine", level="fail", text=text, hint="look at these nodes' disks and memory: wrong bytes")


def check_bulk(unreachable: Sequence[str]) -> Check:
    if not unreachable:
        return Check(name="bulk port", level="ok", text="every alive peer is reached")
    hint = "is peers.bulk open in the firewall of these nodes?"
    return Check(name="bulk port", level="warn", text=f"not reached: {', '.join(unreachable)}", hint=hint)


def check_data_dir(path: Path, error: str) -> Check:
    if not error:
        return Check(name="data_dir", level="ok", text=f"{path} is writable")
    return Check(name="data_dir", level="fail", text=f"{path}: {error}", hint="nothing is cached; mind owner and mount")


def check_disk(free: int, total: int, floor: tuple[float, int]) -> Check:
    share, least = floor
    keep = max(int(total * share), least)
    text = f"{free / 2**30:.1f} GiB free, {keep / 2**30:.1f} GiB stay free (cache.min_free)"
    if free > keep:
        return Check(name="disk space", level="ok", text=text)
    return Check(name="disk space", level="warn", text=text, hint="the cache shrinks and takes nothing new: free some")


# From outside


def check_mirror(address: str, status_code: int | None, error: str) -> Check:
    if status_code == 200:
        return Check(name="mirror", level="ok", text=f"http://{address}/v2/ answers")
    text = error or f"http://{address}/v2/ answers {status_code}"
    return Check(name="mirror", level="fail", text=text, hint="journalctl -u p2pd tells why; is mirror.listen taken?")


def check_hosts(unconfigured: Sequence[str], configured: Sequence[str], problem: str = "") -> Check:
    """Which registries' hosts.toml name the mirror."""
    if problem:
        return Check(name="containerd", level="warn", text=problem)
    if not unconfigured:
        return Check(name="containerd", level="ok", text=f"pulls {', '.join(configured)} through the mirror")
    text = f"does not pull {', '.join(unconfigured)} through the mirror"
    return Check(name="containerd", level="warn", text=text, hint="p2pctl containerd install")


# Facts


def http_status(address: str) -> tuple[int | None, str]:
    """The status of http://address/v2/, or None and why there is none. Blocks."""
    try:
        response = httpx.get(f"http://{address}/v2/", timeout=PROBE_S, trust_env=False)
    except httpx.HTTPError as error:
        return None, f"http://{address}/v2/: {error}"
    return response.status_code, ""


def clock_skew(date: str | None, now: float) -> float | None:
    """Seconds that `now` (Unix time) is ahead of an HTTP Date header; None where that is missing or malformed."""
    if not date:
        return None
    try:
        told = parsedate_to_datetime(date)
    except ValueError:
        return None
    return now - (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()


async def probe_upstream(client: httpx.AsyncClient, url: str) -> Probe:
    """Any answer will do: 401 is how most registries greet."""
    with trio.move_on_after(PROBE_S):
        try:
            async with client.stream("GET", f"{url.rstrip('/')}/v2/") as response:
                error = f"answers {response.status_code}" if response.status_code >= 500 else ""
                return Probe(error, clock_skew(response.headers.get("date"), datetime.now(UTC).timestamp()))
        except httpx.HTTPError as error:
            return Probe(f"{type(error).__name__}: {error}")
    return Probe(f"no answer within {PROBE_S:.0f} s")


async def probe_upstreams(client: httpx.AsyncClient, urls: Mapping[str, str]) -> dict[str, Probe]:
    """All at once. `urls` by name; one result for each, in the same order."""
    probes: dict[str, Probe] = {}

    async def probe(name: str, url: str) -> None:
        probes[name] = await probe_upstream(client, url)

    async with trio.open_nursery() as nursery:
        for name, url in urls.items():
            nursery.start_soon(probe, name, url)
    return {name: probes[name] for name in urls}


def writable_error(path: Path) -> str:
    """Why no file can be made in a folder; empty where it can. Blocks: call it in a thread."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"p2pd")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def disk_space(path: Path) -> tuple[int, int]:
    """Free (to this user) and total bytes of the file system under `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

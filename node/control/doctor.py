"""What may be wrong with a node: facts are gathered by the few functions with I/O, and judged by pure ones.

The daemon tells what only it knows (`examine`); p2pctl adds what is seen from outside (`check_socket`, `check_mirror`,
`check_hosts`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import trio

from node.api.documents import Check, DoctorReport, Level
from node.config.quantities import Floor
from node.config.schema import Config
from node.identity import identity
from node.identity.certificates import ENDLESS, Validity, validity_of
from node.identity.credentials import authority_and_join
from node.identity.revocations import FILE_NAME as REVOCATIONS
from node.identity.revocations import Revocations
from node.identity.verifier import LEEWAY_S, Verifier
from node.membership.renewal import LOOK_EVERY_S, due_at
from protocol.admission import date
from protocol.errors import BadInputError

PROBE_S = 5.0
"""For one registry to say anything at all."""
SKEW_WARN_S = 30.0
SKEW_FAIL_S = 300.0
"""Registry tokens live 5 minutes: with a larger skew they are expired, or not yet valid, when they come."""
RENEWED_WITHIN_S = 2 * LOOK_EVERY_S
"""Of the time from which on it is due: one that takes longer is worth a word."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of asking a registry for /v2/. `error` is empty where it answered; `skew_s` is our clock less its."""

    error: str = ""
    skew_s: float | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """The certificate that this node shows, or would if p2pd ran. `problem` is what the next start stumbles over."""

    validity: Validity = ENDLESS
    revoked: bool = False
    problem: str = ""
    runs: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """`now` is Unix time; names are those of members.

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
    floor: Floor
    certificate: Shown
    now: float
    mirrors: Mapping[str, Probe] = field(default_factory=dict)
    spent: Sequence[str] = ()
    extra: Sequence[Check] = field(default=())


def examine(facts: Facts) -> DoctorReport:
    checks = [
        *(check_upstream(name, probe) for name, probe in facts.upstreams.items()),
        *(check_upstream_mirror(name, probe) for name, probe in facts.mirrors.items()),
        *(check_spent(name) for name in facts.spent),
        check_clock({**facts.upstreams, **facts.mirrors}),
        check_certificate(facts.certificate, facts.now),
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


def check_certificate(shown: Shown, now: float) -> Check:
    """As the members judge it (docs/PROTOCOL.md, "Identity and certificates"), and before they do."""
    name, end = "certificate", shown.validity.end
    if shown.problem:
        hint = "p2pd goes on as it started; at its next start this counts" if shown.runs else "p2pd does not start so"
        return Check(name=name, level="fail", text=shown.problem, hint=hint)
    if shown.revoked:
        hint = "for good: for a new identity remove identity.key and joined.json in the data folder, then p2pctl join"
        return Check(name=name, level="fail", text="revoked: no member lets this node in", hint=hint)
    if end is None:
        return Check(name=name, level="ok", text="without end")
    return _check_end(shown, end, now)


def _check_end(shown: Shown, end: int, now: float) -> Check:
    name, start, due = "certificate", shown.validity.start, due_at(shown.validity)
    if now > end + LEEWAY_S:
        hint = "p2pctl join with a new token, if the clock here is right"
        return Check(name=name, level="fail", text=f"expired at {date(end)}: no member lets this node in", hint=hint)
    if now < start - SKEW_WARN_S:
        hint = "members take it all the same; set the time (timedatectl), or it is renewed too late"
        return Check(name=name, level="warn", text=f"not valid before {date(start)}: the clock is behind", hint=hint)
    if now < due + (RENEWED_WITHIN_S if shown.runs else 0):
        return Check(name=name, level="ok", text=f"until {date(end)}, renewed from {date(due)} on")
    text = f"ends at {date(end)}" if now <= end else f"expired at {date(end)}, taken until {date(end + LEEWAY_S)}"
    text += f"; members are asked for another since {date(due)}" if shown.runs else "; it is due to be renewed"
    hint = "start a member that holds the cluster's key, or p2pctl join" if shown.runs else "start p2pd: it renews it"
    return Check(name=name, level="warn" if now <= end else "fail", text=text, hint=hint)


def check_peers(alive: int, bootstrap: int, *, mdns: bool) -> Check:
    if alive:
        return Check(name="peers", level="ok", text=f"{alive} alive in this site")
    if not bootstrap and not mdns:
        return Check(name="peers", level="ok", text="none: a node of its own, by its configuration")
    where = f"{bootstrap} bootstrap addresses" if bootstrap else "mDNS"
    if bootstrap and mdns:
        where += " and mDNS"
    hint = "do they run, share cluster key and site, let peers.listen and peers.bulk through, and not revoke this?"
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


def check_disk(free: int, total: int, floor: Floor) -> Check:
    keep = floor.of(total)
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


def certificate_in_files(config: Config) -> Shown:
    """What p2pd would show; it makes no file. Blocks."""
    data_dir = Path(config.node.data_dir)
    try:
        own = identity.load(data_dir)
        authority, joined = authority_and_join(config, data_dir, own)
    except FileNotFoundError:
        return Shown(runs=False)
    except BadInputError as error:
        return Shown(problem=str(error), runs=False)
    if authority is not None or joined is None:
        return Shown(runs=False)
    revocations = Revocations(data_dir / REVOCATIONS, joined.authority)
    return Shown(validity_of(joined.certificate), own.peer_id in revocations, runs=False)


def certificate_shown(config: Config, admission: Verifier, revoked: Container[str]) -> Shown:
    """What p2pd shows as it runs, and what it would find in its files at its next start. Blocks."""
    problem = ""
    try:
        _, joined = authority_and_join(config, Path(config.node.data_dir), admission.identity)
        if joined is not None and joined.authority != admission.authority:
            problem = "joined another cluster since p2pd started: restart it"
    except BadInputError as error:
        problem = str(error)
    return Shown(validity_of(admission.certificate), admission.identity.peer_id in revoked, problem)


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

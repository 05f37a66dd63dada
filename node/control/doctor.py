"""Diagnosis of a node: a few functions with I/O gather facts, and pure functions judge them.

The daemon judges the facts that only it has (`examine`); p2pctl adds the checks that need no daemon (`check_mirror`,
`check_hosts`, `check_certificate`). Every finding that is not ok has a hint with its remedy.
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

from node.api.documents import Check, DoctorReport, Level
from node.config.quantities import Floor
from node.config.schema import Config
from node.identity import identity
from node.identity.certificates import ENDLESS, Validity, validity_of
from node.identity.credentials import authority_and_join
from node.identity.revocations import FILE_NAME as REVOCATIONS
from node.identity.revocations import Revocations
from node.identity.verifier import LEEWAY_S
from node.membership.renewal import LOOK_EVERY_S, due_at
from node.stages import Admitted
from protocol.admission import date
from protocol.errors import BadInputError

PROBE_S = 5.0
"""Longest wait for the answer of a registry, or of the mirror."""
SKEW_WARN_S = 30.0
SKEW_FAIL_S = 300.0
"""Registry tokens live 5 minutes: with a larger skew they arrive expired or not yet valid."""
RENEWED_WITHIN_S = 2 * LOOK_EVERY_S
"""Time that a due renewal normally takes; a longer one is reported."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of GET /v2/. `error` is empty if the registry answered; `skew_s` is our clock minus its clock."""

    error: str = ""
    skew_s: float | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """The certificate that this node shows, or would show if p2pd ran. `problem` makes the next start fail."""

    validity: Validity = ENDLESS
    revoked: bool = False
    problem: str = ""
    runs: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """Names of peers are their node names; `now` is Unix time.

    `upstreams` has the registries by name; `mirrors` has the URLs that are asked before them, by `NAME by URL`. `spent`
    lists the upstreams whose daily bytes are used up.
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


def examine(facts: Facts) -> DoctorReport:
    mirrors, unreached = facts.mirrors.items(), ", ".join(facts.bulk_unreachable)
    unreached = unreached and f"not reached: {unreached}"
    quarantined = "; ".join(f"{name}: {reason}" for name, reason in facts.quarantined.items())
    unwritable = facts.data_dir_error and f"{facts.data_dir}: {facts.data_dir_error}"
    checks = (
        *(_check(f"upstream {name}", probe.error, ok="answers", hint=_DOWN) for name, probe in facts.upstreams.items()),
        *(_check(f"upstream {n}", probe.error, ok="answers", level="warn", hint=_MIRROR) for n, probe in mirrors),
        *(_check(f"uplink {name}", "the day's bytes are used up", level="warn", hint=_SPENT) for name in facts.spent),
        check_clock({**facts.upstreams, **facts.mirrors}),
        check_certificate(facts.certificate, facts.now),
        check_peers(facts.alive, facts.bootstrap, mdns=facts.mdns),
        _check("quarantine", quarantined, ok="no peer", hint=_QUARANTINED),
        _check("bulk port", unreached, ok="every live peer is reached", level="warn", hint=_UNREACHED),
        _check("data_dir", unwritable, ok=f"{facts.data_dir} is writable", hint=_UNWRITABLE),
        check_disk(facts.free_bytes, facts.floor.of(facts.total_bytes)),
    )
    return DoctorReport(checks=checks)


_DOWN = "blocks held by the site are still served; check the network, the proxy and [[upstream]] url"
_MIRROR = "the next [[upstream]] url is asked instead; check this one"
_SPENT = "blocks held by the site are still served; raise daily of the [[upstream]], or wait for tomorrow or its hours"
_QUARANTINED = "check the disks and memory of these nodes: they sent wrong bytes"
_UNREACHED = "open the port of peers.bulk in the firewall of these nodes"
_UNWRITABLE = "nothing is cached until p2pd can write there: check the folder's owner and its mount"


def _check(name: str, problem: str, *, ok: str = "", level: Level = "fail", hint: str) -> Check:
    """`problem` with its level and hint, or `ok` if there is no problem."""
    if not problem:
        return Check(name=name, level="ok", text=ok)
    return Check(name=name, level=level, text=problem, hint=hint)


def check_clock(probes: Mapping[str, Probe]) -> Check:
    """The smallest skew counts, because the clock of one registry may be wrong."""
    skews = [probe.skew_s for probe in probes.values() if probe.skew_s is not None]
    if not skews:
        text, hint = "not compared: no registry answered with a date", "run p2pctl doctor again when a registry answers"
        return Check(name="clock", level="warn", text=text, hint=hint)
    skew = min(skews, key=abs)
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the registries"
    problem = text if abs(skew) >= SKEW_WARN_S else ""
    level: Level = "fail" if abs(skew) >= SKEW_FAIL_S else "warn"
    hint = "set the time (timedatectl): tokens and certificates need it"
    return _check("clock", problem, ok="agrees with the registries", level=level, hint=hint)


def check_certificate(shown: Shown, now: float) -> Check:
    """Judge the certificate as the members do (docs/PROTOCOL.md, "Identity and certificates"), and warn in time."""
    name, end = "certificate", shown.validity.end
    if shown.problem:
        hint = (
            "correct it before the next start of p2pd, which fails" if shown.runs else "correct it: p2pd does not start"
        )
        return Check(name=name, level="fail", text=shown.problem, hint=hint)
    if shown.revoked:
        hint = "permanent: for a new identity remove identity.key and joined.json in the data folder, then p2pctl join"
        return Check(name=name, level="fail", text="revoked: no member admits this node", hint=hint)
    if end is None:
        return Check(name=name, level="ok", text="does not expire")
    return _check_end(shown, end, now)


def _check_end(shown: Shown, end: int, now: float) -> Check:
    name, start, due = "certificate", shown.validity.start, due_at(shown.validity)
    if now > end + LEEWAY_S:
        hint = "check the clock; if it is right, p2pctl join with a new token"
        return Check(name=name, level="fail", text=f"expired at {date(end)}: no member admits this node", hint=hint)
    if now < start - SKEW_WARN_S:
        hint = "set the time (timedatectl): members accept the certificate, but it would be renewed too late"
        return Check(name=name, level="warn", text=f"not valid before {date(start)}: the clock is behind", hint=hint)
    if now < due + (RENEWED_WITHIN_S if shown.runs else 0):
        return Check(name=name, level="ok", text=f"valid until {date(end)}, renewed from {date(due)}")
    text = f"ends at {date(end)}" if now <= end else f"expired at {date(end)}, accepted until {date(end + LEEWAY_S)}"
    text += f"; renewal was due at {date(due)}, and no member has renewed it" if shown.runs else "; renewal is due"
    hint = (
        "start a member that holds the cluster's key, or p2pctl join" if shown.runs else "start p2pd, which renews it"
    )
    return Check(name=name, level="warn" if now <= end else "fail", text=text, hint=hint)


def check_peers(alive: int, bootstrap: int, *, mdns: bool) -> Check:
    if alive:
        return Check(name="peers", level="ok", text=f"{alive} alive in this site")
    if not bootstrap and not mdns:
        return Check(name="peers", level="ok", text="none, as configured: neither bootstrap nor mdns")
    where = " and ".join([f"{bootstrap} bootstrap addresses"] * bool(bootstrap) + ["mDNS"] * mdns)
    hint = "check that they are of this cluster and site, are reachable (peers.listen, peers.bulk), and admit this node"
    return Check(name="peers", level="fail" if bootstrap else "warn", text=f"none found by {where}", hint=hint)


def check_disk(free: int, keep: int) -> Check:
    text = f"{free / 2**30:.1f} GiB free, of which {keep / 2**30:.1f} GiB stay free (cache.min_free)"
    problem = "" if free > keep else text
    hint = "the cache shrinks and stores nothing new: free some space"
    return _check("disk space", problem, ok=text, level="warn", hint=hint)


def check_mirror(address: str, status_code: int | None, error: str) -> Check:
    problem = "" if status_code == 200 else error or f"http://{address}/v2/ answers {status_code}"
    hint = "look for the cause with journalctl -u p2pd; another program may use mirror.listen"
    return _check("mirror", problem, ok=f"http://{address}/v2/ answers", hint=hint)


def check_hosts(unconfigured: Sequence[str], configured: Sequence[str], problem: str = "") -> Check:
    """Registries whose hosts.toml names the mirror are `configured`; `problem` is the error of a malformed file."""
    hint = "correct the file, then p2pctl containerd install" if problem else "p2pctl containerd install"
    if unconfigured and not problem:
        problem = f"does not pull {', '.join(unconfigured)} through the mirror"
    ok = f"pulls {', '.join(configured)} through the mirror"
    return _check("containerd", problem, ok=ok, level="warn", hint=hint)


def certificate_in_files(config: Config) -> Shown:
    """The certificate that p2pd would show after a start. Creates no file. Blocks."""
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


def certificate_shown(config: Config, admitted: Admitted) -> Shown:
    """The certificate that p2pd shows now, and the problem that its next start would have. Blocks."""
    problem, verifier = "", admitted.verifier.credentials
    try:
        _, joined = authority_and_join(config, Path(config.node.data_dir), admitted.identity)
        if joined is not None and joined.authority != verifier.authority:
            problem = "joined another cluster since p2pd started: restart p2pd"
    except BadInputError as error:
        problem = str(error)
    revoked = admitted.identity.peer_id in admitted.revocations
    return Shown(validity_of(verifier.certificate), revoked, problem)


def http_status(address: str) -> tuple[int | None, str]:
    """The status of http://address/v2/, or None and the error. Blocks."""
    try:
        response = httpx.get(f"http://{address}/v2/", timeout=PROBE_S, trust_env=False)
    except httpx.HTTPError as error:
        return None, f"http://{address}/v2/: {error}"
    return response.status_code, ""


def clock_skew(date: str | None, now: float) -> float | None:
    """Seconds that `now` (Unix time) is ahead of an HTTP Date header; None if that is missing or malformed."""
    if not date:
        return None
    try:
        sent = parsedate_to_datetime(date)
    except ValueError:
        return None
    return now - (sent if sent.tzinfo else sent.replace(tzinfo=UTC)).timestamp()


async def probe_upstream(client: httpx.AsyncClient, url: str) -> Probe:
    """Any status below 500 counts as an answer: most registries answer 401."""
    with trio.move_on_after(PROBE_S):
        try:
            async with client.stream("GET", f"{url.rstrip('/')}/v2/") as response:
                error = f"answers {response.status_code}" if response.status_code >= 500 else ""
                return Probe(error, clock_skew(response.headers.get("date"), datetime.now(UTC).timestamp()))
        except httpx.HTTPError as error:
            return Probe(f"{type(error).__name__}: {error}")
    return Probe(f"no answer within {PROBE_S:.0f} s")


async def probe_upstreams(client: httpx.AsyncClient, urls: Mapping[str, str]) -> dict[str, Probe]:
    """Probe all URLs at once. The results have the names and the order of `urls`."""
    probes: dict[str, Probe] = {}

    async def probe(name: str, url: str) -> None:
        probes[name] = await probe_upstream(client, url)

    async with trio.open_nursery() as nursery:
        for name, url in urls.items():
            nursery.start_soon(probe, name, url)
    return {name: probes[name] for name in urls}


def writable_error(path: Path) -> str:
    """The error of creating a file in a folder; empty if it works. Blocks: call it in a thread."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"p2pd")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def disk_space(path: Path) -> tuple[int, int]:
    """Free (to this user) and total bytes of the file system under `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

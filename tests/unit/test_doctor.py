"""The doctor's verdicts, and the facts that it gathers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from node.config.quantities import Floor
from node.config.schema import ClusterPart, Config, NodePart
from node.control import doctor
from node.control.doctor import (
    Facts,
    Probe,
    Shown,
    certificate_in_files,
    certificate_shown,
    check_certificate,
    clock_skew,
    disk_space,
    examine,
    http_status,
    probe_upstreams,
    writable_error,
)
from node.identity.certificates import (
    ENDLESS,
    Authority,
    Credentials,
    Subject,
    Validity,
    create_authority,
    issue,
    load_authority,
)
from node.identity.credentials import Joined, save_joined
from node.identity.identity import load_or_create
from node.identity.revocations import FILE_NAME as REVOCATIONS
from node.identity.revocations import Revocations
from node.identity.verifier import Verifier
from protocol.admission import make_revocation

DAY = 86400
GOOD = Facts(
    upstreams={"docker.io": Probe("", 0.5)},
    alive=3,
    bootstrap=1,
    mdns=True,
    quarantined={},
    bulk_unreachable=(),
    data_dir=Path("/data"),
    data_dir_error="",
    free_bytes=50 << 30,
    total_bytes=100 << 30,
    floor=Floor("5%"),
    certificate=Shown(Validity(0, 90 * DAY)),
    now=DAY,
)


def levels(facts: Facts) -> dict[str, str]:
    return {check.name: check.level for check in examine(facts).checks}


def test_a_healthy_node_passes_all_checks() -> None:
    assert set(levels(GOOD).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"upstreams": {"docker.io": Probe("refused")}}, "upstream docker.io", "fail"),
        ({"upstreams": {"docker.io": Probe("refused")}}, "clock", "warn"),
        ({"mirrors": {"docker.io by https://m": Probe("refused")}}, "upstream docker.io by https://m", "warn"),
        ({"upstreams": {"docker.io": Probe("", -31.0)}}, "clock", "warn"),
        ({"upstreams": {"docker.io": Probe("", 301.0)}}, "clock", "fail"),
        ({"upstreams": {"a": Probe("", 301.0), "b": Probe("", 1.0)}}, "clock", "ok"),
        ({"alive": 0}, "peers", "fail"),
        ({"alive": 0, "bootstrap": 0}, "peers", "warn"),
        ({"alive": 0, "bootstrap": 0, "mdns": False}, "peers", "ok"),
        ({"quarantined": {"edge-2": "false record"}}, "quarantine", "fail"),
        ({"bulk_unreachable": ("edge-3",)}, "bulk port", "warn"),
        ({"data_dir_error": "read-only"}, "data_dir", "fail"),
        ({"free_bytes": 5 << 30}, "disk space", "warn"),
        ({"free_bytes": 5 << 30, "floor": Floor("1GiB")}, "disk space", "ok"),
        ({"certificate": Shown()}, "certificate", "ok"),
        ({"now": -20.0}, "certificate", "ok"),
        ({"now": -31.0}, "certificate", "warn"),
        ({"now": 60 * DAY + 1199.0}, "certificate", "ok"),
        ({"now": 60 * DAY + 1200.0}, "certificate", "warn"),
        ({"now": 90 * DAY + 1.0}, "certificate", "fail"),
        ({"now": 91 * DAY + 1.0}, "certificate", "fail"),
        ({"certificate": Shown(Validity(0, 90 * DAY), revoked=True)}, "certificate", "fail"),
        ({"certificate": Shown(problem="of another cluster")}, "certificate", "fail"),
    ],
)
def test_each_problem_is_reported_with_a_remedy(change: dict[str, object], name: str, level: str) -> None:
    facts = replace(GOOD, **change)  # type: ignore[arg-type]
    assert levels(facts)[name] == level
    (check,) = [check for check in examine(facts).checks if check.name == name]
    assert bool(check.hint) == (level != "ok")


@pytest.mark.parametrize(
    ("day", "runs", "text", "hint"),
    [
        (-1, True, "not valid before 1970-01-01 00:00 UTC: the clock is behind", "set the time"),
        (59, False, "valid until 1970-04-01 00:00 UTC, renewed from 1970-03-02 00:00 UTC", ""),
        (
            61,
            True,
            "ends at 1970-04-01 00:00 UTC; renewal was due at 1970-03-02",
            "holds the cluster's",
        ),
        (61, False, "ends at 1970-04-01 00:00 UTC; renewal is due", "start p2pd"),
        (90.5, True, "expired at 1970-04-01 00:00 UTC, accepted until 1970-04-02 00:00 UTC; renewal", "p2pctl join"),
        (92, True, "expired at 1970-04-01 00:00 UTC: no member admits this node", "p2pctl join"),
    ],
)
def test_the_report_on_a_certificate_that_ends(day: float, runs: bool, text: str, hint: str) -> None:
    check = check_certificate(Shown(Validity(0, 90 * DAY), runs=runs), day * DAY)
    assert check.text.startswith(text)
    assert hint in check.hint


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    create_authority(tmp_path / "cluster.key")
    return load_authority(tmp_path / "cluster.key")


def join(config: Config, authority: Authority, validity: Validity) -> Verifier:
    data_dir = Path(config.node.data_dir)
    own = load_or_create(data_dir)
    certificate = issue(authority, Subject(own.peer_id, "edge-1", "harbour"), validity)
    save_joined(data_dir, Joined(certificate=certificate, authority=authority.der))
    return Verifier(Credentials(own, certificate, authority.der))


def test_the_certificate_of_a_node_that_does_not_run(tmp_path: Path, authority: Authority) -> None:
    config = Config(node=NodePart(data_dir=str(tmp_path / "data")))
    assert certificate_in_files(config) == Shown(runs=False)
    assert not (tmp_path / "data").exists()

    own = join(config, authority, Validity(0, DAY)).credentials.identity.peer_id
    assert certificate_in_files(config) == Shown(Validity(0, DAY), runs=False)
    revocation = make_revocation(authority.cluster, own, 1, authority.key.sign)
    Revocations(tmp_path / "data" / REVOCATIONS, authority.der).add([revocation])
    assert certificate_in_files(config).revoked

    same = Config(node=config.node, cluster=ClusterPart(key=str(tmp_path / "cluster.key")))
    assert certificate_in_files(same) == Shown(runs=False), "the node issues itself a certificate"
    create_authority(tmp_path / "other.key")
    other = Config(node=config.node, cluster=ClusterPart(key=str(tmp_path / "other.key")))
    assert "is of the cluster" in certificate_in_files(other).problem
    (tmp_path / "data" / "joined.json").write_text("{")
    assert "remove it and join again" in certificate_in_files(config).problem


def test_the_certificate_of_a_node_that_runs(tmp_path: Path, authority: Authority) -> None:
    config = Config(node=NodePart(data_dir=str(tmp_path / "data")))
    verifier = join(config, authority, Validity(0, DAY))
    admitted: Any = SimpleNamespace(identity=verifier.credentials.identity, verifier=verifier, revocations=())
    assert certificate_shown(config, admitted) == Shown(Validity(0, DAY))
    revoked: Any = SimpleNamespace(
        identity=verifier.credentials.identity, verifier=verifier, revocations={verifier.credentials.identity.peer_id}
    )
    assert certificate_shown(config, revoked).revoked
    create_authority(tmp_path / "other.key")
    join(config, load_authority(tmp_path / "other.key"), ENDLESS)
    assert "restart" in certificate_shown(config, admitted).problem
    (tmp_path / "data" / "joined.json").write_text("{")
    assert "remove it and join again" in certificate_shown(config, admitted).problem


def test_clock_skew() -> None:
    date = "Thu, 01 Jan 1970 00:01:40 GMT"
    assert clock_skew(date, 130.0) == 30.0
    assert clock_skew(date.replace("GMT", "-0000"), 130.0) == 30.0
    assert clock_skew(None, 1.0) is None
    assert clock_skew("nonsense", 1.0) is None


def test_probes_of_registries() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "slow":
            await trio.sleep_forever()
        if request.url.host == "down":
            raise httpx.ConnectError("refused", request=request)
        status = {"greets": 401, "broken": 503}[request.url.host]
        return httpx.Response(status, headers={"date": "Thu, 01 Jan 1970 00:01:40 GMT"})

    async def main() -> dict[str, Probe]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            names = ("slow", "greets", "down", "broken")
            return await probe_upstreams(client, {name: f"http://{name}/" for name in names})

    probes = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert list(probes) == ["slow", "greets", "down", "broken"]
    assert probes["greets"].error == ""
    assert probes["greets"].skew_s is not None
    assert probes["greets"].skew_s > 1e9
    assert probes["slow"].error == f"no answer within {doctor.PROBE_S:.0f} s"
    assert probes["down"].error == "ConnectError: refused"
    assert probes["broken"].error == "answers 503"


def test_facts_of_this_machine(tmp_path: Path) -> None:
    assert writable_error(tmp_path) == ""
    assert writable_error(tmp_path / "none") == "No such file or directory"
    assert list(tmp_path.iterdir()) == []
    free, total = disk_space(tmp_path)
    assert 0 <= free <= total
    assert http_status("127.0.0.1:1")[0] is None

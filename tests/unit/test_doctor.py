"""The doctor's judgements, and the few facts that it gathers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from node import doctor
from node.doctor import Facts, Probe, clock_skew, disk_space, examine, http_status, probe_upstreams, writable_error

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
    floor=(0.05, 0),
)


def levels(facts: Facts) -> dict[str, str]:
    return {check.name: check.level for check in examine(facts).checks}


def test_all_is_well() -> None:
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
        ({"free_bytes": 5 << 30, "floor": (0.0, 1 << 30)}, "disk space", "ok"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(change: dict[str, object], name: str, level: str) -> None:
    facts = replace(GOOD, **change)  # type: ignore[arg-type]
    assert levels(facts)[name] == level
    (check,) = [check for check in examine(facts).checks if check.name == name]
    assert bool(check.hint) == (level != "ok" and "not compared" not in check.text)


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

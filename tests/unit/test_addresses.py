"""Addresses: those that are accepted, those that are announced, and those at which peers were seen."""

import ifaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config.quantities import HostPort
from node.membership import addresses
from node.membership.addresses import Target, bulk_addresses, concrete_hosts, parse_listen, parse_target, with_observed
from protocol.errors import BadInputError
from protocol.ids import PeerId
from protocol.members import MAX_ADDRESSES, Member
from protocol.records import peer_id_of

PEER = peer_id_of(bytes(32))


@pytest.mark.parametrize(
    ("text", "host"),
    [("ip4/10.0.0.5", "10.0.0.5"), ("ip6/fd00::5", "fd00::5"), ("dns4/a.example", "a.example"), ("dns/b", "b")],
)
def test_targets(text: str, host: str) -> None:
    assert parse_target(f"/{text}/tcp/4501/p2p/{PEER}") == Target(PEER, host, 4501)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bad",
        "10.0.0.5:4501",
        "/ip4/10.0.0.5/tcp/4501",
        f"/p2p/{PEER}",
        f"/ip4/10.0.0.5/udp/4501/p2p/{PEER}",
        f"/ip4/10.0.0.5/udp/4501/quic-v1/p2p/{PEER}",
        f"/ip4/10.0.0.5/tcp/4501/ws/p2p/{PEER}",
        f"/ip4/10.0.0.5/tcp/65536/p2p/{PEER}",
        f"/ip4/10.0.0.256/tcp/4501/p2p/{PEER}",
        "/ip4/10.0.0.5/tcp/4501/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        f"/dnsaddr/a.example/p2p/{PEER}",
    ],
)
def test_a_malformed_target_is_named(text: str) -> None:
    with pytest.raises(BadInputError, match=f'"{text}"'):
        parse_target(text)


@given(st.text(max_size=80))
def test_any_text_is_a_target_or_bad_input(text: str) -> None:
    for parse in (parse_target, parse_listen):
        with pytest.raises(BadInputError):
            parse(text)


def test_listen_addresses() -> None:
    assert parse_listen("/ip4/0.0.0.0/tcp/4501") == HostPort("0.0.0.0", 4501)
    assert parse_listen("/ip6/::/tcp/0") == HostPort("::", 0)
    for text in ("/dns4/x/tcp/1", "/ip4/0.0.0.0/udp/1", f"/ip4/0.0.0.0/tcp/1/p2p/{PEER}"):
        with pytest.raises(BadInputError):
            parse_listen(text)


def test_a_concrete_address_is_announced_unchanged() -> None:
    assert bulk_addresses(HostPort("10.1.2.3", 4502)) == ("10.1.2.3:4502",)
    assert bulk_addresses(HostPort("fd00::1", 4502)) == ("[fd00::1]:4502",)
    assert bulk_addresses(HostPort("edge-1.local", 4502)) == ("edge-1.local:4502",)


def interfaces(monkeypatch: pytest.MonkeyPatch, addresses_by_name: list[tuple[str, str]]) -> None:
    def adapter(name: str, text: str) -> ifaddr.Adapter:
        ip = (text, 0, 0) if ":" in text else text
        return ifaddr.Adapter(name, name, [ifaddr.IP(ip, 24, name)])

    monkeypatch.setattr(
        addresses.ifaddr, "get_adapters", lambda: [adapter(name, text) for name, text in addresses_by_name]
    )


def test_the_unspecified_address_stands_for_the_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    host = [
        ("lo", "127.0.0.1"),
        ("docker0", "172.17.0.1"),
        ("eth0", "10.0.0.5"),
        ("eth0", "fd00::5"),
        ("eth0", "fe80::1"),
        ("eth1", "169.254.0.9"),
    ]
    interfaces(monkeypatch, host)
    assert concrete_hosts("0.0.0.0") == ("10.0.0.5", "172.17.0.1")
    assert concrete_hosts("::") == ("fd00::5",)


def test_loopback_is_announced_if_there_is_no_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, [("lo", "127.0.0.1")])
    assert concrete_hosts("0.0.0.0") == ("127.0.0.1",)


def test_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, [(f"eth{n}", f"10.0.{n}.1") for n in range(40)])
    assert len(concrete_hosts("0.0.0.0")) == MAX_ADDRESSES


def test_this_machine_has_an_address() -> None:
    assert bulk_addresses(HostPort("0.0.0.0", 1))


@pytest.mark.parametrize(
    ("claimed", "seen", "expected"),
    [
        (("10.0.0.5:4502",), "192.168.1.5", ("192.168.1.5:4502", "10.0.0.5:4502")),
        (("10.0.0.5:4502",), "10.0.0.5", ("10.0.0.5:4502",)),
        (("10.0.0.5:4502", "192.168.1.5:4502"), "192.168.1.5", ("10.0.0.5:4502", "192.168.1.5:4502")),
        (("10.0.0.5:4502",), "::ffff:192.168.1.5", ("192.168.1.5:4502", "10.0.0.5:4502")),
        (("10.0.0.5:4502",), "fd00::7", ("[fd00::7]:4502", "10.0.0.5:4502")),
        (("10.0.0.5:4502",), "127.0.0.1", ("10.0.0.5:4502",)),
        (("10.0.0.5:4502",), "fe80::7", ("10.0.0.5:4502",)),
        (("10.0.0.5:4502",), "fe80::7%eth0", ("10.0.0.5:4502",)),
        (("nonsense",), "192.168.1.5", ("nonsense",)),
        ((), "192.168.1.5", ()),
    ],
)
def test_the_observed_address_comes_first(claimed: tuple[str, ...], seen: str, expected: tuple[str, ...]) -> None:
    assert with_observed(Member(PeerId("p"), "n", "s", claimed), seen).addresses == expected


def test_observing_keeps_the_bound() -> None:
    claimed = tuple(f"10.0.{n}.1:1" for n in range(MAX_ADDRESSES))
    seen = with_observed(Member(PeerId("p"), "n", "s", claimed), "192.168.1.5").addresses
    assert seen == ("192.168.1.5:1", *claimed[:-1])

"""Where a registry may lead: redirects and token services at addresses that are not public."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.config.schema import UpstreamPart, config_of
from node.registry.reach import Reach, UnreachableHostError, class_of
from node.registry.transport import MAX_REDIRECT_BODY, MAX_REDIRECTS, DirectTransport
from node.registry.upstreams import Upstreams
from node.web.server import Request, Response
from protocol.errors import BadInputError, ShoalError, UnavailableError
from tests.support.fake_registry import MANIFEST_REF, MANIFESTS, FakeRegistry, serve

OWN = "registry.example"


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1", "public"),
        ("127.8.9.1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("::1", "loopback"),
        ("::", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("2002:7f00:1::", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("fec0::1", "private"),
        ("224.0.0.251", "multicast"),
        ("ff02::fb", "multicast"),
        ("255.255.255.255", "private"),
        ("240.0.0.1", "private"),
    ],
)
def test_addresses_have_the_class_of_their_network(address: str, kind: str) -> None:
    assert class_of(ip_address(address)) == kind


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_only_public_addresses_and_those_like_the_registrys_own_are_reached(
    own: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address
) -> None:
    """S-62"""
    reach = Reach(UpstreamPart(name="x", url=f"https://{OWN}"))
    reach.connected(OWN, str(own))
    if class_of(other) in ("public", class_of(own)):
        reach.check("cdn.example", [str(other)])
    else:
        with pytest.raises(UnreachableHostError, match=r"cdn\.example.*redirects"):
            reach.check("cdn.example", [str(other)])


@pytest.mark.parametrize(
    ("entry", "host", "address", "allowed"),
    [
        ("10.0.0.0/8", "cdn.example", "10.1.1.1", True),
        ("10.0.0.0/8", "cdn.example", "192.168.1.1", False),
        ("10.0.0.0/8", "cdn.example", "fd00::1", False),
        ("fd00::/8", "cdn.example", "fd00::1", True),
        ("cdn.example", "CDN.example", "127.0.0.1", True),
        ("cdn.example", "evil-cdn.example", "127.0.0.1", False),
        ("*.example", "cdn.example", "127.0.0.1", True),
        ("*.example", "example", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", "::1", True),
    ],
)
def test_the_setting_allows_names_suffixes_and_networks(entry: str, host: str, address: str, allowed: bool) -> None:
    document = {"upstream": [{"name": "x", "url": f"https://{OWN}", "redirects": [entry]}]}
    reach = Reach(config_of(document).upstream[0])
    if allowed:
        reach.check(host, [address])
    else:
        with pytest.raises(UnreachableHostError):
            reach.check(host, [address])


@pytest.mark.parametrize("entry", ["", "https://cdn.example", "10.0.0.1/8", "*", "a b", "cdn.example/x", "*.*.example"])
def test_a_malformed_entry_is_an_error_that_names_it(entry: str) -> None:
    with pytest.raises(BadInputError, match="redirects"):
        config_of({"upstream": [{"name": "x", "url": f"https://{OWN}", "redirects": [entry]}]})


def run(check: Callable[[FakeRegistry, Upstreams], Awaitable[None]], **part: Any) -> None:
    registry = FakeRegistry()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            url = await serve(nursery, registry.handle)
            parts = [UpstreamPart(name="fake", url=url, **part)]
            async with Upstreams(parts, count=lambda name, count: None, rng=Random(1)) as upstreams:
                with trio.fail_after(60):
                    await check(registry, upstreams)
            nursery.cancel_scope.cancel()

    trio.run(main)


def leading_to(location: str, body: bytes = b"") -> Callable[[Request], Response]:
    return lambda request: Response(307, {"Location": location}, body)


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.7", "[fd00::7]", "[fe80::7]", "224.0.0.7", "0xA9FEA9FE"])
def test_a_manifest_is_not_read_from_a_private_address_to_which_the_registry_redirects(host: str) -> None:
    """S-62"""

    async def check(registry: FakeRegistry, upstreams: Upstreams) -> None:
        registry.answer_manifest = leading_to(f"http://{host}/secret?signature=hush")  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match=r'redirects of \[\[upstream\]\] "fake"') as caught:
            await upstreams.resolve(MANIFESTS, "latest")
        assert "hush" not in str(caught.value)
        assert len(registry.requests) == 1, "the answer is final"

    run(check)


def test_a_token_is_not_fetched_from_a_private_address_that_the_registry_names() -> None:
    """S-62"""

    async def check(registry: FakeRegistry, upstreams: Upstreams) -> None:
        challenge = Response(401, {"WWW-Authenticate": 'Bearer realm="http://169.254.169.254/token"'})
        registry.answer_manifest = lambda request: challenge  # type: ignore[method-assign]
        with pytest.raises(ShoalError, match="redirects"):
            await upstreams.resolve(MANIFESTS, "latest")

    run(check)


def test_a_redirect_to_an_address_like_the_registrys_own_is_followed_at_most_five_times() -> None:
    """S-62"""

    async def check(registry: FakeRegistry, upstreams: Upstreams) -> None:
        original, hops = FakeRegistry.answer_manifest, [0]

        def answer(request: Request) -> Response:
            if hops[0] == 0:
                return original(registry, request)
            hops[0] -= 1
            return Response(307, {"Location": request.path}, b"x" * (2 * MAX_REDIRECT_BODY * (hops[0] % 2)))

        registry.answer_manifest = answer  # type: ignore[method-assign]
        hops[0] = MAX_REDIRECTS
        assert (await upstreams.resolve(MANIFESTS, "latest"))[0].ref == MANIFEST_REF
        hops[0] = MAX_REDIRECTS + 1
        with pytest.raises(UnavailableError, match="too many redirects"):
            await upstreams.resolve(MANIFESTS, "latest")

    run(check)


def test_no_redirect_leads_from_https_to_http() -> None:
    """S-62"""
    reach = Reach(UpstreamPart(name="x", url=f"https://{OWN}"))
    with pytest.raises(UnreachableHostError, match=r"https to http, at cdn\.example"):
        reach.check_redirect(httpx.URL(f"https://{OWN}/a"), httpx.URL("http://cdn.example/?signature=hush"))
    reach.check_redirect(httpx.URL("http://a"), httpx.URL("http://b"))


class Rebinding(trio.abc.HostnameResolver):
    """The name of a hostile registry's host leads to a public address when it is looked up, and then to loopback."""

    def __init__(self) -> None:
        self.lookups = 0

    async def getaddrinfo(self, host: Any, port: Any, *arguments: Any, **keywords: Any) -> Any:
        self.lookups += 1
        address = "8.8.8.8" if self.lookups == 1 else "127.0.0.1"
        return [(trio.socket.AF_INET, trio.socket.SOCK_STREAM, 6, "", (address, int(port)))]

    async def getnameinfo(self, *_: Any) -> tuple[str, str]:
        raise AssertionError("not used")


def test_a_name_that_leads_elsewhere_at_the_connect_gets_no_request() -> None:
    """S-62"""
    received: list[bytes] = []

    async def main() -> None:
        async def serve_secret(stream: trio.SocketStream) -> None:
            received.append(bytes(await stream.receive_some()))

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        trio.socket.set_custom_hostname_resolver(Rebinding())
        reach = Reach(UpstreamPart(name="x", url=f"https://{OWN}"))
        transport = DirectTransport(ssl.create_default_context(), 2, reach)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve_secret, listeners)
            async with httpx.AsyncClient(transport=transport) as client:
                with pytest.raises(UnreachableHostError, match="loopback"):
                    await client.get(f"http://cdn.example:{port}/secret")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert received in ([], [b""])

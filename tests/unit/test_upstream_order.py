"""An upstream with several URLs: if a mirror does not serve an object, the next URL is asked. The last is final."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from node.config.schema import UpstreamPart
from node.oci.references import Grant, Locator
from node.registry.retry import Breaker
from node.registry.upstreams import Upstreams
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from tests.support.fake_registry import BLOB_REF, BLOBS, MANIFEST, MANIFEST_REF, MANIFESTS, FakeRegistry, cut, serve

REFUSED = "http://127.0.0.1:9"


class Fixture:
    """A mirror and the registry itself, each with its own requests and faults."""

    def __init__(
        self, upstreams: Upstreams, mirror: FakeRegistry, registry: FakeRegistry, public: list[Locator]
    ) -> None:
        self.upstreams, self.mirror, self.registry = upstreams, mirror, registry
        self.public = public

    async def read(self, locator: Locator = BLOBS, *, certain: bool = False) -> list[bytes]:
        async with aclosing(self.upstreams.blocks(locator, BLOB_REF, 0, 4, certain=certain)) as blocks:
            return [bytes(block) async for block in blocks]

    async def manifest(self, reference: str = "latest") -> bytes | None:
        return (await self.upstreams.resolve(MANIFESTS, reference, whole=True))[1]

    @property
    def asked(self) -> tuple[int, int]:
        return len(self.mirror.requests), len(self.registry.requests)


def run(check: Callable[[Fixture], Awaitable[None]], mirror_url: str = "", docker_config: str = "") -> None:
    async def main() -> None:
        mirror, registry = FakeRegistry(), FakeRegistry()
        async with trio.open_nursery() as nursery:
            urls = (mirror_url or await serve(nursery, mirror.handle), await serve(nursery, registry.handle))
            access = "node" if docker_config else "relay"
            part = UpstreamPart(name="fake", url=urls, access=access, docker_config=docker_config)
            public: list[Locator] = []
            async with Upstreams(
                [part], count=lambda name, size: None, rng=Random(1), public=public.append
            ) as upstreams:
                with trio.fail_after(60):
                    await check(Fixture(upstreams, mirror, registry, public))
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_first_is_asked_and_the_others_are_not() -> None:
    async def check(fixture: Fixture) -> None:
        assert await fixture.manifest() == MANIFEST
        assert await fixture.read() == cut(0, 4)
        assert fixture.asked == (2, 0)
        assert [endpoint.problem for endpoint in fixture.upstreams.endpoints("fake")] == ["", ""]
        received = [endpoint.received for endpoint in fixture.upstreams.endpoints("fake")]
        assert received == [BLOB_REF.size + len(MANIFEST), 0]
        assert await fixture.read(certain=True) == cut(0, 4)
        assert fixture.asked == (2, 1)

    run(check)


@pytest.mark.parametrize("fault", [401, 403, 404])
def test_objects_that_a_mirror_lacks_or_denies_come_from_the_registry(fault: int) -> None:
    async def check(fixture: Fixture) -> None:
        fixture.mirror.faults = [fault] * 3
        assert await fixture.manifest() == MANIFEST
        assert await fixture.read() == cut(0, 4)
        assert (await fixture.upstreams.passthrough(MANIFESTS, "tags/list", {})).body == b"{}"
        # For some seconds a registry that answered 401 is not asked again without a grant.
        assert fixture.asked == (1 if fault == 401 else 3, 3)
        assert [endpoint.problem for endpoint in fixture.upstreams.endpoints("fake")] == ["", ""], "it answers"

    run(check)


@pytest.mark.parametrize(
    ("fault", "error"), [(404, NotFoundError), (403, DeniedError), (500, UnavailableError), (501, UnavailableError)]
)
def test_the_answer_is_that_of_the_registry_itself(fault: int, error: type[Exception]) -> None:
    async def check(fixture: Fixture) -> None:
        fixture.mirror.faults = [404]
        fixture.registry.faults = [fault] * 5
        with pytest.raises(error):
            await fixture.manifest()

    run(check)


@pytest.mark.parametrize("fault", [500, 503, 429])
def test_a_failing_mirror_is_skipped_for_a_while(fault: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(Breaker, pause, 60.0)

    async def check(fixture: Fixture) -> None:
        fixture.mirror.faults, fixture.mirror.retry_after = [fault] * 20, "1"
        for _ in range(5):
            assert await fixture.manifest() == MANIFEST
        assert fixture.asked[0] <= 2
        mirror, registry = fixture.upstreams.endpoints("fake")
        assert str(fault) in mirror.problem
        assert 0 < mirror.retry_in_s <= 60
        assert registry.problem == ""

    run(check)


def test_a_mirror_that_is_down_costs_one_attempt() -> None:
    async def check(fixture: Fixture) -> None:
        assert await fixture.manifest() == MANIFEST
        assert await fixture.read() == cut(0, 4)
        assert "cannot be reached" in fixture.upstreams.endpoints("fake")[0].problem

    run(check, REFUSED)


def test_a_body_that_a_mirror_broke_off_continues_from_the_registry() -> None:
    async def check(fixture: Fixture) -> None:
        fixture.mirror.faults = ["breaks"] * 20
        assert await fixture.read() == cut(0, 4)
        (request,) = fixture.registry.requests
        assert request.headers["range"] != f"bytes=0-{BLOB_REF.size - 1}", "the bytes already received are kept"

    run(check)


def test_wrong_bytes_of_a_mirror_are_refused_if_a_digest_decides() -> None:
    """S-28"""

    async def check(fixture: Fixture) -> None:
        fixture.mirror.manifest = b"forged"
        assert await fixture.manifest(str(MANIFEST_REF.digest)) == MANIFEST
        assert fixture.asked == (1, 1)

    run(check)


def test_credentials_of_the_registry_are_not_shown_to_a_mirror(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"auths": {"fake": {"username": "u", "password": "hunter2"}}}')

    async def check(fixture: Fixture) -> None:
        for registry in (fixture.mirror, fixture.registry):
            registry.scheme, registry.password = "Basic", "hunter2"
        assert await fixture.manifest() == MANIFEST
        assert all("authorization" not in request.headers for request in fixture.mirror.requests)
        assert fixture.registry.requests[-1].headers["authorization"].startswith("Basic")

    run(check, docker_config=str(path))


def test_a_grant_goes_only_to_the_registry_itself() -> None:
    async def check(fixture: Fixture) -> None:
        grant = Grant("Bearer of-alice")
        blobs, manifests = (replace(locator, grant=grant) for locator in (BLOBS, MANIFESTS))
        resolved, body = await fixture.upstreams.resolve(manifests, "latest", whole=True)
        assert body == MANIFEST
        assert await fixture.upstreams.resolve(manifests, "latest") == (resolved, None)
        assert (await fixture.upstreams.resolve(blobs, str(BLOB_REF.digest)))[0].ref == BLOB_REF
        assert await fixture.read(blobs) == cut(0, 4)
        assert (await fixture.upstreams.passthrough(manifests, "tags/list", {})).body == b"{}"
        assert await fixture.upstreams.admits(manifests, "latest")
        assert fixture.asked == (0, 6)
        assert {request.headers.get("authorization") for request in fixture.registry.requests} == {grant.authorization}
        assert not fixture.public, "it was read with a grant"

    run(check)


@pytest.mark.parametrize("fault", [401, 403, 404, 500])
def test_a_mirror_is_not_asked_for_objects_that_the_registry_denies_a_client(fault: int) -> None:
    async def check(fixture: Fixture) -> None:
        fixture.registry.faults = [fault] * 20
        granted = replace(MANIFESTS, grant=Grant("Bearer of-mallory"))
        with pytest.raises((DeniedError, NotFoundError, UnavailableError)):
            await fixture.upstreams.resolve(granted, "latest")
        assert not fixture.mirror.requests

    run(check)


def test_only_the_registry_itself_makes_a_repository_public() -> None:
    async def check(fixture: Fixture) -> None:
        fixture.registry.faults = [401] * 20
        assert await fixture.manifest() == MANIFEST
        assert fixture.asked == (1, 0)
        assert not fixture.public, "a mirror may serve private content to everyone"
        assert not await fixture.upstreams.admits(MANIFESTS, "latest")
        assert fixture.asked[0] == 1, "a mirror does not decide who may read"

    run(check)


def test_objects_that_the_registry_gives_to_everyone_are_public() -> None:
    async def check(fixture: Fixture) -> None:
        fixture.mirror.faults = [404]
        assert await fixture.manifest() == MANIFEST
        assert fixture.public == [MANIFESTS]

    run(check)

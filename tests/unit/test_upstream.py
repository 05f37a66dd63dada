"""The registry client against a registry in this process, over real sockets, with the known faults of registries."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from random import Random

import httpx
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.config.schema import UpstreamPart
from node.oci.manifests import Resolved
from node.oci.references import Grant, Locator
from node.registry import credential_helper, transport
from node.registry.bodies import BlockCutter
from node.registry.upstreams import Upstreams
from node.runtime.fair_places import Client, Demand, working_for
from node.web.server import Request, Response
from protocol.errors import BadInputError, CorruptObjectError, DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import BLOCK_SIZE, ObjectRef
from tests.support.blobs import Blob
from tests.support.fake_registry import (
    BLOB,
    BLOB_REF,
    BLOBS,
    MANIFEST,
    MANIFEST_REF,
    MANIFESTS,
    MEDIA_TYPE,
    FakeRegistry,
    blob_answer,
    cut,
    serve,
)

OTHER = b'{"schemaVersion": 2, "manifests": []}'
"""A manifest that the registry does not have at first."""


class Fixture:
    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.counted = 0
        self.url = ""
        self.part: dict[str, object] = {}

    def count(self, upstream: str, size: int) -> None:
        assert upstream == "fake"
        self.counted += size

    def upstreams(self) -> Upstreams:
        part = UpstreamPart(name="fake", **({"url": self.url} | self.part))
        return Upstreams([part], count=self.count, rng=Random(1))

    async def read(self, upstreams: Upstreams, first: int = 0, count: int = 4) -> list[bytes]:
        async with aclosing(upstreams.blocks(BLOBS, BLOB_REF, first, count)) as blocks:
            return [bytes(block) async for block in blocks]


def run(check: Callable[[Fixture, Upstreams], Awaitable[None]], **part: object) -> Fixture:
    fixture = Fixture()
    fixture.part = part

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            fixture.url = await serve(nursery, lambda request: fixture.registry.handle(request))
            with trio.fail_after(60):
                async with fixture.upstreams() as upstreams:
                    await check(fixture, upstreams)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return fixture


@settings(max_examples=40)
@given(size=st.integers(1, 3 * BLOCK_SIZE), data=st.data())
def test_blocks_are_cut_alike_however_the_bytes_arrive(size: int, data) -> None:
    content = (BLOB * 2)[:size]
    ref = Blob(content).ref
    first = data.draw(st.integers(0, ref.block_count - 1))
    count = data.draw(st.integers(1, ref.block_count - first))
    cutter = BlockCutter(ref, first, count)
    portion = data.draw(st.integers(1000, 2 * BLOCK_SIZE))
    blocks = []
    while not cutter.done:
        view = cutter.room()[:portion]
        view[:] = content[cutter.position : cutter.position + len(view)]
        blocks += filter(None, [cutter.filled(len(view))])
    assert [bytes(block) for block in blocks] == [
        content[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(first, first + count)
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in</html>",
        b"{}",
        b"[]",
        b'"text"',
        b'{"schemaVersion": 2, "layers": [], "layers": []}',
        b'{"schemaVersion": 2, "layers": [], "Layers": []}',
        b'{"schemaVersion": 2, "layers": [], "manifests": []}',
    ],
)
def test_an_answer_that_is_no_manifest_is_a_failed_answer(body: bytes) -> None:
    """S-63"""

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.manifest = body
        with pytest.raises(UnavailableError, match="no manifest"):
            await upstreams.resolve(MANIFESTS, "latest", whole=True)
        fixture.registry.manifest = MANIFEST
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST

    run(check)


def test_a_manifest_is_resolved_and_revalidated() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        described = Resolved(MANIFEST_REF, MEDIA_TYPE)
        for reference in ("latest", str(MANIFEST_REF.digest)):
            assert await upstreams.resolve(MANIFESTS, reference) == (described, None)
            assert await upstreams.resolve(MANIFESTS, reference, whole=True) == (described, MANIFEST)
        fixture.registry.manifest = b"{}"
        assert await upstreams.resolve(MANIFESTS, "latest") == (Resolved(Blob(b"{}").ref, MEDIA_TYPE), None)
        with pytest.raises(CorruptObjectError):
            await upstreams.resolve(MANIFESTS, str(MANIFEST_REF.digest))
        fixture.registry.manifest = b"forged"
        with pytest.raises(CorruptObjectError):
            await upstreams.resolve(MANIFESTS, "latest", whole=True)

    methods = [request.method for request in run(check).registry.requests]
    assert methods == ["HEAD", "GET"] * 2 + ["HEAD"] + ["HEAD", "GET"] + ["GET"]


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (405, {}),
        (501, {}),
        (403, {}),
        (200, {}),
        (200, {"Docker-Content-Digest": "sha256:no", "Content-Length": "7"}),
        (200, {"Docker-Content-Digest": str(MANIFEST_REF.digest), "Content-Length": str(5 << 20)}),
        (200, {"Docker-Content-Digest": str(MANIFEST_REF.digest), "Content-Length": "0"}),
    ],
)
def test_a_manifest_is_read_if_head_does_not_describe_it(status: int, headers: dict[str, str]) -> None:
    """S-49"""

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        answer = fixture.registry.answer_manifest

        def head(request: Request) -> Response:
            return Response(status, headers) if request.method == "HEAD" else answer(request)

        fixture.registry.answer_manifest = head  # type: ignore[method-assign]
        assert await upstreams.resolve(MANIFESTS, "latest") == (Resolved(MANIFEST_REF, MEDIA_TYPE), MANIFEST)

    assert [request.method for request in run(check).registry.requests] == ["HEAD", "GET"]


def test_the_question_that_admits_a_client_also_resolves_its_tag() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        assert await upstreams.admits(MANIFESTS, "latest")
        resolved, body = await upstreams.resolve(MANIFESTS, "latest")
        assert (resolved.ref, body) == (MANIFEST_REF, None)
        assert resolved.age_s > 0, "it is as old as the question"
        assert len(fixture.registry.requests) == 1
        await upstreams.resolve(MANIFESTS, "latest")
        assert len(fixture.registry.requests) == 2

    run(check)


def test_compressed_bodies_are_not_decompressed() -> None:
    """S-21"""
    bomb = gzip.compress(bytes(64 << 20))

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        headers = {"Content-Type": MEDIA_TYPE, "Content-Encoding": "gzip"}
        fixture.registry.answer_manifest = lambda request: Response(200, headers, bomb)  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match="no manifest"):
            await upstreams.resolve(MANIFESTS, "latest", whole=True)

    assert run(check).counted == len(bomb)


@pytest.mark.parametrize("fault", ["length", "no length", "total", "no total", "no total, no head"])
@pytest.mark.parametrize("size", [len(BLOB) - 1, len(BLOB) + 1, BLOCK_SIZE, 100, 1 << 36])
def test_no_block_is_returned_for_a_size_that_the_registry_contradicts(fault: str, size: int) -> None:
    """S-64: a claim that is too large fails at the latest at its last block: then no record of it was signed."""

    async def answer(request: Request) -> Response:
        if request.method == "HEAD" and "no head" in fault:
            return Response(405)
        answer = blob_answer(request, None if "total" in fault else "no ranges")
        if request.method == "GET" and "no length" in fault:
            return Response(answer.status, {}, _chunks(BLOB))
        if "no total" in fault and "Content-Range" in answer.headers and request.headers["range"] != "bytes=0-0":
            span = answer.headers["Content-Range"].partition("/")[0]
            return Response(206, {**answer.headers, "Content-Range": f"{span}/*"}, answer.body)
        return answer

    async def received(url: str) -> list[bytearray]:
        ref = ObjectRef(BLOB_REF.digest, size)
        count = min(ref.block_count, 8)
        first = ref.block_count - count if fault != "no length" else 0
        part = UpstreamPart(name="fake", url=url)
        async with (
            Upstreams([part], count=lambda name, size: None, rng=Random(1)) as upstreams,
            aclosing(upstreams.blocks(BLOBS, ref, first, count)) as blocks,
        ):
            return [block async for block in blocks]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            url = await serve(nursery, answer)
            with trio.fail_after(60), pytest.raises(UnavailableError):
                await received(url)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def _chunks(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


@pytest.mark.parametrize("fault", [None, "no head"])
def test_a_blobs_size_comes_from_head_or_from_one_byte(fault: str | None) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = [fault]
        resolved, body = await upstreams.resolve(BLOBS, str(BLOB_REF.digest))
        assert (resolved.ref, body) == (BLOB_REF, None)

    assert run(check).counted == 0


@pytest.mark.parametrize("faults", [[], ["no ranges"], ["breaks"] * 3, ["breaks", 503, "no ranges", 429]])
def test_blocks_come_whole_through_broken_bodies_and_missing_ranges(faults) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        for first, count in ((0, 4), (1, 2), (3, 1), (2, 0)):
            fixture.registry.faults = list(faults)
            assert await fixture.read(upstreams, first, count) == cut(first, count)
        assert fixture.counted >= len(BLOB)

    run(check)


def test_an_environments_proxy_is_asked_for_blocks_and_names(monkeypatch) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        monkeypatch.setenv("http_proxy", fixture.url)
        fixture.url = "http://registry.invalid"
        async with fixture.upstreams() as behind:
            fixture.registry.faults = ["breaks", "no ranges"]
            assert await fixture.read(behind, 1, 2) == cut(1, 2)
            assert (await behind.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST

    assert {request.headers["host"] for request in run(check).registry.requests} == {"registry.invalid"}


def test_a_manifest_is_read_in_blocks_too() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        async with aclosing(upstreams.blocks(MANIFESTS, MANIFEST_REF, 0, 1)) as blocks:
            assert [bytes(block) async for block in blocks] == [MANIFEST]

    run(check)


@pytest.mark.parametrize(
    ("faults", "error", "requests"),
    [
        ([404], NotFoundError, 1),
        ([403, 403], DeniedError, 2),
        ([401], DeniedError, 1),
        ([500], UnavailableError, 1),
        ([503] * 9, UnavailableError, 3),
        ([416, 416], UnavailableError, 2),
    ],
)
def test_errors_name_the_registry_and_the_object(faults, error: type[ShoalError], requests: int) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = list(faults)
        with pytest.raises(error, match=r"fake: manifest org/app:latest: "):
            await upstreams.resolve(MANIFESTS, "latest")
        assert len(fixture.registry.requests) == requests

    run(check)


def test_an_answer_with_another_range_is_refused() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = ["other range"]
        with pytest.raises(UnavailableError, match="another range"):
            await fixture.read(upstreams, 1, 1)

    run(check)


def test_a_silent_body_is_resumed_and_a_long_retry_after_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(transport, "TIMEOUT", httpx.Timeout(60, read=1))

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = ["stalls", None]
        assert await fixture.read(upstreams) == cut(0, 4)
        fixture.registry.faults = [429]
        fixture.registry.retry_after = "3600"
        with pytest.raises(UnavailableError, match="429"):
            await fixture.read(upstreams)

    run(check)


def test_one_token_serves_all_reads_until_it_is_refused(tmp_path) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme = "Bearer"
        fixture.registry.password = "hunter2"
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(upstreams.resolve, MANIFESTS, "latest")
        assert fixture.registry.tokens == 1
        fixture.registry.valid_token = "revoked"
        assert await fixture.read(upstreams) == cut(0, 4)
        assert fixture.registry.tokens == 2
        fixture.registry.password = "changed"
        fixture.registry.valid_token = "revoked"
        with pytest.raises(DeniedError) as caught:
            await upstreams.resolve(MANIFESTS, "latest")
        assert "hunter2" not in str(caught.value)

    path = tmp_path / "config.json"
    path.write_text('{"auths": {"fake": {"username": "u", "password": "hunter2"}}}')
    run(check, access="node", docker_config=str(path))


def test_tokens_of_repositories_do_not_wait_for_each_other_and_their_failures_stay_apart() -> None:
    """S-65: a 500 of the token service says nothing about the object or the registry."""
    waiting: dict[str, trio.Event] = {}

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        answer = fixture.registry.handle

        async def handle(request: Request) -> Response:
            if request.path == "/token":
                repository = request.query["scope"].split(":")[1]
                if repository == "org/broken":
                    return Response(500)
                if repository == "org/slow":
                    waiting["slow"].set()
                    await trio.sleep_forever()
                fixture.registry.tokens += 1
                fixture.registry.valid_token = "t1"
                return Response(200, {}, b'{"token": "t1"}')
            return await answer(request)

        fixture.registry.handle = handle  # type: ignore[method-assign]
        fixture.registry.scheme = "Bearer"
        waiting["slow"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upstreams.resolve, Locator("fake", "org/slow", "manifests"), "latest")
            await waiting["slow"].wait()
            for _ in range(3):
                with pytest.raises(UnavailableError, match=r"token service .* answered 500"):
                    await upstreams.resolve(Locator("fake", "org/broken", "manifests"), "latest")
            assert (await upstreams.resolve(MANIFESTS, "latest"))[0].ref == MANIFEST_REF
            (endpoint,) = upstreams.endpoints("fake")
            assert not endpoint.problem
            nursery.cancel_scope.cancel()

    run(check)


def test_a_token_service_in_trouble_has_a_breaker_of_its_own() -> None:
    """S-65"""
    tokens: list[int] = []

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        answer = fixture.registry.handle

        async def handle(request: Request) -> Response:
            if request.path == "/token":
                tokens.append(1)
                return Response(503, {"Retry-After": "3600"})
            return await answer(request)

        fixture.registry.handle = handle  # type: ignore[method-assign]
        fixture.registry.scheme = "Bearer"
        for number in range(5):
            with pytest.raises(UnavailableError, match="token service"):
                await upstreams.resolve(Locator("fake", f"org/app{number}", "manifests"), "latest")
        (endpoint,) = upstreams.endpoints("fake")
        assert not endpoint.problem
        fixture.registry.scheme = ""
        assert (await upstreams.resolve(MANIFESTS, "latest"))[0].ref == MANIFEST_REF

    run(check)
    assert len(tokens) == 1


def test_lookups_of_one_address_leave_connections_and_the_next_turn_to_another() -> None:
    """S-39"""

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        answer, hanging = fixture.registry.handle, trio.Semaphore(0)

        async def handle(request: Request) -> Response:
            if "/none/" in request.path:
                hanging.release()
                await trio.sleep_forever()
            return await answer(request)

        fixture.registry.handle = handle  # type: ignore[method-assign]

        async def look(number: int) -> None:
            with working_for(Demand(Client("10.0.0.1"))):
                await upstreams.resolve(Locator("fake", f"none/n{number}", "manifests"), "latest")

        async with trio.open_nursery() as nursery:
            for number in range(150):
                nursery.start_soon(look, number)
            for _ in range(4):
                await hanging.acquire()
            with working_for(Demand(Client("10.0.0.2"))):
                assert (await upstreams.resolve(MANIFESTS, "latest"))[0].ref == MANIFEST_REF
            assert hanging.value == 0, "of six connections they have four"
            nursery.cancel_scope.cancel()

    run(check)


def test_a_missing_object_is_asked_for_once_in_a_while() -> None:
    """S-39"""

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        for _ in range(5):
            with pytest.raises(NotFoundError):
                await upstreams.resolve(MANIFESTS, "missing")
        assert len(fixture.registry.requests) == 1
        with pytest.raises(NotFoundError):
            await upstreams.resolve(MANIFESTS, "also-missing")
        assert len(fixture.registry.requests) == 2

    run(check)


def helper_on_path(folder, monkeypatch, answer: dict[str, str]) -> None:
    """Install a credential helper `test` that answers `answer` for the registry `fake`."""
    program = folder / "docker-credential-test"
    program.write_text(f"#!/bin/sh\nread registry\n[ $registry = fake ] && echo '{json.dumps(answer)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (folder / "config.json").write_text('{"credHelpers": {"fake": "test"}}')


def test_a_helper_is_asked_for_credentials_and_again_when_they_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(credential_helper, "AGAIN_S", 0.0)

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme, fixture.registry.password = "Basic", "hunter2"
        helper_on_path(tmp_path, monkeypatch, {"Username": "u", "Secret": "hunter2"})
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        fixture.registry.password = "hunter3"
        helper_on_path(tmp_path, monkeypatch, {"Username": "u", "Secret": "hunter3"})
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        (tmp_path / "docker-credential-test").unlink()
        fixture.registry.password = "hunter4"
        with pytest.raises(UnavailableError, match="not in PATH"):
            await upstreams.resolve(MANIFESTS, "latest")

    run(check, access="node", docker_config=str(tmp_path / "config.json"))


def test_an_identity_token_goes_to_the_token_service_in_a_form(tmp_path, monkeypatch) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme, fixture.registry.identity = "Bearer", "refresh me"
        helper_on_path(tmp_path, monkeypatch, {"Username": "<token>", "Secret": "refresh me"})
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        assert fixture.registry.tokens == 1

    run(check, access="node", docker_config=str(tmp_path / "config.json"))


def test_basic_needs_credentials(tmp_path) -> None:
    path = tmp_path / "config.json"

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme = "Basic"
        fixture.registry.password = "hunter2"
        with pytest.raises(DeniedError, match="no credentials"):
            await upstreams.resolve(MANIFESTS, "latest")
        path.write_text('{"auths": {"fake": {"username": "u", "password": "hunter2"}}}')
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        assert await fixture.read(upstreams) == cut(0, 4)
        assert len(fixture.registry.requests) == 4, "the header is remembered"

    run(check, access="node", docker_config=str(path))


def test_a_redirect_to_another_host_carries_no_authorization(caplog) -> None:
    other = FakeRegistry()

    async def handle(request: Request) -> Response:
        other.requests.append(request)
        return blob_answer(request, "no head")

    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme = "Bearer"
        async with trio.open_nursery() as nursery:
            url = await serve(nursery, handle)
            fixture.registry.elsewhere = url.replace("127.0.0.1", "localhost")
            assert await fixture.read(upstreams, 1, 2) == cut(1, 2)
            assert (await upstreams.resolve(BLOBS, str(BLOB_REF.digest)))[0].ref == BLOB_REF
            nursery.cancel_scope.cancel()
        with pytest.raises(UnavailableError) as caught:
            await fixture.read(upstreams)
        assert "hush" not in str(caught.value)

    with caplog.at_level(logging.INFO):
        run(check)
    assert [request.method for request in other.requests] == ["GET", "HEAD", "GET"]
    assert all("authorization" not in request.headers for request in other.requests)
    assert not any("hush" in record.getMessage() for record in caplog.records if record.name.startswith("node"))


def test_a_list_is_passed_on_with_its_link() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        passed = await upstreams.passthrough(MANIFESTS, "tags/list", {"n": "1"})
        assert (passed.body, passed.media_type, passed.link) == (b'{"n": "1"}', "application/json", "<x>")

    run(check)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_list_that_the_registry_refuses_is_not_found(status: int) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = [status]
        with pytest.raises(NotFoundError, match="referrers"):
            await upstreams.passthrough(MANIFESTS, "referrers/sha256:00", {})

    run(check)


def test_a_query_that_the_registry_refuses_is_the_clients_fault() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = [400]
        with pytest.raises(BadInputError, match="tags/list of org/app"):
            await upstreams.passthrough(MANIFESTS, "tags/list", {"n": "-1"})
        assert (await upstreams.passthrough(MANIFESTS, "tags/list", {})).body == b"{}"

    run(check)


def granted(locator: Locator, authorization: str) -> Locator:
    return replace(locator, grant=Grant(authorization))


def test_admission_is_checked_with_only_the_clients_grant(tmp_path) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        registry = fixture.registry
        registry.scheme, registry.password, registry.valid_token = "Bearer", "hunter2", "of-alice"
        assert not await upstreams.admits(MANIFESTS, "latest")
        realm = f"{fixture.url}/token?x=1"
        challenge = f'Bearer realm="{realm}",service="fake",scope="repository:org/app:pull"'
        assert upstreams.challenge(MANIFESTS, basic=True) == challenge
        asked = len(registry.requests)
        with pytest.raises(DeniedError):
            await fixture.read(upstreams)
        assert len(registry.requests) == asked, "requests of members for its blocks do not reach the registry"

        assert await upstreams.admits(granted(MANIFESTS, "Bearer of-alice"), "latest")
        assert not await upstreams.admits(granted(MANIFESTS, "Bearer of-mallory"), "latest")
        assert await upstreams.admits(granted(BLOBS, "Bearer of-alice"), str(BLOB_REF.digest))
        with pytest.raises(DeniedError):
            await fixture.read(upstreams)
        assert (await upstreams.resolve(granted(MANIFESTS, "Bearer of-alice"), "latest", whole=True))[1] == MANIFEST
        async with aclosing(upstreams.blocks(granted(BLOBS, "Bearer of-alice"), BLOB_REF, 0, 4)) as blocks:
            assert [bytes(block) async for block in blocks] == cut(0, 4)
        with pytest.raises(DeniedError) as caught:
            await upstreams.resolve(granted(MANIFESTS, "Bearer of-mallory"), "latest")
        assert "of-mallory" not in str(caught.value)
        assert {request.headers.get("authorization") for request in registry.requests} == {
            None,
            "Bearer of-alice",
            "Bearer of-mallory",
        }

    path = tmp_path / "config.json"
    path.write_text('{"auths": {"fake": {"username": "u", "password": "hunter2"}}}')
    run(check, docker_config=str(path))


def test_a_repository_with_a_token_for_everyone_is_public() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.scheme = "Bearer"
        assert await upstreams.admits(MANIFESTS, "latest")
        assert fixture.registry.tokens == 1
        assert await fixture.read(upstreams) == cut(0, 4)
        assert fixture.registry.tokens == 1

    run(check)


@pytest.mark.parametrize(
    ("faults", "admitted"),
    [([404], True), ([404, 401], False), ([403], False), ([404, 404], NotFoundError), ([503] * 9, UnavailableError)],
)
def test_a_missing_name_does_not_decide_about_admission(faults: list[int | str | None], admitted: object) -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.faults = faults
        if isinstance(admitted, bool):
            assert await upstreams.admits(MANIFESTS, "latest") == admitted
        else:
            with pytest.raises(admitted):  # type: ignore[call-overload]
                await upstreams.admits(MANIFESTS, "latest")

    run(check)


def test_a_redirect_counts_as_admission_and_is_not_followed() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        fixture.registry.elsewhere = "http://registry.invalid"
        assert await upstreams.admits(BLOBS, str(BLOB_REF.digest))

    run(check)


def test_the_error_for_an_unknown_registry_names_the_configured_ones() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        with pytest.raises(NotFoundError, match="configured: fake"):
            await upstreams.resolve(Locator("other", "a", "manifests"), "b")

    run(check)


def test_bodies_leave_a_connection_for_names_and_are_bounded() -> None:
    async def check(fixture: Fixture, upstreams: Upstreams) -> None:
        async with aclosing(upstreams.blocks(BLOBS, BLOB_REF, 0, 4)) as first:
            await anext(first)
            second = upstreams.blocks(BLOBS, BLOB_REF, 0, 4)
            with trio.move_on_after(0.1) as waited:
                await anext(second)
            assert waited.cancelled_caught
            assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        assert await fixture.read(upstreams) == cut(0, 4)

    run(check, connections=2)


class DeadNetwork(trio.abc.HostnameResolver):
    """Never resolves a name, as at a site that is offline."""

    def __init__(self) -> None:
        self.asked = 0

    async def getaddrinfo(self, *args: object, **kwargs: object) -> list:
        self.asked += 1
        await trio.sleep_forever()
        raise AssertionError

    async def getnameinfo(self, *args: object, **kwargs: object) -> tuple[str, str]:
        raise NotImplementedError


def test_an_offline_site_waits_for_one_timeout_and_then_for_none() -> None:
    network = DeadNetwork()

    async def main() -> None:
        trio.socket.set_custom_hostname_resolver(network)
        part = UpstreamPart(name="fake", url="http://registry.invalid")
        async with Upstreams([part], count=lambda name, size: None, rng=Random(1)) as upstreams:
            start = trio.current_time()
            for expected in (5.0, 5.0, 5.0):
                with pytest.raises(UnavailableError, match="fake"):
                    await upstreams.resolve(MANIFESTS, "latest")
                assert trio.current_time() - start == pytest.approx(expected)
            assert network.asked == 1
            await trio.sleep(3)
            with pytest.raises(UnavailableError, match="no connection in time"):
                await upstreams.resolve(MANIFESTS, "latest")
            assert network.asked == 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_bad_ca_file_names_the_upstream(tmp_path) -> None:
    (tmp_path / "ca").write_text("x")
    part = UpstreamPart(name="fake", url="https://registry.invalid", ca=str(tmp_path / "ca"))
    with pytest.raises(ShoalError, match='upstream "fake": ca = '):
        Upstreams([part], count=lambda name, size: None, rng=Random(1))

"""The mirror over real sockets and an in-memory library: the needs of each client, and the answer to each failure."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.parser import BytesParser
from functools import partial
from random import Random
from typing import BinaryIO

import httpx
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.content.listings import Listings
from node.mirror import mirror as mirror_module
from node.mirror.mirror import Mirror
from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.registry.calls import Passed
from node.web.server import Request, serve_http
from protocol.errors import BadInputError, CorruptObjectError, DeniedError, NotFoundError, UnavailableError
from protocol.ids import Digest, ObjectRef
from tests.support.access import Everybody

BLOB = Random(1).randbytes((3 << 20) + 5)
MANIFEST = b'{"schemaVersion": 2, "layers": []}'
MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"


def digest_of(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


BLOB_DIGEST, MANIFEST_DIGEST = digest_of(BLOB), digest_of(MANIFEST)
BLOB_PATH = f"/v2/library/alpine/blobs/{BLOB_DIGEST}"
MANIFEST_PATH = "/v2/library/alpine/manifests/latest"


class MemoryLibrary:
    """Objects of one repository in a dictionary. `fails_at`: the offset from which reads raise `error`."""

    def __init__(self) -> None:
        self.objects = {digest: data for data in (BLOB, MANIFEST, b"") for digest in [digest_of(data)]}
        self.asked: list[tuple[str, str]] = []
        self.reads_open = 0
        self.error: Exception | None = None
        self.fails_at: float = float("inf")
        self.path: str | None = None

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        self.asked.append((str(locator), reference))
        if self.error and self.fails_at < 0:
            raise self.error
        digest = MANIFEST_DIGEST if ":" not in reference else Digest.parse(reference)
        if digest not in self.objects or locator.repository != "library/alpine":
            raise NotFoundError(f"{reference} is not here")
        return Resolved(ObjectRef(digest, len(self.objects[digest])), MEDIA_TYPE)

    async def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[memoryview, None]:
        self.reads_open += 1
        try:
            for position, last in ((start, stop), *more):
                while position < last:
                    await trio.lowlevel.checkpoint()
                    if position >= self.fails_at:
                        if self.error is None:
                            await trio.sleep_forever()
                        raise self.error
                    end = min(last, (position // (1 << 20) + 1) << 20)
                    yield memoryview(self.objects[ref.digest])[position:end]
                    position = end
        finally:
            self.reads_open -= 1

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved:
        return resolved

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool:
        return self.path is not None

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None:
        return None if self.path is None else open(self.path, "rb")


INDEX = "application/vnd.oci.image.index.v1+json"


class EchoListings(Listings):
    """Answers with its arguments, and has a next page."""

    def __init__(self) -> None:
        pass

    async def tags(self, locator: Locator, query: Mapping[str, str]) -> Passed:
        if query.get("n") == "-1":
            raise BadInputError("no count")
        return Passed(json.dumps([str(locator), dict(query)]).encode(), "application/json", LINK)

    async def referrers(self, locator: Locator, digest: Digest, query: Mapping[str, str]) -> Passed:
        return Passed(json.dumps([str(locator), str(digest), dict(query)]).encode(), INDEX, LINK, "artifactType")


LINK = "</v2/elsewhere?n=2&next_page=b%2F&ns=evil>; rel=next"


@asynccontextmanager
async def serving(library: MemoryLibrary) -> AsyncIterator[httpx.AsyncClient]:
    mirror = Mirror(library, ["docker.io", "ghcr.io", "localhost:5000"], EchoListings(), Everybody())  # type: ignore[arg-type]
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_http, listeners, mirror.handle, limits=mirror_module.LIMITS))
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            yield client
        nursery.cancel_scope.cancel()


def run(check: Callable[[httpx.AsyncClient, MemoryLibrary], Awaitable[None]]) -> MemoryLibrary:
    library = MemoryLibrary()

    async def main() -> None:
        with trio.fail_after(60):
            async with serving(library) as client:
                await check(client, library)

    trio.run(main)
    assert library.reads_open == 0
    return library


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["errors"][0]["code"]


def test_head_and_get_have_the_same_headers_which_clients_need() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        assert (await client.get("/v2/")).status_code == 200
        for path, data, media_type in (
            (BLOB_PATH, BLOB, "application/octet-stream"),
            (MANIFEST_PATH, MANIFEST, MEDIA_TYPE),
            (f"/v2/library/alpine/blobs/{digest_of(b'')}", b"", "application/octet-stream"),
        ):
            got, head = await client.get(path), await client.head(path)
            assert got.content == data
            assert got.headers["content-length"] == str(len(data))
            assert got.headers["docker-content-digest"] == str(digest_of(data))
            assert got.headers["content-type"] == media_type
            assert {**got.headers, "date": ""} == {**head.headers, "date": ""}
            etag = got.headers["etag"]
            for tag in (etag, "*", f'"x", W/{etag}'):
                same = await client.get(path, headers={"If-None-Match": tag})
                assert (same.status_code, same.content) == (304, b"")
                assert same.headers["docker-content-digest"] == str(digest_of(data))
            for tag, status in ((etag, 200), ("*", 200), (f'"x", {etag}', 200), (f"W/{etag}", 412), ('"x"', 412)):
                assert (await client.get(path, headers={"If-Match": tag})).status_code == status

    run(check)


def test_the_upstream_is_named_by_ns_by_path_or_by_default() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        for path in (
            "/v2/library/alpine/manifests/a",
            "/v2/docker.io/library/alpine/manifests/a",
            "/v2/library/alpine/manifests/a?ns=registry-1.docker.io",
            "/v2/ghcr.io/library/alpine/manifests/a",
            "/v2/localhost:5000/library/alpine/manifests/a",
            "/v2/library/alpine/manifests/a?ns=GHCR.io",
        ):
            assert (await client.get(path)).status_code == 200

    asked = [locator.partition("/")[0] for locator, _ in run(check).asked]
    assert asked == ["docker.io", "docker.io", "docker.io", "ghcr.io", "localhost:5000", "ghcr.io"]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2/library/alpine/manifests/a?ns=evil.example", (404, "NAME_UNKNOWN")),
        ("GET", "/v2/evil.example/alpine/manifests/a", (404, "NAME_UNKNOWN")),
        ("GET", "/v2/library/alpine/manifests/sha256:abc", (400, "DIGEST_INVALID")),
        ("GET", "/v2/library/alpine/blobs/latest", (400, "DIGEST_INVALID")),
        ("GET", "/v2/library/alpine/manifests/-x", (404, "MANIFEST_UNKNOWN")),
        ("GET", "/v2/library/alpine/manifests/" + "a" * 129, (404, "MANIFEST_UNKNOWN")),
        ("GET", "/v2/" + "a" * 256 + "/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/library/%2e%2e/alpine/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/library//alpine/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2//library/alpine/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/library%252Falpine/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/a/blobs/b/manifests/latest", (404, "MANIFEST_UNKNOWN")),
        ("GET", f"/v2/library/alpine/blobs/sha256:{'A' * 64}", (400, "DIGEST_INVALID")),
        ("GET", f"/v2/library/alpine/blobs/sha512:{'0' * 64}", (400, "DIGEST_INVALID")),
        ("GET", f"/v2/library/alpine/blobs/sha512:{'0' * 128}", (404, "BLOB_UNKNOWN")),
        ("GET", "/v2/library/alpine/manifests/", (404, "NAME_UNKNOWN")),
        ("PUT", "/v2/library/alpine/manifests/sha256:no", (400, "DIGEST_INVALID")),
        ("PUT", "/v2/library/alpine/manifests/v2", (405, "UNSUPPORTED")),
        ("DELETE", "/v2/", (405, "UNSUPPORTED")),
        ("GET", "/v2/library/_x/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/UPPER/x/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/library%0aalpine/manifests/a", (400, "NAME_INVALID")),
        ("GET", "/v2/other/alpine/manifests/a", (404, "MANIFEST_UNKNOWN")),
        ("GET", f"/v2/library/alpine/blobs/sha256:{'0' * 64}", (404, "BLOB_UNKNOWN")),
        ("GET", "/v2/_catalog", (404, "NAME_UNKNOWN")),
        ("GET", "/v2/library/alpine/tags/other", (404, "NAME_UNKNOWN")),
        ("GET", "/v2/library/alpine/referrers/x", (400, "DIGEST_INVALID")),
        ("POST", "/v2/library/alpine/blobs/uploads/", (405, "UNSUPPORTED")),
        ("DELETE", BLOB_PATH, (405, "UNSUPPORTED")),
    ],
)
def test_errors_have_the_codes_of_the_specification(method: str, path: str, expected) -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        response = await client.request(method, path)
        assert code(response) == expected
        assert (expected[0] != 405) or response.headers["allow"] == "GET, HEAD"
        assert ("evil" not in path) or "ghcr.io" in response.text

    run(check)


RANGES = {
    "bytes=0-": (206, BLOB),
    "bytes=5-9": (206, BLOB[5:10]),
    "bytes=-7": (206, BLOB[-7:]),
    f"bytes={len(BLOB) - 1}-{len(BLOB) + 5}": (206, BLOB[-1:]),
    "bytes=1048570-2097160": (206, BLOB[1048570:2097161]),
    "bytes=x": (200, BLOB),
}


@pytest.mark.parametrize("in_file", [False, True])
def test_ranges_from_chunks_and_from_a_sealed_file(tmp_path, in_file: bool) -> None:
    (tmp_path / "blob").write_bytes(BLOB)

    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        library.path = str(tmp_path / "blob") if in_file else None
        for header, (status, data) in RANGES.items():
            got = await client.get(BLOB_PATH, headers={"Range": header})
            assert (got.status_code, got.content) == (status, data)
            if status == 206:
                start = len(BLOB) - 1 if len(data) == 1 else BLOB.index(data)
                assert got.headers["content-range"] == f"bytes {start}-{start + len(data) - 1}/{len(BLOB)}"
        beyond = await client.get(BLOB_PATH, headers={"Range": f"bytes={len(BLOB)}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(BLOB)}")
        assert (await client.get(BLOB_PATH, headers={"Range": "bytes=9-5"})).status_code == 416
        empty = await client.get(f"/v2/library/alpine/blobs/{digest_of(b'')}", headers={"Range": "bytes=0-"})
        assert (empty.status_code, empty.content) == (200, b"")
        tag = f'"{BLOB_DIGEST}"'
        for condition, status in ((tag, 206), (f"W/{tag}", 200), ("Tue, 24 Nov 2026 10:00:00 GMT", 200)):
            got = await client.get(BLOB_PATH, headers={"Range": "bytes=0-1", "If-Range": condition})
            assert got.status_code == status
        other = await client.get(BLOB_PATH, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
        assert (other.status_code, len(other.content)) == (200, len(BLOB))
        head = await client.head(BLOB_PATH, headers={"Range": "bytes=0-1"})
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(BLOB)))

    run(check)


def test_several_ranges_come_as_multipart() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        got = await client.get(BLOB_PATH, headers={"Range": "bytes=0-4, 1048570-1048600, -3"})
        assert got.status_code == 206
        text = b"Content-Type: " + got.headers["content-type"].encode() + b"\r\n\r\n" + got.content
        parts = BytesParser().parsebytes(text).get_payload()
        assert [part["content-range"] for part in parts] == [
            f"bytes {a}-{b}/{len(BLOB)}" for a, b in ((0, 4), (1048570, 1048600), (len(BLOB) - 3, len(BLOB) - 1))
        ]
        for data in (BLOB[:5], BLOB[1048570:1048601], BLOB[-3:]):
            assert b"\r\n\r\n" + data + b"\r\n--" in got.content

    run(check)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotFoundError("x"), (404, "BLOB_UNKNOWN")),
        (DeniedError("x"), (403, "DENIED")),
        (UnavailableError("x"), (503, "UNAVAILABLE")),
        (CorruptObjectError("x"), (503, "UNAVAILABLE")),
    ],
)
def test_failures_before_the_first_byte_are_answers_and_later_ones_end_the_body(error: Exception, expected) -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        library.error = error
        for library.fails_at in (-1, 0):
            assert code(await client.get(BLOB_PATH)) == expected
        library.fails_at = 1 << 20
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            await client.get(BLOB_PATH)
        assert code(await client.get(BLOB_PATH, headers={"Range": f"bytes={1 << 20}-"})) == expected

    run(check)


def test_stalled_answers_become_503_or_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(mirror_module, "HEAD_S", 0.1)
    monkeypatch.setattr(mirror_module, "STALL_S", 1.0)

    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        library.fails_at = 0
        assert code(await client.get(BLOB_PATH)) == (503, "UNAVAILABLE")
        library.fails_at = 1 << 20
        monkeypatch.setattr(mirror_module, "HEAD_S", 60.0)
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            await client.get(BLOB_PATH)

    run(check)


def test_a_client_that_disconnects_ends_its_read() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        library.objects[BLOB_DIGEST] = bytes(64 << 20)
        async with client.stream("GET", BLOB_PATH) as response:
            assert response.status_code == 200
        with trio.fail_after(60):
            while library.reads_open:
                await trio.lowlevel.checkpoint()

    run(check)


def test_lists_have_links_to_this_mirror_and_heads_like_everything() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        path = "/v2/org/app/tags/list?n=2&ns=ghcr.io"
        tags = await client.get(path)
        assert tags.json() == ["ghcr.io/org/app#manifests", {"n": "2"}]
        assert tags.headers["link"] == '</v2/org/app/tags/list?n=2&next_page=b%2F&ns=ghcr.io>; rel="next"'
        path = f"/v2/org/app/referrers/{BLOB_DIGEST}?artifactType=a%2Fb"
        referrers = await client.get(path)
        asked = ["docker.io/org/app#manifests", str(BLOB_DIGEST), {"artifactType": "a/b"}]
        assert (referrers.json(), referrers.headers["content-type"]) == (asked, INDEX)
        assert referrers.headers["oci-filters-applied"] == "artifactType"
        next_page = f'</v2/org/app/referrers/{BLOB_DIGEST}?n=2&next_page=b%2F&artifactType=a%2Fb>; rel="next"'
        assert referrers.headers["link"] == next_page
        for answer in (tags, referrers):
            head = await client.head(answer.url)
            assert {**head.headers, "date": ""} == {**answer.headers, "date": ""}
            assert head.headers["content-length"] == str(len(answer.content))
        for query in (f"last={'a' * 3000}", "n=-1"):
            assert code(await client.get(f"/v2/org/app/tags/list?{query}")) == (400, "UNSUPPORTED")

    run(check)


def test_missing_objects_stay_missing_while_the_registry_is_down() -> None:
    async def check(client: httpx.AsyncClient, library: MemoryLibrary) -> None:
        missing = f"/v2/library/alpine/blobs/{Digest('sha256', '0' * 64)}"
        assert code(await client.get(missing)) == (404, "BLOB_UNKNOWN")
        library.error, library.fails_at = UnavailableError("gone"), -1
        assert code(await client.get(missing)) == (404, "BLOB_UNKNOWN")
        assert code(await client.get(BLOB_PATH)) == (503, "UNAVAILABLE")
        assert code(await client.get(missing.replace("blobs", "manifests"))) == (503, "UNAVAILABLE")
        library.error = None
        library.objects[Digest("sha256", "0" * 64)] = b"pushed"
        library.fails_at = float("inf")
        assert (await client.get(missing)).status_code == 200

    run(check)


WORDS = st.sampled_from(
    [
        *("v2", "library", "alpine", "manifests", "blobs", "tags", "list", "referrers", "latest", "docker.io"),
        *("..", "", "evil.example:1", "%00", "%2e%2e", "é", str(BLOB_DIGEST), str(MANIFEST_DIGEST), "sha512:"),
    ]
)
HEADERS = st.dictionaries(
    st.sampled_from(["range", "if-range", "if-match", "if-none-match", "accept"]), st.text(max_size=30), max_size=3
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT"]),
    path=st.lists(WORDS | st.text(max_size=8), max_size=7).map(lambda words: "/v2/" + "/".join(words)),
    query=st.dictionaries(st.sampled_from(["ns", "n", "last"]), WORDS | st.text(max_size=9), max_size=2),
    headers=HEADERS,
)
def test_no_request_causes_a_server_error(method, path, query, headers, caplog) -> None:
    async def main() -> None:
        response = await Mirror(MemoryLibrary(), ["docker.io"], EchoListings(), Everybody()).handle(  # type: ignore[arg-type]
            Request(method, path, query, headers)
        )
        assert response.status in (200, 206, 304, 400, 404, 405, 412, 416)
        for name, value in response.headers.items():
            assert (name + value).isascii()
            assert (name + value).isprintable()
        if isinstance(response.body, AsyncGenerator):
            await response.body.aclose()

    with caplog.at_level(logging.WARNING):
        trio.run(main)
    assert not caplog.records

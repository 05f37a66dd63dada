"""Lists of tags and referrers are made uniform over different registries, and outlive a registry that is down."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio

from node.content import listings as listings_module
from node.content.listings import INDEX, Listings
from node.oci.references import Locator
from node.registry.calls import Passed
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import Digest
from tests.support.memory_library import MemoryLibrary

APP = Locator("docker.io", "org/app", "manifests")
SUBJECT = Digest("sha256", "ab" * 32)
MAX_AGE_S = 1000.0
TAGS = ["a", "b", "c", "d", "e"]


def descriptor(number: int, **more: object) -> dict[str, object]:
    return {"mediaType": "x/y", "digest": f"sha256:{number:064d}", "size": number, **more}


DESCRIPTORS = [
    descriptor(1, artifactType="sig/a", annotations={"k": "v"}),
    descriptor(2, artifactType="sbom/b"),
    descriptor(3),
]


def index(manifests: list[dict[str, object]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, indent=1).encode()


class Registry:
    """Answers by the tail of the request. If the answer is an exception, it is raised."""

    def __init__(self, answers: Mapping[str, Passed | Exception]) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, dict[str, str]]] = []

    async def passthrough(self, locator: Locator, tail: str, query: Mapping[str, str]) -> Passed:
        self.asked.append((tail, dict(query)))
        answer = self.answers.get(tail, NotFoundError("no such thing"))
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def run(
    tmp_path: Path,
    registry: Registry,
    check: Callable[[Listings], Awaitable[None]],
    library: MemoryLibrary | None = None,
) -> None:
    async def main() -> None:
        listings = Listings(
            registry.passthrough, library or MemoryLibrary("org/app"), tmp_path / "listings.sqlite", MAX_AGE_S
        )
        try:
            await check(listings)
        finally:
            listings.close()

    trio.run(main)


def tags_of(passed: Passed) -> list[str]:
    document = json.loads(passed.body)
    assert document["name"] == "org/app"
    return list(document["tags"])


def tag_list(tags: list[str] | None, link: str = "") -> Passed:
    return Passed(json.dumps({"name": "org/app", "tags": tags}).encode(), "application/json", link)


@pytest.mark.parametrize(
    ("query", "page", "more"),
    [
        ({}, TAGS, ""),
        ({"n": "2"}, ["a", "b"], "n=2&last=b"),
        ({"n": "2", "last": "b"}, ["c", "d"], "n=2&last=d"),
        ({"n": "2", "last": "d"}, ["e"], ""),
        ({"n": "5"}, TAGS, ""),
        ({"n": "0"}, [], ""),
        ({"last": "c"}, ["d", "e"], ""),
        ({"n": "x", "last": "a"}, TAGS[1:], ""),
    ],
)
def test_lists_of_a_registry_without_pages_are_paged_here(tmp_path, query, page, more) -> None:
    registry = Registry({"tags/list": tag_list(TAGS[::-1])})

    async def check(listings: Listings) -> None:
        passed = await listings.tags(APP, query)
        assert tags_of(passed) == page
        assert passed.link == (f'<?{more}>; rel="next"' if more else "")

    run(tmp_path, registry, check)


@pytest.mark.parametrize("answer", [tag_list(["d", "c"], "<x>; rel=next"), tag_list(None), Passed(b"{", "text/html")])
def test_a_page_by_the_registry_stays_unchanged(tmp_path, answer: Passed) -> None:
    async def check(listings: Listings) -> None:
        assert await listings.tags(APP, {"n": "2", "last": "z"}) == answer

    run(tmp_path, Registry({"tags/list": answer}), check)


def test_lists_are_asked_for_once_in_a_while_and_outlive_the_registry(tmp_path, clock, caplog) -> None:
    registry = Registry({"tags/list": tag_list(TAGS)})

    async def check(listings: Listings) -> None:
        for _ in range(2):
            assert tags_of(await listings.tags(APP, {})) == TAGS
        assert len(registry.asked) == 1
        clock[0] += listings_module.FRESH_S + 1
        await listings.tags(APP, {})
        assert len(registry.asked) == 2
        registry.answers["tags/list"] = UnavailableError("gone")
        clock[0] += MAX_AGE_S - 1

    async def check_without_registry(listings: Listings) -> None:
        """After a restart, and with a page that was not requested before."""
        assert tags_of(await listings.tags(APP, {})) == TAGS
        page = await listings.tags(APP, {"n": "2", "last": "bb"})
        assert (tags_of(page), page.link) == (["c", "d"], '<?n=2&last=d>; rel="next"')
        clock[0] += 2
        for query in ({}, {"n": "2"}):
            with pytest.raises(UnavailableError):
                await listings.tags(APP, query)
        with pytest.raises(UnavailableError):
            await listings.tags(Locator("docker.io", "org/other", "manifests"), {})

    run(tmp_path, registry, check)
    run(tmp_path, registry, check_without_registry)


def test_a_clock_that_was_set_back_makes_nothing_fresh(tmp_path, clock) -> None:
    registry = Registry({"tags/list": tag_list(TAGS)})

    async def check(listings: Listings) -> None:
        await listings.tags(APP, {})
        clock[0] -= 5
        await listings.tags(APP, {})
        assert len(registry.asked) == 2

    run(tmp_path, registry, check)


def test_a_list_that_the_registry_deleted_is_not_served(tmp_path, clock) -> None:
    registry = Registry({"tags/list": tag_list(TAGS)})

    async def check(listings: Listings) -> None:
        await listings.tags(APP, {})
        clock[0] += listings_module.FRESH_S + 1
        registry.answers.clear()
        with pytest.raises(NotFoundError):
            await listings.tags(APP, {})

    run(tmp_path, registry, check)


def test_remembered_lists_are_bounded_and_the_oldest_is_dropped_first(tmp_path, clock, monkeypatch) -> None:
    monkeypatch.setattr(listings_module, "KEPT_BYTES", 2500)
    registry = Registry({"tags/list": tag_list(["t" * 128] * 7)})

    async def check(listings: Listings) -> None:
        for number in range(4):
            clock[0] += 1
            await listings.tags(Locator("docker.io", f"org/app{number}", "manifests"), {})
        registry.answers["tags/list"] = UnavailableError("gone")
        clock[0] += 100
        for number in (2, 3):
            await listings.tags(Locator("docker.io", f"org/app{number}", "manifests"), {})
        for number in (0, 1):
            with pytest.raises(UnavailableError):
                await listings.tags(Locator("docker.io", f"org/app{number}", "manifests"), {})

    run(tmp_path, registry, check)


def test_many_lists_of_a_repository_do_not_push_out_those_of_others(tmp_path, clock, monkeypatch) -> None:
    """S-45"""
    monkeypatch.setattr(listings_module, "KEPT_BYTES", 6000)
    registry = Registry({"tags/list": tag_list(["t" * 128] * 7)})
    other = Locator("docker.io", "org/other", "manifests")

    async def check(listings: Listings) -> None:
        await listings.tags(other, {})
        for number in range(40):
            clock[0] += 1
            await listings.tags(APP, {"n": "1000", "last": f"{number}"})
        registry.answers["tags/list"] = UnavailableError("gone")
        clock[0] += 100
        assert await listings.tags(other, {})

    run(tmp_path, registry, check)


def referrers_of(passed: Passed) -> list[dict[str, object]]:
    document = json.loads(passed.body)
    assert (document["schemaVersion"], document["mediaType"], passed.media_type) == (2, INDEX, INDEX)
    return list(document["manifests"])


def test_referrers_are_filtered_here_and_asked_for_once(tmp_path) -> None:
    registry = Registry({f"referrers/{SUBJECT}": Passed(index(DESCRIPTORS), INDEX, "<?x=1>; rel=next")})

    async def check(listings: Listings) -> None:
        whole = await listings.referrers(APP, SUBJECT, {})
        assert (whole.body, whole.link, whole.filters) == (index(DESCRIPTORS), "<?x=1>; rel=next", "")
        for kind, expected in (("sig/a", DESCRIPTORS[:1]), ("sbom/b", DESCRIPTORS[1:2]), ("other", [])):
            some = await listings.referrers(APP, SUBJECT, {"artifactType": kind})
            assert (referrers_of(some), some.link, some.filters) == (expected, whole.link, "artifactType")
        assert registry.asked == [(f"referrers/{SUBJECT}", {})]
        await listings.referrers(APP, SUBJECT, {"x": "1", "artifactType": "sig/a"})
        assert registry.asked[1:] == [(f"referrers/{SUBJECT}", {"x": "1"})]

    run(tmp_path, registry, check)


@pytest.mark.parametrize("answer", [NotFoundError("404"), Passed(b"<html>", "text/html")])
@pytest.mark.parametrize("subject", [SUBJECT, Digest("sha512", "cd" * 64)])
def test_without_the_referrers_api_the_tag_is_read_and_remembered(tmp_path, clock, answer, subject: Digest) -> None:
    registry = Registry({f"referrers/{subject}": answer})
    library = MemoryLibrary("org/app")
    library.tag(f"{subject.algorithm}-{subject.hex[:64]}", index(DESCRIPTORS), INDEX)

    async def check(listings: Listings) -> None:
        assert referrers_of(await listings.referrers(APP, subject, {})) == DESCRIPTORS
        library.error = registry.answers[f"referrers/{subject}"] = UnavailableError("gone")
        clock[0] += listings_module.FRESH_S + 1
        some = await listings.referrers(APP, subject, {"artifactType": "sbom/b"})
        assert (referrers_of(some), some.filters) == (DESCRIPTORS[1:2], "artifactType")
        other = Digest("sha256", "0" * 64)
        registry.answers[f"referrers/{other}"] = UnavailableError("gone")
        with pytest.raises(UnavailableError):
            await listings.referrers(APP, other, {})

    run(tmp_path, registry, check, library)


@pytest.mark.parametrize("media_type", [None, "application/vnd.oci.image.manifest.v1+json"])
def test_an_object_without_referrers_has_an_empty_index_which_is_kept(tmp_path, clock, media_type: str | None) -> None:
    registry = Registry({})
    library = MemoryLibrary("org/app")
    if media_type:
        library.tag(f"sha256-{SUBJECT.hex}", b"{}", media_type)

    async def check(listings: Listings) -> None:
        assert referrers_of(await listings.referrers(APP, SUBJECT, {})) == []
        clock[0] += listings_module.FRESH_S + 1
        registry.answers[f"referrers/{SUBJECT}"] = UnavailableError("gone")
        assert referrers_of(await listings.referrers(APP, SUBJECT, {"artifactType": "x"})) == []

    run(tmp_path, registry, check, library)


@pytest.mark.parametrize("body", [b"", b"[" * 100000, b"\xff", b"{}", b'{"manifests": 1}', index([{"digest": 7}])])
def test_a_malformed_index_is_passed_on_or_filtered_without_an_error(tmp_path, body: bytes) -> None:
    async def check(listings: Listings) -> None:
        passed = await listings.referrers(APP, SUBJECT, {"artifactType": "x"})
        assert passed.body == body or referrers_of(passed) == []

    run(tmp_path, Registry({f"referrers/{SUBJECT}": Passed(body, INDEX)}), check)


def test_a_damaged_file_is_replaced(tmp_path, caplog) -> None:
    (tmp_path / "listings.sqlite").write_bytes(b"not a database" * 1000)

    async def check(listings: Listings) -> None:
        assert tags_of(await listings.tags(APP, {})) == TAGS

    run(tmp_path, Registry({"tags/list": tag_list(TAGS)}), check)
    assert "is damaged" in caplog.text

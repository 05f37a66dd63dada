"""Access to single objects: origins of objects, and the registry's verdicts on them, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.blocks import object_facts
from node.blocks.object_facts import OPEN, UNKNOWN, ObjectFacts, origin_of
from node.mirror.object_access import FRESH_S, REFUSED_S, ObjectAccess
from node.oci.references import Grant, Locator
from protocol.errors import DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Digest, ObjectRef

DIGEST = Digest("sha256", "ab" * 32)
PRIVATE, PUBLIC, TEAM = (Locator("origin.test", name, "blobs") for name in ("team/secret", "public/app", "team/app"))
ALICE = replace(TEAM, grant=Grant("Bearer of-alice"))
GRACE_S = 3600.0


class Registry:
    """`holds`: repositories that have the object. `denies`: those that refuse it."""

    def __init__(self) -> None:
        self.holds: set[str] = set()
        self.denies: set[str] = set()
        self.down = False
        self.asked: list[tuple[str, bool]] = []

    async def gives(self, locator: Locator, digest: Digest) -> bool:
        self.asked.append((locator.repository, locator.grant is not None))
        await trio.lowlevel.checkpoint()
        if self.down:
            raise UnavailableError("out of reach")
        if locator.repository in self.denies:
            return False
        if locator.repository not in self.holds:
            raise NotFoundError("not found")
        return True


Scenario = Callable[[ObjectAccess, ObjectFacts, Registry], Awaitable[None]]


def play(path: Path | None, scenario: Scenario) -> None:
    async def main() -> None:
        registry, facts = Registry(), ObjectFacts(path)
        async with trio.open_nursery() as nursery:
            await scenario(ObjectAccess(registry, facts, nursery), facts, registry)
        facts.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def refusal(access: ObjectAccess, way: Locator) -> type[ShoalError] | None:
    try:
        await access.check(way, DIGEST, GRACE_S)
    except ShoalError as error:
        return type(error)
    return None


def test_a_private_object_is_served_elsewhere_only_if_the_registry_gives_it_there(tmp_path: Path) -> None:
    """S-35"""

    async def scenario(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        facts.granted(DIGEST, PRIVATE)
        assert await refusal(access, replace(PRIVATE, grant=Grant("Bearer x"))) is None
        assert registry.asked == [], "a client that may read the repository may read what came through it"
        assert await refusal(access, PUBLIC) is NotFoundError
        registry.holds.add(PUBLIC.repository)
        assert await refusal(access, PUBLIC) is NotFoundError
        assert len(registry.asked) == 1
        await trio.sleep(REFUSED_S)
        for _ in range(3):
            assert await refusal(access, PUBLIC) is None
        assert len(registry.asked) == 2
        await trio.sleep(FRESH_S)
        registry.denies.add(PUBLIC.repository)
        assert await refusal(access, PUBLIC) is DeniedError

    play(tmp_path / "objects.sqlite", scenario)


def test_a_verdict_is_of_a_repository_a_way_and_a_kind(tmp_path: Path) -> None:
    async def scenario(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        facts.granted(DIGEST, PRIVATE)
        registry.holds = {TEAM.repository}
        ways = [ALICE, TEAM, ALICE.of_kind("manifests"), replace(TEAM, grant=Grant("Bearer of-mallory"))]
        for way in ways:
            assert await refusal(access, way) is None
        assert len(registry.asked) == len(ways)

    play(tmp_path / "objects.sqlite", scenario)


def test_many_clients_cause_one_question(tmp_path: Path) -> None:
    async def scenario(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        facts.granted(DIGEST, PRIVATE)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(refusal, access, PUBLIC)
        assert len(registry.asked) == 1

    play(tmp_path / "objects.sqlite", scenario)


def test_an_outage_serves_what_was_confirmed_before_within_the_grace(tmp_path: Path) -> None:
    """S-35"""

    async def before(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        facts.granted(DIGEST, PRIVATE)
        registry.holds.add(TEAM.repository)
        assert await refusal(access, ALICE) is None

    async def after(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        registry.down = True
        assert await refusal(access, ALICE) is None
        assert await refusal(access, PUBLIC) is UnavailableError

    play(tmp_path / "objects.sqlite", before)
    play(tmp_path / "objects.sqlite", after)


def test_objects_of_unknown_origin_are_asked_for_while_that_is_possible(tmp_path: Path) -> None:
    """S-35"""

    async def scenario(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        assert await refusal(access, PUBLIC) is NotFoundError
        await trio.sleep(REFUSED_S)
        registry.down = True
        assert await refusal(access, PUBLIC) is None
        registry.down, registry.holds = False, {PUBLIC.repository}
        await trio.sleep(FRESH_S)
        assert await refusal(access, PUBLIC) is None
        asked = len(registry.asked)
        await trio.sleep(FRESH_S)
        assert await refusal(access, PUBLIC) is None
        assert len(registry.asked) == asked, "its origin is the repository that the registry confirmed"
        registry.down = True
        assert await refusal(access, TEAM) is UnavailableError

    play(tmp_path / "objects.sqlite", scenario)


def test_an_open_object_needs_no_question(tmp_path: Path) -> None:
    async def scenario(access: ObjectAccess, facts: ObjectFacts, registry: Registry) -> None:
        facts.given_to_all(DIGEST)
        assert await refusal(access, ALICE) is None
        assert registry.asked == []

    play(tmp_path / "objects.sqlite", scenario)


marks = st.binary(min_size=16, max_size=16).filter(lambda mark: mark != UNKNOWN)


@given(st.lists(st.sampled_from([OPEN, UNKNOWN]) | marks))
def test_no_claim_of_a_member_removes_a_mark(origins: list[bytes]) -> None:
    """S-61"""
    facts = ObjectFacts()
    for number, origin in enumerate(origins):
        facts.arrived(DIGEST, origin)
        before = [origin for origin in origins[: number + 1] if origin not in (OPEN, UNKNOWN)]
        expected = before[0] if before else OPEN if OPEN in origins[: number + 1] else UNKNOWN
        assert facts.origin(DIGEST) == expected


def test_what_a_registry_gave_to_everybody_stays_open() -> None:
    """S-61"""
    facts = ObjectFacts()
    facts.given_to_all(DIGEST)
    facts.granted(DIGEST, PRIVATE)
    assert facts.origin(DIGEST) == OPEN
    marked = Digest("sha256", "cd" * 32)
    facts.granted(marked, PRIVATE)
    facts.given_to_all(marked)
    assert facts.origin(marked) == origin_of(PRIVATE)


def test_facts_outlive_a_restart_and_names_of_one_registry_are_equal(tmp_path: Path) -> None:
    facts = ObjectFacts(tmp_path / "objects.sqlite")
    facts.granted(DIGEST, PRIVATE)
    facts.verified(ObjectRef(DIGEST, 7))
    facts.close()
    facts = ObjectFacts(tmp_path / "objects.sqlite")
    assert (facts.origin(DIGEST), facts.size(DIGEST)) == (origin_of(PRIVATE), 7)
    assert facts.contradicts(ObjectRef(DIGEST, 8))
    assert origin_of(Locator("index.docker.io", "a", "blobs")) == origin_of(Locator("docker.io", "a", "manifests"))
    facts.close()


def test_a_mark_is_kept_while_the_object_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S-45"""
    monkeypatch.setattr(object_facts, "MAX_FACTS", 8)
    monkeypatch.setattr(object_facts, "MAX_RECENT", 1)
    digests = [Digest("sha256", f"{number:064x}") for number in range(100)]
    held = set(digests[:3])
    facts = ObjectFacts(tmp_path / "objects.sqlite", held.__contains__)
    for digest in digests:
        facts.granted(digest, PRIVATE)
    facts.close()
    facts = ObjectFacts(tmp_path / "objects.sqlite", held.__contains__)
    assert all(facts.origin(digest) == origin_of(PRIVATE) for digest in held)
    assert sum(facts.origin(digest) != UNKNOWN for digest in digests) <= 8
    facts.close()

"""Access control: verdicts of a registry in memory, in virtual time."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from node.blocks.object_facts import ObjectFacts
from node.mirror.access import MAX_PUBLIC, MAX_VERDICTS, Access, ChallengedError, PublicTable
from node.mirror.object_access import FRESH_S, REFUSED_S
from node.oci.references import Locator
from protocol.errors import DeniedError, NotFoundError, UnavailableError
from protocol.ids import Digest

GRACE_S, PUBLIC_GRACE_S = 3600.0, 7 * 86400.0
SECRET = "s3cr3t-token-of-alice"
ALICE, MALLORY = f"Bearer {SECRET}", "Bearer of-mallory"
PRIVATE, OPEN, HIDDEN = (
    Locator("origin.test", name, "manifests") for name in ("team/app", "public/app", "team/hidden")
)


class Registry:
    """Lets every client read `public`, and those in `allowed` the rest; answers 404 for `hidden`."""

    def __init__(self) -> None:
        self.public = {OPEN.repository}
        self.allowed = {(PRIVATE.repository, ALICE), (HIDDEN.repository, ALICE)}
        self.hidden = {HIDDEN.repository}
        self.asked: list[tuple[str, str]] = []
        self.down = False
        self.bearer = True

    async def admits(self, locator: Locator, reference: str) -> bool:
        shown = locator.grant.authorization if locator.grant else ""
        self.asked.append((locator.repository, shown))
        await trio.lowlevel.checkpoint()
        if self.down:
            raise UnavailableError("the registry is out of reach")
        allowed = locator.repository in self.public or (locator.repository, shown) in self.allowed
        if not allowed and locator.repository in self.hidden:
            raise NotFoundError("not found")
        return allowed

    async def gives(self, locator: Locator, digest: Digest) -> bool:
        raise AssertionError("these tests are about repositories")

    def challenge(self, locator: Locator, *, basic: bool) -> str:
        if self.bearer:
            return f'Bearer realm="https://auth.test/token",scope="repository:{locator.repository}:pull"'
        return 'Basic realm="registry"' if basic else ""


class Fixture:
    def __init__(self, folder: Path, nursery: trio.Nursery, *, loopback: bool = True, upstream: str = "origin.test"):
        self.registry = Registry()
        self.site: dict[str, float] = {}
        self.public = PublicTable(folder / "access.sqlite")
        self.facts = ObjectFacts(folder / "objects.sqlite")
        self.access = Access(
            {upstream: GRACE_S},
            self.registry,
            self.public,
            self.facts,
            site_says=self.site_says,
            nursery=nursery,
            public_grace_s=PUBLIC_GRACE_S,
            loopback=loopback,
        )

    async def site_says(self, locator: Locator, reference: str) -> float | None:
        return self.site.get(locator.repository)

    async def admit(self, locator: Locator, authorization: str = "") -> str:
        """The Authorization with which the node then reads."""
        admitted = await self.access.admit(locator, "v1", authorization)
        assert str(admitted) == str(locator)
        return admitted.grant.authorization if admitted.grant else ""


def play(folder: Path, scenario: Callable[[Fixture], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            fixture = Fixture(folder, nursery, **options)  # type: ignore[arg-type]
            await scenario(fixture)
            fixture.public.close()
            fixture.facts.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_public_repository_costs_one_question_a_minute(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        for _ in range(10):
            assert await fixture.admit(OPEN) == ""
        assert await fixture.admit(OPEN, ALICE) == "", "public content is read without the client's token"
        assert fixture.registry.asked == [(OPEN.repository, "")]
        await trio.sleep(FRESH_S)
        fixture.registry.public.clear()
        with pytest.raises(ChallengedError):
            await fixture.admit(OPEN)

    play(tmp_path, scenario)


def test_a_private_repository_needs_a_valid_token_of_its_own(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        with pytest.raises(ChallengedError) as caught:
            await fixture.admit(PRIVATE)
        assert caught.value.challenge == 'Bearer realm="https://auth.test/token",scope="repository:team/app:pull"'
        for _ in range(5):
            assert await fixture.admit(PRIVATE, ALICE) == ALICE
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE, MALLORY)
        with pytest.raises(ChallengedError):
            await fixture.admit(Locator("origin.test", "other/app", "blobs"), ALICE)
        assert fixture.registry.asked.count((PRIVATE.repository, ALICE)) == 1
        assert fixture.registry.asked.count((PRIVATE.repository, "")) == 1

    play(tmp_path, scenario)


def test_concurrent_clients_cause_one_question(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(fixture.admit, OPEN)
        assert len(fixture.registry.asked) == 1

    play(tmp_path, scenario)


def test_verdicts_end(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        assert await fixture.admit(PRIVATE, ALICE) == ALICE
        fixture.registry.allowed.clear()
        assert await fixture.admit(PRIVATE, ALICE) == ALICE
        await trio.sleep(FRESH_S)
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE, ALICE)
        fixture.registry.allowed.add((PRIVATE.repository, ALICE))
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE, ALICE)
        await trio.sleep(REFUSED_S)
        assert await fixture.admit(PRIVATE, ALICE) == ALICE

    play(tmp_path, scenario)


def test_a_token_that_the_registry_refuses_during_use_is_verified_again(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        admitted = await fixture.access.admit(PRIVATE, "v1", ALICE)
        assert isinstance(fixture.access.refused(admitted), ChallengedError)
        await fixture.admit(PRIVATE, ALICE)
        assert fixture.registry.asked.count((PRIVATE.repository, ALICE)) == 2

    play(tmp_path, scenario)


def test_given_access_lasts_while_the_registry_is_down_but_not_forever(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        await fixture.admit(PRIVATE, ALICE)
        await fixture.admit(OPEN)
        fixture.registry.down = True
        await trio.sleep(GRACE_S / 2)
        assert await fixture.admit(PRIVATE, ALICE) == ALICE
        asked = len(fixture.registry.asked)
        assert await fixture.admit(PRIVATE, ALICE) == ALICE
        assert len(fixture.registry.asked) == asked, "an unreachable registry is not tried each time"
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE)
        with pytest.raises(UnavailableError):
            await fixture.admit(PRIVATE, MALLORY)
        await trio.sleep(GRACE_S / 2 + FRESH_S)
        with pytest.raises(UnavailableError):
            await fixture.admit(PRIVATE, ALICE)
        assert await fixture.admit(OPEN) == ""

    play(tmp_path, scenario)


def test_public_repositories_stay_public_after_a_restart_without_the_registry(tmp_path: Path) -> None:
    async def before(fixture: Fixture) -> None:
        await fixture.admit(OPEN)
        await fixture.admit(PRIVATE, ALICE)

    async def after(fixture: Fixture) -> None:
        fixture.registry.down = True
        assert await fixture.admit(OPEN) == ""
        with pytest.raises(UnavailableError):
            await fixture.admit(PRIVATE)

    play(tmp_path, before)
    play(tmp_path, after)


def test_a_repository_that_is_no_longer_public_is_forgotten(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        await fixture.admit(OPEN)
        fixture.registry.public.clear()
        await trio.sleep(FRESH_S)
        with pytest.raises(ChallengedError):
            await fixture.admit(OPEN)
        assert fixture.public.age(OPEN) is None
        fixture.registry.down = True
        await trio.sleep(GRACE_S)
        with pytest.raises(UnavailableError):
            await fixture.admit(OPEN)

    play(tmp_path, scenario)


@pytest.mark.parametrize(("age", "served"), [(60.0, True), (PUBLIC_GRACE_S + 60, False), (None, False)])
def test_the_site_is_asked_whether_a_repository_was_public(tmp_path: Path, age: float | None, served: bool) -> None:
    """S-26"""

    async def scenario(fixture: Fixture) -> None:
        fixture.registry.down = True
        if age is not None:
            fixture.site[OPEN.repository] = age
        if served:
            assert await fixture.admit(OPEN) == ""
        else:
            with pytest.raises(UnavailableError):
                await fixture.admit(OPEN)

    play(tmp_path, scenario)


def test_the_site_is_not_asked_for_tokens(tmp_path: Path) -> None:
    """S-26"""

    async def scenario(fixture: Fixture) -> None:
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE)
        fixture.registry.down = True
        fixture.site[PRIVATE.repository] = 1.0
        with pytest.raises(UnavailableError):
            await fixture.admit(PRIVATE, ALICE)

    play(tmp_path, scenario)


def test_a_hidden_repository_is_not_found_without_a_token(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        for authorization in ("", MALLORY):
            with pytest.raises(NotFoundError):
                await fixture.admit(HIDDEN, authorization)
        assert await fixture.admit(HIDDEN, ALICE) == ALICE

    play(tmp_path, scenario)


@pytest.mark.parametrize("loopback", [True, False])
def test_passwords_are_accepted_on_loopback_only(tmp_path: Path, loopback: bool) -> None:
    async def scenario(fixture: Fixture) -> None:
        fixture.registry.bearer = False
        fixture.registry.allowed.add((PRIVATE.repository, "Basic YTpi"))
        with pytest.raises(DeniedError) as caught:
            await fixture.admit(PRIVATE)
        assert isinstance(caught.value, ChallengedError) == loopback
        if loopback:
            assert await fixture.admit(PRIVATE, "Basic YTpi") == "Basic YTpi"
        else:
            with pytest.raises(DeniedError):
                await fixture.admit(PRIVATE, "Basic YTpi")
            assert {shown for _, shown in fixture.registry.asked} == {""}

    play(tmp_path, scenario, loopback=loopback)


@pytest.mark.parametrize(
    "authorization", ["Digest x", "Bearer", "Bearer a\r\nX: y", "Bearer ü", "Bearer " + "a" * (1 << 20), "\x00"]
)
def test_an_unusable_authorization_header_is_sent_to_no_registry(tmp_path: Path, authorization: str) -> None:
    async def scenario(fixture: Fixture) -> None:
        with pytest.raises(ChallengedError):
            await fixture.admit(PRIVATE, authorization)
        assert {shown for _, shown in fixture.registry.asked} == {""}

    play(tmp_path, scenario)


def test_other_modes_ask_no_registry(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        assert await fixture.admit(PRIVATE, ALICE) == ""
        assert fixture.registry.asked == []

    play(tmp_path, scenario, upstream="elsewhere.test")


def test_invented_credentials_push_out_no_right(tmp_path: Path) -> None:
    """S-45"""

    async def scenario(fixture: Fixture) -> None:
        fixture.registry.allowed.add((PRIVATE.repository, ALICE))
        assert await fixture.admit(PRIVATE, ALICE) == ALICE
        for number in range(MAX_VERDICTS + 100):
            with pytest.raises(ChallengedError):
                await fixture.admit(PRIVATE, f"Bearer {number}")
        fixture.registry.down = True
        assert await fixture.admit(PRIVATE, ALICE) == ALICE

    play(tmp_path, scenario)


def test_a_public_repository_stays_known_whatever_others_are_read(tmp_path: Path) -> None:
    """S-45"""
    with closing(PublicTable(tmp_path / "access.sqlite")) as table:
        table.note(OPEN)
        for number in range(MAX_PUBLIC + 100):
            table.note(Locator("origin.test", f"other/app-{number}", "blobs"))
        assert table.age(OPEN) is not None
    with closing(PublicTable(tmp_path / "access.sqlite")) as table:
        assert table.age(OPEN) is not None
        table.drop(OPEN)
        assert table.age(OPEN) is None


def test_verdicts_are_bounded_and_hold_no_secret(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        fixture.registry.allowed.add((PRIVATE.repository, ALICE))
        rng = Random(1)
        for _ in range(MAX_VERDICTS + 100):
            with pytest.raises(ChallengedError):
                await fixture.admit(PRIVATE, f"Bearer {rng.randbytes(8).hex()}")
        assert len(fixture.access.verdicts) == MAX_VERDICTS
        assert (await fixture.access.admit(PRIVATE, "v1", ALICE)).grant is not None
        gc.collect()
        assert SECRET not in repr([vars(fixture.access), list(fixture.access.verdicts.items())])

    play(tmp_path, scenario)


def test_no_text_of_a_locator_shows_its_grant(tmp_path: Path) -> None:
    async def scenario(fixture: Fixture) -> None:
        admitted = await fixture.access.admit(PRIVATE, "v1", ALICE)
        assert (
            SECRET not in f"{admitted} {admitted!r} {admitted.of_kind('blobs')!r} {fixture.access.refused(admitted)!r}"
        )
        assert admitted.of_kind("blobs").grant == admitted.grant
        assert Locator.parse(str(admitted)).grant is None

    play(tmp_path, scenario)


def test_a_damaged_table_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "access.sqlite").write_bytes(b"this is no database" * 1000)
    table = PublicTable(tmp_path / "access.sqlite")
    table.note(OPEN, 5.0)
    age = table.age(OPEN)
    assert age is not None
    assert 5.0 <= age < 60.0
    table.note(PRIVATE, -3600.0)
    assert table.age(PRIVATE) is None, "a clock that was set back makes it unknown"
    table.close()


def test_a_pinned_repository_stays_as_it_was_last_seen(tmp_path: Path) -> None:
    table = PublicTable(tmp_path / "access.sqlite", lambda locator: locator == OPEN)
    assert table.age(OPEN) is None, "it was never seen to be public"
    for locator in (OPEN, PRIVATE):
        table.note(locator, 1e6)
    assert table.age(OPEN) == 0.0
    assert table.age(PRIVATE) == pytest.approx(1e6, abs=60.0)
    table.drop(OPEN)
    assert table.age(OPEN) is None
    table.close()

"""A member that lies about names: what tags stand for, whether objects exist, and how large they are."""

from __future__ import annotations

import http.client
import itertools
from contextlib import closing

import pytest

from tests.support.image import INDEX, MANIFEST
from tests.support.lying_daemon import tell_lies
from tests.support.siege import Published, Siege, assert_no_slower
from tests.support.site import UPSTREAM, Node

TAGS = 16
"""More than enough that the liar is home of some names, whatever the keys of this run are."""
WORKING_S = 60.0
"""A pull takes at most so long beside a member that answers nothing: its answers are awaited once for each block that
it is asked for, while others are asked too."""
LIE_OF_ALL = ("not-found", "denied", "bad-request", "unavailable", "busy")


def digest_of(node: Node, published: Published, tag: str) -> tuple[int, str | None]:
    """Status and digest that a client is given for a tag."""
    with closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
        headers = {"Accept": f"{INDEX}, {MANIFEST}"}
        connection.request("HEAD", f"/v2/{UPSTREAM}/{published.repository}/manifests/{tag}", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Docker-Content-Digest")


def tags_of(siege: Siege) -> list[Published]:
    """Names of many homes, all for the same small image."""
    first = siege.fresh(size=1000)
    return [first, *(siege.fresh(f"{first.repository}-{number}", size=1000) for number in range(TAGS - 1))]


@pytest.fixture
def evil(siege: Siege) -> Published:
    """An image that the liar holds, and would like others to run."""
    image = siege.fresh("evil/app", size=2000)
    siege.pull(siege.liar, image)
    return image


def have_it_named(siege: Siege, evil: Published) -> None:
    index = evil.image.index
    tell_lies(siege.liar.folder, lies={"Resolve": "own image"}, image=[index.digest, index.size, index.media_type])


def test_a_tag_is_what_the_registry_says_whatever_its_home_says(siege: Siege, evil: Published) -> None:
    """S-25"""
    with siege.unharmed():
        have_it_named(siege, evil)
        for published, node in itertools.product(tags_of(siege), siege.honest):
            assert digest_of(node, published, "v1") == (200, published.image.index.digest)


def test_a_negative_answer_of_a_member_reaches_no_client(siege: Siege) -> None:
    """S-47"""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        for lie in LIE_OF_ALL:
            siege.lies(every=lie)
            attacked = siege.cold_pulls(1)
            assert_no_slower(calm, attacked)


def test_a_member_that_denies_all_in_an_outage_changes_no_answer(siege: Siege) -> None:
    """S-47: pinned on a node and held by the site: served by that node by tag, and by every node by digest."""
    names = tags_of(siege)
    image = siege.fresh()
    for published in names:
        for node in siege.honest:
            siege.pull(node, published)
    siege.pull_everywhere(image)
    assert siege.honest[0].ctl("pin", image.name).returncode == 0
    siege.proxy.cut()
    with siege.unharmed():
        for lie in ("not-found", "denied"):
            siege.lies(every=lie)
            for published, node in itertools.product(names, siege.honest):
                assert digest_of(node, published, "v1") == (200, published.image.index.digest)
            siege.pull_everywhere(image)
            for node in siege.honest:
                siege.pull(node, image, image.image.index.digest)


def test_in_an_outage_one_members_word_for_a_tag_is_not_enough(siege: Siege, evil: Published) -> None:
    """S-46: a node that never asked for the tag gives the image on which two members agree, or none: not the liar's."""
    *askers, other = siege.honest
    shared, lonely = siege.fresh(size=1000), siege.fresh(size=1000)
    for node in askers[:2]:
        siege.pull(node, shared)
    siege.pull(askers[0], lonely)
    siege.proxy.cut()
    have_it_named(siege, evil)
    with siege.unharmed():
        assert digest_of(other, shared, "v1") == (200, shared.image.index.digest)
        status, digest = digest_of(other, lonely, "v1")
        assert digest in (None, lonely.image.index.digest)
        assert status in (200, 503)
        unknown, _ = digest_of(other, evil, "no-such-tag")
        assert unknown == 503, "the liar alone invents no tag"


def test_a_member_that_lies_about_sizes_fails_no_pull(siege: Siege) -> None:
    """S-49"""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        siege.lies(Resolve="wrong size")
        assert_no_slower(calm, siege.cold_pulls(2))


@pytest.mark.parametrize("lie", ["holds all", "bomb"])
def test_false_holdings_and_wrong_answers_fail_no_pull(siege: Siege, lie: str) -> None:
    """S-18"""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        siege.lies(FindHolders=lie, GetHoldings=lie, Resolve="bomb" if lie == "bomb" else "")
        assert_no_slower(calm, siege.cold_pulls(2))


def test_a_member_that_only_says_that_it_works_fails_no_pull(siege: Siege) -> None:
    """S-19, S-47: it answers every request with `Waiting`, for ever."""
    with siege.unharmed():
        siege.lies(every="never")
        took = siege.cold_pulls(2)
    print(f"pulls took {sorted(took)}")
    assert max(took) < WORKING_S

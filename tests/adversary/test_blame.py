"""A liar that would have honest members shut out: wrong shards, false records, and accusations."""

from __future__ import annotations

import random
from hashlib import sha256

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.identity import Identity
from node.oci.references import Locator
from protocol.evidence import Evidence, make_evidence
from protocol.ids import Digest, ObjectRef, PeerId
from protocol.messages import Accuse, GetShards
from protocol.records import Record, make_record
from tests.support.adversary import Hole
from tests.support.forgery import own_statement, ping
from tests.support.processes import wait_for
from tests.support.siege import Published, Siege, assert_no_slower, quarantined
from tests.support.site import UPSTREAM

SHUT_OUT_S = 60.0


def by_any(siege: Siege) -> bool:
    return any(siege.liar.name in quarantined(node) for node in siege.honest)


def test_records_of_invented_signers_shut_out_no_honest_member(siege: Siege) -> None:
    """S-09"""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        siege.lies(GetShards="by ghosts", GetHoldings="holds all")
        assert_no_slower(calm, siege.cold_pulls(3))


def test_a_maker_of_wrong_shards_is_shut_out_alone(siege: Siege) -> None:
    """S-04"""
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        siege.lies(GetShards="wrong bytes")
        assert_no_slower(calm, siege.cold_pulls(4))
        wait_for("a reader shut the liar out", lambda: by_any(siege), seconds=SHUT_OUT_S, every=0.3)


def test_the_signer_of_false_records_is_shut_out_by_all_and_alone(siege: Siege) -> None:
    """S-05"""
    with siege.unharmed(shut_out=True, expected="has wrong bytes"):
        siege.lies(GetShards="fabricated")
        siege.cold_pulls(4)
        wait_for(
            "all shut the liar out",
            lambda: all(siege.liar.name in quarantined(node) for node in siege.honest),
            seconds=SHUT_OUT_S,
            every=0.3,
        )


def test_a_liar_that_changes_its_weight_and_leaves_blames_no_honest_member(siege: Siege) -> None:
    """S-04: it is home of more blocks, sends their keepers wrong shards, and says that it was never there."""
    rng, attacker = random.Random(2), siege.attacker
    with Hole() as hole, siege.unharmed():
        for _ in range(3):
            siege.tell(ping([own_statement(attacker, [siege.liar_address], rng, weight=2.0, leaving=False)]))
            siege.lies(GetShards="wrong bytes")
            siege.cold_pulls(1)
            siege.tell(ping([own_statement(attacker, hole.addresses, rng, weight=0.5, leaving=True)]))
            siege.cold_pulls(1)


def true_records(siege: Siege, published: Published) -> list[Record]:
    """Records of honest members for the first blocks of an image that all have pulled."""
    layer = published.image.layers[0]
    records: dict[str, Record] = {}
    for node in siege.honest:
        with siege.attacker.line(node, "urgent") as line:
            for index in range(3):
                answer = line.ask(GetShards(layer.digest, index, 1, layer.size, 4, 1, 0, 0, str(locator(published))))
                for field in answer[1:]:
                    if isinstance(field, list) and len(field) == 7:
                        record = msgspec.convert(field, Record)
                        records[f"{record.signer} {record.index}"] = record
    return [record for record in records.values() if record.signer != siege.attacker.peer]


def locator(published: Published, repository: str = "") -> Locator:
    return Locator(UPSTREAM, repository or published.repository, "blobs")


def false_evidence(siege: Siege, record: Record, published: Published) -> list[Evidence]:
    """Accusations of the record's signer, each false in its own way."""
    me = siege.attacker.identity
    other = msgspec.structs.replace(record, sha256=bytes(32), signature=bytes(64))
    ghost = Identity.of(Ed25519PrivateKey.generate())
    true = make_evidence(record, str(locator(published)), PeerId(me.peer_id), me.sign)
    sources = ("evil/app", "no/such", published.repository + "x")
    return [
        true,
        *(make_evidence(record, str(locator(published, place)), PeerId(me.peer_id), me.sign) for place in sources),
        make_evidence(record, "elsewhere.test/a/b#blobs", PeerId(me.peer_id), me.sign),
        make_evidence(record, "not a place", PeerId(me.peer_id), me.sign),
        make_evidence(record, str(locator(published)), PeerId(ghost.peer_id), ghost.sign),
        make_evidence(record, str(locator(published)), PeerId(me.peer_id), me.sign, other),
        msgspec.structs.replace(true, finder=PeerId(record.signer)),
        msgspec.structs.replace(true, source=str(locator(published, "evil/app"))),
    ]


def test_false_accusations_shut_out_no_honest_member(siege: Siege) -> None:
    """S-09"""
    published = siege.fresh()
    siege.fresh("evil/app")
    siege.pull_everywhere(published)
    records = true_records(siege, published)
    assert records, "the liar has a record of an honest member"
    calm = siege.cold_pulls(1)
    with siege.unharmed():
        for record in records:
            for evidence in false_evidence(siege, record, published):
                siege.tell(Accuse(((evidence, 0.0),)))
        assert_no_slower(calm, siege.cold_pulls(2))


@pytest.mark.parametrize("signers", ["ghosts", "the liar"])
def test_a_flood_of_evidence_costs_little(siege: Siege, signers: str) -> None:
    """S-10"""
    me, calm = siege.attacker.identity, siege.cold_pulls(1)

    def evidence(number: int) -> Evidence:
        signer = Identity.of(Ed25519PrivateKey.generate()) if signers == "ghosts" else me
        digest = Digest.parse("sha256:" + sha256(b"%d" % number).hexdigest())
        record = make_record(ObjectRef(digest, 1 << 19), 0, bytes(32), signer=PeerId(signer.peer_id), sign=signer.sign)
        return make_evidence(record, f"{UPSTREAM}/evil/app#blobs", PeerId(me.peer_id), me.sign)

    told = [(evidence(number), 0.0) for number in range(1280)]
    with siege.unharmed():
        siege.tell(*(Accuse(tuple(told[begin : begin + 64])) for begin in range(0, len(told), 64)))
        assert_no_slower(calm, siege.cold_pulls(2))

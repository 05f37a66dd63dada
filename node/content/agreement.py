"""What the answers of several members about one name are worth, while the registry is out of reach.

A member can say anything, so answers count by the hosts that the members run on: a host has one vote for each digest,
however many members it runs. A tag stands for a digest if enough hosts name it, and more hosts than name any other one.
The answer's age is such that the liars among too few hosts to decide cannot make it young: with `needed` votes, the
`needed`-th youngest of the votes for the digest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from node.oci.manifests import Resolved
from protocol.ids import Digest, ObjectRef, PeerId


@dataclass(frozen=True, slots=True)
class Witness:
    """One member's answer about a name. `host` is where this node reaches the member."""

    peer: PeerId
    host: str
    resolved: Resolved


@dataclass(frozen=True, slots=True)
class Agreement:
    """The answer of `hosts` hosts, as these members gave it."""

    resolved: Resolved
    peers: tuple[PeerId, ...]
    hosts: int


def agreements(witnesses: Sequence[Witness], needed: int, doubted: Collection[ObjectRef] = ()) -> Iterable[Agreement]:
    """One Agreement for each digest that is named, that of the most hosts first, then the youngest. Sizes and types are
    those that the most hosts name; descriptors in `doubted` do not count."""
    by_digest: defaultdict[Digest, list[Witness]] = defaultdict(list)
    for witness in witnesses:
        if witness.resolved.ref not in doubted:
            by_digest[witness.resolved.ref.digest].append(witness)
    named = (_agreement(agreeing, needed) for agreeing in by_digest.values())
    return sorted(named, key=lambda agreement: (-agreement.hosts, agreement.resolved.age_s))


def decided(witnesses: Sequence[Witness], needed: int, doubted: Collection[ObjectRef] = ()) -> Agreement | None:
    """The agreement that counts: of at least `needed` hosts, and of more hosts than any other."""
    first, *others = [*agreements(witnesses, needed, doubted), None, None][:2]
    if first is None or first.hosts < needed or any(other and other.hosts == first.hosts for other in others):
        return None
    return first


def _agreement(agreeing: Sequence[Witness], needed: int) -> Agreement:
    ages: dict[str, float] = {}
    hosts_of: defaultdict[tuple[ObjectRef, str], set[str]] = defaultdict(set)
    for witness in agreeing:
        resolved, host = witness.resolved, witness.host
        ages[host] = min(resolved.age_s, ages.get(host, resolved.age_s))
        hosts_of[resolved.ref, resolved.media_type].add(host)
    ref, media_type = max(hosts_of, key=lambda described: len(hosts_of[described]))
    age_s = sorted(ages.values())[min(needed, len(ages)) - 1]
    peers = tuple(dict.fromkeys(witness.peer for witness in agreeing))
    return Agreement(Resolved(ref, media_type, age_s), peers, len(ages))

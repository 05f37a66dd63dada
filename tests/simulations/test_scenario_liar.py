"""A small crowd with a lying member: every pull ends with right bytes, and all members exclude only the liar."""

from __future__ import annotations

import math

from simulations.liar import HONEST, RECORDS, SHARDS, Liar, crowd_of, run
from simulations.run import silent

SMALL = Liar(nodes=12, image=8_000_000, layers=2)


def test_all_members_exclude_the_liar_and_no_other() -> None:
    crowds = run(SMALL, silent).crowds
    assert crowds[HONEST].copies <= 1.02
    for kind in (SHARDS, RECORDS):
        assert crowds[kind].lies
        assert max(crowds[kind].seconds) < math.inf
        assert len(crowds[kind].quarantined) == SMALL.nodes - 1
        assert crowds[kind].wronged == 0
    assert crowds[SHARDS].failed == 0
    assert crowds[RECORDS].failed == 0, "a layer of at most 4 MiB is verified before it is sent"


def test_a_false_record_in_a_large_layer_makes_no_node_compare_the_whole_layer() -> None:
    """If every node compared it with the registry's, that would read ten copies here, and more in a larger site."""
    crowd = crowd_of(Liar(nodes=10, image=12_000_000, layers=2), RECORDS, silent)
    assert crowd.failed <= 2 * 9, "two layers break off, each once at each of nine nodes"
    assert crowd.copies < 8

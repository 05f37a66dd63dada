"""A small crowd with a member that lies: every pull ends right, and who lies is shut out by all, and nobody else."""

from __future__ import annotations

import math

from simulations.liar import HONEST, RECORDS, SHARDS, Liar, crowd_of, run
from simulations.run import silent

SMALL = Liar(nodes=12, image=8_000_000, layers=2)


def test_who_lies_is_shut_out_by_all_and_nobody_else_is() -> None:
    crowds = run(SMALL, silent).crowds
    assert crowds[HONEST].copies <= 1.02
    for kind in (SHARDS, RECORDS):
        assert crowds[kind].lies
        assert max(crowds[kind].seconds) < math.inf
        assert len(crowds[kind].quarantined) == SMALL.nodes - 1
        assert crowds[kind].wronged == 0
    assert crowds[SHARDS].failed == 0
    assert crowds[RECORDS].failed == 0, "of layers up to 4 MiB nothing is given before it is right"


def test_a_false_record_in_a_large_layer_has_no_node_compare_all_of_it() -> None:
    """Each did, which took ten copies here, and as many more as there are more nodes."""
    crowd = crowd_of(Liar(nodes=10, image=12_000_000, layers=2), RECORDS, silent)
    assert crowd.failed <= 2 * 9, "each of two layers breaks off once"
    assert crowd.copies < 8

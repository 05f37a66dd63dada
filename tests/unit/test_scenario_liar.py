"""A small crowd with a member that lies: every pull ends right, and who lies is shut out by all, and nobody else."""

from __future__ import annotations

import math

from simulations.liar import HONEST, RECORDS, SHARDS, Liar, run
from tests.unit.test_flash_crowd import told_nothing

SMALL = Liar(nodes=12, image=8_000_000, layers=2)


def test_who_lies_is_shut_out_by_all_and_nobody_else_is() -> None:
    crowds = run(SMALL, told_nothing).crowds
    assert crowds[HONEST].copies <= 1.02
    for kind in (SHARDS, RECORDS):
        assert crowds[kind].lies
        assert max(crowds[kind].seconds) < math.inf
        assert len(crowds[kind].quarantined) == SMALL.nodes - 1
        assert crowds[kind].wronged == 0
    assert crowds[SHARDS].failed == 0
    assert crowds[RECORDS].failed <= SMALL.nodes - 1, "each node's pull breaks off once: S-05 of docs/SECURITY.md"

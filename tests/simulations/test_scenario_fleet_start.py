"""The start of a small fleet: containers that read a part of an image start nearly as fast as with warm caches."""

from __future__ import annotations

from simulations.fleet_start import FleetStart, run
from simulations.run import silent

SMALL = FleetStart(nodes=8, containers=3, image=60_000_000, layers=3, read=6_000_000)


def test_a_cold_start_reads_each_block_once_for_all_and_is_nearly_as_fast_as_a_warm_one() -> None:
    result = run(SMALL, silent)
    assert len(result.seconds) == SMALL.nodes * SMALL.containers
    assert result.copies <= 1.02
    assert max(result.seconds) < SMALL.warm_s + 0.2
    assert result.received < 1.1 * SMALL.nodes * result.needed

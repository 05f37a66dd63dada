"""Few block reads, with the latencies of a large cache: the gain of the fifth shard, and its cost."""

from __future__ import annotations

from simulations.run import silent
from simulations.tail import BULK, K_OF_ALL, K_OF_K, URGENT, Tail, run

SMALL = Tail(reads=400, blocks=20, shared=(), modes=(K_OF_K, K_OF_ALL, URGENT, BULK))


def test_the_fifth_shard_cuts_the_tail_as_independent_shards_would_and_bulk_reads_take_few_more_bytes() -> None:
    result = run(SMALL, silent)
    for name in (K_OF_ALL, URGENT):
        assert result.cut(name, 0.95) > 0.35  # above 0.4 with ten times the reads
    assert result.runs[K_OF_ALL].off_formula < 0.06
    assert result.runs[BULK].extra < 0.05


def test_the_gain_vanishes_when_all_keepers_are_slow_together() -> None:
    result = run(Tail(reads=200, blocks=20, shared=(1.0,), modes=()), silent)
    p95 = result.p95_by_shared[1.0]
    assert p95[K_OF_ALL] > 0.9 * p95[K_OF_K]

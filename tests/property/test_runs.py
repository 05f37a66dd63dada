"""Runs against the sets of pieces that they stand for, and the memory that they take."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cache.disk_index import StoredRun, open_index, parse_run
from cache.disk_table import MAX_RUNS, PieceTable
from cache.recovery import Folder
from cache.runs import RUN_BLOCKS, Runs, piece_length, space
from cache.segments import PINNED, SegmentedPolicy
from cache.store import READ_HERE, Askers, Holdings
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, BlockId, Digest, PeerId, Piece, Shard

SIZES = [5, 3 * BLOCK_SIZE + 70, 2 * RUN_BLOCKS * BLOCK_SIZE, 3 * RUN_BLOCKS * BLOCK_SIZE + 1]
DIGESTS = [Digest("sha256", f"{number:064x}") for number in range(2)]
SHARDS = [None, Shard(4, 1, 0), Shard(4, 1, 4), Shard(3, 1, 3)]
A, B = PeerId("a"), PeerId("b")
KEPT_FOR: list[Askers] = [READ_HERE, (A,), (A, B), PINNED]

BYTES_A_BLOCK = 64
"""The bound of memory for each block of a large store: 128 MiB for 1 TB."""


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, Piece, int, Askers]]:
    taken = []
    for _ in range(draw(st.integers(0, 60))):
        size = draw(st.sampled_from(SIZES))
        last = (size - 1) // BLOCK_SIZE
        index = draw(st.integers(0, last) | st.just(last))
        piece = Piece(BlockId(draw(st.sampled_from(DIGESTS)), index), draw(st.sampled_from(SHARDS)))
        taken.append((draw(st.sampled_from(["add", "add", "remove"])), piece, size, draw(st.sampled_from(KEPT_FOR))))
    return taken


@given(steps())
def test_runs_are_the_set_of_their_pieces(taken: list[tuple[str, Piece, int, Askers]]) -> None:
    runs, held = Runs(), dict[Piece, tuple[int, Askers]]()
    for action, piece, size, kept_for in taken:
        number, bit = divmod(piece.block.index, RUN_BLOCKS)
        if action == "add" and piece not in held:
            runs.add(runs.run(piece.block.digest, size, number, kept_for), piece.shard, 1 << bit)
            held[piece] = size, kept_for
        elif action == "remove" and (run := runs.find(piece)) is not None:
            runs.remove(run, piece.shard, 1 << bit)
            del held[piece]
        check(runs, held)


def check(runs: Runs, held: dict[Piece, tuple[int, Askers]]) -> None:
    assert runs.pieces == len(held)
    assert {piece: (run.size, run.kept_for) for run in runs for piece in run.pieces()} == held
    assert all(not run.is_empty for run in runs)
    for piece, (size, _) in held.items():
        run = runs.find(piece)
        assert run is not None
        assert run.space(piece.shard, 1 << piece.block.index % RUN_BLOCKS) == space(
            piece_length(size, piece.block.index, piece.shard)
        )
    for run in runs:
        lengths = (piece_length(run.size, piece.block.index, piece.shard) for piece in run.pieces())
        assert sum(run.space(shard, bits) for shard, bits in run.content().items()) == sum(map(space, lengths))
    assert set(runs.objects()) == {piece.block.digest for piece in held}
    for digest in DIGESTS:
        maps: dict[Shard | None, int] = {}
        for piece in held:
            if piece.block.digest == digest:
                maps[piece.shard] = maps.get(piece.shard, 0) | 1 << piece.block.index
        blocks = maps.get(None, 0)
        assert runs.holdings(digest) == Holdings(blocks, {s: bits for s, bits in maps.items() if s is not None})
        assert runs.bitmap(digest, SHARDS[1]) == maps.get(SHARDS[1], 0)
        assert all(runs.holds_any(digest, shard) == (shard in maps) for shard in SHARDS)


def stored(objects: int, blocks: int) -> Iterator[StoredRun]:
    for number in range(objects):
        digest = Digest("sha256", sha256(f"{number}".encode()).hexdigest())
        yield StoredRun(digest, blocks * BLOCK_SIZE, 0, READ_HERE, number + 1, {None: (1 << blocks) - 1})


def test_a_block_of_a_large_store_takes_little_memory(tmp_path: Path) -> None:
    """Of objects of 20 MiB, as layers are in the mean. The rest of 64 bytes is for files that were read or written."""
    objects, blocks = 5000, 40
    folder = Folder(tmp_path, lock=0, index=open_index(Path(":memory:")), punching=True)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        policy = SegmentedPolicy(lambda: 0.0, objects * blocks * BLOCK_SIZE, max_entries=MAX_RUNS)
        table = PieceTable(folder, policy, set())
        table.adopt(stored(objects, blocks))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert table.runs.pieces == objects * blocks
    print(f"{taken / objects:.0f} bytes a run, {taken / (objects * blocks):.1f} a block")
    assert taken / (objects * blocks) < BYTES_A_BLOCK * 3 / 4


@given(
    st.sampled_from(DIGESTS),
    st.integers(-1, 1 << 41),
    st.integers(-1, 1 << 20),
    st.sampled_from(["", "a", "a b", "pinned", " a  b a "]),
    st.binary(max_size=40),
)
def test_a_row_of_a_run_is_read_or_refused(digest: Digest, size: int, number: int, kept_for: str, raw: bytes) -> None:
    with suppress(BadInputError):
        run = parse_run((str(digest), size, number, kept_for, 1, raw))
        assert all(0 < bits < 1 << RUN_BLOCKS for bits in run.content.values())
        assert len(run.kept_for) <= 2

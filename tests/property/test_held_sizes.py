"""The work on an object depends on what is held, never on a claimed size; and what it counts is right."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from cache.pieces import Bitmaps, set_bits
from cache.store import Holdings
from node.blocks.held_objects import bytes_held
from node.telemetry.provenance import MAX_BLOCKS, Provenance, Read
from node.telemetry.sources import Source
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, BlockId, Digest, ObjectRef, Piece, is_possible

DIGEST = Digest("sha256", "ab" * 32)
READ = Read(Source.DISK, seconds=0.0, retries=0, peers=(), at=0.0)
bitmaps = st.sets(st.integers(0, 300)).map(lambda indices: sum(1 << index for index in indices))


@given(bitmaps)
def test_the_bits_that_are_set(bits: int) -> None:
    assert list(set_bits(bits)) == [index for index in range(bits.bit_length()) if bits >> index & 1]


@given(bitmaps, st.integers(0, 200 * BLOCK_SIZE))
def test_the_bytes_that_are_held(blocks: int, size: int) -> None:
    ref = ObjectRef(DIGEST, size)
    expected = sum(ref.block_length(index) for index in range(ref.block_count) if blocks >> index & 1)
    assert bytes_held(Holdings(blocks), ref) == expected


@given(st.sets(st.integers(0, 300)))
def test_the_pieces_of_an_object(indices: set[int]) -> None:
    held = Bitmaps()
    for index in indices:
        held.add(Piece(BlockId(DIGEST, index)))
    assert {piece.block.index for piece in held.pieces(DIGEST)} == indices


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_a_run_of_blocks_is_noted_like_its_blocks(runs: list[tuple[int, int, int]]) -> None:
    together, singly = Provenance(), Provenance()
    for number, start, count in runs:
        digest = Digest("sha256", f"{number:064x}")
        together.note_run(digest, range(start, start + count), READ, 10 * count)
        for index in range(start, start + count):
            singly.note(digest, index, READ, 10)
        assert together.reads(digest) == singly.reads(digest)
    assert (together.requests, together.bytes_served) == (singly.requests, singly.bytes_served)


def test_the_largest_claims_take_no_time() -> None:
    """S-37"""
    ref, ledger = ObjectRef(DIGEST, MAX_OBJECT_SIZE), Provenance()
    began = time.thread_time()
    assert bytes_held(Holdings(0b101), ref) == 2 * BLOCK_SIZE
    ledger.note_run(DIGEST, range(ref.block_count), READ, ref.size)
    assert time.thread_time() - began < 0.1
    assert len(ledger.reads(DIGEST)) == MAX_BLOCKS


@given(st.integers(-1, 100), st.integers(0, 50))
def test_only_the_digest_of_nothing_has_no_bytes(size: int, most: int) -> None:
    nothing = Digest("sha256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert is_possible(nothing, size, most) == (size == 0)
    assert is_possible(DIGEST, size, most) == (0 < size <= most)

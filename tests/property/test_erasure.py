"""The code equals reedsolo's, byte for byte, for every geometry, size and loss."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.erasure import decode_block, encode_shard
from protocol.errors import BadInputError
from protocol.ids import shard_length

EXAMPLE = ["73686f", "616c00", "e7b110", "f5b57f"]
"""docs/FORMATS.md, "Shards"."""

geometries = st.tuples(st.integers(1, 32), st.integers(0, 8))


def slices(block: bytes, k: int) -> list[bytes]:
    size = shard_length(len(block), k)
    return [block[i * size : (i + 1) * size].ljust(size, b"\0") for i in range(k)]


def oracle_shards(block: bytes, k: int, m: int) -> list[bytes]:
    data = slices(block, k)
    if m == 0:
        return data
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0)
    codewords = [codec.encode(bytes(column)) for column in zip(*data, strict=True)]
    return [bytes(word[i] for word in codewords) for i in range(k + m)]


def all_shards(block: bytes, k: int, m: int) -> list[bytes]:
    return [bytes(encode_shard(block, k, m, index)) for index in range(k + m)]


@settings(max_examples=120)
@given(geometries, st.binary(max_size=150))
def test_shards_are_those_of_reedsolo(geometry: tuple[int, int], block: bytes) -> None:
    k, m = geometry
    assert all_shards(block, k, m) == oracle_shards(block, k, m)


@settings(max_examples=80)
@given(geometries, st.binary(min_size=1, max_size=150), st.data())
def test_recovery_agrees_with_reedsolo(geometry: tuple[int, int], block: bytes, data: st.DataObject) -> None:
    k, m = geometry
    shards = all_shards(block, k, m)
    lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m))
    kept = {i: shard for i, shard in enumerate(shards) if i not in lost}
    assert decode_block(kept, k, m, len(block)) == block
    if m:
        codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0)
        columns = [
            codec.decode(
                bytes(0 if i in lost else shards[i][at] for i in range(k + m)),
                erase_pos=sorted(lost),
                only_erasures=True,
            )[0]
            for at in range(len(shards[0]))
        ]
        assert b"".join(bytes(column) for column in zip(*columns, strict=True))[: len(block)] == block


@settings(max_examples=150)
@given(geometries, st.integers(0, 5000), st.randoms(use_true_random=False), st.data())
def test_any_k_shards_make_the_block(
    geometry: tuple[int, int], length: int, rng: random.Random, data: st.DataObject
) -> None:
    k, m = geometry
    block = rng.randbytes(length)
    kept = data.draw(st.permutations(range(k + m)))[: data.draw(st.integers(k, k + m))]
    shards = {i: encode_shard(bytearray(block), k, m, i) for i in kept}
    out = bytearray(rng.randbytes(length))
    assert decode_block(shards, k, m, length) == block
    assert decode_block(shards, k, m, length, out=out) is out
    assert out == block


@pytest.mark.parametrize(("k", "m"), [(1, 3), (2, 1), (4, 1), (4, 2), (3, 3)])
def test_every_loss_pattern_of_small_codes(k: int, m: int) -> None:
    block = random.Random(k * 10 + m).randbytes(1021)
    shards = all_shards(block, k, m)
    for kept in combinations(range(k + m), k):
        assert decode_block({i: shards[i] for i in kept}, k, m, len(block)) == block


def test_a_full_block_over_the_usual_code() -> None:
    block = random.Random(7).randbytes(1 << 20)
    shards = {i: encode_shard(memoryview(block), 4, 2, i) for i in range(6)}
    assert decode_block({i: shards[i] for i in (1, 3, 4, 5)}, 4, 2, len(block)) == block


def test_one_parity_shard_is_the_xor_of_the_slices() -> None:
    block = bytes(range(40))
    expected = bytes(a ^ b ^ c ^ d for a, b, c, d in zip(*slices(block, 4), strict=True))
    assert bytes(encode_shard(block, 4, 1, 4)) == expected


def test_the_worked_example_of_the_documentation() -> None:
    assert [bytes(s).hex() for s in all_shards(b"shoal", 2, 2)] == EXAMPLE


def test_whole_slices_are_not_copied() -> None:
    block = bytearray(4096)
    shard = encode_shard(block, 4, 1, 2)
    block[2048] = 99
    assert shard[0] == 99


@given(geometries, st.integers(1, 500), st.data())
def test_wrong_sizes_are_refused(geometry: tuple[int, int], length: int, data: st.DataObject) -> None:
    k, m = geometry
    shards = all_shards(bytes(length), k, m)
    spoiled = data.draw(st.integers(0, k + m - 1))
    size = data.draw(st.integers(0, 600).filter(lambda n: n != len(shards[0])))
    with pytest.raises(BadInputError, match=f"shard {spoiled} "):
        decode_block({**dict(enumerate(shards)), spoiled: bytes(size)}, k, m, length)


@given(geometries, st.integers(1, 500), st.data())
def test_too_few_shards_are_refused(geometry: tuple[int, int], length: int, data: st.DataObject) -> None:
    k, m = geometry
    shards = all_shards(bytes(length), k, m)
    with pytest.raises(BadInputError, match="do not make a block"):
        decode_block(dict(enumerate(shards[: data.draw(st.integers(0, k - 1))])), k, m, length)


@pytest.mark.parametrize(
    ("k", "m", "index"), [(0, 1, 0), (33, 1, 0), (-1, 0, 0), (4, 9, 0), (4, -1, 0), (4, 1, 5), (4, 1, -1)]
)
def test_impossible_geometries_are_refused(k: int, m: int, index: int) -> None:
    with pytest.raises(BadInputError, match="no "):
        encode_shard(bytes(8), k, m, index)
    with pytest.raises(BadInputError, match=r"no "):
        decode_block(dict.fromkeys((index, 1, 2, 3), bytes(2)), k, m, 8)


def test_a_buffer_of_another_length_is_refused() -> None:
    shards = dict(enumerate(all_shards(bytes(8), 4, 1)))
    with pytest.raises(BadInputError, match="does not fit"):
        decode_block(shards, 4, 1, 8, out=bytearray(9))

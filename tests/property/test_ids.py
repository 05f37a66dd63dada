"""Digests are exact or refused, and the blocks of an object cover it exactly."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, BlockId, Digest, ObjectRef, shard_length

HEX = "0123456789abcdef"
SHA256 = Digest("sha256", "0a" * 32)

sizes = st.integers(0, MAX_OBJECT_SIZE) | st.builds(
    lambda blocks, more: min(MAX_OBJECT_SIZE, max(0, blocks * BLOCK_SIZE + more)),
    st.integers(0, 1 << 20),
    st.integers(-1, 1),
)


@given(st.binary(max_size=64), st.sampled_from(["sha256", "sha512"]))
def test_digests_round_trip(data: bytes, algorithm: str) -> None:
    text = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    digest = Digest.parse(text)
    assert str(digest) == text
    assert (digest.algorithm, digest.hex) == (algorithm, text.partition(":")[2])


@given(
    st.text(max_size=80)
    | st.text(HEX + "ABCDEFg/.:%\n\0", min_size=62, max_size=66).map("sha256:".__add__)
    | st.builds("{}:{}".format, st.text(max_size=8), st.text(HEX, min_size=64, max_size=64))
)
@example("sha256:" + "0" * 64)
def test_a_digest_is_exact_or_refused(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except BadInputError:
        return
    assert str(digest) == text
    assert set(digest.hex) <= set(HEX)
    assert len(digest.hex) == {"sha256": 64, "sha512": 128}[digest.algorithm]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "0" * 128,
        "sha512:" + "0" * 64,
        "sha384:" + "0" * 96,
        "md5:" + "0" * 32,
        "SHA256:" + "0" * 64,
        "sha256:" + "A" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "0" * 63 + "\n",
        "sha256:" + "0" * 64 + "\n",
        " sha256:" + "0" * 64,
        "sha256:" + "../" * 21 + "0",
        "sha256:" + "\N{ARABIC-INDIC DIGIT ZERO}" * 64,
        "sha256:" + "\0" * 64,
        "sha256::" + "0" * 63,
        "0" * 64,
    ],
)
def test_hostile_digests_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="not a sha256 or sha512 digest"):
        Digest.parse(text)


def test_a_huge_digest_is_quoted_short() -> None:
    with pytest.raises(BadInputError) as caught:
        Digest.parse("sha256:" + "0" * 10_000_000)
    assert len(str(caught.value)) < 300


@given(sizes)
@example(0)
@example(1)
@example(BLOCK_SIZE)
@example(MAX_OBJECT_SIZE)
def test_blocks_cover_the_object_exactly(size: int) -> None:
    ref = ObjectRef(SHA256, size)
    assert ref.block_count == -(-size // BLOCK_SIZE)
    if size:
        last = ref.block_count - 1
        assert last * BLOCK_SIZE + ref.block_length(last) == size
        assert 1 <= ref.block_length(last) <= BLOCK_SIZE
        assert last == 0 or ref.block_length(0) == ref.block_length(last - 1) == BLOCK_SIZE


@given(st.integers(0, 50 * BLOCK_SIZE))
def test_block_lengths_add_up(size: int) -> None:
    ref = ObjectRef(SHA256, size)
    assert sum(map(ref.block_length, range(ref.block_count))) == size


@given(sizes, st.integers())
def test_only_the_objects_own_blocks_exist(size: int, index: int) -> None:
    ref = ObjectRef(SHA256, size)
    if 0 <= index < ref.block_count:
        assert ref.block(index) == BlockId(SHA256, index)
    else:
        with pytest.raises(BadInputError, match="blocks, not a block"):
            ref.block(index)


@pytest.mark.parametrize("size", [-1, MAX_OBJECT_SIZE + 1, 1 << 80])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(BadInputError, match="out of range"):
        ObjectRef(SHA256, size)


@given(st.integers(0, BLOCK_SIZE), st.integers(1, 32))
def test_shards_hold_the_block_with_the_least_padding(length: int, k: int) -> None:
    size = shard_length(length, k)
    assert k * size >= length > k * (size - 1) - 1

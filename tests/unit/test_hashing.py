"""Digests beside the loop."""

from __future__ import annotations

import hashlib

import pytest
import trio

from node.runtime.hashing import MOST_PENDING, Hashing, HashingThread, inline

PARTS = [bytes([number]) * 70_000 for number in range(3 * MOST_PENDING)]


async def digest_of(hashing: Hashing, algorithm: str, parts: list[bytes]) -> str:
    digest = hashing(algorithm)
    for part in parts:
        await digest.update(part)
    return await digest.hexdigest()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_digest_is_that_of_all_parts_in_order(algorithm: str) -> None:
    async def main() -> None:
        expected = hashlib.new(algorithm, b"".join(PARTS)).hexdigest()
        assert await digest_of(inline, algorithm, PARTS) == expected
        assert await digest_of(HashingThread(), algorithm, PARTS) == expected

    trio.run(main)


def test_digests_at_the_same_time_do_not_mix() -> None:
    async def main() -> None:
        hashing, found = HashingThread(), dict[int, str]()

        async def one(number: int) -> None:
            found[number] = await digest_of(hashing, "sha256", PARTS[number:])

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(one, number)
        assert found == {number: hashlib.sha256(b"".join(PARTS[number:])).hexdigest() for number in range(8)}

    trio.run(main)

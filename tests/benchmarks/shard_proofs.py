"""Processor time of signed shards: `python -m tests.benchmarks.shard_proofs`.

Microseconds for a shard of a block of 512 KiB in the code 4+1, and seconds for a GB of image in a site of five nodes,
all nodes together. The home signs four shards of each block, and four keepers check them. Each figure is a median.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from hashlib import sha256
from statistics import median

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from node.identity.identity import Identity
from protocol.erasure import encode_shard
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, Shard
from protocol.records import make_record
from protocol.shard_proofs import check_proof, make_proof

ROUNDS, REPEATS = 31, 100
KEPT = 4
"""Shards of each block that other members keep, in the code 4+1 of five nodes."""
BLOCKS_PER_GB = 1e9 / BLOCK_SIZE


def cpu_us(work: Callable[[], object]) -> float:
    def once() -> float:
        began = time.process_time()
        for _ in range(REPEATS):
            work()
        return (time.process_time() - began) / REPEATS * 1e6

    return median(once() for _ in range(ROUNDS))


def main() -> None:
    maker = Identity.of(Ed25519PrivateKey.generate())
    block = random.Random(1).randbytes(BLOCK_SIZE)
    ref, shard = ObjectRef(Digest("sha256", sha256(block).hexdigest()), BLOCK_SIZE), Shard(4, 1, 1)
    record = make_record(ref, 0, sha256(block).digest(), maker.peer_id, sign=maker.sign)
    data = encode_shard(block, shard.k, shard.m, shard.index)
    proof = make_proof(record, shard, data, maker=maker.peer_id, sign=maker.sign)
    hashing = cpu_us(lambda: sha256(data).digest())
    making = cpu_us(lambda: make_proof(record, shard, data, maker=maker.peer_id, sign=maker.sign))
    checking = cpu_us(lambda: check_proof(proof, record, shard, data))
    table = Table("", "us / shard", "s / GB")
    for name, cost in (
        ("sha256 of a shard, which the disk needs anyway", hashing),
        ("maker: sha256 and signature", making),
        ("keeper: sha256 and check", checking),
        ("added: maker, and the keeper's check", making + checking - hashing),
    ):
        table.add_row(name, f"{cost:.0f}", f"{cost * KEPT * BLOCKS_PER_GB / 1e6:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

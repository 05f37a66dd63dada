"""Which records and shards this node trusts: those signed by a member that is not in quarantine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import cachetools
import trio

from node.membership.membership import View
from protocol.errors import PeerMisbehavedError, UnavailableError
from protocol.ids import Buffer, ObjectRef, PeerId, Shard
from protocol.records import Record, check_record
from protocol.shard_proofs import ShardProof, check_proof

log = logging.getLogger(__name__)

MAX_SUSPECTED = 64
"""Suspicions that wait for the judge. If there is no place, the next read that fails raises it again."""
_REMEMBERED = 8192
"""Records with a verified signature: a record arrives with every shard of its block, and a check takes 100 us."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A record that may be false. `source` is the locator of its object. `other` contradicts it. `proven`: it differs
    from bytes that have the object's digest."""

    record: Record
    source: str
    proven: bool = False
    other: Record | None = None


class Trust:
    """`suspicions` is read by node/evidence/judge.py, which investigates them."""

    def __init__(self, own: PeerId, view: View) -> None:
        self._own, self._view = own, view
        self._suspect, self.suspicions = trio.open_memory_channel[Suspicion](MAX_SUSPECTED)
        self._good: cachetools.LRUCache[Record, bool] = cachetools.LRUCache(_REMEMBERED)

    def accepts(self, signer: PeerId) -> bool:
        return signer == self._own or (self._view.find(signer) is not None and not self._view.is_quarantined(signer))

    def check(self, record: Record, ref: ObjectRef, index: int) -> None:
        """Raises UnavailableError if this node does not trust the signer: the peer that sent the record may still trust
        it. Raises PeerMisbehavedError if the record is of another block, or its signature is wrong."""
        if not self.accepts(record.signer):
            raise UnavailableError(f"record of {ref.digest} #{index} signed by {record.signer}: not trusted here")
        if record not in self._good:
            check_record(record, ref, index)
            self._good[record] = True
        elif (record.digest, record.index, record.size) != (str(ref.digest), index, ref.size):
            raise PeerMisbehavedError(f"record of another block than {ref.digest} #{index}")

    def check_maker(self, proof: ShardProof | None) -> None:
        """Raises UnavailableError if this node does not trust the maker of a shard, as `check` for a signer."""
        if proof is not None and not self.accepts(proof.maker):
            raise UnavailableError(f"shard made by {proof.maker}: not trusted here")

    def check_kept(self, proof: ShardProof | None, record: Record, shard: Shard, data: Buffer) -> None:
        """A shard that this node is about to keep. Raises as `check`; the sender had to check the proof too."""
        if proof is None:
            raise PeerMisbehavedError(f"a shard of {record.digest} #{record.index} to keep, without its maker's proof")
        self.check_maker(proof)
        check_proof(proof, record, shard, data)

    def suspect(self, suspicion: Suspicion) -> None:
        try:
            self._suspect.send_nowait(suspicion)
        except trio.WouldBlock:
            log.debug("too many suspected records: %s is not investigated", suspicion.record.block)

"""Whose word about a block is taken: records with a member's signature, members that are not in quarantine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import cachetools
import trio

from node.membership.view import View
from protocol.errors import PeerMisbehavedError, UnavailableError
from protocol.ids import ObjectRef, PeerId
from protocol.records import Record, check_record

log = logging.getLogger(__name__)

MAX_SUSPECTED = 64
"""Records that wait to be looked into; a read that fails again tells of them again."""
_REMEMBERED = 8192
"""Each record comes with every shard of its block: checking a signature (100 us) once is enough."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Something speaks against a record; `source` is where its object is read.

    `compared`: this node has compared it with the registry's own bytes. `other` contradicts it.
    """

    record: Record
    source: str
    compared: bool = False
    other: Record | None = None


class Trust:
    """`suspicions` is for node/evidence/judge.py, which looks into them."""

    def __init__(self, own: PeerId, view: View) -> None:
        self._own, self._view = own, view
        self._suspect, self.suspicions = trio.open_memory_channel[Suspicion](MAX_SUSPECTED)
        self._good: cachetools.LRUCache[Record, bool] = cachetools.LRUCache(_REMEMBERED)

    def accepts(self, signer: PeerId) -> bool:
        return signer == self._own or (self._view.find(signer) is not None and not self._view.is_quarantined(signer))

    def check(self, record: Record, ref: ObjectRef, index: int) -> None:
        """Raises UnavailableError unless the signer is a member in good standing: who carries the record may know him.

        Raises PeerMisbehavedError where the record is of another block, or its signature is wrong.
        """
        if not self.accepts(record.signer):
            raise UnavailableError(f"record of {ref.digest} #{index} signed by {record.signer}, who is no member")
        if record not in self._good:
            check_record(record, ref, index)
            self._good[record] = True
        elif (record.digest, record.index, record.size) != (str(ref.digest), index, ref.size):
            raise PeerMisbehavedError(f"record of another block than {ref.digest} #{index}")

    def suspect(self, suspicion: Suspicion) -> None:
        try:
            self._suspect.send_nowait(suspicion)
        except trio.WouldBlock:
            log.debug("too many suspected records: %s is not looked into", suspicion.record.block)

"""The revocations by the cluster's authority that reached this node, in a file. docs/FORMATS.md, "Revocations".

A revocation excludes a peer id or a join token permanently, so the set only grows. It is effective even if the file
cannot be written: members send all revocations again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from node.identity.certificates import key_of_authority
from node.runtime import secret_files
from protocol.admission import MAX_REVOCATIONS, Revocation, check_revocation, cluster_id
from protocol.errors import UNDECODABLE, BadInputError, PeerMisbehavedError

log = logging.getLogger(__name__)

FILE_NAME = "revocations.msgpack"
MAX_FILE = 256 * MAX_REVOCATIONS
"""Bytes. A revocation has about 140."""


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    revocations: tuple[Revocation, ...]


class Revocations:
    """A container of the revoked peer ids and token subjects."""

    def __init__(self, path: Path, authority: bytes) -> None:
        """`authority`: the CA certificate (DER) whose key signs every revocation."""
        self._path = path
        self._key, self._cluster = key_of_authority(authority), cluster_id(authority)
        self._held: dict[str, Revocation] = {}
        for revocation in self._load():
            try:
                self._add(revocation)
            except BadInputError as error:  # of another cluster, to which this node belonged before
                log.info("revocation skipped", extra={"reason": error})

    def __contains__(self, subject: object) -> bool:
        return subject in self._held

    @property
    def all(self) -> tuple[Revocation, ...]:
        return tuple(self._held.values())

    def add(self, revocations: Iterable[Revocation]) -> list[str]:
        """Add revocations, and save them if the disk can be written. Returns the subjects that are new.

        Raises PeerMisbehavedError at the first that this authority did not sign; earlier ones are added.
        """
        before = len(self._held)
        try:
            for revocation in revocations:
                if revocation.subject not in self._held:
                    self._add(revocation)
        except BadInputError as error:
            raise PeerMisbehavedError(str(error)) from error
        finally:
            new = list(self._held)[before:]
            if new:
                self._save()
        return new

    def _add(self, new: Revocation) -> None:
        check_revocation(new, self._key, self._cluster)
        if len(self._held) >= MAX_REVOCATIONS:
            log.error("too many revocations: a cluster that needs more needs a new key", extra={"peer": new.subject})
            return
        self._held[new.subject] = new

    def _load(self) -> tuple[Revocation, ...]:
        try:
            return msgspec.msgpack.decode(secret_files.read(self._path, MAX_FILE), type=_File).revocations
        except FileNotFoundError:
            return ()
        except (BadInputError, *UNDECODABLE) as error:
            text = "the file of revocations cannot be read; members send them again"
            log.error(text, extra={"path": self._path, "reason": error})  # noqa: TRY400 # the reason says it all
            return ()

    def _save(self) -> None:
        data = msgspec.msgpack.encode(_File(1, self.all))
        try:
            secret_files.replace(self._path, data, 0o644)
        except BadInputError as error:
            log.error("revocations are lost at a restart", extra={"reason": error})  # noqa: TRY400 # as above

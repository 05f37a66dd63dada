"""What the authority has revoked, as far as this node has heard, in a file. Bytes: docs/FORMATS.md, "Revocations"."""

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
"""Bytes; each has some 140."""


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    revocations: tuple[Revocation, ...]


class Revocations:
    """A set that only grows. Contains peer ids and the subjects of tokens."""

    def __init__(self, path: Path, authority: bytes) -> None:
        """`authority`: the CA certificate (DER), by whose key each has to be signed."""
        self._path = path
        self._key, self._cluster = key_of_authority(authority), cluster_id(authority)
        self._held: dict[str, Revocation] = {}
        self._take(self._load())

    def __contains__(self, subject: object) -> bool:
        return subject in self._held

    @property
    def all(self) -> tuple[Revocation, ...]:
        return tuple(self._held.values())

    def add(self, revocations: Iterable[Revocation]) -> list[str]:
        """The subjects that were not known, on disk when it returns, if that can be written.

        Raises PeerMisbehavedError at the first that this authority did not sign; those before it count.
        """
        before = len(self._held)
        try:
            for one in revocations:
                if one.subject not in self._held:
                    self._add(one)
        except BadInputError as error:
            raise PeerMisbehavedError(str(error)) from error
        finally:
            new = list(self._held)[before:]
            if new:
                self._save()
        return new

    def _add(self, one: Revocation) -> None:
        check_revocation(one, self._key, self._cluster)
        if len(self._held) >= MAX_REVOCATIONS:
            log.error("too many revocations: a cluster that needs more needs a new key", extra={"peer": one.subject})
            return
        self._held[one.subject] = one

    def _load(self) -> tuple[Revocation, ...]:
        try:
            return msgspec.msgpack.decode(secret_files.read(self._path, MAX_FILE), type=_File).revocations
        except FileNotFoundError:
            return ()
        except (BadInputError, *UNDECODABLE) as error:
            log.error(  # noqa: TRY400 # the reason is all of it
                "the revocations are not readable; members tell them again", extra={"path": self._path, "reason": error}
            )
            return ()

    def _take(self, found: Iterable[Revocation]) -> None:
        """Those of another cluster, that this node was of before, are of no use any more."""
        for one in found:
            try:
                self._add(one)
            except BadInputError as error:
                log.info("passed over", extra={"reason": error})

    def _save(self) -> None:
        data = msgspec.msgpack.encode(_File(1, self.all))
        try:
            secret_files.replace(self._path, data, 0o644)
        except BadInputError as error:
            log.error("revocations are lost at the next start", extra={"reason": error})  # noqa: TRY400 # as above

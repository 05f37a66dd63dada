"""Errors that one module raises and another handles. "The peer misbehaved" and "we have a bug" are different types."""

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of msgspec for bytes from outside: RecursionError is for values that are nested too deep."""


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose."""


class BadInputError(ShoalError):
    """Malformed input from a user, a file or a client; the text names the input and the remedy."""


class PeerMisbehavedError(ShoalError):
    """A peer broke the protocol or sent bytes that do not match what was signed."""


class NotAdmittedError(PeerMisbehavedError):
    """The other side is not, or no longer, a member of this cluster. `peer` is its peer id if that is proven."""

    def __init__(self, text: str, peer: str = "") -> None:
        super().__init__(text, peer)
        self.peer = peer

    def __str__(self) -> str:
        return str(self.args[0])


class PeerUnavailableError(ShoalError):
    """A peer did not answer in time, or cannot be reached."""


class UnavailableError(ShoalError):
    """No peer and no registry can send the object now: they are out of reach or failing."""


class NotFoundError(ShoalError):
    """The registry says that the name or digest does not exist."""


class DeniedError(ShoalError):
    """The registry refused access (401 or 403) with the credentials that were used."""


class UnsignedError(ShoalError):
    """An image has no signature that the configuration requires."""


class CorruptObjectError(ShoalError):
    """The bytes of a whole object do not hash to its digest."""

"""The node's only key, an Ed25519 key in a file. Peer id, certificate and signatures of the node derive from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from node.runtime import secret_files
from protocol.errors import BadInputError
from protocol.ids import PeerId
from protocol.records import peer_id_of

FILE_NAME = "identity.key"


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key and the libp2p peer id that follows from it."""

    private_key: Ed25519PrivateKey
    peer_id: PeerId

    @classmethod
    def of(cls, private_key: Ed25519PrivateKey) -> Identity:
        return cls(private_key, peer_id_of(private_key.public_key().public_bytes_raw()))

    def sign(self, data: bytes) -> bytes:
        return self.private_key.sign(data)


def load_or_create(data_dir: Path) -> Identity:
    """The identity of `data_dir`: its file `identity.key` (PEM, PKCS #8, unencrypted, mode 0600), created if missing.

    Raises BadInputError for a file that cannot be read or is not an Ed25519 key; such a file is left unchanged.
    """
    try:
        return load(data_dir)
    except FileNotFoundError:
        try:
            data_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise BadInputError(f"cannot make the folder {data_dir}: {error.strerror}") from error
        secret_files.create(data_dir / FILE_NAME, to_pem(Ed25519PrivateKey.generate()))
    return load(data_dir)


def load(data_dir: Path) -> Identity:
    """The identity of `data_dir`. Raises FileNotFoundError if there is none, and BadInputError as `load_or_create`."""
    path = data_dir / FILE_NAME
    data = secret_files.read(path)
    try:
        return Identity.of(from_pem(path, data))
    except BadInputError as error:
        raise BadInputError(f"{error}; restore it, or remove it to give the node a new identity") from error


def to_pem(private_key: Ed25519PrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def from_pem(path: Path, data: bytes) -> Ed25519PrivateKey:
    """The first private key in `data`, which was read from `path`. Raises BadInputError."""
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInputError(f"{path} is not an unencrypted private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInputError(f"the key in {path} is not an Ed25519 key")
    return key

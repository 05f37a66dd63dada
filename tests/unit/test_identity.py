"""The identity file: created once, never changed, readable by its owner only."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from node.identity import identity
from node.runtime import secret_files
from protocol.errors import BadInputError
from protocol.records import public_key_of


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    first = identity.load_or_create(tmp_path / "data")
    again = identity.load_or_create(tmp_path / "data")
    assert first.peer_id == again.peer_id
    assert first.peer_id.startswith("12D3KooW")
    path = tmp_path / "data" / "identity.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


def test_two_folders_have_two_identities(tmp_path: Path) -> None:
    assert identity.load_or_create(tmp_path / "a").peer_id != identity.load_or_create(tmp_path / "b").peer_id


def test_the_peer_id_names_the_key_that_signs(tmp_path: Path) -> None:
    own = identity.load_or_create(tmp_path)
    key = Ed25519PublicKey.from_public_bytes(public_key_of(own.peer_id))
    key.verify(own.sign(b"words"), b"words")


def other_kind() -> bytes:
    return X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x00" * 70000, other_kind()], ids=["none", "text", "large", "kind"]
)
def test_a_damaged_file_is_named_and_left_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"identity\.key"):
        identity.load_or_create(tmp_path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="file/data"):
        identity.load_or_create(tmp_path / "file" / "data")


def test_a_private_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert secret_files.create(path, b"first")
    assert not secret_files.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1

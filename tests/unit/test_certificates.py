"""Certificates decide which peers may connect, and under which peer id. Tested over real TLS handshakes."""

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from node.identity import certificates
from node.identity.certificates import Authority, Credentials, Subject, Validity, issued_by
from node.identity.identity import Identity
from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.wire import MAX_CERTIFICATE


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    certificates.create_authority(tmp_path / "cluster.key")
    return certificates.load_authority(tmp_path / "cluster.key")


def identity() -> Identity:
    return Identity.of(Ed25519PrivateKey.generate())


def impostor(authority: Authority) -> Credentials:
    """A certificate of the cluster that names another peer than that of its key."""
    mine = identity()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity().peer_id)])
    lie = certificates.issue_to_key(authority, name, mine.private_key.public_key())
    return Credentials(mine, lie, authority.der)


def shake_hands(client: Credentials, server: Credentials) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """A TLS connection over a socket pair, after a byte each way: earlier, TLS 1.3 shows no refusal to a client."""
    ours, theirs = socket.socketpair()
    ends: list[ssl.SSLSocket] = []
    errors: list[ssl.SSLError] = []

    def serve() -> None:
        try:
            end = server.server_context().wrap_socket(theirs, server_side=True)
            end.sendall(end.recv(1))
            ends.append(end)
        except ssl.SSLError as error:
            errors.append(error)
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        end = client.client_context().wrap_socket(ours)
        end.sendall(b"x")
        end.recv(1)
    finally:
        ours.close()
        thread.join(60)
    assert not errors
    return end, ends[0]


def der(end: ssl.SSLSocket) -> bytes:
    return end.getpeercert(binary_form=True) or b""


def test_both_sides_learn_the_right_peer_id(authority: Authority) -> None:
    here, there = Credentials.issued(authority, identity(), "a"), Credentials.issued(authority, identity(), "")
    seen: list[PeerId] = []
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with there.server_context().wrap_socket(theirs, server_side=True) as end:
            seen.append(certificates.peer_of(der(end)))

    thread = threading.Thread(target=serve)
    thread.start()
    with here.client_context().wrap_socket(ours) as end:
        assert end.version() == "TLSv1.3"
        assert certificates.peer_of(der(end)) == there.identity.peer_id
    thread.join(60)
    assert seen == [here.identity.peer_id]


def test_another_cluster_is_refused_by_both_sides(authority: Authority, tmp_path: Path) -> None:
    member = Credentials.issued(authority, identity(), "member")
    stranger = Credentials.issued(certificates.own_authority(tmp_path), identity(), "stranger")
    with pytest.raises(ssl.SSLError):
        shake_hands(stranger, member)
    with pytest.raises(ssl.SSLError):
        shake_hands(member, stranger)


def test_a_client_without_certificate_is_refused(authority: Authority) -> None:
    member = Credentials.issued(authority, identity(), "member")
    ours, theirs = socket.socketpair()
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    client = bare.wrap_socket(ours, do_handshake_on_connect=False)
    client.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    server = member.server_context().wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
    server.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):
        server.do_handshake()
    client.do_handshake()
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        server.do_handshake()
    client.close()
    server.close()


def test_issued_by_agrees_with_tls(authority: Authority, tmp_path: Path) -> None:
    there = Credentials.issued(authority, identity(), "b")
    stranger = Credentials.issued(certificates.own_authority(tmp_path), identity(), "stranger")
    assert issued_by(there.certificate, authority.der) == there.identity.peer_id
    with pytest.raises(PeerMisbehavedError, match="another cluster"):
        issued_by(stranger.certificate, authority.der)
    with pytest.raises(PeerMisbehavedError, match="another common name"):
        issued_by(impostor(authority).certificate, authority.der)
    with pytest.raises(PeerMisbehavedError, match="another common name"):
        issued_by(authority.der, authority.der)


def test_a_name_that_is_not_the_keys_is_refused(authority: Authority) -> None:
    with pytest.raises(PeerMisbehavedError, match="another common name"):
        certificates.peer_of(impostor(authority).certificate)


def test_a_forged_issuer_is_not_enough(authority: Authority) -> None:
    forger = Authority(Ed25519PrivateKey.generate(), authority.certificate)
    forged = Credentials.issued(forger, identity(), "forged")
    with pytest.raises(PeerMisbehavedError, match="another cluster"):
        issued_by(forged.certificate, authority.der)


@pytest.mark.parametrize("bytes_", [b"", b"\x30\x80", b"\x00" * 5000], ids=["none", "stub", "large"])
def test_malformed_certificates_are_refused(authority: Authority, bytes_: bytes) -> None:
    with pytest.raises(PeerMisbehavedError):
        issued_by(bytes_, authority.der)
    with pytest.raises(PeerMisbehavedError):
        certificates.peer_of(bytes_)


def test_every_node_that_loads_the_file_has_the_same_authority(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    certificates.create_authority(path)
    first, second = certificates.load_authority(path), certificates.load_authority(path)
    assert first.certificate.public_bytes(Encoding.DER) == second.certificate.public_bytes(Encoding.DER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    certificates.create_authority(path)
    before = path.read_bytes()
    with pytest.raises(BadInputError, match="exists"):
        certificates.create_authority(path)
    assert path.read_bytes() == before


def test_an_own_authority_is_kept(tmp_path: Path) -> None:
    assert certificates.own_authority(tmp_path).certificate == certificates.own_authority(tmp_path).certificate


def test_files_that_are_no_authority_are_named(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    whole = path.read_bytes()
    key, certificate = whole.split(b"-----BEGIN CERTIFICATE")
    node = ssl.DER_cert_to_PEM_cert(certificates.issue(authority, Subject(Identity.of(authority.key).peer_id))).encode()
    other = x509.load_pem_x509_certificate(b"-----BEGIN CERTIFICATE" + certificate)
    assert other == authority.certificate
    certificates.create_authority(tmp_path / "second")
    second = (tmp_path / "second").read_bytes().split(b"-----BEGIN CERTIFICATE")[1]
    for content in (b"", key, key + node, key + b"-----BEGIN CERTIFICATE" + second, whole[len(key) :]):
        path.write_bytes(content)
        with pytest.raises(BadInputError, match=r"cluster\.key"):
            certificates.load_authority(path)
    with pytest.raises(BadInputError, match="p2pctl cluster init"):
        certificates.load_authority(tmp_path / "missing")


def test_certificates_stay_well_below_their_bound(authority: Authority) -> None:
    credentials = Credentials.issued(authority, identity(), "n" * 300, "s" * 64)
    assert len(credentials.certificate) < MAX_CERTIFICATE / 4


def test_subject_and_dates_are_read_back(authority: Authority) -> None:
    subject = Subject(identity().peer_id, "edge-1", "harbour")
    for validity in (certificates.ENDLESS, Validity.lasting(1_700_000_000.7, 86400)):
        der = certificates.issue(authority, subject, validity)
        assert certificates.subject_of(der) == subject
        assert certificates.validity_of(der) == validity
    assert Validity.lasting(1_700_000_000.7, 86400).lifetime_s == 86400
    assert Validity.lasting(5.0, 0) == certificates.ENDLESS


def test_an_open_cluster_is_the_same_everywhere() -> None:
    assert certificates.open_authority().der == certificates.open_authority().der
    node = Credentials.issued(certificates.open_authority(), identity(), "a")
    assert issued_by(node.certificate, certificates.open_authority().der) == node.identity.peer_id

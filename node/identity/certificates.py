"""The cluster's authority, and the certificates by which its nodes recognise each other.

The authority is one file: an Ed25519 key and its self-signed CA certificate. A node that loads the file issues a
certificate to itself, and to other nodes that show a join token. A certificate contains the node's own key, so a TLS
handshake proves the peer id. Contents and checks: docs/PROTOCOL.md, "Identity and certificates".
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.identity.identity import Identity, from_pem, to_pem
from node.runtime import secret_files
from protocol.admission import cluster_id, is_site
from protocol.errors import BadInputError, NotAdmittedError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.records import peer_id_of, public_key_of
from protocol.wire import MAX_CERTIFICATE

FILE_NAME = "cluster.pem"
"""In the data folder: the authority that a node makes for itself when no cluster key is configured."""

_NOT_BEFORE = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(2100, 1, 1, tzinfo=UTC)
"""The dates in a certificate without end. They are not checked: a board without a battery starts in 1970."""

_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""Raised by `cryptography` when it parses a certificate, and when parts of the certificate are read."""
_MAX_NAME = 64
"""Most characters of a common name and of an organizational unit, by X.520."""
_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module lacks: node/identity/verifier.py checks the time."""


@dataclass(frozen=True, slots=True)
class Authority:
    key: Ed25519PrivateKey
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def cluster(self) -> bytes:
        return cluster_id(self.der)


def create_authority(path: Path) -> None:
    """Create the authority file (PEM: private key, CA certificate; mode 0600). Raises BadInputError if it exists."""
    if not secret_files.create(path, new_authority()):
        raise BadInputError(f"{path} exists already; a cluster's key is never overwritten")


def load_authority(path: Path) -> Authority:
    """Raises BadInputError, which names the file, if it is missing, unreadable or not an authority."""
    try:
        data = secret_files.read(path)
    except FileNotFoundError as error:
        raise BadInputError(f"no cluster key at {path}; make one with `p2pctl cluster init {path}`") from error
    key = from_pem(path, data)
    try:
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise BadInputError(f"{path} holds no certificate beside its key") from error
    if certificate.public_key() != key.public_key() or not _is_authority(certificate):
        raise BadInputError(f"the certificate in {path} is not a CA certificate for the key in that file")
    return Authority(key, certificate)


def own_authority(data_dir: Path) -> Authority:
    """The authority of a cluster that consists of this node only, created if missing. Raises BadInputError."""
    path = data_dir / FILE_NAME
    if not path.exists():
        secret_files.create(path, new_authority())
    return load_authority(path)


def open_authority() -> Authority:
    """The authority of all nodes with `cluster.open`: its key is public, and its certificate the same everywhere."""
    key = Ed25519PrivateKey.from_private_bytes(sha256(b"shoal open cluster").digest())
    return Authority(key, _ca_certificate(key, serial=1))


@dataclass(frozen=True, slots=True)
class Validity:
    """Unix times in whole seconds. `end` None: no end. `start` is not checked: see docs/PROTOCOL.md."""

    start: int = 0
    end: int | None = None

    @classmethod
    def lasting(cls, start: float, lifetime_s: int) -> Validity:
        """`lifetime_s` 0: no end."""
        return cls(int(start), int(start) + lifetime_s) if lifetime_s else cls()

    @property
    def lifetime_s(self) -> int:
        return 0 if self.end is None else self.end - self.start


ENDLESS = Validity()


@dataclass(frozen=True, slots=True)
class Subject:
    """The node that a certificate is issued to. `name` is cut to the length that X.520 allows."""

    peer: PeerId
    name: str = ""
    site: str = ""


def issue(authority: Authority, subject: Subject, validity: Validity = ENDLESS, serial: int = 0) -> bytes:
    """Issue a node's certificate (DER). Its common name is the peer id; it also names the node and its site. `serial`
    0: a random number."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject.peer)]
    if subject.name:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, subject.name[:_MAX_NAME]))
    if is_site(subject.site):
        attributes.append(x509.NameAttribute(NameOID.LOCALITY_NAME, subject.site))
    key = Ed25519PublicKey.from_public_bytes(public_key_of(subject.peer))
    return issue_to_key(authority, x509.Name(attributes), key, validity, serial=serial)


def issue_to_key(
    authority: Authority, name: x509.Name, key: Ed25519PublicKey, validity: Validity = ENDLESS, *, serial: int = 0
) -> bytes:
    """Issue a certificate (DER) with any `name`. `peer_of` refuses it if the common name is not the key's peer id."""
    issuer = authority.certificate.subject
    certificate = _signed(authority.key, issuer, name, key, serial=serial, validity=validity)
    return certificate.public_bytes(Encoding.DER)


def issued_by(certificate: bytes, authority: bytes) -> PeerId:
    """The peer named in a certificate (DER) that this authority (DER) issued. The dates are not checked.

    Raises NotAdmittedError for a certificate of any other authority, else PeerMisbehavedError as `peer_of`.
    """
    parsed = _parse(certificate)
    try:
        parsed.verify_directly_issued_by(x509.load_der_x509_certificate(authority))
    except (*_MALFORMED, InvalidSignature) as error:
        raise NotAdmittedError("certificate of another cluster") from error
    return peer_of(certificate)


def key_of_authority(certificate: bytes) -> Ed25519PublicKey:
    """The key of a CA certificate (DER). Raises PeerMisbehavedError for a certificate of another kind."""
    parsed = _parse(certificate)
    try:
        key = parsed.public_key()
    except _MALFORMED as error:
        raise PeerMisbehavedError("the CA certificate has a malformed key") from error
    if not isinstance(key, Ed25519PublicKey) or not _is_authority(parsed):
        raise PeerMisbehavedError("the cluster's certificate is not a CA certificate")
    return key


def subject_of(certificate: bytes) -> Subject:
    """The subject of a verified certificate (DER). Raises PeerMisbehavedError like `peer_of`."""
    names = _parse(certificate).subject

    def text(oid: x509.ObjectIdentifier) -> str:
        return next((str(attribute.value) for attribute in names.get_attributes_for_oid(oid)), "")

    return Subject(peer_of(certificate), text(NameOID.ORGANIZATIONAL_UNIT_NAME), text(NameOID.LOCALITY_NAME))


def validity_of(certificate: bytes) -> Validity:
    """The dates of a verified certificate (DER)."""
    parsed = _parse(certificate)
    start, end = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    return ENDLESS if end >= _NOT_AFTER else Validity(int(start.timestamp()), int(end.timestamp()))


@dataclass(frozen=True, slots=True)
class Credentials:
    """This node's key and certificate, and the CA certificate that it trusts. Certificates are DER."""

    identity: Identity
    certificate: bytes
    authority: bytes

    @classmethod
    def issued(cls, authority: Authority, identity: Identity, name: str, site: str = "") -> Credentials:
        return cls(identity, issue(authority, Subject(identity.peer_id, name, site)), authority.der)

    def server_context(self) -> ssl.SSLContext:
        """Mutual TLS 1.3, without tickets: each connection authenticates both sides again."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """Mutual TLS 1.3. No host name is checked, because a node's name is its key: see `peer_of`."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def show_in(self, context: ssl.SSLContext) -> None:
        """Make all later handshakes of `context` show this certificate."""
        certificate = ssl.DER_cert_to_PEM_cert(self.certificate).encode("ascii")
        # The ssl module reads keys from files only; this file is in memory, and exists only during the call.
        with open(os.memfd_create("credentials", os.MFD_CLOEXEC), "wb", buffering=0) as file:
            file.write(to_pem(self.identity.private_key) + certificate)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT | _NO_CHECK_TIME
        context.load_verify_locations(cadata=self.authority)
        self.show_in(context)
        return context


def peer_of(certificate: bytes) -> PeerId:
    """The peer id of the key in a certificate (DER) that TLS or `issued_by` has verified.

    Raises PeerMisbehavedError if the key is not an Ed25519 key, or the common name is not its peer id.
    """
    parsed = _parse(certificate)
    try:
        key = parsed.public_key()
        names = [attribute.value for attribute in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except _MALFORMED as error:
        raise PeerMisbehavedError("the certificate has a malformed key or subject") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PeerMisbehavedError("the certificate's key is not an Ed25519 key")
    peer = peer_id_of(key.public_bytes_raw())
    if names != [peer]:
        raise PeerMisbehavedError(f"the certificate of {peer} has another common name: {names!r:.200}")
    return peer


def _parse(certificate: bytes) -> x509.Certificate:
    if not certificate:
        raise NotAdmittedError("showed no certificate")
    if len(certificate) > MAX_CERTIFICATE:
        raise PeerMisbehavedError(f"the certificate is too long: {len(certificate)} bytes")
    try:
        return x509.load_der_x509_certificate(certificate)
    except _MALFORMED as error:
        raise PeerMisbehavedError("malformed certificate") from error


def new_authority() -> bytes:
    key = Ed25519PrivateKey.generate()
    return to_pem(key) + _ca_certificate(key).public_bytes(Encoding.PEM)


def _ca_certificate(key: Ed25519PrivateKey, serial: int = 0) -> x509.Certificate:
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"shoal cluster {digest.hex()[:16]}")])
    return _signed(key, name, name, key.public_key(), ca=True, serial=serial)


def _signed(
    signer: Ed25519PrivateKey,
    issuer: x509.Name,
    subject: x509.Name,
    key: Ed25519PublicKey,
    *,
    ca: bool = False,
    serial: int = 0,
    validity: Validity = ENDLESS,
) -> x509.Certificate:
    """`serial` 0: a random number."""
    end = validity.end
    unused = dict.fromkeys(("key_encipherment", "data_encipherment", "encipher_only", "decipher_only"), False)
    usage = x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_agreement=False, **unused
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE if end is None else _date(validity.start))
        .not_valid_after(_NOT_AFTER if end is None else min(_date(end), _NOT_AFTER))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
    )
    if not ca:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(purposes, critical=False)
    key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return builder.add_extension(key_id, critical=False).sign(signer, algorithm=None)


def _date(seconds: int) -> datetime:
    """`seconds` limited to 1970 ... _NOT_AFTER: the library writes no X.509 dates before 1950."""
    return datetime.fromtimestamp(max(0, min(seconds, int(_NOT_AFTER.timestamp()))), UTC)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, *_MALFORMED):
        return False

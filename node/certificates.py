"""The cluster's authority, and the certificates by which its nodes know each other.

The authority is one file: an Ed25519 key and its self-signed CA certificate. Every node that loads the file issues
itself a certificate that holds its identity's key, so a peer id follows from a TLS handshake. What is in a
certificate, and what each side checks: docs/PROTOCOL.md, "Identity and certificates".
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node import private_files
from node.identity import Identity, from_pem, to_pem
from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.records import peer_id_of

FILE_NAME = "cluster.pem"
"""In the data folder: the authority that a node makes for itself when no cluster key is configured."""

_NOT_BEFORE = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(2100, 1, 1, tzinfo=UTC)
"""Wide on purpose: a board without a clock battery wakes up in 1970 or at its image's build date."""

MAX_CERTIFICATE = 4096
"""Bytes of DER. Ours take 450; what a peer claims is not parsed beyond this."""
_MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What `cryptography` raises, when it parses a certificate and when its parts are looked at."""
_MAX_NAME = 64
"""Characters that X.520 allows in a common name and in an organizational unit."""


@dataclass(frozen=True, slots=True)
class Authority:
    key: Ed25519PrivateKey
    certificate: x509.Certificate


def create_authority(path: Path) -> None:
    """Make the authority file (PEM: private key, CA certificate; mode 0600). Raises BadInputError where one exists."""
    if not private_files.create(path, _new_authority()):
        raise BadInputError(f"{path} exists already; a cluster's key is never overwritten")


def load_authority(path: Path) -> Authority:
    """Raises BadInputError naming the file where it is missing, unreadable or not an authority."""
    try:
        data = private_files.read(path)
    except FileNotFoundError as error:
        raise BadInputError(f"no cluster key at {path}; make one with `p2pctl cluster init {path}`") from error
    key = from_pem(path, data)
    try:
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise BadInputError(f"{path} holds no certificate beside its key") from error
    if certificate.public_key() != key.public_key() or not _is_authority(certificate):
        raise BadInputError(f"the certificate in {path} is not that of the authority whose key stands beside it")
    return Authority(key, certificate)


def own_authority(data_dir: Path) -> Authority:
    """The authority of a cluster of this one node, made where missing. Raises BadInputError."""
    path = data_dir / FILE_NAME
    if not path.exists():
        private_files.create(path, _new_authority())
    return load_authority(path)


def issue(authority: Authority, identity: Identity, name: str) -> x509.Certificate:
    """A node's certificate. Its common name is the peer id; `name` stands beside it for whoever reads it."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, identity.peer_id)]
    if name:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, name[:_MAX_NAME]))
    builder = _builder(x509.Name(attributes), identity.private_key.public_key(), authority.certificate.subject)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(_issuer_key_id(authority.key), critical=False)
        .sign(authority.key, algorithm=None)
    )


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a node proves itself with, and whom it believes. Certificates are DER."""

    identity: Identity
    certificate: bytes
    authority: bytes

    @classmethod
    def issued(cls, authority: Authority, identity: Identity, name: str) -> Credentials:
        certificate = issue(authority, identity, name).public_bytes(Encoding.DER)
        return cls(identity, certificate, authority.certificate.public_bytes(Encoding.DER))

    def server_context(self) -> ssl.SSLContext:
        """Mutual TLS 1.3, without tickets: every connection proves both sides anew."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """As the server's. No host name is checked: the name of a node is its key, see `peer_of`."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def verify(self, certificate: bytes) -> PeerId:
        """The peer that a certificate (DER) of this cluster names. Raises PeerMisbehavedError for any other.

        For where TLS has not verified it already. As there are no expiring certificates, no time is looked at.
        """
        parsed = _parse(certificate)
        try:
            parsed.verify_directly_issued_by(x509.load_der_x509_certificate(self.authority))
        except (*_MALFORMED, InvalidSignature) as error:
            raise PeerMisbehavedError("certificate of another cluster") from error
        return peer_of(certificate)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=self.authority)
        _load_chain(context, to_pem(self.identity.private_key) + _pem(self.certificate))
        return context


def peer_of(certificate: bytes) -> PeerId:
    """The peer id that follows from the key in a certificate (DER) which TLS or `Credentials.verify` has verified.

    Raises PeerMisbehavedError where the key is no Ed25519 key or the common name is another than the peer id.
    """
    parsed = _parse(certificate)
    try:
        key = parsed.public_key()
        names = [attribute.value for attribute in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except _MALFORMED as error:
        raise PeerMisbehavedError("certificate with a malformed key or subject") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PeerMisbehavedError("certificate with a key of another kind than Ed25519")
    peer = peer_id_of(key.public_bytes_raw())
    if names != [peer]:
        raise PeerMisbehavedError(f"certificate of {peer} goes by another name: {names!r:.200}")
    return peer


def _parse(certificate: bytes) -> x509.Certificate:
    if len(certificate) > MAX_CERTIFICATE:
        raise PeerMisbehavedError(f"certificate of {len(certificate)} bytes")
    try:
        return x509.load_der_x509_certificate(certificate)
    except _MALFORMED as error:
        raise PeerMisbehavedError("malformed certificate") from error


def _new_authority() -> bytes:
    key = Ed25519PrivateKey.generate()
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"shoal cluster {digest.hex()[:16]}")])
    certificate = (
        _builder(name, key.public_key(), name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(_issuer_key_id(key), critical=False)
        .sign(key, algorithm=None)
    )
    return to_pem(key) + certificate.public_bytes(Encoding.PEM)


def _builder(subject: x509.Name, key: Ed25519PublicKey, issuer: x509.Name) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issuer_key_id(key: Ed25519PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _pem(certificate: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(certificate).encode("ascii")


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """The ssl module reads keys from files only: this one exists in memory, and only for the call."""
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)

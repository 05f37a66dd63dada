"""Signatures of images as cosign makes them with a key pair: keys, signed documents, and the objects that carry them.

Two forms exist. *Simple signing* (sigstore/cosign, SIGNATURE_SPEC.md): the manifest at the tag `sha256-<hex>.sig` has a
layer for each signature; the layer is the signed document, its annotation the signature. *Bundles* (BUNDLE_SPEC.md,
DSSE 1.0, in-toto Statement 1): a manifest that refers to the image has a layer with the signed document and its
signature. A document counts only if it names the image's digest and says that it is the signature of an image: the same
key also signs lists of contents and test reports. Certificates and transparency logs are not used.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import Digest, ObjectRef

SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MAX_DOCUMENT = 256 << 10
"""Bytes of a signed document: cosign's have some hundred, a bundle with a proof of a log some thousand."""
MAX_SIGNATURES = 32
"""Signatures of one image that are tried, each with every key."""
MAX_KEY_FILE = 64 << 10
RSA_BITS = range(2048, 8193)
"""Shorter keys are weak, and longer ones cost too much time for each signature."""
_ANNOTATION = "dev.cosignproject.cosign/signature"
_SIGNATURE_OF_IMAGE = "cosign container image signature"
_STATEMENT, _STATEMENT_TYPE = "application/vnd.in-toto+json", "https://in-toto.io/Statement/v1"
_PREDICATE_OF_IMAGE = "https://sigstore.dev/cosign/sign/v1"
_LISTED_AS = (BUNDLE, "application/vnd.oci.empty.v1+json")
"""Types of bundles in lists of referrers: in the list that it keeps at a tag, cosign writes that of their config."""
_ACCESSORY = re.compile(r"sha256-[0-9a-f]{64}(\.(sig|att|sbom))?", re.ASCII)

_Key = ec.EllipticCurvePublicKey | Ed25519PublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A public key. `fingerprint` is the sha256 of its SubjectPublicKeyInfo in hex."""

    key: _Key = field(compare=False)
    fingerprint: str

    @classmethod
    def parse(cls, pem: bytes) -> VerifyKey:
        """Read a file with one key in PEM. Raises BadInputError."""
        if pem.count(b"-----BEGIN ") != 1:
            raise BadInputError("not one public key in PEM (-----BEGIN PUBLIC KEY-----)")
        try:
            key = load_pem_public_key(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BadInputError("not a public key in PEM (-----BEGIN PUBLIC KEY-----)") from error
        p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        if not (p256 or isinstance(key, Ed25519PublicKey) or (isinstance(key, rsa.RSAPublicKey) and _fits(key))):
            raise BadInputError("neither ECDSA P-256, nor Ed25519, nor RSA of 2048 to 8192 bits")
        shown = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(key, sha256(shown).hexdigest())  # type: ignore[arg-type] # one of the three kinds

    def verifies(self, signature: bytes, data: bytes) -> bool:
        try:
            match self.key:
                case Ed25519PublicKey():
                    self.key.verify(signature, data)
                case rsa.RSAPublicKey():
                    self.key.verify(signature, data, padding.PKCS1v15(), SHA256())
                case _:
                    self.key.verify(signature, data, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def _fits(key: rsa.RSAPublicKey) -> bool:
    return key.key_size in RSA_BITS


def signature_tag(digest: Digest) -> str:
    """The tag of the manifest with an image's simple signatures."""
    return f"{digest.algorithm}-{digest.hex}.sig"


def is_accessory(tag: str) -> bool:
    """Whether the tag is one of those that hold signatures and other statements, which are not signed themselves."""
    return _ACCESSORY.fullmatch(tag) is not None


@dataclass(frozen=True, slots=True)
class Carried:
    """A layer that is a signed document. `signature` is base64, and "" for a bundle, which contains its own."""

    ref: ObjectRef
    media_type: str
    signature: str


class _Layer(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] = {}


class _Manifest(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] = ()


def carried(manifest: bytes) -> Iterator[Carried]:
    """The signed documents that a manifest carries, at most MAX_SIGNATURES of at most MAX_DOCUMENT bytes."""
    try:
        layers = msgspec.json.decode(manifest, type=_Manifest).layers
    except UNDECODABLE:
        return
    documents = [layer for layer in layers if layer.media_type in (SIMPLE_SIGNING, BUNDLE)]
    for layer in documents[:MAX_SIGNATURES]:
        try:
            ref = ObjectRef(Digest.parse(layer.digest), layer.size)
        except BadInputError:
            continue
        if 0 < ref.size <= MAX_DOCUMENT:
            yield Carried(ref, layer.media_type, layer.annotations.get(_ANNOTATION, ""))


class _Entry(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    artifact_type: str = ""


class _Index(msgspec.Struct, frozen=True):
    manifests: tuple[_Entry, ...] = ()


def bundles(referrers: bytes, most: int) -> Iterator[ObjectRef]:
    """The manifests that may carry bundles, of at most `most` bytes, in a list of referrers; at most MAX_SIGNATURES."""
    try:
        entries = msgspec.json.decode(referrers, type=_Index).manifests
    except UNDECODABLE:
        return
    fitting = sorted((e for e in entries if e.artifact_type in _LISTED_AS), key=lambda e: e.artifact_type != BUNDLE)
    for entry in fitting[:MAX_SIGNATURES]:
        try:
            ref = ObjectRef(Digest.parse(entry.digest), entry.size)
        except BadInputError:
            continue
        if 0 < ref.size <= most:
            yield ref


class _Image(msgspec.Struct, frozen=True):
    digest: str = msgspec.field(name="docker-manifest-digest")


class _Critical(msgspec.Struct, frozen=True):
    image: _Image
    type: str


class _SimpleSigning(msgspec.Struct, frozen=True):
    critical: _Critical


class _EnvelopeSignature(msgspec.Struct, frozen=True):
    sig: str


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: tuple[_EnvelopeSignature, ...]


class _Bundle(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct, frozen=True):
    digest: dict[str, str] = {}


class _Statement(msgspec.Struct, frozen=True):
    type: str = msgspec.field(name="_type")
    predicate: str = msgspec.field(name="predicateType")
    subject: tuple[_Subject, ...] = ()


def signs(document: bytes, carrier: Carried, digest: Digest, keys: Iterable[VerifyKey]) -> bool:
    """Whether the document is the signature of the image `digest` by one of the keys."""
    try:
        if carrier.media_type == SIMPLE_SIGNING:
            return _signed_simply(document, carrier.signature, digest, keys)
        return _signed_in_bundle(document, digest, keys)
    except (*UNDECODABLE, ValueError):  # ValueError: no base64
        return False


def _signed_simply(document: bytes, signature: str, digest: Digest, keys: Iterable[VerifyKey]) -> bool:
    shown = b64decode(signature, validate=True)
    if not any(key.verifies(shown, document) for key in keys):
        return False
    critical = msgspec.json.decode(document, type=_SimpleSigning).critical
    return critical.type == _SIGNATURE_OF_IMAGE and critical.image.digest == str(digest)


def _signed_in_bundle(document: bytes, digest: Digest, keys: Iterable[VerifyKey]) -> bool:
    bundle = msgspec.json.decode(document, type=_Bundle)
    envelope = bundle.dsse_envelope
    if bundle.media_type != BUNDLE or envelope.payload_type != _STATEMENT or len(envelope.signatures) != 1:
        return False
    payload = b64decode(envelope.payload, validate=True)
    shown = b64decode(envelope.signatures[0].sig, validate=True)
    signed = b"DSSEv1 %d %b %d %b" % (len(_STATEMENT), _STATEMENT.encode(), len(payload), payload)
    if not any(key.verifies(shown, signed) for key in keys):
        return False
    statement = msgspec.json.decode(payload, type=_Statement)
    of_image = statement.type == _STATEMENT_TYPE and statement.predicate == _PREDICATE_OF_IMAGE
    return of_image and any(subject.digest.get(digest.algorithm) == digest.hex for subject in statement.subject)

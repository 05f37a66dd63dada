"""Signatures of images as `cosign sign --key` makes them, with keys of every kind that it makes or takes.

`recorded` reads signatures that cosign itself made.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from node.oci.signatures import BUNDLE, SIMPLE_SIGNING
from protocol.ids import Digest, ObjectRef

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = b"{}"
"""The blob of a manifest's `config`."""
TYPE, PREDICATE = "cosign container image signature", "https://sigstore.dev/cosign/sign/v1"
RECORDED = {
    ".sig": ("signatures.json", "payload.json"),
    "": ("referrers.json", "bundle-manifest.json", "bundle.json"),
}
"""The recorded objects of both forms of signatures, by the end of the tag that the first of them has. The last is the
signed document, and the one before it the manifest that carries it."""


@dataclass(frozen=True)
class Signer:
    pem: bytes
    sign: Callable[[bytes], bytes]


def pem_of(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def ecdsa() -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    return Signer(pem_of(key), lambda data: key.sign(data, ec.ECDSA(SHA256())))


def ed25519() -> Signer:
    key = Ed25519PrivateKey.generate()
    return Signer(pem_of(key), key.sign)


def rsa_key(bits: int = 2048) -> Signer:
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    return Signer(pem_of(key), lambda data: key.sign(data, padding.PKCS1v15(), SHA256()))


def simple_payload(digest: Digest | str, kind: str = TYPE) -> bytes:
    critical = {"identity": {"docker-reference": "any"}, "image": {"docker-manifest-digest": str(digest)}, "type": kind}
    return json.dumps({"critical": critical, "optional": None}).encode()


def statement(digest: Digest, predicate: str = PREDICATE) -> bytes:
    subject = [{"digest": {digest.algorithm: digest.hex}, "annotations": {}}]
    fields = {"_type": "https://in-toto.io/Statement/v1", "subject": subject, "predicateType": predicate}
    return json.dumps({**fields, "predicate": {}}).encode()


def bundle(signer: Signer, payload: bytes, payload_type: str = "application/vnd.in-toto+json") -> bytes:
    signed = b" ".join([b"DSSEv1", b"%d" % len(payload_type), payload_type.encode(), b"%d" % len(payload), payload])
    envelope = {
        "payload": b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"sig": b64encode(signer.sign(signed)).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": "x"}, "tlogEntries": []}
    return json.dumps({"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


def manifest_of(*layers: tuple[ObjectRef, str, str], artifact_type: str = "") -> bytes:
    """A manifest of signatures: each layer's object, media type, and signature in base64 or ""."""
    described: list[dict[str, Any]] = [
        {
            "mediaType": media_type,
            "digest": str(ref.digest),
            "size": ref.size,
            **({"annotations": {"dev.cosignproject.cosign/signature": signature}} if signature else {}),
        }
        for ref, media_type, signature in layers
    ]
    digest = f"sha256:{sha256(CONFIG).hexdigest()}"
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(CONFIG)}
    fields = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described}
    return json.dumps({**fields, **({"artifactType": artifact_type} if artifact_type else {})}).encode()


def simple_layer(signer: Signer, add: Callable[[bytes], ObjectRef], payload: bytes) -> tuple[ObjectRef, str, str]:
    return add(payload), SIMPLE_SIGNING, b64encode(signer.sign(payload)).decode()


def sign_simply(add: Callable[[bytes], ObjectRef], digest: Digest, *signers: Signer) -> ObjectRef:
    """Add the objects of simple signatures to a registry. Returns the manifest for the signature tag."""
    return add(manifest_of(*(simple_layer(signer, add, simple_payload(digest)) for signer in signers)))


def sign_in_bundle(
    add: Callable[[bytes], ObjectRef], digest: Digest, signer: Signer, listed_as: str = BUNDLE
) -> ObjectRef:
    """Add the objects of a bundle to a registry. Returns the index for the referrers tag."""
    carrier = add(manifest_of((add(bundle(signer, statement(digest))), BUNDLE, ""), artifact_type=BUNDLE))
    entry = {"mediaType": MANIFEST, "digest": str(carrier.digest), "size": carrier.size, "artifactType": listed_as}
    return add(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode())


def recorded(name: str) -> bytes:
    """A file of tests/data/cosign/README.md."""
    return (Path(__file__).parents[1] / "data/cosign" / name).read_bytes()

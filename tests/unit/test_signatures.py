"""Keys and signed documents of cosign, as values."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from node.config.schema import TagsPart
from node.content.signatures import MAX_VERIFIED, Verified, load_keys
from node.oci import signatures
from node.oci.manifests import MAX_MANIFEST
from node.oci.signatures import (
    BUNDLE,
    MAX_DOCUMENT,
    MAX_SIGNATURES,
    SIMPLE_SIGNING,
    Carried,
    VerifyKey,
    bundles,
    carried,
    is_accessory,
    signature_tag,
    signs,
)
from protocol.errors import BadInputError
from protocol.ids import Digest, ObjectRef
from tests.support import signing
from tests.support.blobs import Blob
from tests.support.signing import Signer

DIGEST, OTHER = Digest("sha256", "ab" * 32), Digest("sha256", "cd" * 32)
SIGNERS = {"ecdsa": signing.ecdsa(), "ed25519": signing.ed25519(), "rsa": signing.rsa_key()}
KEYS = {name: VerifyKey.parse(signer.pem) for name, signer in SIGNERS.items()}
REF = ObjectRef(DIGEST, 5)


def simple(signer: Signer, document: bytes) -> Carried:
    return Carried(REF, SIMPLE_SIGNING, b64encode(signer.sign(document)).decode())


@pytest.mark.parametrize("kind", SIGNERS)
def test_a_signature_counts_for_its_image_and_its_key_only(kind: str) -> None:
    """S-48"""
    signer, key = SIGNERS[kind], KEYS[kind]
    others = [other for name, other in KEYS.items() if name != kind]
    document = signing.simple_payload(DIGEST)
    assert signs(document, simple(signer, document), DIGEST, [*others, key])
    assert not signs(document, simple(signer, document), DIGEST, others)
    assert not signs(document, simple(signer, document), OTHER, [key])
    assert not signs(document + b" ", simple(signer, document), DIGEST, [key])
    bundle = signing.bundle(signer, signing.statement(DIGEST))
    in_bundle = Carried(REF, BUNDLE, "")
    assert signs(bundle, in_bundle, DIGEST, [*others, key])
    assert not signs(bundle, in_bundle, DIGEST, others)
    assert not signs(bundle, in_bundle, OTHER, [key])


@pytest.mark.parametrize("end", signing.RECORDED)
def test_a_signature_that_cosign_made_counts_for_its_image_and_its_key_only(end: str) -> None:
    key, image = VerifyKey.parse(signing.recorded("cosign.pub")), Blob(signing.recorded("image.json")).ref.digest
    *listed, manifest, document = map(signing.recorded, signing.RECORDED[end])
    for referrers in listed:
        assert list(bundles(referrers, MAX_MANIFEST)) == [Blob(manifest).ref]
    (carrier,) = carried(manifest)
    assert carrier.ref == Blob(document).ref
    assert signs(document, carrier, image, [*KEYS.values(), key])
    assert not signs(document, carrier, image, KEYS.values())
    assert not signs(document, carrier, OTHER, [key])


@pytest.mark.parametrize(
    "document",
    [
        signing.simple_payload(DIGEST, kind="atomic container signature"),
        signing.simple_payload(str(DIGEST).upper()),
        json.dumps({"Critical": json.loads(signing.simple_payload(DIGEST))["critical"]}).encode(),
        b"{}",
        b"[" * 5000,
        b"\xff",
    ],
)
def test_a_signed_document_that_is_no_signature_of_the_image_does_not_count(document: bytes) -> None:
    """S-48"""
    signer = SIGNERS["ecdsa"]
    assert not signs(document, simple(signer, document), DIGEST, [KEYS["ecdsa"]])


def many_signatures(bundle: bytes) -> bytes:
    fields = json.loads(bundle)
    fields["dsseEnvelope"]["signatures"] *= 2
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "document",
    [
        signing.bundle(SIGNERS["ecdsa"], signing.statement(DIGEST, predicate="https://spdx.dev/Document")),
        signing.bundle(SIGNERS["ecdsa"], signing.statement(DIGEST), payload_type="text/plain"),
        signing.bundle(SIGNERS["ecdsa"], b"{}"),
        many_signatures(signing.bundle(SIGNERS["ecdsa"], signing.statement(DIGEST))),
        signing.bundle(SIGNERS["ecdsa"], signing.statement(DIGEST)).replace(b"v0.3", b"v0.9"),
        b'{"mediaType": "x"}',
        b"",
    ],
)
def test_a_bundle_with_another_statement_does_not_count(document: bytes) -> None:
    assert not signs(document, Carried(REF, BUNDLE, ""), DIGEST, [KEYS["ecdsa"]])


@given(st.binary(max_size=200), st.sampled_from([SIMPLE_SIGNING, BUNDLE]), st.text(max_size=40))
def test_any_bytes_are_only_no_signature(document: bytes, media_type: str, signature: str) -> None:
    assert not signs(document, Carried(REF, media_type, signature), DIGEST, KEYS.values())
    assert list(carried(document)) == []
    assert list(bundles(document, 1 << 20)) == []


def test_the_documents_of_a_manifest_are_bounded() -> None:
    """S-48"""
    layer = (REF, SIMPLE_SIGNING, "c2ln")
    large = (ObjectRef(OTHER, MAX_DOCUMENT + 1), SIMPLE_SIGNING, "c2ln")
    other = (REF, "application/vnd.oci.image.layer.v1.tar", "")
    assert list(carried(signing.manifest_of(other, layer))) == [Carried(REF, SIMPLE_SIGNING, "c2ln")]
    assert len(list(carried(signing.manifest_of(*[layer] * 100)))) == MAX_SIGNATURES
    assert list(carried(signing.manifest_of(large))) == []
    entry = {"digest": str(DIGEST), "size": 7, "artifactType": BUNDLE}
    listed = [{**entry, "artifactType": "x"}, {**entry, "size": 1 << 30}, {**entry, "digest": "x"}, *[entry] * 100]
    found = list(bundles(json.dumps({"manifests": listed}).encode(), 1 << 20))
    assert set(found) == {ObjectRef(DIGEST, 7)}
    assert len(found) <= MAX_SIGNATURES


def test_tags_of_signatures_are_not_images() -> None:
    assert signature_tag(DIGEST) == f"sha256-{'ab' * 32}.sig"
    assert is_accessory(signature_tag(DIGEST))
    assert is_accessory(f"sha256-{'ab' * 32}")
    assert not is_accessory("sha256-ab.sig")
    assert not is_accessory(f"{signature_tag(DIGEST)}x")


# Key files


@pytest.mark.parametrize(
    ("pem", "error"),
    [
        (lambda: b"", "not one public key"),
        (lambda: SIGNERS["rsa"].pem + SIGNERS["ecdsa"].pem, "not one public key"),
        (lambda: b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (lambda: signing.pem_of(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda: signing.rsa_key(1024).pem, "2048"),
    ],
)
def test_a_file_that_holds_no_fit_key_is_refused_with_its_name(
    tmp_path: Path, pem: Callable[[], bytes], error: str
) -> None:
    path = tmp_path / "cosign.pub"
    path.write_bytes(pem())
    with pytest.raises(BadInputError, match=error) as caught:
        load_keys([TagsPart(match="*:latest", verify=str(path))])
    assert str(path) in str(caught.value)
    assert "*:latest" in str(caught.value)


def test_keys_are_loaded_by_path(tmp_path: Path) -> None:
    paths = []
    for name, signer in SIGNERS.items():
        paths.append(str(tmp_path / f"{name}.pub"))
        Path(paths[-1]).write_bytes(signer.pem)
    keys = load_keys([TagsPart(match="*", verify=tuple(paths)), TagsPart(match="*:x", verify=paths[0])])
    assert list(keys) == paths
    assert {key.fingerprint for key in keys.values()} == {key.fingerprint for key in KEYS.values()}
    with pytest.raises(BadInputError, match="No such file"):
        load_keys([TagsPart(match="*", verify=str(tmp_path / "none"))])


def test_what_was_verified_is_remembered_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Verified(tmp_path / "signatures.sqlite")
    table.note("r/app", DIGEST, KEYS["rsa"])
    table.close()
    table = Verified(tmp_path / "signatures.sqlite")
    assert table.has("r/app", DIGEST, [KEYS["ecdsa"], KEYS["rsa"]])
    assert not table.has("r/app", DIGEST, [KEYS["ecdsa"]])
    assert not table.has("r/app", OTHER, [KEYS["rsa"]])
    assert not table.has("r/other", DIGEST, [KEYS["rsa"]])
    assert MAX_VERIFIED > 1000
    assert Blob(b"x").ref.size == 1
    assert len(SIGNERS["rsa"].pem) < signatures.MAX_KEY_FILE
    table.close()

"""A token service for docker-registry: real signed tokens, for the token flow of clients and nodes.

Specification: distribution/docs/spec/auth/token.md and jwt.md. Every client gets a token, which allows the repositories
that the user may pull, or none.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ISSUER, SERVICE = "shoal-test", "registry.test"
LIFETIME_S = 300
ANYBODY = ""


def _part(document: object) -> bytes:
    return _base64url(json.dumps(document).encode())


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class TokenServer:
    """A context manager that answers in threads. `rights`: repositories by user; those of ANYBODY are for everyone."""

    def __init__(self, folder: Path, users: Mapping[str, str], rights: Mapping[str, Sequence[str]]) -> None:
        self._users, self._rights = users, rights
        self.identities = {user: secrets.token_urlsafe(16) for user in users}
        """The identity token of each user, which clients send instead of a password."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "token.pem"
        """Path of a certificate for the registry, which trusts tokens signed with its key."""
        self.certificate.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        self.realm = f"http://127.0.0.1:{self._server.server_port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, name="token-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def registry_auth(self) -> str:
        """This service in docker-registry's configuration."""
        return (
            f"auth:\n  token: {{realm: '{self.realm}', service: {SERVICE}, issuer: {ISSUER},"
            f" rootcertbundle: '{self.certificate}'}}\n"
        )

    def accepts(self, user: str, password: str) -> bool:
        return self._users.get(user) == password

    def token(self, user: str, *repositories: str, lifetime_s: float = LIFETIME_S) -> str:
        """A token for the given repositories, restricted to those that `user` may pull."""
        now = int(time.time())
        allowed = {*self._rights.get(user, ()), *self._rights.get(ANYBODY, ())}
        certificate = base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER)).decode()
        head = _part({"typ": "JWT", "alg": "ES256", "x5c": [certificate]})
        access = [{"type": "repository", "name": name, "actions": ["pull"]} for name in repositories if name in allowed]
        claims: dict[str, object] = {"iss": ISSUER, "sub": user, "aud": SERVICE, "access": access}
        claims |= {"exp": now + int(lifetime_s), "nbf": now - 10, "iat": now, "jti": f"{time.monotonic_ns():x}"}
        signed = head + b"." + _part(claims)
        r, s = decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return (signed + b"." + _base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: TokenServer

    def do_GET(self) -> None:
        user, password = self._credentials()
        if user != ANYBODY and not self.service.accepts(user, password):
            self._answer(401, {"errors": [{"code": "UNAUTHORIZED"}]})
            return
        query = parse_qs(urlsplit(self.path).query)
        self._answer(200, {"token": self._token(user, query), "expires_in": LIFETIME_S})

    def do_POST(self) -> None:
        """OAuth2, for identity tokens. Clients with a password also try it first; it is refused with 405."""
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode())
        for user, identity in self.service.identities.items():
            if form.get("refresh_token") == [identity]:
                self._answer(200, {"access_token": self._token(user, form), "expires_in": LIFETIME_S})
                return
        self._answer(405, {})

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _token(self, user: str, asked: Mapping[str, Sequence[str]]) -> str:
        scopes = " ".join(asked.get("scope", [])).split()
        return self.service.token(user, *(scope.split(":")[1] for scope in scopes if scope.startswith("repository:")))

    def _credentials(self) -> tuple[str, str]:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return ANYBODY, ""
        user, _, password = base64.b64decode(value).decode().partition(":")
        return user, password

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

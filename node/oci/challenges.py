"""Registry authorization as values: challenges, credentials, and the requests and replies of token services. No I/O.

Sources: RFC 9110, 11.6.1 (challenges); distribution/docs/spec/auth/token.md and oauth.md (tokens).
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from node.oci.strict_json import check_members, decode_strictly
from protocol.errors import UNDECODABLE, BadInputError

MAX_CHALLENGE = 8 << 10
"""Most characters of a WWW-Authenticate header that are parsed; the rest is ignored."""
IDENTITY = "<token>"
"""The user name with which credential helpers mark an identity token."""
DEFAULT_LIFETIME_S = 60.0
"""The token specification's default, and its lower bound."""
MAX_LIFETIME_S = 3600.0
MARGIN_S = 15.0
"""A token is renewed this long before its end: longer than a request may wait for its headers."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?=,|$)', re.ASCII)
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=\s|,|$)(?: +[A-Za-z0-9._~+/-]+=*(?=\s*(?:,|$)))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenge of `WWW-Authenticate`; scheme and parameter names are lower-case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """All challenges up to the first malformed one."""
    challenges: list[tuple[str, dict[str, str]]] = []
    header, position = header[:MAX_CHALLENGE], 0
    while True:
        if challenges and (match := _PARAMETER.match(header, position)):
            value = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3]
            challenges[-1][1].setdefault(match[1].lower(), value)
        elif match := _SCHEME.match(header, position):
            challenges.append((match[1].lower(), {}))
        else:
            return [Challenge(scheme, parameters) for scheme, parameters in challenges]
        position = match.end()


@dataclass(frozen=True, slots=True)
class Credentials:
    username: str
    password: str = field(repr=False)

    @property
    def is_identity(self) -> bool:
        """Whether the password is an identity token (OAuth2's refresh token), which only token services accept."""
        return self.username == IDENTITY

    @property
    def header(self) -> str:
        return "Basic " + b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request for a Bearer token: the URL of the token service, and the query."""

    realm: str
    query: Mapping[str, str]

    def form(self, identity: Credentials) -> dict[str, str]:
        """The form of the same request by POST, for an identity token."""
        grant = {"grant_type": "refresh_token", "client_id": "shoal", "refresh_token": identity.password}
        return grant | dict(self.query)


def token_request(challenge: Challenge, *, insecure: bool, scope: str) -> TokenRequest | None:
    """None if credentials must not be sent to the realm: it must be https; http only if the registry is http too."""
    realm = challenge.parameters.get("realm", "")
    try:
        parts = urlsplit(realm)
        usable = bool(parts.hostname) and parts.scheme in (("https", "http") if insecure else ("https",))
    except ValueError:
        usable = False
    if not usable:
        return None
    query = {"service": challenge.parameters.get("service", ""), "scope": challenge.parameters.get("scope") or scope}
    return TokenRequest(realm, {name: value for name, value in query.items() if value})


def relayed(challenges: Sequence[Challenge], *, insecure: bool, repository: str, basic: bool) -> str:
    """The challenge that a client should answer, as the value of WWW-Authenticate, or "".

    `basic`: whether the client may be asked for a password. `insecure`: whether the registry is http.
    """
    scope = f"repository:{repository}:pull"
    for challenge in challenges:
        if challenge.scheme == "bearer":
            asked = token_request(challenge, insecure=insecure, scope=scope)
            fields = {"realm": asked.realm, **asked.query, "scope": scope} if asked else {}
            if fields and all(value.isascii() and value.isprintable() for value in fields.values()):
                quoted = {name: re.sub(r'(["\\])', r"\\\1", value) for name, value in fields.items()}
                return "Bearer " + ",".join(f'{name}="{value}"' for name, value in quoted.items())
        elif challenge.scheme == "basic" and basic:
            return 'Basic realm="registry"'
    return ""


class _TokenReply(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


def parse_token(body: bytes) -> tuple[str, float] | None:
    """The token and the seconds for which it may be used; None if the body is not a token reply."""
    try:
        document = decode_strictly(body)
        reply = msgspec.convert(document, _TokenReply)
        check_members(document, _TokenReply.__struct_fields__)
    except (*UNDECODABLE, BadInputError):
        return None
    token = reply.token or reply.access_token
    if not token or not token.isascii() or not token.isprintable():
        return None
    lifetime = max(DEFAULT_LIFETIME_S, min(reply.expires_in or 0, MAX_LIFETIME_S))
    return token, lifetime - MARGIN_S

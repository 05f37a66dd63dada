"""Authorization at one registry or mirror: its challenges, this node's credentials for it, and the tokens it issued.

A call carries its client's grant, or the header last accepted for its repository. After a 401, one task answers the
challenge for the repository, and the others that want it wait. With `access = "relay"` this node has no credentials:
clients answer the challenges. A token service has its own breaker: its failures are not the registry's, and those for
one repository are not another's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import trio
from cachetools import LRUCache, TTLCache

from node.config.schema import UpstreamPart
from node.oci.challenges import Challenge, Credentials, parse_challenges, parse_token, relayed, token_request
from node.registry.attempts import Availability, FailedAttemptError, unexpected
from node.registry.bodies import Meter
from node.registry.calls import Call, Headers
from node.registry.credential_helper import CredentialHelpers, HelperError
from node.registry.docker_config import DockerConfig
from node.registry.retry import RETRIED_STATUS
from node.runtime.fair_places import Demand, current_demand, working_for
from protocol.errors import DeniedError, UnavailableError

MAX_TOKEN_REPLY = 1 << 20
MAX_SERVICES = 16
"""Token services of one registry whose state is remembered. Registries have one, or a few."""
MAX_AUTHORIZED = 256
"""Repositories of one registry whose authorization is remembered."""
BASIC_LIFETIME_S = 300.0
REFUSED_S = 10.0
"""How long calls without a grant are denied after the registry refused a repository: members that do not know that it
is private would ask for each of its blocks and names."""
TOKEN_FAILURE_S = 1.0
"""Tasks that waited while another failed to get a token for a repository fail with it, instead of trying one after the
other."""
Send = Callable[..., Awaitable[httpx.Response]]


@dataclass(eq=False, slots=True)
class _Renewal:
    """The tasks that want a repository's next token. `demand`: the one that fetches it works for all of them."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    demand: Demand = field(default_factory=Demand)
    wanted: int = 0


class Authorization:
    def __init__(self, registry: Availability, url: httpx.URL, part: UpstreamPart, *, meter: Meter, send: Send) -> None:
        """A mirror's name differs from the upstream's, so its credentials do too. `send` is RegistryClient.send."""
        self._registry = registry
        self._names = (registry.name, url.netloc.decode("ascii"))
        self._insecure = url.scheme == "http"
        self._meter, self._send = meter, send
        self.relays = part.access == "relay"
        self._config = DockerConfig(part.docker_config if part.access == "node" else "")
        self._helpers = CredentialHelpers()
        self._refused_header = ""
        self.challenges: LRUCache[str, list[Challenge]] = LRUCache(MAX_AUTHORIZED)
        """By repository, the challenges of the registry's last 401."""
        self._refused: TTLCache[str, bool] = TTLCache(MAX_AUTHORIZED, REFUSED_S, timer=trio.current_time)
        self._accepted: LRUCache[str, tuple[Headers, float]] = LRUCache(MAX_AUTHORIZED)
        self._renewals: dict[str, _Renewal] = {}
        """By repository, while tasks want a token."""
        self._failures: TTLCache[str, str] = TTLCache(MAX_AUTHORIZED, TOKEN_FAILURE_S, timer=trio.current_time)
        """By repository, why there was no token."""
        self._services: LRUCache[str, Availability] = LRUCache(MAX_SERVICES)

    def headers(self, call: Call) -> Headers:
        """Raises DeniedError, without asking the registry, if it has just refused the repository."""
        if call.grant:
            return {"Authorization": call.grant.authorization}
        if call.repository in self._refused:
            raise self.denied(call, "access denied (401)")
        return self._remembered(call.repository)

    def denied(self, call: Call, why: str) -> DeniedError:
        """The error of a call without authorization. With `relays`, later calls without a grant fail for REFUSED_S."""
        if self.relays and call.grant is None:
            self._refused[call.repository] = True
        return DeniedError(f"{self._names[0]}: {call.subject}: {why}")

    def challenge(self, repository: str, *, basic: bool) -> str:
        challenges = self.challenges.get(repository, [])
        return relayed(challenges, insecure=self._insecure, repository=repository, basic=basic)

    async def renewed(self, call: Call, response: httpx.Response, used: Headers) -> Headers:
        """Headers for the second request after a 401; {} if a grant was refused. Raises DeniedError."""
        challenges = parse_challenges(response.headers.get("www-authenticate", ""))
        self.challenges[call.repository] = challenges
        if call.grant:
            return {}
        await response.aclose()  # the token service may need its connection
        with self._renewing(call.repository) as renewal:
            async with renewal.lock:
                remembered = self._remembered(call.repository)
                if remembered and remembered != used:
                    return remembered
                if call.repository in self._failures:
                    raise UnavailableError(self._failures[call.repository])
                try:
                    with working_for(renewal.demand):
                        header, lifetime_s = await self._meet(call, challenges, used)
                except (UnavailableError, FailedAttemptError) as failure:
                    self._failures[call.repository] = str(failure)
                    raise
                headers = {"Authorization": header}
                self._accepted[call.repository] = (headers, trio.current_time() + lifetime_s)
                return headers

    @contextmanager
    def _renewing(self, repository: str) -> Iterator[_Renewal]:
        renewal = self._renewals.setdefault(repository, _Renewal())
        renewal.wanted += 1
        try:
            with current_demand().supporting(renewal.demand):
                yield renewal
        finally:
            renewal.wanted -= 1
            if not renewal.wanted:
                del self._renewals[repository]

    def _remembered(self, repository: str) -> Headers:
        headers, until = self._accepted.get(repository, ({}, 0.0))
        return headers if trio.current_time() < until else {}

    async def _credentials(self) -> Credentials | None:
        config = self._config.read()
        helper = config.helper(self._names)
        try:
            credentials = await self._helpers.get(*helper, self._refused_header) if helper else None
        except HelperError as error:
            raise FailedAttemptError(str(error), again=False) from error
        return credentials or config.of(self._names)

    async def _meet(self, call: Call, challenges: list[Challenge], used: Headers) -> tuple[str, float]:
        self._refused_header = used.get("Authorization", self._refused_header)
        credentials = await self._credentials()
        for challenge in challenges:
            if challenge.scheme == "bearer":
                return await self._token(call, challenge, credentials)
            if challenge.scheme == "basic" and credentials and not credentials.is_identity:
                return credentials.header, BASIC_LIFETIME_S
        raise self.denied(call, "access denied" if credentials else "access denied; no credentials for it")

    async def _token(self, call: Call, challenge: Challenge, credentials: Credentials | None) -> tuple[str, float]:
        scope = f"repository:{call.repository}:pull"
        asked = token_request(challenge, insecure=self._insecure, scope=scope)
        if asked is None:
            raise self.denied(call, "the token service it names is not https")
        try:
            realm = httpx.URL(asked.realm)
            url = realm.copy_merge_params(asked.query)
        except httpx.InvalidURL as error:
            raise self.denied(call, "the token service it names is not a URL") from error
        service = self._service(realm)

        async def attempt(call: Call) -> tuple[str, float]:
            if credentials and credentials.is_identity:
                form = asked.form(credentials)
                response = await self._send("POST", realm, {}, follow=False, form=form, token=True)
            else:
                shown = {"Authorization": credentials.header} if credentials else {}
                response = await self._send("GET", url, shown, token=True)
            if response.status_code not in RETRIED_STATUS:
                service.answered()
            try:
                return await self._token_in(response, call, credentials)
            finally:
                await response.aclose()

        return await service.retrying(call, attempt)

    def _service(self, realm: httpx.URL) -> Availability:
        host = realm.netloc.decode("ascii")
        if host not in self._services:
            registry = self._registry
            name = f"{registry.name}'s token service {host}"
            self._services[host] = Availability(name, is_mirror=registry.is_mirror, rng=registry.rng)
        return self._services[host]

    async def _token_in(
        self, response: httpx.Response, call: Call, credentials: Credentials | None
    ) -> tuple[str, float]:
        if response.status_code == 401 and credentials:
            self._refused_header = credentials.header
        if response.status_code in (400, 401, 403, 404):
            raise self.denied(call, f"the token service answered {response.status_code}")
        if response.status_code != 200:
            raise unexpected(response)
        token = parse_token(await self._meter.whole(response, MAX_TOKEN_REPLY, f"{self._names[0]}: {call.subject}"))
        if token is None:
            raise FailedAttemptError("it sent no token", again=False)
        return f"Bearer {token[0]}", token[1]

"""Challenges, tokens, credentials, back-off and the breaker: decisions without a socket or a clock."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.oci.challenges import Challenge, Credentials, parse_challenges, parse_token, relayed, token_request
from node.registry.docker_config import DockerConfig, parse_docker_config
from node.registry.retry import BODY, RESOLVE, Breaker

TOKENS = st.text("abcdefXYZ0123-_.", min_size=1, max_size=12)
SCOPE = 'scope="repository:o/a:pull"'
HTTPS = False, False  # neither an insecure registry nor a client that may be asked for a password
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@given(st.lists(st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), VALUES, max_size=4)), max_size=4))
def test_challenges_survive_quoting(challenges) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{scheme} " + ", ".join(f"{name}={quoted(value)}" for name, value in parameters.items())
        for scheme, parameters in challenges
    )
    assert parse_challenges(header) == [Challenge(scheme.lower(), parameters) for scheme, parameters in challenges]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Bearer realm="https://a/t",service=b', [("bearer", {"realm": "https://a/t", "service": "b"})]),
        ('Negotiate YWJj==, Basic realm="r"', [("negotiate", {}), ("basic", {"realm": "r"})]),
        ("Basic", [("basic", {})]),
        ('Bearer realm="unclosed', [("bearer", {})]),
        ("", []),
    ],
)
def test_challenges_of_real_servers(header: str, expected) -> None:
    assert [(c.scheme, c.parameters) for c in parse_challenges(header)] == expected


@given(st.text(max_size=200))
def test_any_header_is_parsed_to_something(header: str) -> None:
    assert len(parse_challenges(header)) <= len(header)


@pytest.mark.parametrize(
    ("realm", "insecure", "usable"),
    [
        ("https://a/token", False, True),
        ("http://a/token", True, True),
        ("http://a/token", False, False),
        ("file:///etc/passwd", True, False),
        ("https://[::1", True, False),
        ("", True, False),
    ],
)
def test_credentials_go_to_https_only_unless_the_registry_itself_is_http(realm, insecure, usable) -> None:
    asked = token_request(Challenge("bearer", {"realm": realm, "service": "s"}), insecure=insecure, scope="x")
    assert (asked is not None) == usable
    assert not asked or asked.query == {"service": "s", "scope": "x"}


@pytest.mark.parametrize(
    ("header", "insecure", "basic", "expected"),
    [
        (
            f'Bearer realm="https://a",service="s",{SCOPE},x="y"',
            *HTTPS,
            f'Bearer realm="https://a",service="s",{SCOPE}',
        ),
        ('Bearer realm="https://a/t",scope="registry:catalog:*"', *HTTPS, f'Bearer realm="https://a/t",{SCOPE}'),
        ('Bearer realm="http://a/t"', False, True, ""),
        ('Bearer realm="http://a/t"', True, False, f'Bearer realm="http://a/t",{SCOPE}'),
        ('Bearer realm="https://a/t",service="a\\"b"', *HTTPS, f'Bearer realm="https://a/t",service="a\\"b",{SCOPE}'),
        ('Bearer realm="https://a/\u00fc"', False, False, ""),
        ('Basic realm="evil"', False, True, 'Basic realm="registry"'),
        ('Basic realm="evil"', False, False, ""),
        ("Negotiate, Basic", False, True, 'Basic realm="registry"'),
        ("", False, True, ""),
    ],
)
def test_relayed_challenges_contain_only_the_needed_parameters(header, insecure, basic, expected) -> None:
    assert relayed(parse_challenges(header), insecure=insecure, repository="o/a", basic=basic) == expected


def test_token_replies() -> None:
    assert parse_token(b'{"token": "a", "expires_in": 300}') == ("a", 285.0)
    assert parse_token(b'{"access_token": "b"}') == ("b", 45.0)
    assert parse_token(b'{"token": "a", "expires_in": 1e99}') == ("a", 3585.0)
    for body in (b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\r\\nX: y"}', b"\xff"):
        assert parse_token(body) is None


def test_docker_config_knows_every_spelling_of_a_registry() -> None:
    auth = b64encode(b"me:p:w").decode()
    entries = {
        "https://index.docker.io/v1/": {"auth": auth},
        "ghcr.io": {"username": "u", "password": "secret"},
        "empty": {},
        "broken": {"auth": "!!"},
        "identity.azurecr.io": {"auth": auth, "identitytoken": "secret"},
    }
    config = parse_docker_config(json.dumps({"auths": entries}).encode())
    assert config.auths == {
        "docker.io": Credentials("me", "p:w"),
        "ghcr.io": Credentials("u", "secret"),
        "identity.azurecr.io": Credentials("<token>", "secret"),
    }
    assert "secret" not in repr(config)
    docker = config.of(["registry-1.docker.io", "ghcr.io"])
    assert docker is not None
    assert docker.header == f"Basic {auth}"
    assert config.helper(["docker.io"]) is None


def test_docker_config_names_a_helper_for_a_registry_before_the_store_for_all() -> None:
    helpers = {"123.dkr.ecr.eu-1.amazonaws.com": "ecr-login", "https://gcr.io": "gcr"}
    config = parse_docker_config(json.dumps({"credHelpers": helpers, "credsStore": "pass"}).encode())
    assert config.helper(["123.dkr.ecr.eu-1.amazonaws.com"]) == ("ecr-login", "123.dkr.ecr.eu-1.amazonaws.com")
    assert config.helper(["other", "gcr.io"]) == ("gcr", "https://gcr.io")
    assert config.helper(["quay.io"]) == ("pass", "quay.io")
    assert config.helper(["index.docker.io"]) == ("pass", "https://index.docker.io/v1/")


@pytest.mark.parametrize("helper", ["../evil", "a b", "a;b", "a/b", "\u00fc", "x" * 65, "-\n"])
def test_a_helper_with_another_name_than_a_programs_is_refused(helper: str) -> None:
    for config in ({"credsStore": helper}, {"credHelpers": {"gcr.io": helper}}):
        with pytest.raises(ValueError, match="helper's name"):
            parse_docker_config(json.dumps(config).encode())


def test_docker_config_is_read_again_when_it_changes_and_reported_once_when_it_is_broken(tmp_path, caplog) -> None:
    path = tmp_path / "config.json"
    config = DockerConfig(str(path))
    assert config.read().of(["ghcr.io"]) is None
    assert config.read().of(["ghcr.io"]) is None
    assert len(caplog.records) == 1
    for number, text in enumerate(
        ['{"auths": {"ghcr.io": {"username": "a", "password": "hidden"}}}', '{"hidden', '{"auths": {}}']
    ):
        path.write_text(text)
        os.utime(path, ns=(number, number))
        credentials = config.read().of(["other", "ghcr.io"])
        assert (credentials is not None) == (number == 0)
    assert len(caplog.records) == 2
    assert "hidden" not in caplog.text


@given(st.integers(1, 20), st.none() | st.floats(0, 100), st.integers())
def test_back_off_is_bounded_and_honours_the_server(failures: int, after: float | None, seed: int) -> None:
    delay = BODY.delay(failures, after, Random(seed))
    if failures >= BODY.attempts or (after or 0) > BODY.retry_after_cap_s:
        assert delay is None
    else:
        assert delay is not None
        assert (after or 0) <= delay <= max(after or 0, min(BODY.cap_s, BODY.base_s * 2 ** (failures - 1)))


def test_a_resolve_waits_less_than_clients_do() -> None:
    total = sum(min(RESOLVE.cap_s, RESOLVE.base_s * 2 ** (n - 1)) for n in range(1, RESOLVE.attempts))
    assert total < 5


def test_the_breaker_opens_probes_with_one_call_and_closes() -> None:
    breaker = Breaker()
    assert breaker.wait_s(0) == 0
    for _ in range(5):
        breaker.failed(10)
    assert breaker.wait_s(11) == pytest.approx(1)
    assert breaker.wait_s(12) == 0, "one probe"
    assert breaker.wait_s(12) > 0, "other calls wait meanwhile"
    breaker.failed(13)
    assert breaker.wait_s(16.9) == pytest.approx(0.1)
    assert breaker.wait_s(17) == 0
    breaker.succeeded()
    assert breaker.wait_s(17) == breaker.wait_s(17) == 0


def test_a_probe_that_is_cancelled_does_not_keep_the_breaker_open_and_the_pause_is_bounded() -> None:
    breaker, now = Breaker(), 0.0
    breaker.failed(now)
    for _ in range(20):
        now += Breaker.LONGEST_PAUSE_S
        assert breaker.wait_s(now) == 0
        breaker.failed(now)
    now += Breaker.LONGEST_PAUSE_S
    assert breaker.wait_s(now) == 0
    assert breaker.wait_s(now + Breaker.LONGEST_PAUSE_S) == 0


def test_a_hint_ends_a_pause_at_once_and_the_next_one_when_that_pause_would_have_ended() -> None:
    breaker = Breaker()
    assert not breaker.hinted(0), "it is closed"
    breaker.failed(0)
    assert breaker.hinted(0.5)
    assert breaker.wait_s(0.5) == 0
    breaker.failed(0.6)
    assert not breaker.hinted(1.9)
    assert breaker.wait_s(1.9) == pytest.approx(2.7)
    assert breaker.hinted(2.0)
    assert breaker.wait_s(2.0) == 0
    breaker.succeeded()
    assert not breaker.hinted(9.0)


def test_a_hint_leaves_a_pause_for_which_the_registry_asked() -> None:
    breaker = Breaker()
    breaker.failed(0, 60)
    assert not breaker.hinted(1)
    assert breaker.wait_s(1) == pytest.approx(59)


@given(st.lists(st.floats(0.01, 30.0), max_size=60))
def test_hints_at_most_double_the_probes_of_a_dead_registry(gaps: list[float]) -> None:
    def probes(*, hinted: bool) -> int:
        breaker, now, count = Breaker(), 0.0, 0
        breaker.failed(now)
        for gap in gaps:
            now += gap
            if hinted:
                breaker.hinted(now)
            if not breaker.wait_s(now):
                count += 1
                breaker.failed(now)
        return count

    assert probes(hinted=True) <= 2 * probes(hinted=False) + 4

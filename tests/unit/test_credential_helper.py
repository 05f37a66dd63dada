"""Docker's credential helpers, as programs that the tests write, with all their possible failures."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from node.oci.challenges import Credentials
from node.registry import credential_helper
from node.registry.credential_helper import CredentialHelpers, HelperError

GOOD = "#!/bin/sh\nread registry\necho called >> {log}\n" + (
    """[ "$1" = get ] && echo '{"ServerURL":"'$registry'","Username":"AWS","Secret":"s3cr3t"}'\n"""
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the program `docker-credential-test`, whose log is in the file `log`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script: str) -> None:
        path = tmp_path / "docker-credential-test"
        path.write_text(script.replace("{log}", str(tmp_path / "log")))
        path.chmod(0o755)

    return write


def play(scenario: Callable[[CredentialHelpers], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            await scenario(CredentialHelpers())

    trio.run(main)


def test_a_helper_is_started_once_for_a_while(program: Callable[[str], None], tmp_path: Path) -> None:
    async def scenario(helpers: CredentialHelpers) -> None:
        for _ in range(3):
            assert await helpers.get("test", "r.test", "") == Credentials("AWS", "s3cr3t")
        assert (tmp_path / "log").read_text() == "called\n"
        assert await helpers.get("test", "other.test", "") == Credentials("AWS", "s3cr3t")
        assert (tmp_path / "log").read_text() == "called\n" * 2

    program(GOOD)
    play(scenario)


def test_refused_credentials_are_asked_for_again_but_not_at_once(
    program: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(helpers: CredentialHelpers) -> None:
        credentials = await helpers.get("test", "r.test", "")
        assert credentials is not None
        await helpers.get("test", "r.test", credentials.header)
        assert (tmp_path / "log").read_text() == "called\n"
        monkeypatch.setattr(credential_helper, "AGAIN_S", 0.0)
        await helpers.get("test", "r.test", credentials.header)
        assert (tmp_path / "log").read_text() == "called\n" * 2

    program(GOOD)
    play(scenario)


def test_a_helper_may_have_no_credentials_for_a_registry(program: Callable[[str], None]) -> None:
    async def scenario(helpers: CredentialHelpers) -> None:
        assert await helpers.get("test", "r.test", "") is None

    program("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n")
    play(scenario)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("#!/bin/sh\necho s3cr3t\nexit 3\n", "status 3"),
        ("#!/bin/sh\necho s3cr3t\n", "did not answer as"),
        ('#!/bin/sh\necho \'{"Username": 5, "Secret": "s3cr3t"}\'\n', "did not answer as"),
        ("#!/bin/sh\nkill -9 $$\n", "status -9"),
        ("#!/bin/sh\nwhile :; do echo s3cr3ts3cr3ts3cr3t; done\n", "printed more than"),
        ("#!/bin/sh\nexec sleep 600\n", "did not answer in"),
        ("#!/nowhere/to/be/found\n", "cannot be run"),
        (None, "not in PATH"),
    ],
)
def test_the_error_of_a_helper_contains_nothing_of_its_output(
    program: Callable[[str], None], script: str | None, error: str, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(credential_helper, "LIMIT_S", 1.0 if "sleep" in (script or "") else 60.0)
    monkeypatch.setattr(credential_helper, "AGAIN_S", 60.0)

    async def scenario(helpers: CredentialHelpers) -> None:
        for _ in range(3):
            with pytest.raises(HelperError, match=error) as caught:
                await helpers.get("test", "r.test", "")
            assert "s3cr3t" not in str(caught.value)

    if script is not None:
        program(script)
    play(scenario)
    assert len(caplog.records) == 1, "a failure is kept for a while"
    assert "s3cr3t" not in caplog.text

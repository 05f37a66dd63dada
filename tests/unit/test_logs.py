"""Logs: a single line for each event, whatever its text; journald's priorities; no credentials."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.runtime.logs import LogfmtFormatter, configure, logfmt, redact, under_journald


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_format_of_a_line() -> None:
    out = io.StringIO()
    configure("info", out)
    logging.getLogger("node.mirror").info("pulled %s", "alpine", extra={"bytes": 12, "upstream": "docker.io"})
    logging.getLogger("node.mirror").debug("not at this level")
    (line,) = out.getvalue().splitlines()
    stamp, rest = line.split(" ", 1)
    assert stamp.startswith("ts=20")
    assert rest == 'level=info logger=node.mirror msg="pulled alpine" bytes=12 upstream=docker.io'


def test_configuring_twice_does_not_double_the_lines() -> None:
    out = io.StringIO()
    configure("info", out)
    configure("info", out)
    logging.getLogger("x").warning("once")
    assert len(out.getvalue().splitlines()) == 1


def test_libraries_that_log_every_url_are_quiet() -> None:
    out = io.StringIO()
    configure("debug", out)
    logging.getLogger("httpx").info("HTTP Request: GET https://r.example/token?account=x")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "prefix"),
    [(logging.DEBUG, "<7>"), (logging.INFO, "<6>"), (logging.WARNING, "<4>"), (logging.ERROR, "<3>"), (50, "<2>")],
)
def test_priorities_for_the_journal(level: int, prefix: str) -> None:
    record = logging.makeLogRecord({"name": "node.x", "levelno": level, "levelname": "X", "msg": "text"})
    line = LogfmtFormatter(journal=True).format(record)
    assert line.startswith(f"{prefix}level=")
    assert "ts=" not in line


def test_the_journal_is_known_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert under_journald({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, stream)
        assert not under_journald({"JOURNAL_STREAM": f"{status.st_dev}:1"}, stream)
        assert not under_journald({}, stream)
    assert not under_journald({"JOURNAL_STREAM": "1:1"}, io.StringIO())


@given(st.text())
def test_a_value_never_breaks_its_line(text: str) -> None:
    value = logfmt(text)
    assert len((value + "x").splitlines()) == 1
    assert value.isprintable()
    if " " in value or "=" in value:
        assert value[0] == value[-1] == '"'


def test_a_traceback_stays_on_its_line() -> None:
    out = io.StringIO()
    configure("info", out)
    try:
        int("first\nsecond")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = out.getvalue().splitlines()
    assert "\\nValueError: invalid literal" in line


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer S3CRET.abc-def",
        "authorization=Basic S3CRETabc==",
        "https://user:S3CRET@registry.example/v2/",
        "GET https://r.example/token?account=me&password=S3CRET&x=1",
        "https://s3.example/blob?X-Amz-Signature=S3CRET&X-Amz-Credential=S3CRET%2F1",
        '{"token": "S3CRET", "access_token":"S3CRET"}',
        "{'auth': 'S3CRET'}",
        "identitytoken=S3CRET;",
    ],
)
def test_credentials_are_blanked(text: str) -> None:
    assert "S3CRET" in text
    assert "S3CRET" not in redact(text)
    assert "***" in logfmt(text)


def test_other_text_is_not_blanked() -> None:
    text = "sha256:ab read from docker.io/library/alpine at http://127.0.0.1:5050/v2/ by 12D3KooW"
    assert redact(text) == text


def test_a_long_value_is_cut() -> None:
    assert len(logfmt("x" * 100_000)) < 5000

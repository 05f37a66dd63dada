"""Every decoder of external bytes (tests/fuzz), on its corpus and on mutations of the corpus."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import CORPUS, seeds
from tests.fuzz.targets import TARGETS

SLOW = ("http_answer", "mirror", "control", "certificate", "archive")
"""Targets that run a scheduler, check a signature or read many bytes."""

edits = st.lists(
    st.tuples(
        st.integers(0, 1 << 16), st.sampled_from(["set", "cut", "insert", "repeat", "end"]), st.binary(max_size=8)
    ),
    max_size=6,
)


def edited(data: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    for at, how, new in changes:
        at %= len(data) + 1
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + len(new) + 1 :]
        elif how == "repeat":
            data = data[:at] + data[max(0, at - 40) : at] * 3 + data[at:]
        else:
            data = data[:at] + new
    return data


def nested() -> Iterator[bytes]:
    """Values that are nested deeper than any decoder should go."""
    for opening in (b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"<", b"\x30\x80", b"a.", b"[["):
        yield opening * 50_000
    yield b"a = " + b"[" * 50_000
    body = b'{"a":' * 5000
    yield b"POST /prefetch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    for data in (b"", *seeds(name), *nested()):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_mutated_corpus(name: str) -> None:
    count = 40 if name in SLOW else 150

    @given(st.one_of(st.binary(max_size=200), st.builds(edited, st.sampled_from(seeds(name)), edits)))
    @settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow])
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()


def test_the_corpus_is_small_and_has_only_existing_targets() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) < 200_000

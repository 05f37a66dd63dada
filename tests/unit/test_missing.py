"""Absent names: those that clients rely on are not pushed out by invented ones."""

from __future__ import annotations

from node.mirror.missing import MAX_MISSING, MissingNames, Name
from node.oci.references import Locator


def name(repository: str, tag: str) -> Name:
    return Locator("origin.test", repository, "manifests"), "manifests", tag


def test_a_name_is_absent_until_it_is_found() -> None:
    for read_from in (False, True):
        missing, absent = MissingNames(), name("org/app", "v1")
        if read_from:
            missing.read_from(absent[0])
        assert missing.get(absent) is None
        missing.note(absent, "no v1")
        assert missing.get(absent) == "no v1"
        missing.read_from(absent[0])
        missing.note(absent, "still no v1")
        assert missing.get(absent) == "still no v1"
        missing.forget(absent)
        assert missing.get(absent) is None


def test_invented_names_push_out_none_in_a_repository_that_clients_read() -> None:
    """S-45"""
    missing = MissingNames()
    probes = [name("org/app", f"sha256-{number}.sig") for number in range(10)]
    missing.read_from(probes[0][0])
    for probe in probes:
        missing.note(probe, "absent")
    for number in range(2 * MAX_MISSING):
        missing.note(name(f"invented/{number}", "v1"), "absent")
    missing.read_from(name("library/large", "v1")[0])
    for number in range(2 * MAX_MISSING):
        missing.note(name("library/large", f"v{number}"), "absent")
    assert all(missing.get(probe) for probe in probes)
    held = sum(missing.get(name("library/large", f"v{number}")) is not None for number in range(2 * MAX_MISSING))
    assert held == MAX_MISSING - len(probes)


def test_few_repositories_are_remembered() -> None:
    missing = MissingNames()
    for number in range(2 * MAX_MISSING):
        probe = name(f"org/app-{number}", "v1")
        missing.read_from(probe[0])
        missing.note(probe, "absent")
    held = [missing.get(name(f"org/app-{number}", "v1")) is not None for number in range(2 * MAX_MISSING)]
    assert held == [False] * MAX_MISSING + [True] * MAX_MISSING

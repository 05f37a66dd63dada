"""docs/SECURITY.md and the tests name each other, and the limits in the document exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "SECURITY.md").read_text("utf-8")
LIMITS = re.findall(r"^\|.*\| (`(?:node|protocol|cache)/.*) \|$", TEXT, re.MULTILINE)


def pairs_in_the_document() -> set[tuple[str, str]]:
    """The pairs of line and test in the document's table."""
    rows = re.findall(r"^\| (S-\d\d) \|.*\| ([^|]*) \|$", TEXT, re.MULTILINE)
    return {(line, test) for line, tests in rows for test in re.findall(r"`([^`]+::[^`]+)`", tests)}


def pairs_in_the_tests() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for line in re.findall(r"S-\d\d", ast.get_docstring(node) or ""):
                    yield line, f"{path.relative_to(ROOT / 'tests')}::{node.name}"


def test_document_and_tests_name_each_other_line_by_line() -> None:
    document = pairs_in_the_document()
    assert document == set(pairs_in_the_tests())
    lines = re.findall(r"^\| (S-\d\d) ", TEXT, re.MULTILINE)
    assert len(lines) == len(set(lines)) > 30
    assert {line for line, _ in document} == set(lines), "every line has a test"
    mentioned = set(re.findall(r"S-\d\d", TEXT))
    assert mentioned == set(lines)


@pytest.mark.parametrize("limits", LIMITS)
def test_every_limit_that_is_named_exists(limits: str) -> None:
    for part in limits.split(";"):
        file, *constants = re.findall(r"`([^`]+)`", part)
        module = import_module(file.removesuffix(".py").replace("/", "."))
        assert constants
        for constant in constants:
            assert attrgetter(constant)(module) is not None


def test_the_pattern_matches_all_limits() -> None:
    assert len(LIMITS) == TEXT.split("## Limits")[1].count("\n| ") - 1

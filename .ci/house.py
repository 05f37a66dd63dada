"""House rules that neither ruff, mypy nor import-linter checks: sizes, calls, names and the language of comments.

`python .ci/house.py` prints a table, and exits with 1 if a limit is exceeded. `--list RULE` shows each place. Sizes are
in source lines. Shares are per thousand lines, bindings or words of all files in the rule's scope.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PRODUCT = ("node", "protocol", "cache")
CODE = (*PRODUCT, "simulations", "tests", ".ci")

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_METHODS = 25
MAX_FILES_IN_NODE = 5
MAX_POSITIONAL_CALLS = 1.0
"""Calls with MANY_POSITIONAL or more positional arguments, per 1000 lines."""
MANY_POSITIONAL = 5
MAX_SKIPS = 5
MAX_VAGUE = 5.0
"""Bindings of a name that says nothing, per 1000 bindings."""
MAX_TURNS = 2.0
"""Mannered turns of phrase, per 1000 words of docstrings, comments and documents."""

VAGUE = frozenset({"one", "found", "told", "known", "what", "each"})
TURNS = re.compile(
    r"(?:(?:^|(?<=[.:;!?]\s)|(?<=\n\n)|(?<=[\"'(|*-]\s))(?:Who|Whoever|Whom|Whose|What|Whatever|Of)\b(?![^.?\n]*\?))"
    r"|\b[Ss]o long\b|\b[Tt]old\b|\b[Nn]obody\b|\b(?:is|are|was|were) to be\b"
)
PATH = re.compile(
    r"(?<![\w/.])(?:node|protocol|cache|simulations|tests|docs|deploy)/[\w./-]+\.(?:py|md|toml|service|svg)\b"
)
"""A file of this repository, as comments and documents name it."""
WORD = re.compile(r"[A-Za-z][\w'-]*")
ONE_IDEA = re.compile(r"One (?:class|idea)", re.I)
"""How the docstring of a class with more methods than MAX_METHODS begins its reason."""


@dataclass
class Tally:
    """The places that a rule names, and the `total` of lines, bindings or words that it examined."""

    total: int = 0
    places: list[str] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        return 1000 * len(self.places) / max(1, self.total)


@dataclass
class Report:
    """All tallies, by the rule's name."""

    sizes: Tally = field(default_factory=Tally)
    imports: Tally = field(default_factory=Tally)
    paths: Tally = field(default_factory=Tally)
    calls: dict[str, Tally] = field(default_factory=lambda: {"product": Tally(), "rest": Tally()})
    skips: Tally = field(default_factory=Tally)
    vague: dict[str, Tally] = field(default_factory=lambda: {"product": Tally(), "rest": Tally()})
    turns: dict[str, Tally] = field(default_factory=lambda: {"product": Tally(), "rest": Tally(), "documents": Tally()})


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], check=True, capture_output=True, text=True
    )
    paths = (Path(line) for line in sorted(set(listed.stdout.splitlines())))
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def bindings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each name that is assigned, looped over, matched or caught, and each parameter, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno


def texts(source: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each docstring (also that of a constant or an attribute) and each block of comments, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text, node.lineno
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# fmt", "# type", "#!")):
            if block and token.start[0] != last + 1:
                yield "\n".join(block), last
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    if block:
        yield "\n".join(block), last


def check_text(tally: Tally, text: str, where: str, line: int) -> None:
    plain = re.sub(r"`[^`]*`", "", text)
    tally.total += len(WORD.findall(plain))
    for match in TURNS.finditer(plain):
        tally.places.append(f"{where}:{line + plain.count(chr(10), 0, match.start())}: {match.group().strip()}")


def check_paths(tally: Tally, text: str, where: Path) -> None:
    """Find named files that do not exist. Lines that cite a document of containerd's repository do not count."""
    for number, line in enumerate(text.splitlines(), 1):
        for path in PATH.findall(line):
            folders = (Path(), where.parent, Path("tests"))
            if "containerd" not in line and not any((folder / path).exists() for folder in folders):
                tally.places.append(f"{where}:{number}: {path}")


def check_imports(tally: Tally, path: Path, tree: ast.AST) -> None:
    """Find imports of private names and of test modules. Private attributes are the task of ruff's SLF001."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(CODE):
            continue
        for alias in node.names:
            if alias.name.startswith("_"):
                tally.places.append(f"{path}:{node.lineno}: {node.module}.{alias.name} is private")
            if ".test_" in f"{node.module}.{alias.name}":
                tally.places.append(f"{path}:{node.lineno}: {node.module} is a test: move it to tests/support")


def check_sizes(tally: Tally, path: Path, source: str, tree: ast.AST) -> None:
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        tally.places.append(f"{path}: {lines} lines")
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    tally.places.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
            case ast.ClassDef():
                methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
                if methods > MAX_METHODS and not ONE_IDEA.search(ast.get_docstring(node) or ""):
                    tally.places.append(f"{path}:{node.lineno}: {node.name} has {methods} methods")


def examine() -> Report:
    report = Report()
    for path in tracked(".py"):
        if path.parts[0] not in CODE:
            continue
        source = path.read_text("utf8")
        tree = ast.parse(source)
        scope = "product" if path.parts[0] in PRODUCT else "rest"
        if scope == "product":
            check_sizes(report.sizes, path, source, tree)
        check_imports(report.imports, path, tree)
        check_paths(report.paths, source, path)
        calls, vague = report.calls[scope], report.vague[scope]
        calls.total += source.count("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and len(node.args) >= MANY_POSITIONAL:
                calls.places.append(f"{path}:{node.lineno}: {ast.unparse(node.func)}, {len(node.args)} arguments")
        for name, line in bindings(tree):
            vague.total += 1
            if name in VAGUE:
                vague.places.append(f"{path}:{line}: {name}")
        skip = "# fmt: " + "skip"
        report.skips.places += [f"{path}:{n}" for n, line in enumerate(source.splitlines(), 1) if skip in line]
        for text, line in texts(source, tree):
            check_text(report.turns[scope], text, str(path), line)
    for path in tracked(".md"):
        check_text(report.turns["documents"], path.read_text("utf8"), str(path), 1)
        check_paths(report.paths, path.read_text("utf8"), path)
    shelf = [path for path in Path("node").glob("*.py") if path.name != "__init__.py"]
    if len(shelf) > MAX_FILES_IN_NODE:
        report.sizes.places.append(f"node/: {len(shelf)} files outside its rooms")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--list", choices=["sizes", "imports", "paths", "calls", "skips", "vague", "turns"], help="show each place"
    )
    parser.add_argument("paths", nargs="*", help="with --list: only places below these")
    options = parser.parse_args()
    report = examine()
    rows: list[tuple[str, str, Tally, float, bool]] = [
        ("sizes", "product", report.sizes, 0, False),
        ("imports", "all", report.imports, 0, False),
        ("paths", "all", report.paths, 0, False),
        ("skips", "all", report.skips, MAX_SKIPS, False),
        *(("calls", scope, tally, MAX_POSITIONAL_CALLS, True) for scope, tally in report.calls.items()),
        *(("vague", scope, tally, MAX_VAGUE, True) for scope, tally in report.vague.items()),
        *(("turns", scope, tally, MAX_TURNS, True) for scope, tally in report.turns.items()),
    ]
    failed = False
    for rule, scope, tally, limit, is_share in rows:
        value = tally.per_thousand if is_share else len(tally.places)
        failed |= value > limit
        if options.list is None:
            verdict = "too many" if value > limit else "ok"
            print(f"{rule:6} {scope:10} {value:8.2f} of at most {limit:g}{' per 1000' if is_share else ''}: {verdict}")
        elif options.list == rule:
            prefixes = tuple(options.paths) or ("",)
            print("\n".join(place for place in tally.places if place.startswith(prefixes)))
    return failed


if __name__ == "__main__":
    sys.exit(main())

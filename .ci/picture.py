"""Draws the rooms into docs/ARCHITECTURE.md, from the import graph and the docstrings of the packages.

`python .ci/picture.py` writes the part of the document between its two markers; `--check` only compares, and exits with
1 if the document is stale. An arrow means "imports". An arrow that follows from others is left out (transitive
reduction): a room may import all rooms that its arrows lead to, directly or through others.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import grimp

DOCUMENT = Path("docs/ARCHITECTURE.md")
BEGIN, END = "<!-- rooms: made by .ci/picture.py -->\n", "<!-- end of rooms -->\n"
PACKAGES = ("simulations", "node", "cache", "protocol")

Arrows = dict[str, set[str]]


def room_of(module: str) -> str:
    """`node.blocks.home` is in node/blocks, `node.daemon` in node/daemon.py, `cache.disk` in cache."""
    package, _, rest = module.partition(".")
    return f"node.{rest.split('.')[0]}" if package == "node" and rest else package


def arrows() -> Arrows:
    graph = grimp.build_graph(*PACKAGES)
    rooms: Arrows = {}
    for module in graph.modules:
        room = room_of(module)
        targets = {room_of(imported) for imported in graph.find_modules_directly_imported_by(module)}
        rooms.setdefault(room, set()).update(targets - {room, "node"})
    rooms.pop("node", None)
    return rooms


def reachable(rooms: Arrows, start: str) -> set[str]:
    """Every room that can be reached from `start`, without `start`."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for room in rooms[waiting.pop()] - seen:
            seen.add(room)
            waiting.append(room)
    return seen


def reduced(rooms: Arrows) -> Arrows:
    """The arrows that do not follow from others. `rooms` has no cycle: import-linter checks this."""
    below = {room: reachable(rooms, room) for room in rooms}
    return {room: {to for to in rooms[room] if not any(to in below[by] for by in rooms[room])} for room in rooms}


def by_depth(rooms: Arrows) -> list[str]:
    """Rooms from the top down: a room stands after every room that imports it."""
    below = {room: reachable(rooms, room) for room in rooms}
    return sorted(rooms, key=lambda room: (-len(below[room]), room))


def label(room: str) -> str:
    name = room.replace(".", "/")
    return f"{name}.py" if Path(f"{name}.py").exists() else f"{name}/"


def drawn() -> str:
    rooms = arrows()
    order = by_depth(rooms)
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {room.replace(".", "_")}["{label(room)}"]' for room in order]
    lines += [
        f"    {room.replace('.', '_')} --> {to.replace('.', '_')}"
        for room, targets in sorted(reduced(rooms).items(), key=lambda row: order.index(row[0]))
        for to in sorted(targets, key=order.index)
    ]
    lines += ["```", "", "| room | what it is |", "|---|---|"]
    for room in order:
        title = (importlib.import_module(room).__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{label(room)}` | {title} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    text = DOCUMENT.read_text("utf8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}{drawn()}{END}{tail}"
    if options.check and new != text:
        print(f"{DOCUMENT} does not show the rooms of the code: run `make picture`", file=sys.stderr)
        return 1
    if not options.check:
        DOCUMENT.write_text(new, "utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""p2pd whose loop is watched: `python -m tests.support.watched_daemon --config FILE`, with all options of p2pd.

Steps of tasks and turns of the loop over the limit (tests/support/turns.py) are appended to `turns.jsonl` in the
node's data folder, or to the file that P2PD_TURNS names. P2PD_TURN_S is the limit in seconds.

A test starts a watched node with `node.program = WATCHED` before `launch`, and reads `turns_of(node.data)`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from node import daemon
from node.config.schema import Config
from node.runtime.systemd import Notifier
from tests.support.turns import LIMIT_S, LongTurn, Turns, read, to_file

WATCHED = [sys.executable, "-m", "tests.support.watched_daemon"]
FILE_NAME = "turns.jsonl"


def turns_of(data: Path, after: int = 0) -> list[LongTurn]:
    """The findings of the node with this data folder, without the first `after` ones. Those of its start, when it opens
    tables and reads its index, come first: `after=len(turns_of(data))` of a node that is ready leaves them out."""
    return read(data / FILE_NAME, after)


def main() -> None:
    unwatched = daemon.run

    async def watched(config: Config, path: Path | None, notifier: Notifier, stop: trio.Event) -> None:
        file = os.environ.get("P2PD_TURNS") or daemon.data_dir(config) / FILE_NAME
        limit_s = float(os.environ.get("P2PD_TURN_S", LIMIT_S))
        trio.lowlevel.add_instrument(Turns(to_file(Path(file)), limit_s))
        await unwatched(config, path, notifier, stop)

    daemon.run = watched
    daemon.main()


if __name__ == "__main__":
    main()

"""A site under attack: honest daemons whose loops are watched, a member that lies, and a real registry.

`Siege.unharmed` is the check that all attacks share: the honest daemons live, their logs have no bug, no turn of their
loops was long, they see each other, and none of them shut out another.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.cli.client import ControlClient
from protocol.errors import ShoalError
from protocol.members import Statement
from tests.support import image as images
from tests.support import registry as registries
from tests.support.adversary import Attacker, ClosedError
from tests.support.forgery import gathered, own_statement
from tests.support.image import Image
from tests.support.lying_daemon import tell_lies
from tests.support.processes import tail, wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import fetch, verify
from tests.support.site import UPSTREAM, Node, site, start_all
from tests.support.watched_daemon import WATCHED, turns_of

LONGEST_TURN_S = 0.1
SLOWER, GRACE_S = 1.3, 1.0
"""Pulls in an attack may take SLOWER times as long as before it. GRACE_S more forgive a busy machine."""
SIZE = 1_300_000
"""Bytes of a layer: three blocks, of which each is cut into shards."""
LYING = [sys.executable, "-m", "tests.support.lying_daemon"]
LIAR = "liar"
WRONG_BYTES = frozenset({"wrong bytes", "fabricated", "by ghosts"})
"""The lies that others may keep, and find later."""
SEEN_S = 20.0
"""Time for the honest members to see each other after an attack: longer than a member that was dropped needs."""


@dataclass(frozen=True, slots=True)
class Published:
    """An image that the registry has."""

    image: Image
    repository: str
    tag: str

    @property
    def name(self) -> str:
        return f"{UPSTREAM}/{self.repository}:{self.tag}"


@dataclass(slots=True)
class Siege:
    honest: list[Node]
    liar: Node
    key: Path
    folder: Path
    registry: registries.Registry
    proxy: CountingProxy
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _gave_wrong_bytes: bool = False

    @property
    def attacker(self) -> Attacker:
        """The liar's identity, for connections that the test makes itself."""
        return Attacker.as_node(self.liar, self.key)

    def renew_liar(self) -> None:
        """If an honest member shut the liar out, or may do so when it reads what the liar gave to others, begin with
        another one: a new key, certificate and name."""
        if not self._gave_wrong_bytes and not any(self.liar.name in quarantined(node) for node in self.honest):
            return
        self._gave_wrong_bytes = False
        self.liar.stop()
        shutil.rmtree(self.liar.data)
        text, old = self.liar.config.read_text(), self.liar.name
        self.liar.name = f"{LIAR}-{next(self._numbers)}"
        self.liar.config.write_text(text.replace(f'name = "{old}"', f'name = "{self.liar.name}"'))
        self.liar.start()
        for node in self.honest:
            wait_for("the new liar is seen", lambda node=node: self.liar.name in alive(node))  # type: ignore[misc]

    def tell(self, *messages: object, nodes: Sequence[Node] = (), attacker: Attacker | None = None) -> None:
        """Send the messages to each honest node in the liar's name, or as another member. A node may refuse to hear
        more of them."""
        attacker = attacker or self.attacker
        for node in nodes or self.honest:
            with contextlib.suppress(ClosedError), attacker.line(node) as line:
                for message in messages:
                    line.ask(message)

    @property
    def statement(self) -> Statement:
        """What the liar says of itself, as its daemon would: where it is, and that it lives."""
        return own_statement(self.attacker, [self.liar_address], random.Random(), weight=1.0, leaving=False)

    @property
    def liar_address(self) -> str:
        return f"{self.liar.host}:{self.liar.bulk_port}"

    def gathered(self) -> list[Statement]:
        """What the honest members say of themselves, with certificates: any member is given it."""
        return gathered(self.attacker, self.honest[0], self.statement)

    def lies(self, **lies: str) -> None:
        """Give the liar a new plan, by the names of requests. `every` is for all requests but membership."""
        self._gave_wrong_bytes |= not WRONG_BYTES.isdisjoint(lies.values())
        tell_lies(self.liar.folder, lies={("*" if name == "every" else name): lie for name, lie in lies.items()})

    def fresh(self, repository: str = "", tag: str = "v1", *, size: int = SIZE) -> Published:
        """A new image, which no node has seen."""
        number = next(self._numbers)
        noise = images.noise(10_000 + number, size)
        image = images.build(self.folder / f"image-{number}", [[("noise", noise)], [("small", b"%d" % number)]])
        published = Published(image, repository or f"app/{number}", tag)
        registries.push(self.registry, image, published.repository, tag)
        return published

    def pull(self, node: Node, published: Published, reference: str = "") -> float:
        """Pull and verify every byte. Returns the seconds. Raises PullFailedError."""
        folder = self.folder / f"pull-{next(self._numbers)}"
        began = time.monotonic()
        fetch(f"{node.mirror}/{UPSTREAM}/{published.repository}", reference or published.tag, folder)
        took = time.monotonic() - began
        verify(folder, published.image)
        return took

    def pull_everywhere(self, published: Published) -> list[float]:
        return [self.pull(node, published) for node in self.honest]

    def cold_pulls(self, count: int = 3) -> list[float]:
        """Seconds of pulls of new images, each through all honest nodes in turn."""
        return [seconds for _ in range(count) for seconds in self.pull_everywhere(self.fresh())]

    @contextlib.contextmanager
    def unharmed(self, *, shut_out: bool | None = None, expected: str = "") -> Iterator[None]:
        """Check the honest daemons at the end. `shut_out`: whether all of them have the liar in quarantine then.
        `expected` is in the errors that they may log."""
        with contextlib.ExitStack() as stack:
            for node in self.honest:
                stack.enter_context(sound(node, expected))
            yield
        names = {node.name for node in self.honest}
        for node in self.honest:
            wait_for(
                f"{node.name} sees all honest members",
                lambda node=node: names - {node.name} <= alive(node),  # type: ignore[misc]
                seconds=SEEN_S,
                every=0.2,
            )
            shut = quarantined(node)
            assert not names & shut.keys(), f"{node.name} shut out {shut}"
            if shut_out is not None:
                assert (self.liar.name in shut) == shut_out, f"{node.name}: {shut}"


@contextlib.contextmanager
def sound(node: Node, expected: str = "") -> Iterator[None]:
    """The daemon outlives the context, without a bug in its log, and without a long turn of its loop."""
    pid, logged, turns = node.process.pid, node.log.stat().st_size, len(turns_of(node.data))
    yield
    assert node.process.pid == pid, f"{node.name} was restarted"
    assert node.process.poll() is None, f"{node.name} ended with {node.process.returncode}:\n{tail(node.log)}"
    with node.log.open("rb") as file:
        file.seek(logged)
        text = file.read().decode("utf-8", "replace")
    assert "Traceback" not in text, text[max(0, text.index("Traceback") - 500) :][:3000]
    errors = [line for line in text.splitlines() if "level=error" in line or "level=critical" in line]
    errors = [line for line in errors if not expected or expected not in line]
    assert not errors, errors[:3]
    long = [turn for turn in turns_of(node.data, turns) if turn.cpu_s >= LONGEST_TURN_S]
    assert not long, f"{node.name}: {len(long)} long turns; the longest: {max(long, key=lambda turn: turn.cpu_s)}"


def peers(node: Node) -> list[dict[str, Any]]:
    """The rows of `p2pctl peers`."""
    try:
        rows: list[dict[str, Any]] = json.loads(ControlClient(node.socket).get("/peers"))["peers"]
    except ShoalError as error:
        raise AssertionError(f"{node.name}: {error}\n{tail(node.log)}") from error
    return rows


def alive(node: Node) -> set[str]:
    return {row["name"] for row in peers(node) if row["state"] in ("alive", "suspect")}


def quarantined(node: Node) -> dict[str, str]:
    """The reasons by name."""
    return {row["name"]: row["quarantine"] for row in peers(node) if row["quarantine"]}


def assert_no_slower(calm: Sequence[float], attacked: Sequence[float]) -> None:
    before, after = statistics.median(calm), statistics.median(attacked)
    assert after <= SLOWER * before + GRACE_S, f"{before:.2f} s before, {after:.2f} s in the attack"


@contextlib.contextmanager
def besieged(
    folder: Path,
    registry: registries.Registry,
    honest: int = 4,
    *,
    changes: Mapping[str, str] | None = None,
    prepare: Callable[[Sequence[Node]], None] = lambda nodes: None,
    **values: Any,
) -> Iterator[Siege]:
    """Start `honest` watched daemons and a liar that is honest at first. `changes` replaces texts of all
    configurations, `prepare` is called before the start, and `values` are those of tests/support/site.py."""
    with CountingProxy(registry.host, registry.port) as proxy:
        values = {"memory": "8MiB"} | values
        with site(folder / "site", proxy.url, honest + 1, start=False, **values) as nodes:
            *watched, liar = nodes
            for node in nodes:
                node.program = LYING if node is liar else WATCHED
                text = node.config.read_text()
                for old, new in (changes or {}).items():
                    assert old in text, old
                    text = text.replace(old, new)
                node.config.write_text(text.replace(f'name = "{liar.name}"', f'name = "{LIAR}"'))
            liar.name = LIAR
            prepare(nodes)
            start_all(nodes)
            yield Siege(watched, liar, folder / "site" / "cluster.key", folder, registry=registry, proxy=proxy)

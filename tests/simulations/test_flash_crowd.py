"""A small flash crowd of the shipped nodes in virtual time. It detects unbalanced load and double reads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from node.runtime.shared_work import SharedWork
from protocol.ids import Digest, PeerId
from protocol.placement import Placement, Route
from protocol.stripes import StripeId
from simulations.flash_crowd import FlashCrowd, run
from simulations.run import silent

SMALL = FlashCrowd(nodes=12, image=16_000_000)


def test_a_crowd_reads_each_byte_once_near_the_limit_and_shares_the_work() -> None:
    shares: list[float] = []
    result = run(SMALL, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert result.copies <= 1.02
    assert (
        max(result.seconds) < 1.6 * result.limit_s
    )  # with 30 blocks only, the latency of three links is a third of this
    assert result.imbalance < 1.35


def test_double_reads_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    obtain = SharedWork.obtain

    async def not_shared(self: SharedWork[object, Any], group: object, *work: Any, **options: Any) -> None:
        await obtain(self, (group, object()), *work, **options)

    monkeypatch.setattr(SharedWork, "obtain", not_shared)
    assert run(SMALL, silent).copies > 1.5


def test_an_unfair_placement_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Placement.route

    def the_same_for_all(self: Placement, peer: PeerId, stripe: StripeId, length: int) -> Route:
        return route(self, peer, StripeId(Digest("sha256", "0" * 64), 0), length)

    monkeypatch.setattr(Placement, "route", the_same_for_all)
    assert run(SMALL, silent).imbalance > 1.35


def test_a_seed_decides_every_byte_that_is_printed() -> None:
    command = [sys.executable, "-m", "simulations", "flash-crowd", "--nodes", "5", "--image", "2000000", "--json"]
    first, second, other = (
        subprocess.run([*command, "--seed", seed], check=True, capture_output=True, timeout=120).stdout
        for seed in ("1", "1", "2")
    )
    assert first == second != other
    assert len(json.loads(first)["seconds"]) == 5

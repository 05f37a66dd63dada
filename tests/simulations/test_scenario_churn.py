"""A small site whose nodes die and return while all nodes pull: no pull fails, and all views soon become right."""

from __future__ import annotations

from simulations.churn import Churn, run
from simulations.run import silent

SMALL = Churn(nodes=8, image=2_000_000, layers=2, images=3, change_s=15.0)


def test_pulls_succeed_while_nodes_die_and_return_and_all_views_soon_agree() -> None:
    result = run(SMALL, silent)
    assert result.failed == 0
    assert len(result.deaths) == len(result.returns) > 5
    assert result.unsettled == 0
    assert max(result.deaths) < 12
    assert max(result.returns) < 8
    assert result.copies < 2
    assert result.quiet is not None
    assert result.quiet.copies <= 1.02
    assert max(result.seconds) < max(result.quiet.seconds) + 6

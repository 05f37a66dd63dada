"""Probation costs a site with full caches about nothing."""

from __future__ import annotations

from simulations.run import silent
from simulations.site_cache import run


def test_a_site_reads_from_the_registry_about_as_much_with_probation_as_without() -> None:
    rows = run(1, 5, 600, reads=6000, percents=(5.0, 20.0), report=silent)
    for row in rows:
        assert 5 < row.segmented < row.one_lru_k + 2

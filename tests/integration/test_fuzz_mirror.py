"""Some thousand odd and malformed requests. `python -m tests.fuzz_mirror` sends a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz_mirror import run
from tests.support import registry as registries


@pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed: run .ci/packages as root")
def test_odd_requests_are_refused_and_have_no_lasting_effect(folder: Path) -> None:
    report = run(folder, 6000, seed=7)
    assert report.wrong == []
    good = sum(
        count for portion in report.findings for code, count in portion.statuses.items() if code in ("200", "206")
    )
    assert good > 300, "some requests must be well-formed"

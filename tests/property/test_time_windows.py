"""Daily time windows, over midnight and around the clock."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config.quantities import Window
from protocol.errors import BadInputError

MIDNIGHT = datetime(2026, 3, 4)


@given(st.integers(0, 1439), st.integers(0, 1440), st.integers(0, 86399))
def test_a_window_begins_and_ends_at_its_times(start: int, stop: int, second: int) -> None:
    text = "-".join(f"{minute // 60:02d}:{minute % 60:02d}" for minute in (start, stop))
    if start == stop:
        with pytest.raises(BadInputError):
            Window(text)
        return
    window, when = Window(text), MIDNIGHT + timedelta(seconds=second)
    wait = timedelta(seconds=window.opens_in(when))
    assert not window.opens_in(when + wait)
    assert not wait or (when + wait).time() == (MIDNIGHT + timedelta(minutes=start)).time()
    within = start * 60 <= second < stop * 60 if start < stop else not stop * 60 <= second < start * 60
    assert (not wait) == within


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:00-06:60", "22:00-24:01", "22:00", "22:00-06:00x"])
def test_malformed_texts_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="22:00-06:00"):
        Window(text)

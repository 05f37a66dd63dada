"""Windows of the day, also across midnight and around the clock."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.runtime.time_windows import Hours
from protocol.errors import BadInputError

MIDNIGHT = datetime(2026, 3, 4)


@given(st.integers(0, 1439), st.integers(0, 1440), st.integers(0, 86399))
def test_they_begin_when_they_say_and_end_when_they_say(start: int, stop: int, second: int) -> None:
    text = "-".join(f"{minute // 60:02d}:{minute % 60:02d}" for minute in (start, stop))
    if start == stop:
        with pytest.raises(BadInputError):
            Hours.parse(text)
        return
    hours, when = Hours.parse(text), MIDNIGHT + timedelta(seconds=second)
    wait = timedelta(seconds=hours.opens_in(when))
    assert not hours.opens_in(when + wait)
    assert not wait or (when + wait).time() == (MIDNIGHT + timedelta(minutes=start)).time()
    within = start * 60 <= second < stop * 60 if start < stop else not stop * 60 <= second < start * 60
    assert (not wait) == within


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:00-06:60", "22:00-24:01", "22:00", "22:00-06:00x"])
def test_other_texts_are_no_hours(text: str) -> None:
    with pytest.raises(BadInputError, match="22:00-06:00"):
        Hours.parse(text)

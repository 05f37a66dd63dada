"""The window for cold blocks follows the speed of the uplink."""

from __future__ import annotations

from protocol.window import COLD_FIRST, COLD_LEAST, LATE_S, LEAST, MOST, RAMP, SOON_S, TAKEN_S, ReadWindow

HOST = "127.0.0.1"


def fill(window: ReadWindow, now: float) -> int:
    """Begin blocks for a client with many earlier blocks, while there is room. Returns the number of cold blocks."""
    cold = 0
    while window.has_room(HOST, under_way=cold, cold=cold, warm=MOST):
        window.began((now, cold), now)
        cold += 1
    return cold


def drain(window: ReadWindow, began: float, count: int, now: float) -> None:
    for number in range(count):
        assert window.warmed((began, number), now)
        assert not window.warmed((began, number), now)
        window.ended((began, number), now)


def test_a_client_begins_with_few_blocks_and_gets_one_more_per_arrival() -> None:
    window = ReadWindow()
    window.entered(HOST)
    assert window.has_room(HOST, under_way=RAMP - 1, cold=RAMP - 1, warm=0)
    assert not window.has_room(HOST, under_way=RAMP, cold=RAMP, warm=0)
    assert window.has_room(HOST, under_way=RAMP + 1, cold=RAMP, warm=1)


def test_the_last_stripe_that_begins_may_go_beyond_its_part() -> None:
    """The window counts blocks, and has room for a stripe as long as it has room for one block of it."""
    window = ReadWindow()
    window.entered(HOST)
    assert window.has_room(HOST, under_way=COLD_FIRST - 1, cold=COLD_FIRST - 1, warm=MOST)
    assert not window.has_room(HOST, under_way=COLD_FIRST, cold=0, warm=MOST)


def test_the_window_grows_while_blocks_are_early_and_shrinks_while_they_are_late() -> None:
    window = ReadWindow()
    window.entered(HOST)
    sizes = []
    for start in range(0, 4000, 100):
        sizes.append(fill(window, float(start)))
        drain(window, float(start), sizes[-1], start + SOON_S / 2)
    assert sizes[0] == COLD_FIRST
    assert sizes == sorted(sizes)
    assert sizes[-1] == MOST
    for start in range(4000, 8000, 100):
        sizes.append(fill(window, float(start)))
        drain(window, float(start), sizes[-1], start + 2 * LATE_S)
    assert sizes[-1] == COLD_LEAST


def test_a_client_that_asks_for_few_blocks_does_not_widen_the_window() -> None:
    window = ReadWindow()
    window.entered(HOST)
    for number in range(100):
        window.began(number, float(number))
        window.warmed(number, number + SOON_S / 2)
        window.ended(number, number + SOON_S)
    assert fill(window, 1000.0) == COLD_FIRST


def test_on_a_slow_link_fewer_blocks_are_under_way() -> None:
    window = ReadWindow()
    window.entered(HOST)
    for number in range(2 * MOST):
        window.began(number, float(number))
        window.warmed(number, float(number))
        window.ended(number, number + 2 * TAKEN_S)
    assert window.share(HOST) == LEAST
    for number in range(2 * MOST):
        window.began(number, float(number))
        window.warmed(number, float(number))
        window.ended(number, number + TAKEN_S / 2)
    assert window.share(HOST) == MOST


def test_clients_share_the_window() -> None:
    window = ReadWindow()
    for _ in range(3):
        window.entered(HOST)
    share = -(-COLD_FIRST // 3)
    assert window.has_room(HOST, under_way=share - 1, cold=share - 1, warm=9)
    assert not window.has_room(HOST, under_way=share, cold=share, warm=9)
    window.left(HOST)
    assert window.has_room(HOST, under_way=share, cold=share, warm=9)


def test_addresses_share_the_window_whatever_the_number_of_their_reads() -> None:
    window = ReadWindow()
    for _ in range(30):
        window.entered(HOST)
    for number in range(30):
        window.began(number, 0.0)  # the window is full
    assert not window.has_room(HOST, under_way=1, cold=1, warm=9)
    assert not window.has_room(HOST, under_way=0, cold=0, warm=9, joins=True)
    assert not window.has_room("10.0.0.2", under_way=0, cold=0, warm=9, joins=True)
    window.entered("10.0.0.2")
    half = COLD_FIRST // 2
    assert window.has_room("10.0.0.2", under_way=half - 1, cold=half - 1, warm=9)
    assert not window.has_room("10.0.0.2", under_way=half, cold=half, warm=9)
    assert window.share(HOST) == 1

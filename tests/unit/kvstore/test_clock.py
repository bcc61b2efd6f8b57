"""Clocks never go back; the manual one moves only when told."""

from __future__ import annotations

import pytest

from snowskin.kvstore.clock import ManualClock, SystemClock


def test_system_clock_never_goes_back():
    clock = SystemClock()
    seen = [clock.now_s() for _ in range(1000)]
    assert seen == sorted(seen)


def test_manual_clock_stands_still_until_advanced():
    clock = ManualClock(5.0)
    assert (clock.now_s(), clock.now_s()) == (5.0, 5.0)
    assert clock.advance(1.5) == 6.5
    assert clock.now_s() == 6.5


def test_manual_clock_refuses_to_go_back():
    clock = ManualClock()
    with pytest.raises(ValueError, match="cannot advance by -1"):
        clock.advance(-1)
    assert clock.now_s() == 0.0

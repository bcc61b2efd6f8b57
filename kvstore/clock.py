"""Time, brought in as an argument: the only place of the hub that asks the system for it.

Rules kept here: `now_s` never goes back and says nothing about the wall; pure code takes seconds as
an argument and never a clock; tests bring `ManualClock`, whose time moves only when told.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. Law: a later call never returns less than an earlier one."""

    def now_s(self) -> float:
        """Seconds since some moment in the past, the same one for the life of the clock."""
        ...


class SystemClock:
    """The host's monotonic clock: the same for its processes, never comparable across hosts."""

    def now_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()


class ManualClock:
    """A clock for tests and simulations: it stands still until `advance`."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """The seconds that this clock was moved to."""
        return self._now_s

    def advance(self, duration_s: float) -> float:
        """Moves the clock forward by `duration_s` seconds and returns the new time.

        Raises:
            ValueError: `duration_s` is negative: this clock never goes back either.
        """
        if duration_s < 0:
            raise ValueError(f"a monotonic clock cannot advance by {duration_s} s")
        self._now_s += duration_s
        return self._now_s

"""Waiting for what has no event: the state of another process."""

from __future__ import annotations

import time

LOOK_S = 0.005


def eventually(is_so, within_s: float, what: str = ""):
    """The first true value of `is_so()`; fails where there is none in time."""
    deadline_s = time.monotonic() + within_s
    while not (value := is_so()):
        assert time.monotonic() < deadline_s, f"not so within {within_s} s: {what or is_so}"
        time.sleep(LOOK_S)
    return value

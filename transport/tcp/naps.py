"""A nap: a sleep that is nearly as short as it was meant.

The kernel may let a thread sleep longer than it asked for, by its timer slack of 50 µs, to wake many at once. While
much is on its way to a reader, that is too long: 1 MiB takes 130 µs. So the slack is set aside for the nap alone, and
is afterwards what it was; whose thread it is does not notice.

Sources: prctl(2) of PR_SET_TIMERSLACK.
"""

from __future__ import annotations

import ctypes
import time

NAP_S = 30e-6  # and about as long again until the thread runs
_SET_SLACK, _GET_SLACK = 29, 30
_LEAST_SLACK_NS = 1

# With the GIL: the calls take less than letting go of it.
_prctl = ctypes.PyDLL(None).prctl
_prctl.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))


def nap() -> None:
    """Sleeps for `NAP_S`, on the calling thread."""
    slack_ns = _prctl(_GET_SLACK, 0, 0, 0, 0)
    try:
        _prctl(_SET_SLACK, _LEAST_SLACK_NS, 0, 0, 0)
        time.sleep(NAP_S)
    finally:
        _prctl(_SET_SLACK, max(slack_ns, 0), 0, 0, 0)  # 0: the thread's default

"""A store that is killed, stopped or slowed down costs a request a moment, then nothing, and is used again by itself.

The short form of `python -m snowskin.tools.bench reliability`, which has the numbers. Here the host may be busy: what
is far below the second that a call to a silent node may take by itself is little.
"""

from __future__ import annotations

import statistics

import pytest

from snowskin.tools.bench import reliability

NUM_REQUESTS = 5
BEFORE_MS = 150.0
AFTER_MS = 30.0
BACK_S = 10.0


# By day each fault once and each way to the store once more than that; by night every fault by every way.
BY_NIGHT = ("kill -9, gRPC", "SIGSTOP, local door")
FAULTS = [
    pytest.param(fault, marks=pytest.mark.soak if fault in BY_NIGHT else ())
    for fault in reliability.FAULTS
]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return reliability.small_model(str(tmp_path_factory.mktemp("reliability")))


@pytest.mark.parametrize("fault", FAULTS)
def test_it_costs_a_moment_then_nothing_and_is_used_again_by_itself(small_model, fault):
    cost = reliability.measure(small_model, fault, rounds=1, num=NUM_REQUESTS)
    usual_ms = statistics.median(cost.healthy_ms)
    assert statistics.median(cost.before_ms) < usual_ms + BEFORE_MS, cost
    assert max(cost.before_ms) < usual_ms + 2 * BEFORE_MS, cost
    assert statistics.median(cost.after_ms) < usual_ms + AFTER_MS, cost
    assert cost.back_s[0] < BACK_S, cost

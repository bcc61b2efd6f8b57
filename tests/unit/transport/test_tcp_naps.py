"""Naps, and the threads that take them."""

from __future__ import annotations

import statistics
import time

import pytest

from snowskin.transport.tcp import naps


def slack_ns() -> int:
    found: int = naps._prctl(naps._GET_SLACK, 0, 0, 0, 0)
    return found


def took_s(sleep: object, *values: float) -> float:
    began_s = time.perf_counter()
    sleep(*values)  # type: ignore[operator]
    return time.perf_counter() - began_s


def test_a_nap_is_shorter_than_a_sleep_of_its_length() -> None:
    if slack_ns() < naps.NAP_S * 1e9:
        pytest.skip("this thread's sleeps are as short already")
    slept_s = [(took_s(naps.nap), took_s(time.sleep, naps.NAP_S)) for _ in range(200)]
    # Of the quick ones: how long the others wait for a core, others decide.
    napped, slept = (statistics.quantiles(each, n=10)[0] for each in zip(*slept_s, strict=True))
    assert naps.NAP_S <= napped < slept


@pytest.mark.parametrize("before_ns", [20_000, 50_000, 123_456])
def test_a_nap_leaves_the_threads_slack_as_it_was(before_ns: int) -> None:
    own_ns = slack_ns()
    naps._prctl(naps._SET_SLACK, before_ns, 0, 0, 0)
    try:
        naps.nap()
        assert slack_ns() == before_ns
    finally:
        naps._prctl(naps._SET_SLACK, own_ns, 0, 0, 0)


def test_a_nap_that_is_interrupted_leaves_the_slack_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    own_ns = slack_ns()
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        naps.nap()
    assert slack_ns() == own_ns

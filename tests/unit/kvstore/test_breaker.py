"""A node that does not answer is left alone soon, tried by nobody's request, and trusted again by itself."""

from __future__ import annotations

import pytest

from snowskin.kvstore.client.breaker import (
    FIRST_EXPECTED_S,
    MAX_EXPECTED_S,
    MIN_SAMPLES,
    NUM_SAMPLES,
    Breaker,
    BreakerRules,
    BreakerState,
    LookupBudget,
    LookupTime,
)

RULES = BreakerRules(num_failures=3, window_s=5.0, min_pause_s=0.1, max_pause_s=0.4, look_s=0.02)


def fail(breaker, *times_s):
    for at_s in times_s:
        breaker.on_failure(began_at_s=at_s - 0.01, now_s=at_s)


@pytest.fixture
def breaker():
    return Breaker(RULES)


def test_it_opens_at_the_third_failure_in_a_row(breaker):
    fail(breaker, 1.0, 1.1)
    assert breaker.allows()
    assert breaker.is_suspect
    fail(breaker, 1.2)
    assert not breaker.allows()
    assert (breaker.num_opened, breaker.num_failures, breaker.num_refused) == (1, 3, 1)


def test_an_answer_in_between_begins_the_count_anew(breaker):
    fail(breaker, 1.0, 1.1)
    breaker.on_answer(1.15)
    assert not breaker.is_suspect
    fail(breaker, 1.2, 1.3)
    assert breaker.allows()


def test_failures_far_apart_do_not_open_it(breaker):
    for number in range(20):
        fail(breaker, number * 2.6)
    assert breaker.state is BreakerState.CLOSED


def test_one_silence_is_one_failure_however_many_calls_it_delays(breaker):
    for _ in range(32):
        breaker.on_failure(began_at_s=1.0, now_s=1.02)
    assert breaker.num_failures == 1
    assert breaker.allows()


def test_open_it_is_tried_after_a_pause_and_the_first_answer_closes_it(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    assert breaker.probe_at_s == pytest.approx(1.3)
    breaker.on_probe()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows(), "a probe is nobody's request"
    breaker.on_answer(1.31)
    assert breaker.allows()
    assert not breaker.is_suspect


def test_pauses_double_up_to_their_limit(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    now_s, pauses = 1.2, []
    for _ in range(4):
        pauses.append(breaker.probe_at_s - now_s)
        now_s = breaker.probe_at_s
        breaker.on_probe()
        breaker.on_failure(began_at_s=now_s, now_s=now_s)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert breaker.num_opened == 1


def test_what_was_asked_before_it_opened_neither_closes_nor_prolongs_it(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    breaker.on_answer(1.25)
    breaker.on_failure(began_at_s=1.15, now_s=1.25)
    assert breaker.state is BreakerState.OPEN
    assert breaker.probe_at_s == pytest.approx(1.3)


def test_a_probe_that_is_answered_late_keeps_an_open_breaker_open(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    breaker.on_probe()
    breaker.on_slow_probe(1.5)
    assert breaker.state is BreakerState.OPEN
    assert breaker.probe_at_s == pytest.approx(1.7)


def test_a_probe_that_is_answered_late_says_nothing_about_a_suspect(breaker):
    fail(breaker, 1.0, 1.1)
    breaker.on_slow_probe(1.15)
    assert breaker.is_suspect
    assert breaker.probe_at_s == pytest.approx(1.17)
    fail(breaker, 1.2)
    assert not breaker.allows()


def test_one_that_opens_again_soon_goes_on_with_the_pause_it_had(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    breaker.on_probe()
    breaker.on_answer(1.31)
    fail(breaker, 1.4, 1.5, 1.6)
    assert breaker.probe_at_s == pytest.approx(1.8)
    breaker.on_probe()
    breaker.on_answer(1.81)
    fail(breaker, 11.0, 11.1, 11.2)
    assert breaker.probe_at_s == pytest.approx(11.3)


def test_another_connection_has_no_past(breaker):
    fail(breaker, 1.0, 1.1, 1.2)
    breaker.on_connected()
    assert breaker.allows()
    assert not breaker.is_suspect
    assert breaker.num_opened == 1


def test_first_lookups_are_given_the_time_of_first_ones():
    lookups = LookupTime()
    for _ in range(MIN_SAMPLES - 1):
        lookups.add(0.0003)
        assert lookups.expected_s == FIRST_EXPECTED_S
    lookups.add(0.0003)
    assert lookups.expected_s == pytest.approx(0.0003)


def test_the_expected_time_is_that_of_most_lookups_and_no_outliers():
    lookups = LookupTime()
    for number in range(NUM_SAMPLES):
        lookups.add(0.030 if number % 32 == 31 else 0.001)
    assert lookups.expected_s == pytest.approx(0.001)


def test_it_follows_a_node_that_became_slower_up_to_a_limit():
    lookups = LookupTime()
    for seconds in (0.001, 0.008, 9.0):
        for _ in range(NUM_SAMPLES):
            lookups.add(seconds)
        assert lookups.expected_s == pytest.approx(min(seconds, MAX_EXPECTED_S))


def test_a_budget_pays_only_for_what_is_beyond_the_expected_time():
    budget = LookupBudget(0.012)
    budget.spend(0.003, expected_s=0.004)
    assert budget.left_s == 0.012
    budget.spend(0.009, expected_s=0.004)
    assert budget.left_s == pytest.approx(0.007)
    budget.spend(1.0, expected_s=0.004)
    assert budget.left_s == 0.0

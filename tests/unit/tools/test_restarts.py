"""When a dead child is started again."""

from __future__ import annotations

from snowskin.tools.cluster.restarts import GiveUp, Restart, RestartHistory, RestartLimits

LIMITS = RestartLimits(
    quick_s=5.0, num_immediate=2, first_delay_s=0.5, max_delay_s=2.0, max_quick_deaths=7
)


def die(history: RestartHistory, *, lived_s: float | None) -> Restart | GiveUp:
    ready_at_s = None if lived_s is None else 100.0
    return history.on_death(ready_at_s=ready_at_s, now_s=100.0 + (lived_s or 0.0))


def test_a_child_that_lived_is_restarted_at_once_however_often():
    history = RestartHistory(LIMITS)
    assert [die(history, lived_s=5.0) for _ in range(50)] == [Restart(delay_s=0.0)] * 50


def test_quick_deaths_are_forgiven_twice_then_wait_longer_and_longer_then_end():
    history = RestartHistory(LIMITS)
    decisions = [die(history, lived_s=0.1) for _ in range(7)]
    delays = [decision.delay_s for decision in decisions if isinstance(decision, Restart)]
    assert delays == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0]
    assert decisions[-1] == GiveUp(num_quick_deaths=7)


def test_a_death_before_readiness_counts_as_quick():
    history = RestartHistory(LIMITS)
    assert [die(history, lived_s=None) for _ in range(7)][-1] == GiveUp(num_quick_deaths=7)


def test_one_long_life_forgives_the_quick_deaths_before_it():
    history = RestartHistory(LIMITS)
    for _ in range(5):
        die(history, lived_s=0.0)
    die(history, lived_s=60.0)
    assert die(history, lived_s=0.0) == Restart(delay_s=0.0)
    assert history.num_quick_deaths == 1

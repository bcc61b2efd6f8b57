"""Worker threads: what is urgent first, one kept free for it, nothing lost and nothing left over."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.errors import TransportClosed
from snowskin.transport.workers import PriorityWorkers

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 5.0


class Held:
    """Work that stays in its thread until `go`."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.go.wait(WAIT_S)


@pytest.fixture
def single() -> Iterator[PriorityWorkers]:
    workers = PriorityWorkers(1, name="test")
    yield workers
    workers.close()


def test_lower_class_goes_first_and_within_a_class_what_came_first(single: PriorityWorkers) -> None:
    held, done = Held(), list[str]()
    single.submit(held, urgency=2)
    assert held.begun.wait(WAIT_S)
    futures = [
        single.submit(lambda name=f"{number}{urgency}": done.append(name), urgency=urgency)  # type: ignore[misc]
        for number, urgency in enumerate((2, 1, 0, 1, 0))
    ]
    assert single.num_waiting == 5
    held.go.set()
    for future in futures:
        future.result(WAIT_S)
    assert done == ["20", "40", "11", "31", "02"]


def test_last_worker_is_kept_for_what_is_most_urgent() -> None:
    workers = PriorityWorkers(3, name="test")
    held = [Held() for _ in range(3)]
    for one in held:
        workers.submit(one, urgency=2)
    assert held[0].begun.wait(WAIT_S)
    assert held[1].begun.wait(WAIT_S)
    assert workers.submit(lambda: "urgent", urgency=0).result(WAIT_S) == "urgent"
    assert not held[2].begun.is_set()
    held[0].go.set()
    assert held[2].begun.wait(WAIT_S)
    for one in held:
        one.go.set()
    workers.close()


def test_most_urgent_work_may_use_all_workers() -> None:
    workers = PriorityWorkers(3, name="test")
    held = [Held() for _ in range(3)]
    for one in held:
        workers.submit(one, urgency=0)
    for one in held:
        assert one.begun.wait(WAIT_S)
    for one in held:
        one.go.set()
    workers.close()


def test_threads_begin_only_when_no_idle_one_is_there() -> None:
    before = threading.active_count()
    workers = PriorityWorkers(4, name="test")
    assert threading.active_count() == before
    for _ in range(20):
        workers.submit(lambda: None, urgency=0).result(WAIT_S)
        wait_until_idle(workers)
    assert threading.active_count() == before + 1
    workers.close()
    assert threading.active_count() == before


def wait_until_idle(workers: PriorityWorkers) -> None:
    for _ in range(100_000):
        if workers._num_idle:
            return
        threading.Event().wait(0.0001)
    raise AssertionError("the worker never became idle")


def test_error_is_the_futures_and_the_thread_goes_on(single: PriorityWorkers) -> None:
    def fail() -> None:
        raise ArithmeticError("of the work")

    with pytest.raises(ArithmeticError, match="of the work"):
        single.submit(fail, urgency=0).result(WAIT_S)
    assert single.submit(lambda: 7, urgency=0).result(WAIT_S) == 7


def test_cancelled_before_it_began_it_never_runs(single: PriorityWorkers) -> None:
    held, ran = Held(), list[int]()
    single.submit(held, urgency=0)
    assert held.begun.wait(WAIT_S)
    future = single.submit(lambda: ran.append(1), urgency=0)
    assert future.cancel()
    held.go.set()
    single.close()
    assert not ran


def test_close_runs_what_waits_and_takes_nothing_new() -> None:
    workers = PriorityWorkers(1, name="test")
    held = Held()
    workers.submit(held, urgency=0)
    assert held.begun.wait(WAIT_S)
    waiting = workers.submit(lambda: "ran", urgency=2)
    closing = threading.Thread(target=workers.close)
    closing.start()
    held.go.set()
    closing.join(WAIT_S)
    assert waiting.result(0) == "ran"
    with pytest.raises(TransportClosed):
        workers.submit(lambda: None, urgency=0)
    workers.close()


def test_worker_may_close_its_own_workers() -> None:
    workers = PriorityWorkers(2, name="test")
    workers.submit(workers.close, urgency=0).result(WAIT_S)
    workers.close()

"""The ground that runs stand on: time, freezing, cancelling, streams."""

from __future__ import annotations

import pytest

from tests.simulation.kernel import START_S, Cancelled, Future, Kernel, Process
from tests.simulation.network import Network, Weather


@pytest.fixture
def kernel():
    return Kernel(1)


def run(kernel: Kernel) -> None:
    while kernel.step():
        pass


def test_events_come_by_time_and_then_in_the_order_in_which_they_were_made(kernel):
    happened = []
    for name, delay_s in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        kernel.at(delay_s, lambda name=name: happened.append((name, kernel.now_s - START_S)))
    run(kernel)
    assert happened == [("a", 1.0), ("b", 1.0), ("c", 2.0)]


def test_frozen_process_does_io_first_and_is_overtaken_by_nothing(kernel):
    process, happened = Process(kernel, "p"), []
    process.freeze()
    process.at(0.1, lambda: happened.append("timer"), is_io=False)
    process.at(0.2, lambda: happened.append("io"))
    kernel.at(1.0, process.thaw)
    kernel.at(1.0, lambda: process.at(0.0, lambda: happened.append("new")))
    run(kernel)
    assert happened == ["io", "timer", "new"]
    assert process.frozen_s == 1.0
    assert not process.is_behind


def test_killed_process_does_nothing_any_more_and_its_tasks_are_over(kernel):
    process, happened = Process(kernel, "p"), []

    def flow():
        try:
            yield process.sleep(1.0)
        finally:
            happened.append("cleaned up")
            yield process.sleep(1.0)
            happened.append("never")

    task = process.start(flow(), "flow")
    process.at(0.5, lambda: happened.append("never"))
    kernel.at(0.1, process.kill)
    run(kernel)
    assert happened == ["cleaned up"]
    assert task.done.is_done


def test_cancelled_task_is_told_where_it_waits_even_if_what_it_waits_for_has_come(kernel):
    process, told = Process(kernel, "p"), []
    future = Future()

    def flow():
        try:
            yield future
        except Cancelled:
            told.append(future.is_done)
            return "done"

    def come_and_cancel():
        future.set_result(1)
        task.cancel()

    task = process.start(flow(), "flow")
    kernel.at(1.0, come_and_cancel)
    run(kernel)
    assert told == [True]
    assert task.done.result == "done"


def test_stream_keeps_its_order_and_tells_its_end_last(kernel):
    weather = Weather(slow_probability=0.5, split_probability=0.5)
    network = Network(kernel, weather)
    near, far = network.connect(Process(kernel, "a"), Process(kernel, "b"))
    got: list[bytes] = []
    far.on_data, far.on_end = got.append, lambda: got.append(b"END")
    for number in range(50):
        kernel.at(number * 0.001, lambda number=number: near.send(b"%03d" % number))
    kernel.at(1.0, near.process.kill)
    run(kernel)
    assert b"".join(got) == b"".join(b"%03d" % number for number in range(50)) + b"END"
    assert got[-1] == b"END"


def test_call_that_is_lost_fails_at_its_deadline_and_the_callee_is_told(kernel):
    network = Network(kernel, Weather(slow_probability=0.0))
    caller, callee = Process(kernel, "a"), Process(kernel, "b")
    ended: list[str] = []

    def serve():
        try:
            yield callee.sleep(10.0)
        except Cancelled:
            ended.append("cancelled")
            raise

    steps = network.call(caller, lambda: callee, serve, timeout_s=0.5, name="slow")
    task = caller.start(steps, "call")
    run(kernel)
    assert type(task.done.error).__name__ == "DeadlineExceeded"
    assert ended == ["cancelled"]

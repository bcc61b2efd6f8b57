"""What lies between processes: streams, as Unix sockets are, and calls, as gRPC's are.

Rules kept here: a stream loses nothing, doubles nothing and keeps its order, but it delays, it cuts what was sent
into other pieces, and it ends with either process; streams overtake one another. A call may lose its question or its
answer (a partition: then only its deadline helps), may find nobody, and its answer may come after others that were
asked for later. What a caller repeats by itself (registrations, reports) may come twice. The callee of a call that
was given up is told, or finds out by the deadline that came with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from tests.simulation.kernel import Cancelled, Future, Task, first_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.kernel import Kernel, Process


@dataclass(slots=True, kw_only=True)
class Weather:
    """How the network is at the moment; the nemesis changes it."""

    min_delay_s: float = 0.00005
    max_delay_s: float = 0.0005
    slow_probability: float = 0.02
    slow_s: float = 0.2
    loss_probability: float = 0.0
    double_probability: float = 0.0
    split_probability: float = 0.1


class Network:
    """Carries what processes send."""

    def __init__(self, kernel: Kernel, weather: Weather) -> None:
        self.kernel = kernel
        self.weather = weather

    def delay_s(self) -> float:
        """What one message takes."""
        rng, weather = self.kernel.rng, self.weather
        if rng.random() < weather.slow_probability:
            self.kernel.seen["messages delayed"] += 1
            return rng.uniform(weather.max_delay_s, weather.slow_s)
        return rng.uniform(weather.min_delay_s, weather.max_delay_s)

    def connect(self, near: Process, far: Process) -> tuple[End, End]:
        """A stream between two processes."""
        ends = End(self, near), End(self, far)
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        return ends

    def call(
        self,
        caller: Process,
        find: Callable[[], Process | None],
        serve: Callable[[], Any],
        *,
        timeout_s: float,
        name: str,
    ) -> Any:
        """One call, as a task's own steps: the answer, or its error.

        `find` names the callee when the question arrives; `serve` makes the generator that answers there.
        """
        call = _Call(self, caller, find, serve, timeout_s=timeout_s, name=name)
        return (yield from call.steps())


class End:
    """One end of a stream."""

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self.peer: End | None = None
        self.is_open = True
        self.is_silent = False
        self.on_data: Callable[[bytes], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._network = network
        self._last_at_s = 0.0
        process.when_dead(self.close)

    def send(self, data: bytes) -> None:
        """Leaves for the peer; into a closed stream it is lost."""
        if not self.is_open or self.is_silent or not self.process.is_alive:
            return
        kernel = self._network.kernel
        pieces = [data]
        if len(data) > 1 and kernel.chance(self._network.weather.split_probability):
            at = kernel.rng.randrange(1, len(data))
            pieces = [data[:at], data[at:]]
            kernel.seen["messages split"] += 1
        for piece in pieces:
            self._deliver(lambda peer, piece=piece: peer.on_data and peer.on_data(piece))  # type: ignore[misc]

    def close(self) -> None:
        """The peer reads what was sent, then the end; idempotent."""
        if not self.is_open:
            return
        self.say_no_more()
        self.is_open = False
        self.process.forget_death(self.close)

    def say_no_more(self) -> None:
        """The peer reads what was sent, then the end; what it says still comes; idempotent."""
        if not self.is_silent:
            self.is_silent = True
            self._deliver(lambda peer: peer.on_end and peer.on_end())

    def cut(self) -> None:
        """Both sides see the end, and what was under way is lost: as a connection between hosts breaks."""
        peer = self.peer
        for end in (self, peer):
            if end is not None and end.is_open:
                end.is_open = False
                end.process.forget_death(end.close)
                if end.on_end is not None:
                    end.process.at(self._network.delay_s(), end.on_end)

    def _deliver(self, act: Callable[[End], Any]) -> None:
        kernel, peer = self._network.kernel, self.peer
        assert peer is not None, "an end without its peer"
        at_s = max(self._last_at_s, kernel.now_s + self._network.delay_s())
        self._last_at_s = at_s

        def arrive() -> None:
            if peer.is_open:
                act(peer)

        peer.process.at_moment(at_s, arrive)


class _Call:
    """One gRPC call from question to answer."""

    def __init__(
        self,
        network: Network,
        caller: Process,
        find: Callable[[], Process | None],
        serve: Callable[[], Any],
        *,
        timeout_s: float,
        name: str,
    ) -> None:
        self.network = network
        self.caller = caller
        self.find = find
        self.serve = serve
        self.timeout_s = timeout_s
        self.name = name
        self.answer = Future()
        self.callee: Process | None = None
        self.task: Task | None = None
        self.deadline_s = network.kernel.now_s + timeout_s

    def steps(self) -> Any:
        late = Future()
        timer = self.caller.at(self.timeout_s, late.set_result, is_io=False)
        self._travel(self._arrive)
        try:
            yield first_of(self.answer, late)
            if not self.answer.is_done:
                self.network.kernel.seen["calls past their deadline"] += 1
                raise DeadlineExceeded(f"{self.name}: no answer within {self.timeout_s:.3f} s")
            return self.answer.value()
        finally:
            timer.cancel()
            if not self.answer.is_done:
                self.answer.is_done = True
                self._travel(self._give_up)

    def _travel(self, act: Callable[[], None]) -> None:
        kernel = self.network.kernel
        if kernel.chance(self.network.weather.loss_probability):
            kernel.seen["messages lost"] += 1
            return
        kernel.at(self.network.delay_s(), act)

    def _arrive(self) -> None:
        callee = self.find()
        if callee is None or not callee.is_alive:
            self._fail_soon(NodeUnavailable(f"{self.name}: nobody listens there"))
            return
        self.callee = callee
        callee.when_dead(self._on_death)
        callee.at(0.0, self._begin)

    def _begin(self) -> None:
        callee = self.callee
        assert callee is not None, "a call that arrived nowhere"
        if self.network.kernel.now_s >= self.deadline_s:
            callee.forget_death(self._on_death)
            return  # it came with its deadline
        self.task = task = callee.start(self.serve(), self.name)
        timer = callee.at(self.deadline_s - self.network.kernel.now_s, task.cancel, is_io=False)

        def ended() -> None:
            timer.cancel()
            callee.forget_death(self._on_death)
            if isinstance(task.done.error, Cancelled):
                self._fail_soon(NodeUnavailable(f"{self.name}: cancelled by the callee"))
            else:
                self._travel(lambda: self._return(task.done))

        task.done.when_done(ended)

    def _give_up(self) -> None:
        if self.callee is not None and self.task is not None and self.callee.is_alive:
            self.callee.at(0.0, self.task.cancel)

    def _on_death(self) -> None:
        self._fail_soon(NodeUnavailable(f"{self.name}: the connection broke"))

    def _fail_soon(self, error: Exception) -> None:
        def arrive() -> None:
            self.caller.at(0.0, lambda: self.answer.set_error(error))

        self._travel(arrive)

    def _return(self, done: Future) -> None:
        def arrive() -> None:
            if done.error is not None:
                self.answer.set_error(done.error)
            else:
                self.answer.set_result(done.result)

        self.caller.at(0.0, arrive)

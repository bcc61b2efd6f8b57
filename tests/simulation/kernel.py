"""Virtual time, one source of chance, and processes that can be frozen and killed.

Rules kept here: a run is a list of events in the order of (time, when they were made); nothing else decides what
comes next, so a seed is a run. Chance comes from `Kernel.rng` alone. A process is what a signal can hit: what it
would do while it is frozen it does when it is thawed, I/O before timers, as an event loop does; what it would do when
it is dead is not done. A task is a generator that yields futures; cancelling it throws `Cancelled` in where it waits,
even where what it waits for has come in the same moment.
"""

from __future__ import annotations

import heapq
import random
import struct
import zlib
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

START_S = 1000.0
_TIME = struct.Struct("<d")
MAX_LAST_YIELDS = 64  # of a task whose process was killed


class Violation(AssertionError):
    """A rule of the product was broken; the message says which."""


class Cancelled(BaseException):
    """Thrown into a task that is cancelled."""


class Killed(BaseException):
    """Thrown into the tasks of a killed process, so that nothing of them stays; what they do then is not done."""


class Timer:
    """Something that will happen; `cancel` and it will not."""

    __slots__ = ("act", "is_io")

    def __init__(self, act: Callable[[], None], *, is_io: bool) -> None:
        self.act: Callable[[], None] | None = act
        self.is_io = is_io

    def cancel(self) -> None:
        self.act = None


class Kernel:
    """The clock, the queue of events, chance, and what was seen."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_s = START_S
        self.num_steps = 0
        self.seen: Counter[str] = Counter()  # how often the run came to what it is for
        self.print_line: Callable[[str], None] | None = None
        # Told of each piece of a copy that begins: the worst moment to stop a process.
        self.on_copy: Callable[[Process], None] = lambda process: None
        self.processes: list[Process] = []  # all that ever were
        self.digest = 0  # of when everything happened: the same for two runs of one seed
        self._events: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, delay_s: float, act: Callable[[], None], *, is_io: bool = True) -> Timer:
        """`act` happens `delay_s` from now."""
        return self.at_moment(self.now_s + max(0.0, delay_s), act, is_io=is_io)

    def at_moment(self, at_s: float, act: Callable[[], None], *, is_io: bool = True) -> Timer:
        """`act` happens at just this time: of two events at one time the one made first comes first."""
        timer = Timer(act, is_io=is_io)
        self._order += 1
        heapq.heappush(self._events, (max(self.now_s, at_s), self._order, timer))
        return timer

    def step(self) -> bool:
        """The next event; False where none is left."""
        while self._events:
            at_s, _, timer = heapq.heappop(self._events)
            if timer.act is None:
                continue
            self.now_s = at_s
            self.num_steps += 1
            self.digest = zlib.crc32(_TIME.pack(at_s), self.digest)
            timer.act()
            return True
        return False

    def say(self, who: str, what: str) -> None:
        """A line of the trace."""
        if self.print_line is not None:
            self.print_line(f"{self.num_steps:5d} {self.now_s - START_S:9.4f} s  {who:<10} {what}")

    @property
    def is_traced(self) -> bool:
        """Whether anybody reads the trace: what costs much to say is said only then."""
        return self.print_line is not None

    def chance(self, probability: float) -> bool:
        """True now and then."""
        return self.rng.random() < probability


class Future:
    """What a task can wait for; belongs to a process."""

    __slots__ = ("_callbacks", "error", "is_done", "result")

    def __init__(self) -> None:
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def set_result(self, result: Any = None) -> None:
        if not self.is_done:
            self.is_done, self.result = True, result
            self._call()

    def set_error(self, error: BaseException) -> None:
        if not self.is_done:
            self.is_done, self.error = True, error
            self._call()

    def value(self) -> Any:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result

    def when_done(self, callback: Callable[[], None]) -> None:
        if self.is_done:
            callback()
        else:
            self._callbacks.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def _call(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Task:
    """A generator that runs in a process; `done` is its end."""

    def __init__(self, process: Process, flow: Any, name: str) -> None:
        self.name = name
        self.done = Future()
        self.is_stopped = False
        self._process = process
        self._flow = flow
        self._waits_for: Future | None = None
        self._must_cancel = False
        self._resume_is_due = True
        process.at(0.0, self._resume)

    def cancel(self) -> None:
        """Throws `Cancelled` in, at once or where it would go on anyway."""
        if self.done.is_done:
            return
        self._must_cancel = True
        if not self._resume_is_due:
            if self._waits_for is not None:
                self._waits_for.forget(self._on_ready)
            self._resume_is_due = True
            self._process.at(0.0, self._resume)

    def _on_ready(self) -> None:
        self._resume_is_due = True
        self._process.at(0.0, self._resume)

    def _resume(self) -> None:
        waited, self._waits_for, self._resume_is_due = self._waits_for, None, False
        if self.done.is_done:
            return
        try:
            if self._must_cancel:
                self._must_cancel = False
                future = self._flow.throw(Cancelled())
            elif waited is None:
                future = next(self._flow)
            elif waited.error is not None:
                future = self._flow.throw(waited.error)
            else:
                future = self._flow.send(waited.result)
        except StopIteration as end:
            self._end(result=end.value)
        except Violation:
            raise
        except (Exception, Cancelled) as error:  # noqa: BLE001  whoever waits for this task is told
            self._end(error=error)
        else:
            self._waits_for = future
            future.when_done(self._on_ready)

    def _end(self, result: Any = None, error: BaseException | None = None) -> None:
        self._process.tasks.pop(self, None)
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_error(error)

    def kill(self) -> None:
        """Its process is dead: runs it to its end, without effect, so that the collector finds it finished."""
        if self.done.is_done:
            return
        self.is_stopped = True
        try:
            for _ in range(MAX_LAST_YIELDS):
                self._flow.throw(Killed())
        except (StopIteration, Killed):
            pass
        except Violation:
            raise
        except Exception:  # noqa: BLE001  what a dead process would say
            pass
        self.done.is_done, self.done.error = True, Killed()


class Process:
    """What can be frozen and killed."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self.frozen_s = 0.0  # in all
        self.tasks: dict[Task, None] = {}
        self._backlog: deque[Timer] = deque()
        self._frozen_at_s = 0.0
        self._on_death: dict[Callable[[], None], None] = {}
        kernel.processes.append(self)

    # --- what it does

    def at(self, delay_s: float, act: Callable[[], None], *, is_io: bool = True) -> Timer:
        """`act` is done `delay_s` from now, or when it is thawed, or never."""
        timer = Timer(act, is_io=is_io)
        self.kernel.at(delay_s, lambda: self._fire(timer))
        return timer

    def at_moment(self, at_s: float, act: Callable[[], None], *, is_io: bool = True) -> Timer:
        """`act` is done at just this time, or later, or never."""
        timer = Timer(act, is_io=is_io)
        self.kernel.at_moment(at_s, lambda: self._fire(timer))
        return timer

    def _fire(self, timer: Timer) -> None:
        if not self.is_alive or timer.act is None:
            return
        if self.is_frozen or self._backlog:  # nothing overtakes what has waited
            self._backlog.append(timer)
        else:
            timer.act()

    def _catch_up(self) -> None:
        """One thing of those that have waited."""
        if self.is_frozen or not self._backlog:
            return
        timer = self._backlog.popleft()
        if self._backlog:
            self.kernel.at(0.0, self._catch_up)
        if timer.act is not None:
            timer.act()

    def start(self, flow: Any, name: str) -> Task:
        """A task of this process."""
        task = Task(self, flow, name)
        self.tasks[task] = None
        return task

    def sleep(self, duration_s: float) -> Future:
        """Done after a while."""
        future = Future()
        self.at(duration_s, future.set_result, is_io=False)
        return future

    @property
    def is_behind(self) -> bool:
        """Whether it is stopped, or has things to do that are late because it was."""
        return self.is_frozen or bool(self._backlog)

    # --- what is done to it

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.is_alive and not self.is_frozen:
            self.is_frozen, self._frozen_at_s = True, self.kernel.now_s

    def thaw(self) -> None:
        """SIGCONT."""
        if not self.is_alive or not self.is_frozen:
            return
        self.is_frozen = False
        self.frozen_s += self.kernel.now_s - self._frozen_at_s
        if self._backlog:
            in_order = sorted(self._backlog, key=lambda timer: not timer.is_io)  # stable
            self._backlog = deque(in_order)
            self.kernel.at(0.0, self._catch_up)

    def kill(self) -> None:
        """SIGKILL."""
        if not self.is_alive:
            return
        self.is_alive = self.is_frozen = False
        self._backlog.clear()
        tasks, self.tasks = list(self.tasks), {}
        for task in tasks:
            task.kill()
        callbacks, self._on_death = list(self._on_death), {}
        for callback in callbacks:
            callback()

    def when_dead(self, callback: Callable[[], None]) -> None:
        self._on_death[callback] = None

    def forget_death(self, callback: Callable[[], None]) -> None:
        self._on_death.pop(callback, None)


def first_of(*futures: Future) -> Future:
    """Done when one of them is; without its result."""
    first = Future()
    for future in futures:
        future.when_done(first.set_result)
    return first


def all_of(futures: Iterable[Future]) -> Future:
    """Done when all of them are; without results."""
    left = list(futures)
    every = Future()

    def look() -> None:
        if all(future.is_done for future in left):
            every.set_result()

    for future in left:
        future.when_done(look)
    look()
    return every

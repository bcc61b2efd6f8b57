"""The one thread that speaks to UCX: it sleeps until UCX, another thread or a time wakes it.

Rules kept here: every call on a worker is made here; other threads hand in work and are never called back under a lock
of theirs; nothing that runs here waits; idle it uses no CPU. It looks at its work after every few turns of UCX, so that
bulk bytes do not delay a cancellation. Where UCX itself fails under it, it ends as if it had been stopped, and says so.

UCX's event descriptor is level-triggered only after `arm`, and `arm` says False where events came in between: then it
makes progress again before it sleeps.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from snowskin.transport.errors import TransportClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.ucp.api import UcpContext, UcpWorker

T = TypeVar("T")

TURNS = 16  # of UCX, between two looks at the work

log = logging.getLogger("snowskin.transport.ucx")


class Timer:
    """A call that is still to come."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        """Made by `ProgressThread.later`."""
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """It does not come. Idempotent."""
        self.call = None


class ProgressThread:
    """Owns a context and its worker, and closes both at its end."""

    def __init__(
        self, context: UcpContext, worker: UcpWorker, *, last: Callable[[], object]
    ) -> None:
        """Starts at once; `last` is done before worker and context are closed, whatever ends the thread."""
        self.context = context
        self.worker = worker
        self._last = last
        self._work: collections.deque[Callable[[], object]] = collections.deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # work is not handed in once the last was done
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._poll.register(worker.event_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="snowskin-ucx", daemon=True)
        self._thread.start()

    def post(self, work: Callable[[], object]) -> bool:
        """Has `work` done soon, in this thread's order; False after `stop`."""
        with self._lock:
            if self._closed:
                return False
            self._work.append(work)
            with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
                os.eventfd_write(self._wake_fd, 1)
            return True

    def run(self, work: Callable[[], T]) -> T:
        """Has `work` done and returns what it returned, or raises what it raised; not from this thread itself.

        It waits only for what never waits. Raises TransportClosed after `stop`.
        """
        assert threading.current_thread() is not self._thread, "it would wait for itself"
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def capture() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                errors.append(error)
            done.set()

        if not self.post(capture):
            raise TransportClosed("transport ucx is closed")
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def later(self, delay_s: float, call: Callable[[], object]) -> Timer:
        """Has `call` done after `delay_s`; only from this thread."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), timer))
        return timer

    @property
    def ended(self) -> bool:
        """Whether it takes no work any more."""
        return self._closed

    def stop(self) -> None:
        """Does what was handed in, then the last, then closes worker and context; waits. Idempotent."""
        self._closing = True
        self.post(_nothing)  # which wakes it
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not (self._closing and not self._work):
                self._turn()
        except Exception:  # UCX's: there is no way to go on, and whoever waits must hear of it
            log.exception("ucx: UCX failed; this transport is closed")
        finally:
            with self._lock:
                self._closed = True
            while self._work:
                self._do(self._work.popleft())
            self._do(self._last)
            self._timers.clear()
            self._poll.close()
            os.close(self._wake_fd)
            self._do(self.worker.close)
            self._do(self.context.close)

    def _turn(self) -> None:
        """Some progress, all work that was handed in until now, all calls whose time has come; then sleeps."""
        busy = False
        for _ in range(TURNS):
            if not self.worker.progress():
                break
            busy = True
        for _ in range(len(self._work)):
            self._do(self._work.popleft())
            busy = True
        if self._call_due() or busy or not self.worker.arm():
            return
        timeout_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for fd, _ in self._poll.poll(timeout_s):
            if fd == self._wake_fd:
                os.eventfd_read(fd)

    def _call_due(self) -> bool:
        called = False
        now_s = time.monotonic()
        while self._timers and (self._timers[0][0] <= now_s or self._timers[0][2].call is None):
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                self._do(timer.call)
                called = True
        return called

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:  # this thread owns all transfers: one's mistake must not end the others
            log.exception("ucx: work failed")


def _nothing() -> None:
    """Work that only wakes the thread."""

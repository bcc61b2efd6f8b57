"""Worker threads that take the most urgent work first.

Rules kept here: of what waits, the lower class goes first, and within a class what came first; one
worker is kept free of all but the most urgent class, so that it never waits only for others; idle
workers use no CPU; `close` runs what still waits and returns when all threads have ended.

An executor with one queue would let a decode-critical pull wait behind a gigabyte of replication.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import itertools
import threading
from typing import TYPE_CHECKING, TypeVar

from snowskin.transport.errors import TransportClosed

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class PriorityWorkers:
    """Up to `num_workers` threads, begun when they are needed."""

    def __init__(self, num_workers: int, *, name: str) -> None:
        """Starts no thread yet; `name` is what threads are called."""
        self._num_workers = num_workers
        self._name = name
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._num_less_urgent = 0  # running now, of any class but 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def num_waiting(self) -> int:
        """Work that no thread has begun."""
        return len(self._waiting)

    def submit(self, work: Callable[[], T], *, urgency: int) -> concurrent.futures.Future[T]:
        """Runs `work` in a thread, lower `urgency` first; raises TransportClosed after `close`."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
                    future.set_exception(error)

        with self._changed:
            if self._closed:
                raise TransportClosed(f"{self._name} takes no work any more")
            heapq.heappush(self._waiting, (urgency, next(self._order), run))
            if self._num_idle < len(self._waiting) and len(self._threads) < self._num_workers:
                thread = threading.Thread(
                    target=self._serve, name=f"{self._name}_{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Lets what waits run, and joins the threads; from a worker itself, all others. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self) -> None:
        while True:
            taken = self._take()
            if taken is None:
                return
            urgency, run = taken
            run()
            del taken, run  # an idle thread keeps nothing of a transfer alive
            if urgency:
                with self._changed:
                    self._num_less_urgent -= 1
                    self._changed.notify()

    def _take(self) -> tuple[int, Callable[[], None]] | None:
        """The most urgent work that may begin now; None once there is none and none will come."""
        with self._changed:
            while not self._may_begin():
                if self._closed and not self._waiting:
                    return None
                self._num_idle += 1
                try:
                    self._changed.wait()
                finally:
                    self._num_idle -= 1
            urgency, _, run = heapq.heappop(self._waiting)
            if urgency:
                self._num_less_urgent += 1
            return urgency, run

    def _may_begin(self) -> bool:
        if not self._waiting:
            return False
        # What is most urgent stands first: if the first is less urgent, nothing urgent waits.
        return not self._waiting[0][0] or self._num_less_urgent < max(1, self._num_workers - 1)

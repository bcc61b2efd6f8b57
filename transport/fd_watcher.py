"""One thread that waits on descriptors, while there are any.

Rules kept here: no descriptors, no thread; waiting costs no CPU; a descriptor that was removed is not
called for any more, except by a call that is under way; what a callback raises ends nobody else's
watch. Callbacks are short and do not block. The descriptors stay their owners', who remove them
before they close them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportClosed

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class FdWatcher:
    """Calls back when a descriptor can be read or its other end is gone, again and again until it is removed."""

    def __init__(self, name: str) -> None:
        """Starts no thread yet; `name` is what the thread is called."""
        self._name = name
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._running: _Running | None = None
        self._ending: list[threading.Thread] = []
        self._closed = False
        self._lock = threading.Lock()

    def add(self, fd: int, on_ready: Callable[[], None]) -> None:
        """Calls `on_ready` from the thread; TransportClosed after `close`, OSError where no descriptor is left."""
        with self._lock:
            if self._closed:
                raise TransportClosed(f"{self._name} watches nothing any more")
            if self._running is None:
                self._running = _Running(self._name, self._serve)
            self._callbacks[fd] = on_ready
            try:
                self._running.epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP)
            except OSError:
                del self._callbacks[fd]
                if not self._callbacks:
                    self._end()
                raise

    def remove(self, fd: int) -> None:
        """Forgets a descriptor; the last one's removal ends the thread. Idempotent."""
        with self._lock:
            if self._callbacks.pop(fd, None) is None or self._running is None:
                return
            with contextlib.suppress(OSError):  # its owner closed it too early
                self._running.epoll.unregister(fd)
            if not self._callbacks:
                self._end()

    def close(self) -> None:
        """Forgets all, and returns when the thread has ended; from the thread itself, at once. Idempotent."""
        with self._lock:
            self._closed = True
            self._callbacks.clear()
            if self._running is not None:
                self._end()
            ending = list(self._ending)
        for thread in ending:
            if thread is not threading.current_thread():
                thread.join()

    def _end(self) -> None:
        assert self._running is not None, "whoever calls looked"
        running, self._running = self._running, None
        self._ending = [thread for thread in self._ending if thread.is_alive()]
        self._ending.append(running.thread)
        running.end()

    def _serve(self, running: _Running) -> None:
        while True:
            for fd, _ in running.epoll.poll():
                if fd == running.wake_fd:
                    running.close()
                    return
                callback = self._callbacks.get(fd)
                if callback is None:
                    continue
                try:
                    callback()
                except Exception:  # this loop owns the thread, and others' watches with it
                    log.exception("%s: a callback failed", self._name)


class _Running:
    """A thread with its epoll; it closes both when it is told to end."""

    def __init__(self, name: str, serve: Callable[[_Running], None]) -> None:
        self.epoll = select.epoll()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.epoll.register(self.wake_fd, select.EPOLLIN)
            self.thread = threading.Thread(target=serve, args=(self,), name=name, daemon=True)
            self.thread.start()
        except BaseException:
            self.close()
            raise

    def end(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    def close(self) -> None:
        self.epoll.close()
        os.close(self.wake_fd)

"""The thread that looks after idle connections to owners.

Rules kept here: an owner that ended an idle connection is noticed at once; one that does not answer a PING within its
time is counted lost; a connection that says PING belongs to nobody else until PONG; there is one thread while any
connection is open, and none otherwise; between heartbeats it sleeps.

All connections are watched for their end alone, from when they were made: so taking one for a transfer and giving it
back costs no system call.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportClosed, TransportError
from snowskin.transport.frames import Kind, Ping, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.tcp.connection import Connection
    from snowskin.transport.tcp.connections import Link
    from snowskin.transport.tcp.settings import TcpSettings

_PUNCTUAL = 0.75  # of a heartbeat: those that are nearly due speak together, and the thread wakes less often


class Keeper:
    """The thread that looks after idle connections; there is one while any connection is open."""

    def __init__(self, settings: TcpSettings, links: Callable[[], list[Link]]) -> None:
        """Starts no thread yet."""
        self.closed = False
        self.num_connected = 0
        self.num_peers_lost = 0
        self._settings = settings
        self._links = links
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._wake_fd = -1
        self._heartbeat_s = settings.heartbeat_s  # of the least patient owner so far
        self._watched: dict[int, tuple[Connection, Link]] = {}

    def check_open(self) -> None:
        """Raises TransportClosed after `close`."""
        if self.closed:
            raise TransportClosed("transport tcp is closed")

    def watch(self, connection: Connection, link: Link) -> None:
        """From now on its end is noticed; starts the thread where it does not run.

        Raises:
            TransportClosed. OSError: this process is out of descriptors; then it is not watched.
        """
        with self._lock:
            self.check_open()
            if self._epoll is None:
                self._open()
            assert self._epoll is not None
            self._watched[connection.fd] = (connection, link)
            try:
                self._epoll.register(connection.fd, select.EPOLLRDHUP | select.EPOLLET)
            except OSError:
                del self._watched[connection.fd]
                raise
            self.num_connected += 1
            if connection.heartbeat_s < self._heartbeat_s:
                self._heartbeat_s = connection.heartbeat_s
                os.eventfd_write(self._wake_fd, 1)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="snowskin-tcp-keeper", daemon=True)
                thread.start()
                self._thread = thread

    def watch_end(self, connection: Connection) -> bool:
        """What still comes on it is thrown away until it ends; False after `close`."""
        with self._lock:
            if self.closed or self._epoll is None:
                return False
            self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLRDHUP)
            return True

    def close(self) -> None:
        """Joins the thread. Idempotent."""
        with self._lock:
            self.closed = True
            thread = self._thread
            if thread is not None:
                os.eventfd_write(self._wake_fd, 1)
            elif self._epoll is not None:  # no thread could be started
                self._end()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        due_s = time.monotonic() + self._heartbeat_s
        while True:
            events = epoll.poll(max(0.0, due_s - time.monotonic()))
            if self.closed:
                break
            for fd, _ in events:
                self._look(fd)
            now_s = time.monotonic()
            if now_s >= due_s or self._has_pinged() or self._is_woken():
                due_s = self._tick(now_s)
            if not any(link.num_open for link in self._links()) and self._may_end():
                return
        with self._lock:
            self._end()

    def _may_end(self) -> bool:
        with self._lock:
            if any(link.num_open for link in self._links()):
                return False
            self._end()
            return True

    def _open(self) -> None:
        """Guarded by the lock; both descriptors, or none."""
        epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            epoll.close()
            raise
        epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll = epoll

    def _end(self) -> None:
        """Guarded by the lock."""
        assert self._epoll is not None
        self._epoll.close()
        os.close(self._wake_fd)
        self._epoll, self._wake_fd, self._thread = None, -1, None
        self._watched.clear()

    def _is_woken(self) -> bool:
        try:
            return os.eventfd_read(self._wake_fd) > 0
        except BlockingIOError:
            return False

    def _has_pinged(self) -> bool:
        return any(link.pinged for link in self._links())

    def _look(self, fd: int) -> None:
        watched = self._watched.get(fd)
        if watched is None:
            return
        connection, link = watched
        with link.lock:
            draining = link.draining.get(fd)
            was_pinged = link.pinged.pop(fd, None)
            if draining is None and was_pinged is None:
                if connection.fd != fd or not connection.is_dead():
                    return
                if not link.remove_idle(connection):
                    connection.hung_up = True  # its user will notice; the pool takes it no more
                    return
        if draining is not None:
            self._drain(connection, link, draining[2])
            return
        is_pong = False if was_pinged is None else self._is_pong(connection)
        if is_pong:
            self._rest(connection, link)
        elif is_pong is None and was_pinged is not None:
            with link.lock:
                link.pinged[fd] = was_pinged
        else:
            self._close(connection, link)
            if not link.num_open:
                link.count_lost()

    def _drain(self, connection: Connection, link: Link, at_end: Callable[[], None]) -> None:
        """Throws away what the owner still says; at its end nothing of the push can land any more."""
        if connection.skip():
            return
        with link.lock:
            link.draining.pop(connection.fd, None)
        self._close(connection, link)
        at_end()

    def _rest(self, connection: Connection, link: Link) -> None:
        """Answered: idle again, and as old as before."""
        assert self._epoll is not None
        self._epoll.modify(connection.fd, select.EPOLLRDHUP | select.EPOLLET)
        with link.lock:
            link.put_idle(connection)

    def _close(self, connection: Connection, link: Link) -> None:
        self._watched.pop(connection.fd, None)
        with link.lock:
            link.num_open -= 1
        connection.close()

    def _tick(self, now_s: float) -> float:
        """Closes what is too old or does not answer, says PING where it is time; when to look again."""
        settings = self._settings
        due_s = now_s + self._heartbeat_s
        for fd, (connection, _) in list(self._watched.items()):
            if connection.closed:
                self._watched.pop(fd, None)
        for link in self._links():
            with link.lock:
                silent = [
                    connection
                    for connection, pinged_at_s in link.pinged.values()
                    if now_s - pinged_at_s >= settings.pong_timeout_s
                ]
                for connection in silent:
                    del link.pinged[connection.fd]
                stuck = [each for each, until_s, _ in link.draining.values() if now_s >= until_s]
                for connection in stuck:  # what it pushed stays in quarantine
                    del link.draining[connection.fd]
                surplus = self._take_surplus(link, now_s)
                pinged = [
                    connection
                    for connection in link.all_idle()
                    if now_s - connection.spoke_at_s >= connection.heartbeat_s * _PUNCTUAL
                ]
                for connection in pinged:
                    link.remove_idle(connection)
                    link.pinged[connection.fd] = (connection, now_s)
            for connection in silent:
                self._lost(connection, link)
            for connection in surplus + stuck:
                self._close(connection, link)
            for connection in pinged:
                self._ping(connection, link)
            for _, pinged_at_s in list(link.pinged.values()):
                due_s = min(due_s, pinged_at_s + settings.pong_timeout_s)
            for connection in list(link.all_idle()):
                due_s = min(due_s, connection.spoke_at_s + connection.heartbeat_s)
        return max(due_s, now_s + 0.01)

    def _take_surplus(self, link: Link, now_s: float) -> list[Connection]:
        """Guarded by the link's lock."""
        settings = self._settings
        idle = sorted(link.all_idle(), key=lambda each: each.idle_since_s)
        num_too_many = max(0, len(idle) - settings.max_idle_connections_to_peer)
        # The oldest ones are used first: see `Link.put_idle`.
        in_use = [
            connection
            for path, connections in link.idle.items()
            for connection in connections[-link.paths.most_streams(path) :]
        ]
        spare_s = min(settings.max_spare_idle_s, settings.max_idle_s)
        surplus = [
            connection
            for index, connection in enumerate(idle)
            if index < num_too_many
            or now_s - connection.idle_since_s
            >= (settings.max_idle_s if connection in in_use else spare_s)
        ]
        for connection in surplus:
            link.remove_idle(connection)
        return surplus

    def _ping(self, connection: Connection, link: Link) -> None:
        assert self._epoll is not None
        connection.spoke_at_s = time.monotonic()
        connection.set_mood(polling=True)
        try:
            sent = connection.send([encode(Ping(op=connection.next_op()))])
            self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLRDHUP)
        except (TransportError, OSError):
            sent = 0
        if not sent:
            with link.lock:
                link.pinged.pop(connection.fd, None)
            self._close(connection, link)

    def _is_pong(self, connection: Connection) -> bool | None:
        """Whether PONG came, and that alone; None where nothing, or not all of it, came yet."""
        try:
            for _ in connection.expect(Kind.PONG, connection.last_op):
                return None
        except TransportError:
            return False
        return not connection.num_ahead

    def _lost(self, connection: Connection, link: Link) -> None:
        """The owner does not answer: it is stopped, or the way to it is cut; unless only this thread is late."""
        if self._is_pong(connection):
            self._rest(connection, link)
            return
        link.count_lost()
        link.failed(connection.path.name)
        self._close(connection, link)

    def count_peer_lost(self) -> None:
        """An owner is gone. From any thread."""
        with self._lock:
            self.num_peers_lost += 1

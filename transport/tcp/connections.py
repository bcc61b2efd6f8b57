"""The connections to owners: kept between transfers, bounded in number, by the paths on which they go.

Rules kept here: a connection belongs to one transfer, to its pool, or to the keeper, never to two; only whom it belongs
to closes it, others interrupt it; a path that failed is left alone for a while.
"""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Reachability
from snowskin.transport.errors import PeerLost, TransportUnavailable
from snowskin.transport.memory import Quarantine
from snowskin.transport.paths import Path, PathSet
from snowskin.transport.tcp.dialing import dial
from snowskin.transport.tcp.gate import Gate
from snowskin.transport.tcp.keeper import Keeper
from snowskin.transport.tcp.names import Names
from snowskin.transport.tcp.routes import TcpRoutes

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from snowskin.transport.tcp.connection import Connection
    from snowskin.transport.tcp.names import Patience
    from snowskin.transport.tcp.settings import TcpSettings

PathsTo = Callable[[Reachability], Sequence[Path]]

_CLOSE_S = 1.0  # that the close of a transport waits for transfers of other threads


class Link:
    """All connections to one owner, and what is known of the ways to it.

    Attributes:
        peer: its name in errors: `tcp://` and its first address.
        paths: guarded by `lock`.
        gate: what transfers pass first.
        is_reached: the owner answered since it was lost last.
    """

    def __init__(
        self,
        reachability: Reachability,
        paths: Sequence[Path],
        settings: TcpSettings,
        keeper: Keeper,
        names: Names,
        *,
        tls: ssl.SSLContext | None,
    ) -> None:
        """No connection yet."""
        self.peer = f"tcp://{reachability.addresses[0]}"
        self.reachability = reachability
        self.paths = PathSet(paths, max_streams=settings.max_streams)
        self.path_names = tuple(path.name for path in self.paths.paths)
        self.has_many_paths = len(self.path_names) > 1
        self.lock = threading.Lock()
        self.gate = Gate(
            max_transfers=settings.max_connections_to_peer,
            max_nbytes=settings.max_nbytes_in_flight,
            lock=self.lock,
        )
        self.idle: dict[str, list[Connection]] = {name: [] for name in self.path_names}
        self.busy: dict[Connection, Patience] = {}
        self.pinged: dict[int, tuple[Connection, float]] = {}
        self.draining: dict[int, tuple[Connection, float, Callable[[], None]]] = {}
        self._quarantines: weakref.WeakValueDictionary[bytes, Quarantine] = (
            weakref.WeakValueDictionary()
        )
        self.num_open = 0
        self.is_reached = False
        self.num_users = 0  # attached regions; guarded by Connections
        self._settings = settings
        self._keeper = keeper
        self._names = names
        self._tls = tls

    def enter(self, user: Patience, nbytes: int) -> tuple[Connection, int] | None:
        """Through the gate and a kept connection in one step, and what `leave` takes back; None: not in one step."""
        if self.has_many_paths:
            return None
        with self.lock:
            idle = self.idle[self.path_names[0]]
            if not idle:
                return None
            charge = self.gate.try_enter_locked(nbytes)
            if not charge:
                return None
            connection = idle.pop()
            self.busy[connection] = user
        connection.was_idle = True
        return connection, charge

    def leave(self, connection: Connection, charge: int) -> None:
        """`give_back`, and out of the gate, in one step."""
        with self.lock:
            is_kept = self._keep(connection)
            self.gate.leave_locked(charge)
        if self.gate.num_waiting:
            self.gate.let_in()
        if not is_kept:
            connection.close()
            self.look_whether_lost()

    def num_streams(self, nbytes: int) -> int:
        """How many connections a pull over the only path is worth, by what was measured."""
        with self.lock:
            return self.paths.num_streams(self.path_names[0], nbytes)

    def measured_one_stream(self, nbytes: int, seconds: float) -> None:
        """A pull over the only path used one connection, for so long."""
        with self.lock:
            self.paths.measured(self.path_names[0], nbytes, num_streams=1, seconds=seconds)

    def take_idle(self, path: str, user: Patience) -> Connection | None:
        """A kept connection of this path, the one used last; None where there is none."""
        with self.lock:
            idle = self.idle[path]
            if not idle:
                return None
            connection = idle.pop()
            self.busy[connection] = user
        connection.was_idle = True
        return connection

    def take_any(self, user: Patience) -> Connection | None:
        """A kept connection of the least busy path that has one; None where none has."""
        if not self.has_many_paths:
            return self.take_idle(self.path_names[0], user)
        with self.lock:
            paths = self._by_business()
        for path in paths:
            connection = self.take_idle(path, user)
            if connection is not None:
                return connection
        return None

    def connect_any(self, user: Patience) -> Connection:
        """A new connection of the least busy path that can be reached; raises what `connect` does, of the last one."""
        tried: set[str] = set()
        while True:
            with self.lock:
                now_s = time.monotonic()
                paths = self._by_business() + [path.name for path in self.paths.due(now_s)]
                path = next((path for path in paths if path not in tried), self.path_names[-1])
            try:
                return self.connect(path, user)
            except PeerLost:
                if path in tried or not self.has_many_paths:
                    raise
                tried.add(path)

    def has_other_way(self, path: str) -> bool:
        """Whether another path than this one lives."""
        with self.lock:
            return any(other.name != path for other in self.paths.alive())

    def has_room(self) -> bool:
        """Whether one more connection may be opened beside those in use."""
        with self.lock:
            return len(self.busy) + len(self.pinged) < self._settings.max_connections_to_peer

    def connect(self, path: str, user: Patience, *, is_due: bool = False) -> Connection:
        """A new connection of this path; closes the one that was idle longest where there are too many.

        Args:
            path: its name.
            user: whose it becomes, and who waits for it.
            is_due: it was said already that this path is to be tried.

        Raises:
            PeerLost: also at once, while the path is left alone after a failure. What `dial` raises.
            TransportUnavailable: this process is out of descriptors.
        """
        now_s = time.monotonic()
        with self.lock:
            if not is_due:
                self._check_path(path, now_s)
            chosen = self.paths.path(path)
            self.num_open += 1
            surplus = self._surplus()
        if surplus is not None:
            surplus.close()
        connection = None
        try:
            self._keeper.check_open()
            connection = dial(
                chosen,
                self._settings,
                _Until(user, now_s + self._settings.connect_timeout_s, self.peer),
                peer=self.peer,
                names=self._names,
                tls=self._tls,
            )
            with self.lock:
                self.busy[connection] = user
                self.paths.reached(path)
                self.is_reached = True
            self._keeper.watch(connection, self)
        except BaseException as error:
            with self.lock:
                self.num_open -= 1
                if isinstance(error, PeerLost):
                    self.paths.failed(path, time.monotonic())
                if connection is not None:
                    self.busy.pop(connection, None)
            if connection is not None:
                connection.close()
            self.look_whether_lost()
            if isinstance(error, OSError):  # what the peer did is PeerLost already
                raise TransportUnavailable(
                    f"no connection to {self.peer} can be opened here: {error.strerror or error}",
                    hint="raise this process's limit of open files",
                ) from error
            raise
        return connection

    def give_back(self, connection: Connection) -> None:
        """Its transfer has ended: keeps it where it can serve another one, else closes it."""
        with self.lock:
            is_kept = self._keep(connection)
        if not is_kept:
            connection.close()
            self.look_whether_lost()

    def discard(self, connection: Connection) -> None:
        """Its transfer failed: nothing of it may land any more."""
        connection.is_reusable = False
        self.give_back(connection)

    def abandon(self, connection: Connection, at_end: Callable[[], None]) -> None:
        """A push failed half-way: says so, and calls `at_end` once the owner has ended the connection too."""
        connection.is_reusable = False
        connection.end_sending()
        # Watched first: as soon as it is drained it is the keeper's, who may close it.
        is_watched = self._keeper.watch_end(connection)
        with self.lock:
            del self.busy[connection]
            if is_watched and not self._keeper.closed:
                until_s = time.monotonic() + self._settings.pong_timeout_s
                self.draining[connection.fd] = (connection, until_s, at_end)
                return
            self.num_open -= 1
        connection.close()

    def interrupt(self, affects: Callable[[Patience], bool]) -> None:
        """Ends the transfers under way that `affects` names."""
        with self.lock:
            for connection, user in self.busy.items():
                if affects(user):
                    connection.interrupt()

    def quarantine_of(self, capability: bytes) -> Quarantine:
        """What abandoned pushes may still write under a grant, however often it is attached."""
        with self.lock:
            return self._quarantines.setdefault(capability, Quarantine())

    def failed(self, path: str) -> None:
        """A connection of this path broke though it was new, or its owner is silent."""
        with self.lock:
            self.paths.failed(path, time.monotonic())

    def count_lost(self) -> None:
        """The owner is gone, or silent: counted once until it is reached again."""
        with self.lock:
            is_news, self.is_reached = self.is_reached, False
        if is_news:
            self._keeper.count_peer_lost()

    def look_whether_lost(self, *, broke: bool = False) -> None:
        """Where no connection is open and no path lives, the owner is gone; where the last one `broke`, at once."""
        with self.lock:
            is_lost = not self.num_open and (broke or not self.paths.alive())
        if is_lost:
            self.count_lost()

    def all_idle(self) -> Iterator[Connection]:
        """Guarded by `lock`."""
        for connections in self.idle.values():
            yield from connections

    def remove_idle(self, connection: Connection) -> bool:
        """Guarded by `lock`; False where somebody has it."""
        idle = self.idle[connection.path.name]
        if connection not in idle:
            return False
        idle.remove(connection)
        return True

    def _keep(self, connection: Connection) -> bool:
        """Guarded by `lock`; whether it was put into the pool."""
        self.busy.pop(connection, None)
        if not connection.is_reusable or connection.hung_up or self._keeper.closed:
            self.num_open -= 1
            return False
        connection.idle_since_s = connection.spoke_at_s = time.monotonic()
        self.put_idle(connection)
        return True

    def put_idle(self, connection: Connection) -> None:
        """Guarded by `lock`: the oldest is taken first, for the kernel has measured how much it can take."""
        bisect.insort(
            self.idle[connection.path.name], connection, key=lambda each: -each.opened_at_s
        )

    def _by_business(self) -> list[str]:
        """Guarded by `lock`: living paths, the one first that would be through first."""
        first = self.paths.least_busy()
        names = [] if first is None else [first.name]
        return names + [path.name for path in self.paths.alive() if path.name not in names]

    def _check_path(self, path: str, now_s: float) -> None:
        if self.paths.is_alive(path):
            return
        if any(due.name == path for due in self.paths.due(now_s)):
            self.paths.tried(path, now_s)
            return
        row = next(row for row in self.paths.statistics(now_s) if row.name == path)
        raise PeerLost(
            f"{self.peer} could not be reached {row.num_failures} times",
            hint=f"it is tried again in {row.retry_in_s:.1f} s",
            retry_after_s=row.retry_in_s,
        )

    def _surplus(self) -> Connection | None:
        if self.num_open <= self._settings.max_connections_to_peer:
            return None
        oldest = min(self.all_idle(), key=lambda each: each.idle_since_s, default=None)
        if oldest is not None:
            self.remove_idle(oldest)
            self.num_open -= 1
        return oldest


class Connections:
    """Links to all owners that somebody attached to, by where they are reached."""

    def __init__(self, settings: TcpSettings, paths_to: PathsTo | None = None) -> None:
        """No link yet, no thread; `paths_to` says which ways there are to an owner."""
        self._settings = settings
        self._paths_to = paths_to or TcpRoutes(settings.local_addresses)
        self._links: dict[Reachability, Link] = {}
        self._names = Names()
        self._lock = threading.Lock()
        self._tls = None if settings.tls is None else settings.tls.reader_context()
        self.keeper = Keeper(settings, self.links)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.keeper.closed

    def links(self) -> list[Link]:
        """All of them, as of now."""
        with self._lock:
            return list(self._links.values())

    def link(self, reachability: Reachability) -> Link:
        """The way to this owner, for one more user; `release` it."""
        with self._lock:
            for known in [link for link in self._links.values() if not _is_needed(link)]:
                del self._links[known.reachability]
            link = self._links.get(reachability)
            if link is None:
                paths = self._paths_to(reachability)
                if not paths:
                    raise PeerLost(
                        f"no address of tcp://{reachability.addresses[0]} can be reached from here"
                    )
                link = Link(
                    reachability, paths, self._settings, self.keeper, self._names, tls=self._tls
                )
                self._links[reachability] = link
            link.num_users += 1
            return link

    def release(self, link: Link) -> None:
        """One user less; connections stay for the next one until they are too old."""
        with self._lock:
            link.num_users -= 1

    @property
    def num_open(self) -> int:
        """Connections, idle and in use."""
        return sum(link.num_open for link in self.links())

    def close(self) -> None:
        """Ends all connections; waits a second for transfers of other threads to let go of theirs. Idempotent."""
        self.keeper.close()
        deadline_s = time.monotonic() + _CLOSE_S
        for link in self.links():
            with link.lock:
                idle = list(link.all_idle())
                for connections in link.idle.values():
                    connections.clear()
                idle += [connection for connection, _ in link.pinged.values()]
                idle += [connection for connection, _, _ in link.draining.values()]
                link.pinged.clear()
                link.draining.clear()
                link.num_open -= len(idle)
            for connection in idle:
                connection.close()
            link.interrupt(lambda _user: True)
        me = threading.get_ident()
        while any(
            getattr(user, "thread_ident", me) != me
            for link in self.links()
            for user in list(link.busy.values())
        ):
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.001)


class _Until:
    """Somebody's patience, but not beyond a time of its own."""

    def __init__(self, user: Patience, until_s: float, peer: str) -> None:
        self._user = user
        self._until_s = until_s
        self._peer = peer

    def check(self) -> float:
        remaining_s = self._user.check()
        own_s = self._until_s - time.monotonic()
        if own_s <= 0:
            raise PeerLost(f"{self._peer} does not answer", hint="it may be stopped, or cut off")
        return min(remaining_s, own_s)


def _is_needed(link: Link) -> bool:
    return bool(link.num_users or link.num_open or link.gate.num_inside)

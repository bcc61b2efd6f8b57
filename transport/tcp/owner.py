"""The owner's side of `tcp`: listens, lets readers in, deals them to the serving threads.

Rules kept here: a peer is answered where it is known to be unwelcome; no error of `accept` ends the listening; when
`close` has returned there is no thread, no descriptor and no grant left.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import math
import socket
import time
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Address, Reachability
from snowskin.transport.errors import PeerBusy, TransportUnavailable
from snowskin.transport.frames import encode, fail_of
from snowskin.transport.tcp.admission import RETRY_AFTER_S, Admission
from snowskin.transport.tcp.egress import leaves_by_hardware
from snowskin.transport.tcp.serving import ServedConnection
from snowskin.transport.tcp.serving_loop import Link, ServingLoop
from snowskin.transport.tcp.sockets import check_options, set_options, set_options_for_peer
from snowskin.transport.tcp.streams import TlsStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.grants import GrantTable
    from snowskin.transport.tcp.serving import Ledger
    from snowskin.transport.tcp.settings import TcpSettings
    from snowskin.transport.tcp.streams import Stream

ACCEPTS_A_TURN = 64
PAUSE_S = 0.1  # of listening, when this process or this host is out of something that nobody here can give
ROOM_AT_ONCE = 16  # connections dropped then
WARN_EVERY_S = 10.0
_OUT_OF_SOMETHING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger("snowskin.transport.tcp")


class TcpOwner:
    """Serves what is in a grant table to readers that connect; listens from construction to `close`.

    Attributes:
        reachability: where peers find it, for descriptors.
    """

    def __init__(
        self,
        grants: GrantTable,
        settings: TcpSettings,
        ledger: Ledger,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Binds all addresses and starts the threads.

        Raises:
            TransportUnavailable: an address cannot be bound, or TLS's files do not fit; nothing is left behind.
        """
        self._grants = grants
        self._settings = settings
        self._ledger = ledger
        self._now_s = now_s
        self._warn_at_s = -math.inf
        check_options(settings)
        self._tls = settings.tls.owner_context() if settings.tls is not None else None
        self._admission: Admission[Link] = Admission(
            most=settings.max_connections,
            most_per_peer=settings.max_connections_per_peer,
            is_busy=lambda link: link.is_busy,
        )
        self._loops: list[ServingLoop] = []
        with contextlib.ExitStack() as undo:
            bound = []
            for address in settings.listen:
                listener = _listen(address, settings)
                undo.callback(listener.close)
                bound.append((address, listener))
            self.reachability = _reachability(bound, settings)
            for index in range(settings.num_serving_threads):
                loop = ServingLoop(f"snowskin-tcp-owner-{index}", self._admission, now_s=now_s)
                undo.callback(loop.close)
                self._loops.append(loop)
            for _, listener in bound:
                self._loops[0].listen(listener, self._accept)
            self._next_loop = itertools.cycle(self._loops)
            for loop in self._loops:
                loop.start()
            undo.pop_all()

    @property
    def num_connections(self) -> int:
        """Connections of readers that are open now."""
        return len(self._admission)

    @property
    def num_errors(self) -> int:
        """Exceptions that were bugs, of ours or of an `on_done`."""
        return sum(loop.num_errors for loop in self._loops)

    def close(self) -> None:
        """Ends all connections, waits for the threads, revokes all grants. Idempotent."""
        for loop in self._loops:
            loop.close()
        self._grants.close()

    def _accept(self, listener: socket.socket) -> None:
        """Lets in who waits at a listener; on the first loop's thread."""
        for _ in range(ACCEPTS_A_TURN):
            try:
                plain, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_SOMETHING:
                    self._make_room(listener, error)
                    return
                continue  # that one has gone again
            self._let_in(plain, str(address[0]))

    def _let_in(self, plain: socket.socket, host: str) -> None:
        try:
            plain.setblocking(False)
            set_options_for_peer(plain, self._settings)
            stream: Stream = plain if self._tls is None else TlsStream(plain, self._tls)
        except (OSError, TransportUnavailable):  # gone again
            plain.close()
            return
        served = ServedConnection(
            self._grants,
            self._settings,
            self._ledger,
            peer=host,
            now_s=self._now_s(),
            may_lend=functools.partial(self._may_lend, host),
        )
        loop = next(self._next_loop)
        link = Link(stream, served, loop, holds_bytes=self._tls is not None)
        try:
            leaving = self._admission.enter(link, host)
        except PeerBusy as error:
            self._ledger.count_refused(error.reason)
            if self._tls is None:
                with contextlib.suppress(OSError):
                    stream.send(encode(fail_of(0, error)))
            stream.close()
            return
        if leaving is not None:
            self._dismiss(leaving, f"{host} needed the place of a connection that moved nothing")
        if not loop.call(functools.partial(loop.adopt, link)):
            stream.close()

    def _may_lend(self, host: str) -> bool:
        """Whether a peer may be sent pages by reference: with TLS there are none, and of `egress.py` is why."""
        if self._tls is not None:
            return False
        return self._settings.lend_to_this_host or leaves_by_hardware(host)

    def _dismiss(self, link: Link, why: str) -> None:
        error = PeerBusy(why, hint="connect again", retry_after_s=RETRY_AFTER_S)
        link.loop.call(functools.partial(link.loop.drop, link, error))

    def _make_room(self, listener: socket.socket, error: OSError) -> None:
        """This process or host is out of descriptors or memory: those who only wait make room."""
        now_s = self._now_s()
        if now_s >= self._warn_at_s:
            self._warn_at_s = now_s + WARN_EVERY_S
            _log.warning("cannot accept", extra={"error": str(error), "open": self.num_connections})
        for num_dropped in range(ROOM_AT_ONCE):
            leaving = self._admission.make_room()
            if leaving is None:
                if not num_dropped:
                    self._loops[0].pause(listener, PAUSE_S)
                return
            self._dismiss(leaving, f"the owner is out of room: {error}")


def _listen(address: Address, settings: TcpSettings) -> socket.socket:
    """A non-blocking listener whose connections inherit all options."""
    listener = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # 0.0.0.0 and :: may be listened on side by side
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        set_options(listener, settings)
        listener.bind(where)
        listener.listen(settings.backlog)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise TransportUnavailable(
            f"tcp: cannot listen on {address}: {error}", hint="see `listen` in the settings"
        ) from error
    return listener


def _reachability(
    bound: list[tuple[Address, socket.socket]], settings: TcpSettings
) -> Reachability:
    addresses = [
        Address(told.host, told.port or int(bound[min(index, len(bound) - 1)][1].getsockname()[1]))
        for index, told in enumerate(settings.advertise or settings.listen)
    ]
    return Reachability(addresses=tuple(addresses), tls=settings.tls is not None)

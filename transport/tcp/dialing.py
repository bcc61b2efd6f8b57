"""How a reader reaches an owner: connects, by TLS where asked, and shakes hands.

Rules kept here: whoever waits is asked at least each `WAIT_S` whether it still does; what cannot be reached is
PeerLost, and names the peer; a connection that was not made leaves no descriptor behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from typing import TYPE_CHECKING

from snowskin.transport.addresses import Address
from snowskin.transport.errors import PeerLost
from snowskin.transport.tcp.connection import NOTHING_YET, WAIT_S, Connection
from snowskin.transport.tcp.sockets import open_window, set_options, set_options_for_peer

if TYPE_CHECKING:
    import ssl

    from snowskin.transport.paths import Path
    from snowskin.transport.tcp.names import Names, Patience
    from snowskin.transport.tcp.settings import TcpSettings


def dial(
    path: Path,
    settings: TcpSettings,
    patience: Patience,
    *,
    peer: str,
    names: Names,
    tls: ssl.SSLContext | None,
) -> Connection:
    """Connects and shakes hands, within `patience`.

    Raises:
        PeerLost: it cannot be reached. BadFrame: somebody else is there. PeerBusy. What `patience` raises.
    """
    address = Address.parse(path.remote_address)
    connected = _connected(address, path, settings, patience, peer=peer, names=names)
    connection = None
    try:
        if tls is not None:
            connected = _wrapped(connected, address, settings, patience, peer=peer, tls=tls)
        connection = Connection(connected, peer=peer, path=path, spin_s=settings.spin_s)
        for _ in connection.greet(settings):
            connection.wait_at_most(patience.check())
    except BaseException:
        connected.close()
        raise
    return connection


def _connected(
    address: Address,
    path: Path,
    settings: TcpSettings,
    patience: Patience,
    *,
    peer: str,
    names: Names,
) -> socket.socket:
    """The first of the host's addresses that answers, of the family of ours where one is chosen."""
    try:
        found = names.find(address, patience)
    except OSError as error:
        raise PeerLost(f"{peer}: no host is called {address.host}: {error.strerror}") from error
    if path.local_address:
        ours = socket.AF_INET6 if ":" in path.local_address else socket.AF_INET
        found = tuple(row for row in found if row[0] == ours)
    failure = OSError(
        errno.EADDRNOTAVAIL, f"it has no address of the family of {path.local_address}"
    )
    for its_family, target in found:
        made = socket.socket(its_family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            set_options(made, settings)
            _bind(made, path)
            _connect(made, target, patience)
            set_options_for_peer(made, settings)
            open_window(made)
        except OSError as error:
            made.close()
            failure = error
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise PeerLost(
        f"{peer} cannot be reached at {address}: {failure.strerror}",
        hint="is it alive, and is its advertised address reachable from here?",
    ) from failure


def _bind(made: socket.socket, path: Path) -> None:
    """To the path's address and NIC; OSError where this host has not got them (any more)."""
    if path.local_device:
        # Without the right to, the address alone decides: the kernel's routes then choose the NIC.
        with contextlib.suppress(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, path.local_device.encode())
    if path.local_address:
        made.bind((path.local_address, 0))


def _connect(made: socket.socket, target: tuple[object, ...], patience: Patience) -> None:
    """Raises OSError where nobody listens there."""
    made.setblocking(False)
    code = made.connect_ex(target)
    if code == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(made, select.POLLOUT)
        while not poll.poll(1000 * min(WAIT_S, max(patience.check(), 0.001))):
            pass
        code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    made.setblocking(True)


def _wrapped(
    connected: socket.socket,
    address: Address,
    settings: TcpSettings,
    patience: Patience,
    *,
    peer: str,
    tls: ssl.SSLContext,
) -> ssl.SSLSocket:
    name = settings.tls.server_name if settings.tls is not None else ""
    wrapped = tls.wrap_socket(
        connected, server_hostname=name or address.host, do_handshake_on_connect=False
    )
    try:
        while True:
            wrapped.settimeout(min(WAIT_S, max(patience.check(), 0.001)))
            try:
                wrapped.do_handshake()
            except TimeoutError as error:
                if error.errno not in NOTHING_YET:
                    raise
            else:
                return wrapped
    except OSError as error:
        wrapped.close()
        raise PeerLost(
            f"{peer}: no TLS with {address}: {error.strerror or error}",
            hint="both sides need certificates of one authority, and the owner's must name its host",
        ) from error
    except BaseException:
        wrapped.close()
        raise

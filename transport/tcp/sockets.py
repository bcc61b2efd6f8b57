"""What is set on a TCP socket, on both sides.

Rules kept here: small frames do not wait for more; peers that are gone are noticed by the kernel, whether it waits or
sends (TCP_USER_TIMEOUT bounds what is unacknowledged, keepalive bounds silence); what goes to this same host is not
paced; who waits for payload opens its receive window before it comes.

Some kernels pace by default (bbr): over loopback, where there is nothing to share, that halves the rate. Measured there
for 16 MiB: 1.7 times faster without, with a quarter less CPU. Reno is in every kernel, and everybody may choose it.

A new connection takes 64 KiB ahead, and the kernel opens that window only as fast as the reader reads. Measured over
loopback, 16 MiB a pull: the first came at an eighth of the later rate, and it took ten to get there; with the window
open from the start, the first comes at two thirds, the second at all of it. Pushes need no help.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportUnavailable

if TYPE_CHECKING:
    from snowskin.transport.tcp.settings import TcpSettings

WINDOW_NBYTES = 4 << 20
"""What a peer may send ahead: the most that kernels keep to send (tcp_wmem), and 100 Gb/s for 0.3 ms."""

_TCP = socket.IPPROTO_TCP


def set_options(stream: socket.socket, settings: TcpSettings) -> None:
    """What does not depend on the peer; connections inherit it from their listener."""
    stream.setsockopt(_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(_TCP, socket.TCP_KEEPIDLE, settings.keepalive_idle_s)
    stream.setsockopt(_TCP, socket.TCP_KEEPINTVL, settings.keepalive_interval_s)
    stream.setsockopt(_TCP, socket.TCP_KEEPCNT, settings.keepalive_count)
    stream.setsockopt(_TCP, socket.TCP_USER_TIMEOUT, round(1000 * settings.user_timeout_s))
    if settings.send_buffer_nbytes:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_nbytes)
    if settings.receive_buffer_nbytes:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, settings.receive_buffer_nbytes)
    if settings.congestion_control:
        _choose(stream, settings.congestion_control)


def set_options_for_peer(stream: socket.socket, settings: TcpSettings) -> None:
    """What depends on where the peer is; for a connected socket, on the side that sends the payload."""
    if settings.local_congestion_control and is_on_this_host(stream):
        _choose(stream, settings.local_congestion_control)


def open_window(stream: socket.socket) -> None:
    """Lets the peer of a connected socket send `WINDOW_NBYTES` ahead from the first payload on.

    A low-water mark has the kernel make room for so much, at most half of the largest tcp_rmem, and leaves it free to
    tune further; SO_RCVBUF would not, and rmem_max, often 208 KiB, would cap it. Where SO_RCVBUF was set, that stays.
    """
    with contextlib.suppress(OSError):  # a window as it was is no reason to fail
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WINDOW_NBYTES)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def is_on_this_host(stream: socket.socket) -> bool:
    """Whether a connected socket's peer surely is; False for one in another network namespace of this host."""
    try:
        here, there = stream.getsockname()[0], stream.getpeername()[0]
    except OSError:  # gone again, as its user will find
        return False
    return bool(here == there or there.startswith("127."))


def check_options(settings: TcpSettings) -> None:
    """Raises TransportUnavailable where this kernel, or this user, does not have what the settings choose."""
    with socket.socket() as probe:
        set_options(probe, settings)
        if settings.local_congestion_control:
            _choose(probe, settings.local_congestion_control)


def _choose(stream: socket.socket, name: str) -> None:
    try:
        stream.setsockopt(_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as error:
        raise TransportUnavailable(
            f"tcp: this kernel, or this user, has no congestion control {name!r}: {error}",
            hint="see net.ipv4.tcp_allowed_congestion_control",
        ) from error

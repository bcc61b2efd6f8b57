"""What is set on a TCP socket."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.runs import Run
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.sockets import WINDOW_NBYTES, open_window
from snowskin.transport.tcp.transport import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def connected() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as made,
    ):
        yield made


def receive_buffer(stream: socket.socket) -> int:
    return stream.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def widest() -> int:
    """What the kernel grants for the asking: it counts twice, and at most what tcp_rmem says."""
    limits = Path("/proc/sys/net/ipv4/tcp_rmem")
    if not limits.exists():
        pytest.skip("a network stack that is not Linux's")
    return min(2 * WINDOW_NBYTES, int(limits.read_text().split()[2]) // 2 * 2)


def test_an_open_window_takes_much_ahead_and_wakes_for_a_byte(connected: socket.socket) -> None:
    if receive_buffer(connected) >= widest():
        pytest.skip("this kernel's windows are as wide from the start")
    open_window(connected)
    assert receive_buffer(connected) >= widest()
    assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


def test_a_buffer_that_was_chosen_stays_as_it_is(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    before = receive_buffer(connected)
    open_window(connected)
    assert receive_buffer(connected) == before


def test_a_readers_first_transfer_finds_its_window_open() -> None:
    source, target = np.ones(4096, np.uint8), np.zeros(4096, np.uint8)
    settings = TcpSettings(listen=(Address("127.0.0.1", 0),))
    with closing(TcpTransport(settings)) as owner, closing(TcpTransport()) as reader:
        remote = reader.attach(owner.describe(owner.register(source)))
        run = Run(0, 0, target.nbytes)
        reader.pull(remote, reader.register(target), [run], deadline_s=time.monotonic() + 5)
        (connection,) = (each for idle in remote.link.idle.values() for each in idle)
        assert receive_buffer(connection._socket) >= widest()

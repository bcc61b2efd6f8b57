"""The kernel's count of what a connection carried."""

from __future__ import annotations

import socket

import pytest

from tests.support.tcp_bytes import is_counted, since, tcp_nbytes

pytestmark = pytest.mark.skipif(not is_counted(), reason="this kernel has no tcp_diag")

NUM_SENT = 123_457
NUM_ANSWERED = 1_009
# The kernel counts the SYN of the side that opens as a byte acknowledged.
SLACK_NBYTES = 2


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
    with client, server:
        yield client, server, port


def send(sender: socket.socket, receiver: socket.socket, num_bytes: int) -> None:
    sender.sendall(bytes(num_bytes))
    left = num_bytes
    while left:
        left -= len(receiver.recv(left))


def test_bytes_of_both_directions_are_counted_at_the_servers_port_alone(connection):
    client, server, port = connection
    before = tcp_nbytes({port})
    assert len(before) == 1
    send(client, server, NUM_SENT)
    send(server, client, NUM_ANSWERED)
    send(client, server, 1)  # acknowledges what came before it
    counted = since(before, tcp_nbytes({port}))
    assert 0 <= counted - (NUM_SENT + NUM_ANSWERED + 1) <= SLACK_NBYTES
    assert tcp_nbytes({port + 1 if port < 65_535 else 1}) == {}


def test_a_connection_that_ended_is_not_taken_for_silence(connection):
    client, server, port = connection
    before = tcp_nbytes({port})
    client.close()
    server.close()
    with pytest.raises(AssertionError, match="a connection ended"):
        since(before, tcp_nbytes({port}))

"""Ports that servers can come back to."""

from __future__ import annotations

import socket

import pytest

from snowskin.tools.cluster.ports import candidate_ports, ephemeral_range, pick_port


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (32768, 60999, range(10240, 32768)),
        (16000, 65535, range(10240, 16000)),
        (1024, 32767, range(32768, 65536)),
        (0, -1, range(10240, 65536)),
        (1024, 65535, range(10240, 65536)),
    ],
)
def test_candidates_lie_outside_of_the_ephemeral_range_where_there_is_room(low, high, expected):
    assert candidate_ports(low, high) == expected


@pytest.mark.parametrize("text", ["", "12", "a b", "1 2 3"])
def test_an_unreadable_ephemeral_range_is_empty(text):
    assert ephemeral_range(text) == (0, -1)


def test_a_picked_port_is_free_and_a_taken_preference_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        preferred = taken.getsockname()[1]
        port = pick_port("127.0.0.1", preferred=preferred)
    assert port != preferred
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", port))


def test_a_free_preference_is_taken():
    port = pick_port("127.0.0.1")
    assert pick_port("127.0.0.1", preferred=port) == port

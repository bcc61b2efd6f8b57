"""Settings of `tcp` that cannot work are refused when they are made."""

from __future__ import annotations

import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.tcp.settings import TcpSettings, TlsFiles

HERE = Address("192.0.2.1", 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"listen": (Address("0.0.0.0", 0),)},
        {"listen": (Address("::", 0),)},
        {"listen": (Address("", 0),)},
        {"listen": (HERE,), "advertise": (Address("0.0.0.0", 5),)},
        {"advertise": (Address("node-7", 4711),)},
        {"listen": (HERE,) * 17},
        {"chunk_nbytes": 0},
        {"chunk_nbytes": (16 << 20) + 1},
        {"max_ranges": 4097},
        {"max_connections": -1},
        {"frame_timeout_s": 0.0},
        {"hello_timeout_s": float("nan")},
        {"idle_timeout_s": float("inf")},
        {"epoch": 1 << 64},
        {"name": "n" * 129},
    ],
)
def test_what_cannot_work_is_refused(fields):
    with pytest.raises(TransportUnavailable):
        TcpSettings(**fields)


def test_what_is_bound_everywhere_can_be_advertised_somewhere():
    made = TcpSettings(listen=(Address("0.0.0.0", 0),), advertise=(Address("node-7", 0),))
    assert made.advertise == (Address("node-7", 0),)


def test_zero_means_no_limit_or_the_kernels_choice_where_it_is_said_so():
    TcpSettings(epoch=0, idle_timeout_s=0, send_buffer_nbytes=0, receive_buffer_nbytes=0)


def test_files_that_are_not_there_are_refused_by_name():
    files = TlsFiles(certificate="/nowhere/c.pem", key="/nowhere/k.pem", authority="/nowhere/a.pem")
    for make in (files.owner_context, files.reader_context):
        with pytest.raises(TransportUnavailable, match=r"/nowhere/c\.pem"):
            make()

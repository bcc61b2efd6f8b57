"""What an engine tells the conductor to connect to."""

from __future__ import annotations

import socket

import pytest

from snowskin.engines.registration import told_host


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    def resolve(name, _port):
        if name != "box":
            raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_who_listens_on_one_address_is_found_there():
    assert told_host("127.0.0.1") == "127.0.0.1"
    assert told_host("prefill") == "prefill"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_on_all_addresses_is_found_by_the_hosts_name(host):
    assert told_host(host) == "box"


def test_a_name_without_an_address_is_not_told(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere")
    assert told_host("0.0.0.0") == "0.0.0.0"


def test_what_is_said_plainly_wins():
    assert told_host("0.0.0.0", advertise_host="front") == "front"
    assert told_host("10.0.0.1", advertise_host="front") == "front"

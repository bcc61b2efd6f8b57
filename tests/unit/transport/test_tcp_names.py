"""Names of hosts are looked up within the patience of who asks."""

from __future__ import annotations

import socket
import threading

import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.errors import TransferTimedOut
from snowskin.transport.tcp.names import Names

NAME = Address("owner.example", 4711)
WITHIN_S = 5.0


class Looks:
    """Patience for so many looks."""

    def __init__(self, num: int) -> None:
        self.num = num

    def check(self) -> float:
        self.num -= 1
        if self.num < 0:
            raise TransferTimedOut("too late")
        return 0.001


class Resolver:
    """Answers when it is let; in place of the system's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()
        self.error: OSError | None = None
        real = socket.getaddrinfo

        def look_up(host: str, port: int, **options: int) -> list[object]:
            if options.get("flags"):
                return real(host, port, **options)  # type: ignore[return-value]
            self.asked.append(host)
            assert self.go.wait(WITHIN_S)
            if self.error is not None:
                raise self.error
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", port))]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    return Resolver(monkeypatch)


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_numbers_ask_nobody(resolver: Resolver, host: str, family: int) -> None:
    found = Names().find(Address(host, 80), Looks(0))
    assert [(row[0], row[1][:2]) for row in found] == [(family, (host, 80))]
    assert not resolver.asked


def test_a_name_is_asked_for_once_and_remembered(resolver: Resolver) -> None:
    names = Names()
    resolver.go.set()
    for _ in range(2):
        found = names.find(NAME, Looks(1000))
        assert found == ((socket.AF_INET, ("192.0.2.7", 4711)),)
    assert resolver.asked == ["owner.example"]


def test_who_loses_patience_is_let_go_and_the_next_waits_for_the_same_answer(
    resolver: Resolver,
) -> None:
    names = Names()
    with pytest.raises(TransferTimedOut):
        names.find(NAME, Looks(2))
    with pytest.raises(TransferTimedOut):
        names.find(NAME, Looks(2))
    resolver.go.set()
    assert names.find(NAME, Looks(1000))
    assert resolver.asked == ["owner.example"]


def test_a_failure_is_told_and_not_remembered(resolver: Resolver) -> None:
    names = Names()
    resolver.go.set()
    resolver.error = socket.gaierror(socket.EAI_AGAIN, "later")
    with pytest.raises(OSError, match="later"):
        names.find(NAME, Looks(1000))
    resolver.error = None
    assert names.find(NAME, Looks(1000))
    assert len(resolver.asked) == 2


@pytest.mark.parametrize("host", ["a" * 64, "owner..example", "fe80::1%" + "a" * 64])
def test_what_cannot_be_a_name_is_known_by_nobody_at_once(host: str) -> None:
    with pytest.raises(OSError, match="no host's name"):
        Names().find(Address(host, 4711), Looks(20))

"""Host names looked up without waiting longer than who asks wants to.

Rules kept here: addresses written as numbers ask nobody; a name is looked up by one thread at a time, whoever and
however many wait for it; what was found is remembered for a while, a failure is not.

The system's resolver cannot be interrupted: a thread that it keeps outlives the transport, for as long as the
resolver's own time limit, and does nothing any more. It is the only thread here that nobody joins.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from snowskin.transport.addresses import Address

REMEMBER_S = 30.0
LOOK_S = 0.05

Found = tuple[tuple[int, tuple[object, ...]], ...]
"""Socket families and the addresses to connect to, in the resolver's order."""


class Patience(Protocol):
    """Who waits: it can lose patience."""

    def check(self) -> float:
        """How many more seconds it waits; raises what ends its waiting."""


class _Lookup:
    """One question to the resolver."""

    def __init__(self, address: Address) -> None:
        """Asks at once."""
        self.found: Found = ()
        self.error: OSError | None = None
        self.ended_at_s = 0.0
        self.ended = threading.Event()
        self._address = address
        threading.Thread(target=self._run, name="snowskin-tcp-lookup", daemon=True).start()

    def is_of_use(self, now_s: float) -> bool:
        """Whether it is worth waiting for, or remembering."""
        if not self.ended.is_set():
            return True
        return self.error is None and now_s - self.ended_at_s < REMEMBER_S

    def _run(self) -> None:
        try:
            self.found = _looked_up(self._address, flags=0)
        except OSError as error:
            self.error = error
        self.ended_at_s = time.monotonic()
        self.ended.set()


class Names:
    """What hosts are called."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._lookups: dict[Address, _Lookup] = {}
        self._lock = threading.Lock()

    def find(self, address: Address, patience: Patience) -> Found:
        """Where this host is; OSError where nobody knows, and what `patience` raises."""
        if _is_number(address.host):
            return _looked_up(address, flags=socket.AI_NUMERICHOST)
        with self._lock:
            now_s = time.monotonic()
            self._lookups = {
                name: lookup for name, lookup in self._lookups.items() if lookup.is_of_use(now_s)
            }
            lookup = self._lookups.get(address)
            if lookup is None:
                lookup = self._lookups[address] = _Lookup(address)
        while not lookup.ended.wait(min(LOOK_S, max(patience.check(), 0.001))):
            pass
        if lookup.error is not None:
            raise lookup.error
        return lookup.found


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _looked_up(address: Address, *, flags: int) -> Found:
    try:
        rows = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        # A label that is empty or longer than 63: no host can be called so.
        raise socket.gaierror(socket.EAI_NONAME, "this is no host's name") from error
    return tuple((int(family), tuple(target)) for family, _, _, _, target in rows)

"""Who may stay when an owner is full: a bound on connections in all, and one for each address.

Rules kept here: whoever comes to a full house takes the place of the oldest guest who never completed a transfer and
has none under way; where all have, the newcomer is refused. So idle connections, however many, keep no reader out,
and readers at work are never dropped for newcomers.

Methods may be called from any thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from snowskin.transport.errors import PeerBusy

if TYPE_CHECKING:
    from collections.abc import Callable

Guest = TypeVar("Guest")
RETRY_AFTER_S = 1.0


class _Guests(Generic[Guest]):
    """How many there are, and those without merit, the oldest first."""

    __slots__ = ("num", "unproven")

    def __init__(self) -> None:
        self.num = 0
        self.unproven: dict[Guest, None] = {}


class Admission(Generic[Guest]):
    """The guests of one owner, by the address that they came from."""

    def __init__(self, *, most: int, most_per_peer: int, is_busy: Callable[[Guest], bool]) -> None:
        """`is_busy` says whether a guest has a transfer under way."""
        self._most = most
        self._most_per_peer = most_per_peer
        self._is_busy = is_busy
        self._all: _Guests[Guest] = _Guests()
        self._by_peer: dict[str, _Guests[Guest]] = {}
        self._peers: dict[Guest, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many guests there are."""
        return self._all.num

    def enter(self, guest: Guest, peer: str) -> Guest | None:
        """Lets a guest in; returns who has to go for it, and is none any more.

        Raises:
            PeerBusy: the house is full of readers at work.
        """
        with self._lock:
            of_peer = self._by_peer.get(peer) or _Guests()
            leaving = None
            if of_peer.num >= self._most_per_peer:
                leaving = self._dispensable(of_peer, f"from {peer}")
            elif self._all.num >= self._most:
                leaving = self._dispensable(self._all, "in all")
            if leaving is not None:
                self._remove(leaving)
            self._by_peer[peer] = of_peer
            self._peers[guest] = peer
            for guests in (self._all, of_peer):
                guests.num += 1
                guests.unproven[guest] = None
            return leaving

    def make_room(self) -> Guest | None:
        """Who has to go because this process is out of descriptors; None where all are at work."""
        with self._lock:
            try:
                leaving = self._dispensable(self._all, "in all")
            except PeerBusy:
                return None
            self._remove(leaving)
            return leaving

    def prove(self, guest: Guest) -> None:
        """A guest completed a transfer: no newcomer takes its place any more."""
        with self._lock:
            peer = self._peers.get(guest)
            if peer is not None:
                self._all.unproven.pop(guest, None)
                self._by_peer[peer].unproven.pop(guest, None)

    def leave(self, guest: Guest) -> None:
        """A guest is gone. Idempotent."""
        with self._lock:
            if guest in self._peers:
                self._remove(guest)

    def _dispensable(self, guests: _Guests[Guest], which: str) -> Guest:
        for guest in guests.unproven:
            if not self._is_busy(guest):
                return guest
        raise PeerBusy(
            f"{guests.num} connections {which}, all of them at work",
            hint="try again, or another replica",
            retry_after_s=RETRY_AFTER_S,
        )

    def _remove(self, guest: Guest) -> None:
        peer = self._peers.pop(guest)
        of_peer = self._by_peer[peer]
        for guests in (self._all, of_peer):
            guests.num -= 1
            guests.unproven.pop(guest, None)
        if not of_peer.num:
            del self._by_peer[peer]

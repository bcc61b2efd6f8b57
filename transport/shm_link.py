"""Links: what two processes on one host that share memory still have to say to each other.

A link is a pair of sockets, one end with the owner of a grant, the other with its peer, passed beside
the memfd. By it the peer says that a transfer is complete, the owner that a grant lives longer; and
each sees at once when the other dies, because the kernel closes its end.

Rules kept here: what a peer says is bounded and checked, and one wrong word ends its link; a peer that
says too much waits, the owner never does; a word that could not be said is an error of the transfer
that wanted it said; nobody is called back under a lock.

Packets (SOCK_SEQPACKET, big-endian), told apart by their first byte:

    owner to peer   L  version (1), capability (16), epoch (8), generation (8), slot (4), serial (8);
                       beside it the board's memfd
                    R  seconds to live from now (8, float)
    peer to owner   H  (hello: it has attached)
                    N  1 if it wrote, else 0 (1), bytes moved (8), its note (at most 256)
                    B  (bye: it has closed the region)
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Protocol

from snowskin.transport.errors import (
    BadDescriptor,
    BadFrame,
    GrantRefused,
    PeerLost,
    TransferTimedOut,
    TransportClosed,
    TransportUnavailable,
)
from snowskin.transport.grant_board import GrantBoards, SeenGrant
from snowskin.transport.words import MAX_NOTE_NBYTES, Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.fd_watcher import FdWatcher
    from snowskin.transport.grant_board import Place
    from snowskin.transport.mapping import Mappings

VERSION = 1
MAX_PACKETS_A_TURN = 32  # then the others have theirs

_WELCOME = struct.Struct(">cB16sQQIQ")
_RENEWED = struct.Struct(">cd")
_NOTE = struct.Struct(">cBQ")
_MAX_NBYTES = _NOTE.size + MAX_NOTE_NBYTES
_CREDENTIALS = struct.Struct("3i")
_LOOK_S = 0.5  # how long to wait for room before looking at the deadline's clock again


class _OwnerEnd:
    """The owner's end of one link."""

    __slots__ = ("capability", "end", "greeted", "lock", "peer_end", "place")

    def __init__(self, capability: bytes, place: Place) -> None:
        self.capability = capability
        self.place = place
        self.greeted = False
        self.lock = threading.Lock()
        self.end, peer_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer_end: socket.socket | None = peer_end
        self.end.setblocking(False)

    def welcome(self, descriptor: RegionDescriptor) -> None:
        """Leaves the peer its first packet; where that fails, nothing is left open."""
        board_fd = -1
        try:
            board_fd = self.place.board.open_read_only()
            packet = _WELCOME.pack(
                b"L",
                VERSION,
                descriptor.capability,
                descriptor.epoch,
                descriptor.generation,
                self.place.slot,
                self.place.serial,
            )
            socket.send_fds(self.end, [packet], [board_fd])
        except BaseException:
            self.close()
            raise
        finally:
            if board_fd >= 0:
                os.close(board_fd)

    def close(self) -> None:
        """Both ends that this process holds; nobody receives meanwhile."""
        with self.lock:
            self.end.close()
            if self.peer_end is not None:
                self.peer_end.close()
                self.peer_end = None


class OwnerLinks:
    """All links of one owner.

    Attributes:
        num_peers_lost: peers that had attached and went without a word.
    """

    def __init__(
        self,
        watcher: FdWatcher,
        *,
        complete: Callable[[Completion], None],
        refuse: Callable[[str], None],
    ) -> None:
        """`complete` hears what peers completed, `refuse` why one was cut off."""
        self.num_peers_lost = 0
        self._watcher = watcher
        self._complete = complete
        self._refuse = refuse
        self._links: dict[bytes, _OwnerEnd] = {}
        self._boards = GrantBoards()
        self._closed = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._links)

    def add(self, descriptor: RegionDescriptor) -> None:
        """Makes a link for a new grant; the peer finds its welcome there. OSError: nothing is left of it."""
        capability = descriptor.capability
        with self._lock:
            if self._closed:
                raise TransportClosed("this transport makes no links any more")
            place = self._boards.add()
            try:
                link = _OwnerEnd(capability, place)
                link.welcome(descriptor)
            except BaseException:
                self._boards.take_back(place)
                raise
            self._links[capability] = link
        try:
            self._watcher.add(link.end.fileno(), lambda: self._receive(link))
        except BaseException:
            self.take_back(capability)
            raise

    def take_peer_end(self, capability: bytes) -> int:
        """The peer's end, once; the caller passes it on and closes it.

        Raises:
            TransportUnavailable: the grant has no link, or its peer's end was taken before.
        """
        link = self._links.get(capability)
        if link is not None:
            with link.lock:
                peer_end, link.peer_end = link.peer_end, None
            if peer_end is not None:
                return peer_end.detach()
        raise TransportUnavailable(
            "no link of this grant is here to be passed on",
            hint="one comes with each `describe` that has an on_done, for one peer",
        )

    def is_open(self, capability: bytes) -> bool:
        """Whether the peer may still use what it attached: it neither said bye nor ended."""
        return capability in self._links

    def renew(self, capability: bytes, expires_in_s: float) -> None:
        """Tells the peer that its grant lives longer; one that does not listen goes without."""
        link = self._links.get(capability)
        if link is not None:
            with link.lock, contextlib.suppress(OSError):
                link.end.send(_RENEWED.pack(b"R", expires_in_s), socket.MSG_NOSIGNAL)

    def take_back(self, capability: bytes) -> None:
        """Lets the peer see, before this returns, that its grant is no good any more. Idempotent."""
        with self._lock:
            link = self._links.pop(capability, None)
            if link is not None:
                self._boards.take_back(link.place)
        if link is not None:
            self._end(link)

    def close(self) -> None:
        """Takes all back. Idempotent."""
        with self._lock:
            self._closed = True
            links, self._links = list(self._links.values()), {}
            self._boards.close()
        for link in links:
            self._end(link)

    def _end(self, link: _OwnerEnd) -> None:
        self._watcher.remove(link.end.fileno())
        link.close()

    def _lose(self, link: _OwnerEnd) -> None:
        """The peer's end is gone; the grant stays good for who else holds its descriptor."""
        with self._lock:
            if self._links.get(link.capability) is not link:
                return
            del self._links[link.capability]
            self._boards.take_back(link.place)
            self.num_peers_lost += link.greeted
        self._end(link)

    def _receive(self, link: _OwnerEnd) -> None:
        for _ in range(MAX_PACKETS_A_TURN):
            with link.lock:
                try:
                    # One byte more than the longest: what was cut is seen to be too long.
                    packet = link.end.recv(_MAX_NBYTES + 1)
                except BlockingIOError:
                    return
                except OSError:  # reset; or closed meanwhile, by whoever took the grant back
                    packet = b""
            try:
                going_on = self._hear(link, packet)
            except BadFrame as error:
                self._refuse(error.reason)
                going_on = False
            if not going_on:
                self._lose(link)
                return

    def _hear(self, link: _OwnerEnd, packet: bytes) -> bool:
        """Whether the link goes on; raises BadFrame."""
        if not packet:
            return False
        if packet == b"H":
            link.greeted = True
            return True
        if packet == b"B":
            link.greeted = False
            return False
        if packet[:1] != b"N" or not _NOTE.size <= len(packet) <= _MAX_NBYTES:
            raise BadFrame(f"a peer said {packet[:1]!r} and {len(packet) - 1} bytes more")
        _, is_push, nbytes = _NOTE.unpack_from(packet)
        if is_push > 1 or not link.greeted:
            raise BadFrame(
                f"a note with flags {is_push}, from a peer that had attached: {link.greeted}"
            )
        self._complete(
            Completion(
                capability=link.capability,
                nbytes=nbytes,
                is_push=bool(is_push),
                note=packet[_NOTE.size :],
            )
        )
        return True


class LinkedRegion(Protocol):
    """What a peer's end changes as the owner says or goes."""

    lost: bool
    expires_at_s: float


class PeerEnd:
    """The peer's end of one link.

    Attributes:
        owner: who is at the other end, for errors and logs.
    """

    def __init__(
        self,
        link_fd: int,
        descriptor: RegionDescriptor,
        watcher: FdWatcher,
        mappings: Mappings,
        *,
        now_s: Callable[[], float],
        on_lost: Callable[[], None],
    ) -> None:
        """Reads the owner's welcome; `link_fd` stays the caller's, `on_lost` hears of the owner's death.

        Raises:
            BadDescriptor: this is no link. GrantRefused: it is another grant's, of another epoch or
            generation, or was taken back. PeerLost: the owner is gone.
        """
        self._now_s = now_s
        self._on_lost = on_lost
        self._watcher = watcher
        self._region: LinkedRegion | None = None
        self._lock = threading.Lock()
        self._end = _own_end(link_fd)
        self.owner = _owner_at(self._end)
        try:
            self._grant = self._welcome(descriptor, mappings)
            self._grant.check()
            self._send(b"H")
        except BaseException:
            self._end.close()
            raise

    def follow(self, region: LinkedRegion) -> None:
        """From now on `region` is lost when the owner is, and lives longer when the owner says so."""
        self._region = region
        self._watcher.add(self._end.fileno(), self._receive)

    def check(self, _now_s: float) -> None:
        """Raises GrantRefused where the owner took the grant back. No system call."""
        self._grant.check()

    def tell(self, nbytes: int, *, is_push: bool, note: bytes, deadline_s: float) -> None:
        """Says that a transfer is complete.

        Raises:
            TransferTimedOut: the owner does not listen. GrantRefused, PeerLost, TransportClosed.
        """
        packet = _NOTE.pack(b"N", is_push, nbytes) + note
        while not self._send(packet):
            left_s = deadline_s - self._now_s()
            if left_s <= 0:
                raise TransferTimedOut(f"{self.owner} took no note of {len(note)} bytes in time")
            self._wait_for_room(min(left_s, _LOOK_S))

    def close(self) -> None:
        """Says bye. Idempotent."""
        with self._lock:
            if self._end.fileno() < 0:
                return
            self._watcher.remove(self._end.fileno())
            with contextlib.suppress(OSError):  # the owner is gone, or full: then it sees the end
                self._end.send(b"B", socket.MSG_NOSIGNAL)
            self._end.close()

    def _welcome(self, descriptor: RegionDescriptor, mappings: Mappings) -> SeenGrant:
        try:
            packet, fds, _, _ = socket.recv_fds(
                self._end, _WELCOME.size + 1, 1, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            packet, fds = b"", []
        except OSError as error:
            raise BadDescriptor(f"the descriptor beside the grant is no link: {error}") from error
        try:
            if len(packet) != _WELCOME.size or len(fds) != 1:
                raise BadDescriptor(
                    f"a link with {len(packet)} bytes and {len(fds)} descriptors of welcome",
                    hint="a link is for one peer, and attached once: describe anew",
                )
            kind, version, capability, epoch, generation, slot, serial = _WELCOME.unpack(packet)
            if kind != b"L" or version != VERSION:
                raise BadDescriptor(
                    f"a link of another release (version {version})",
                    hint="run the same release of Snowskin on both sides",
                )
            theirs = (capability, epoch, generation)
            if theirs != (descriptor.capability, descriptor.epoch, descriptor.generation):
                raise GrantRefused(
                    "this link is of another grant, or of another epoch or generation",
                    hint="match again: the owner may have restarted",
                )
            return SeenGrant(mappings, fds[0], slot=slot, serial=serial)
        finally:
            for fd in fds:
                os.close(fd)

    def _send(self, packet: bytes) -> bool:
        """False where there is no room now."""
        with self._lock:
            if self._end.fileno() < 0:
                raise TransportClosed("the region was closed before its owner was told")
            try:
                self._end.send(packet, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                gone = error
            else:
                return True
        self._grant.check()
        raise PeerLost(f"{self.owner} is gone", hint="attach another replica") from gone

    def _wait_for_room(self, timeout_s: float) -> None:
        fd = self._end.fileno()
        if fd >= 0:
            waiting = select.poll()
            waiting.register(fd, select.POLLOUT)
            waiting.poll(timeout_s * 1000)

    def _receive(self) -> None:
        """Called by the watcher."""
        for _ in range(MAX_PACKETS_A_TURN):
            with self._lock:
                if self._end.fileno() < 0:
                    return
                try:
                    packet = self._end.recv(_RENEWED.size + 1)
                except BlockingIOError:
                    return
                except OSError:
                    packet = b""
                if not packet:
                    self._watcher.remove(self._end.fileno())
            assert self._region is not None, "watched once it is followed"
            if not packet:
                # An owner that goes in order takes its grants back first.
                if self._grant.is_good:
                    self._region.lost = True
                    self._on_lost()
                return
            if len(packet) == _RENEWED.size and packet[:1] == b"R":
                _, expires_in_s = _RENEWED.unpack(packet)
                if expires_in_s >= 0:  # not NaN either
                    self._region.expires_at_s = self._now_s() + expires_in_s


def _own_end(link_fd: int) -> socket.socket:
    """A descriptor of our own for a link."""
    fd = -1
    try:
        fd = os.dup(link_fd)
        end = socket.socket(fileno=fd)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise BadDescriptor(f"descriptor {link_fd} is no link: {error}") from error
    if (end.family, end.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        end.close()
        raise BadDescriptor(f"descriptor {link_fd} is a socket, but no link")
    end.setblocking(False)
    return end


def _owner_at(end: socket.socket) -> str:
    """Who made the link, as the kernel says."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(credentials)
    return f"process {pid} on this host" if pid else "a process of another namespace on this host"

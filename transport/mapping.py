"""Memfds in this process's address space: mapped once, aligned for huge pages, never under a reader's feet.

Rules kept here: a memfd that could shrink is refused (its owner could kill this process by SIGBUS); a mapping lives as
long as anybody holds it, or an array or view of it, and not longer; it keeps no descriptor; the same file with the same
rights is mapped once (`Mappings`), however often it is attached.

Not `mmap.mmap`: that one keeps a descriptor of its own, cannot say where to map, and lets memory go only when asked at
the right moment. Two mappings can share huge pages only where both begin at a multiple of one.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.errors import BadDescriptor, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.memory import Bytes

ALIGN_NBYTES = 2 << 20  # what x86 and most of ARM call huge

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Mapping:
    """A whole file, mapped; what is made of `array()` keeps it.

    Attributes:
        address: where it begins.
        nbytes: its size.
        writable: whether arrays of it can be written.
    """

    __slots__ = ("__weakref__", "address", "nbytes", "writable")

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        """Maps `fd` from its beginning; the descriptor stays the caller's.

        Raises:
            TransportError: the kernel refused, e.g. for want of the descriptor's rights.
        """
        self.address = 0  # nothing to unmap yet
        self.nbytes = nbytes
        self.writable = writable
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if nbytes < ALIGN_NBYTES:
            self.address = _mapped(None, nbytes, protection, mmap.MAP_SHARED, fd)
            return
        # Take more than enough of empty address space, and map over its aligned part.
        room_nbytes = nbytes + ALIGN_NBYTES
        room = _mapped(None, room_nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        start = -(-room // ALIGN_NBYTES) * ALIGN_NBYTES
        try:
            self.address = _mapped(start, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except TransportError:
            _libc.munmap(room, room_nbytes)
            raise
        if start > room:
            _libc.munmap(room, start - room)
        # Whole pages of whatever size lie under the file: only what is behind the last one is empty.
        end = start + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if room + room_nbytes > end:
            _libc.munmap(end, room + room_nbytes - end)

    @property
    def __array_interface__(self) -> dict[str, object]:
        """What numpy makes arrays of, without a copy; each keeps this mapping."""
        return {
            "version": 3,
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, not self.writable),
        }

    def array(self) -> Bytes:
        """All bytes as uint8."""
        return np.asarray(self)

    def __del__(
        self,
        munmap: Callable[[int, int], int] = _libc.munmap,  # at exit, globals may be gone
    ) -> None:
        """Unmaps; nobody can look any more."""
        if self.address:
            munmap(self.address, self.nbytes)


class Mappings:
    """The mappings of one transport, each file once per kind of right while anybody uses it."""

    def __init__(self) -> None:
        """None yet."""
        self._by_file: weakref.WeakValueDictionary[tuple[int, int, bool], Mapping] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many are in use."""
        return len(self._by_file)

    def map(self, fd: int, nbytes: int, *, writable: bool) -> Mapping:
        """As `map_memfd`; one that is in use already is used again."""
        # A descriptor says which file by device and inode: no other has them while this one is mapped.
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, writable)
        with self._lock:
            mapping = self._by_file.get(key)
            if mapping is None:
                mapping = self._by_file[key] = map_memfd(fd, nbytes, writable=writable)
                return mapping
        check_memfd(fd, nbytes)
        check_rights(fd, writable=writable)
        return mapping


def map_memfd(fd: int, nbytes: int, *, writable: bool) -> Mapping:
    """Maps a memfd, which must be of exactly `nbytes` and must not be able to shrink.

    Raises:
        BadDescriptor: it is not. TransportError: it cannot be mapped with these rights.
    """
    check_memfd(fd, nbytes)
    return Mapping(fd, nbytes, writable=writable)


def check_memfd(fd: int, nbytes: int) -> None:
    """Raises BadDescriptor where `fd` is no sealed memfd of exactly `nbytes`."""
    actual_nbytes = os.fstat(fd).st_size
    if actual_nbytes != nbytes or nbytes < 1:
        raise BadDescriptor(f"the memfd has {actual_nbytes} bytes, {nbytes} were described")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise BadDescriptor(
            f"descriptor {fd} is not a memfd sealed against shrinking",
            hint="make pools with Arena, or add F_SEAL_SHRINK before sharing",
        )


def check_rights(fd: int, *, writable: bool) -> None:
    """Raises TransportError where `fd` could not be mapped with these rights.

    Who comes with a lesser descriptor must not get what a greater one once opened.
    """
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if access == os.O_WRONLY or (writable and access != os.O_RDWR):
        raise TransportError(
            f"descriptor {fd} cannot be mapped {'for writing' if writable else 'for reading'}"
        )


def _mapped(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if result is None or result == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        access = "for writing" if protection & mmap.PROT_WRITE else "for reading"
        raise TransportError(f"mapping {nbytes} bytes {access} failed: {reason}")
    return int(result)

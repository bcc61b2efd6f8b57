"""Arenas: the memory under a pool, shared with the processes of this host that may see it.

Rules kept here: one arena belongs to one tenant; it has no name that could be guessed or left
behind, only descriptors; its pages exist before anybody maps it (so that "no memory" is an error at
the start and not a SIGBUS in a reader) and it can neither shrink nor grow; readers get a descriptor
with which they cannot write.

A memfd opened anew through /proc is a descriptor of its own with the rights asked for. The same
user could open it for writing in the same way: between tenants, arenas are not shared at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import psutil

from snowskin.kvstore.errors import BadSetting, PoolExhausted
from snowskin.transport.errors import TransportClosed
from snowskin.transport.memory import Population

if TYPE_CHECKING:
    from types import TracebackType

    from snowskin.transport.memory import Bytes

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CGROUP = Path("/sys/fs/cgroup")  # as a container sees its own group
_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)


class Arena:
    """One sealed memfd, mapped for writing; a context manager that closes.

    Attributes:
        nbytes: its size; whole pages.
        name: for /proc and for messages; no path.
        tenant: whose bytes lie here.
    """

    def __init__(self, nbytes: int, *, name: str, tenant: str, populate: bool = False) -> None:
        """Takes the memory at once.

        Args:
            nbytes: rounded up to whole pages.
            name: what /proc shows.
            tenant: the only tenant whose blocks may lie here.
            populate: fault the pages in, in a thread (`populated` waits for it).

        Raises:
            BadSetting: less than one byte, or more than the machine could ever hold.
            PoolExhausted: the memory is not there now.
        """
        if nbytes < 1:
            raise BadSetting(f"arena {name} of {nbytes} bytes", hint="give it at least one page")
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name = name
        self.tenant = tenant
        self._population: Population | None = None
        self._fd: int | None = os.memfd_create(
            f"snowskin-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            _take_pages(self._fd, self.nbytes, name)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map: mmap.mmap | None = mmap.mmap(self._fd, self.nbytes, mmap.MAP_SHARED)
        except BaseException:
            os.close(self._fd)
            raise
        with contextlib.suppress(OSError):  # a wish: many kernels have it off for shared memory
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._buffer: Bytes | None = np.frombuffer(self._map, dtype=np.uint8)
        if populate:
            self._population = Population(self._buffer, writable=True)

    @property
    def buffer(self) -> Bytes:
        """All bytes as uint8; who keeps it longer than the arena keeps the memory."""
        if self._buffer is None:
            raise TransportClosed(f"arena {self.name} is closed")
        return self._buffer

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd is None

    def open_read_only(self) -> int:
        """A new descriptor that can be mapped for reading only; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._open_fd()}", os.O_RDONLY | os.O_CLOEXEC)

    def open_read_write(self) -> int:
        """A new descriptor with all rights but resizing; the caller closes it."""
        return os.dup(self._open_fd())

    def populated(self, timeout_s: float) -> bool:
        """Whether `populate` has finished, after at most `timeout_s`; True if it was not asked."""
        return self._population is None or self._population.wait(timeout_s)

    def close(self) -> None:
        """Gives the memory back, as soon as no other descriptor or mapping of it is left."""
        if self._fd is None:
            return
        if self._population is not None:
            self._population.stop()
        fd, self._fd = self._fd, None
        os.close(fd)
        self._buffer = None
        mapped, self._map = self._map, None
        if mapped is not None:
            # Somebody may still hold `buffer`: then the mapping goes with the last such view.
            with contextlib.suppress(BufferError):
                mapped.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise TransportClosed(f"arena {self.name} is closed")
        return self._fd


def available_nbytes() -> int:
    """Bytes that this process could still take: the machine's, or its control group's if fewer."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit_nbytes = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used_nbytes = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        available = min(available, max(limit_nbytes - used_nbytes, 0))
    return available


def _take_pages(fd: int, nbytes: int, name: str) -> None:
    """Makes all pages exist; fails here, where somebody can still act on it.

    The kernel puts no limit on a memfd and would rather kill a process than say no: so ask first.
    """
    hint = "free memory, raise the container's limit, or lower the pool's size"
    total_nbytes = int(psutil.virtual_memory().total)
    if nbytes > total_nbytes:
        raise BadSetting(
            f"arena {name}: {nbytes} bytes wanted, the machine has {total_nbytes}",
            hint="lower the pool's size",
        )
    room_nbytes = available_nbytes()
    if nbytes > room_nbytes:
        raise PoolExhausted(
            f"arena {name}: {nbytes} bytes wanted, {room_nbytes} available", hint=hint
        )
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_MEMORY:
            raise
        raise PoolExhausted(
            f"arena {name}: the kernel refused {nbytes} bytes: {error.strerror}", hint=hint
        ) from error

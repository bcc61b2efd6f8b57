"""Arenas: the memory under a pool, shared with the processes of this host that may see it.

Rules kept here: one arena belongs to one tenant; it has no name that could be guessed or left
behind, only descriptors; its pages exist before anybody maps it (so that "no memory" is an error at
the start and not a SIGBUS in a reader) and it can neither shrink nor grow; readers get a descriptor
with which they cannot write. Huge pages that were demanded are there, or there is no arena.

Huge pages come from those that the operator set aside (hugetlb), else from the kernel's joining of
small ones, which needs no setting (Linux 6.1). A file on a tmpfs mounted with huge=always cannot be
sealed, so that way is not offered.

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
from typing import TYPE_CHECKING, Literal, Self

import psutil

from snowskin.kvstore.errors import BadSetting, PoolExhausted
from snowskin.transport.errors import TransportClosed
from snowskin.transport.lending import Lending
from snowskin.transport.lending_probe import unit_nbytes, why_not_lend
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping
from snowskin.transport.pages import (
    PageUse,
    Population,
    collapse,
    free_hugetlb_nbytes,
    keep_small,
    page_use,
)

if TYPE_CHECKING:
    from types import TracebackType

    from snowskin.transport.memory import Bytes

HugePages = Literal["auto", "never", "always"]
LendPages = Literal["auto", "trusted", "never"]

_HUGE_NBYTES = ALIGN_NBYTES
_MFD_HUGE_2MB = 21 << 26  # MFD_HUGE_2MB, which Python does not name everywhere
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CGROUP = Path("/sys/fs/cgroup")  # as a container sees its own group
_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)


class Arena:
    """One sealed memfd, mapped for writing; a context manager that closes.

    Attributes:
        nbytes: its size; whole pages.
        name: for /proc and for messages; no path.
        tenant: whose bytes lie here.
        lending: what sockets refer to of its pages; None where they must not.
        why_not_lent: why they must not; empty where they may.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        name: str,
        tenant: str,
        populate: bool = False,
        huge_pages: HugePages = "auto",
        lend_pages: LendPages = "never",
    ) -> None:
        """Takes the memory at once.

        Args:
            nbytes: rounded up to whole pages; to whole huge pages where those are demanded.
            name: what /proc shows.
            tenant: the only tenant whose blocks may lie here.
            populate: fault the pages in, in a thread (`populated` waits for it).
            huge_pages: `auto` takes them where they can be had, `always` takes nothing else.
            lend_pages: `auto` and `trusted` where this host lets go of pages that sockets refer to.

        Raises:
            BadSetting: less than one byte, more than the machine could ever hold, or huge pages
                demanded that cannot be had.
            PoolExhausted: the memory is not there now.
        """
        if nbytes < 1:
            raise BadSetting(f"arena {name} of {nbytes} bytes", hint="give it at least one page")
        page_nbytes = _HUGE_NBYTES if huge_pages == "always" else mmap.PAGESIZE
        self.nbytes = -(-nbytes // page_nbytes) * page_nbytes
        self.name = name
        self.tenant = tenant
        self.lending: Lending | None = None
        self.why_not_lent = "lend_pages is never" if lend_pages == "never" else ""
        self._population: Population | None = None
        self._fd: int | None = _take_memfd(name, self.nbytes, huge_pages)
        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping: Mapping | None = Mapping(self._fd, self.nbytes, writable=True)
            self._settle_pages(self._mapping, huge_pages)
            self._open_lending(self._fd)
        except BaseException:
            self._mapping = None
            os.close(self._fd)
            raise
        self._buffer: Bytes | None = self._mapping.array()
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

    def page_use(self) -> PageUse | None:
        """What pages it lies on now; None where the kernel does not say. Costs about 1 ms."""
        return None if self._mapping is None else page_use(self._mapping.address)

    def close(self) -> None:
        """Gives the memory back, as soon as no other descriptor or mapping of it is left."""
        if self._fd is None:
            return
        if self._population is not None:
            self._population.stop()
        if self.lending is not None:
            self.lending.close()
        fd, self._fd = self._fd, None
        os.close(fd)
        self._buffer = self._mapping = None  # the mapping goes with the last view of `buffer`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _settle_pages(self, mapping: Mapping, huge_pages: HugePages) -> None:
        """Small pages, huge ones, or those that can be had."""
        if huge_pages == "never":
            keep_small(mapping.address, mapping.nbytes)
            return
        reason = ""
        whole_nbytes = mapping.nbytes // _HUGE_NBYTES * _HUGE_NBYTES
        if whole_nbytes:
            use = page_use(mapping.address)
            if use is None or not use.is_hugetlb:
                reason = collapse(mapping.address, whole_nbytes)
        if huge_pages == "always" and reason:
            raise BadSetting(
                f"arena {self.name}: huge pages for {self.nbytes} bytes cannot be had: {reason}",
                hint=f"set {self.nbytes // _HUGE_NBYTES} aside (vm.nr_hugepages), or huge_pages = auto",
            )

    def _open_lending(self, fd: int) -> None:
        """Where it was asked for, and this host lets pages go."""
        if self.why_not_lent:
            return
        unit = unit_nbytes()
        self.why_not_lent = why_not_lend(fd, unit_nbytes=unit)
        if not self.why_not_lent:
            self.lending = Lending(fd, self.nbytes, unit_nbytes=unit)

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


def _take_memfd(name: str, nbytes: int, huge_pages: HugePages) -> int:
    """A memfd whose pages exist; of hugetlb where that is wanted and enough are set aside."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if (
        huge_pages != "never"
        and nbytes % _HUGE_NBYTES == 0
        and free_hugetlb_nbytes(_HUGE_NBYTES) >= nbytes
    ):
        fd = os.memfd_create(f"snowskin-{name}", flags | os.MFD_HUGETLB | _MFD_HUGE_2MB)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return fd
        except OSError:  # another process was faster: there are other huge pages
            os.close(fd)
    fd = os.memfd_create(f"snowskin-{name}", flags)
    try:
        _take_pages(fd, nbytes, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


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

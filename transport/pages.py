"""The pages under memory: faulted in before the first copy, huge where they can be had, and what was got.

Rules kept here: nothing here is needed for right bytes, only for speed; what the kernel will not do
is reported, not guessed.

Sources: madvise(2), of MADV_POPULATE_* (Linux 5.14) and MADV_COLLAPSE (Linux 6.1), which makes huge
pages whatever `shmem_enabled` says; proc_pid_smaps(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snowskin.transport.memory import Bytes

_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_SLICE_NBYTES = 64 << 20  # a closing region waits for at most this much
_HUGETLB = Path("/sys/kernel/mm/hugepages")
_SMAPS = Path("/proc/self/smaps")
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_FIELD = re.compile(r"(\w+): +(\d+) kB")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Population:
    """Faults the pages of `buffer` in, in a thread, so that the first copy does not pay for it."""

    def __init__(self, buffer: Bytes, *, writable: bool) -> None:
        """Starts at once."""
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(buffer, writable), name="snowskin-populate", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether all pages are in, after at most `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stops within one slice and waits for that; idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self, buffer: Bytes, writable: bool) -> None:
        for start in range(0, buffer.nbytes, _SLICE_NBYTES):
            if self._stop.is_set():
                return
            populate(buffer[start : start + _SLICE_NBYTES], writable=writable)


def populate(buffer: Bytes, *, writable: bool) -> None:
    """Faults all pages of `buffer` in, without the GIL; does nothing where the kernel cannot.

    ctypes and not `mmap.madvise`, which holds the GIL for as long as it takes (256 MiB: 150 ms).
    """
    start = buffer.ctypes.data
    skip = -start % mmap.PAGESIZE
    if buffer.nbytes > skip:
        advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
        _advise(start + skip, buffer.nbytes - skip, advice)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageUse:
    """What pages lie under one mapping of this process.

    Attributes:
        nbytes: size of the mapping.
        page_nbytes: of what the mapping was made; 2 MiB or more where it is hugetlb.
        huge_nbytes: how much of it is mapped by huge pages now, of whichever kind.
        resident_nbytes: how much is mapped at all.
    """

    nbytes: int
    page_nbytes: int
    huge_nbytes: int
    resident_nbytes: int

    @property
    def is_hugetlb(self) -> bool:
        """Whether they were taken from those that the operator set aside."""
        return self.page_nbytes > mmap.PAGESIZE

    def __str__(self) -> str:
        """One line for people."""
        if self.is_hugetlb:
            return f"huge pages of {self.page_nbytes >> 10} KiB set aside (hugetlb)"
        if not self.huge_nbytes:
            return f"pages of {self.page_nbytes >> 10} KiB"
        return f"{self.huge_nbytes / self.nbytes:.0%} huge pages (transparent)"


def page_use(address: int) -> PageUse | None:
    """What the kernel says of the mapping at `address`; None where it says nothing. Costs about 1 ms."""
    fields: dict[str, int] = {}
    inside, nbytes = False, 0
    with contextlib.suppress(OSError), _SMAPS.open(encoding="ascii", errors="replace") as smaps:
        for line in smaps:
            bounds = _RANGE.match(line)
            if bounds is not None:
                if inside:
                    break
                start, end = int(bounds[1], 16), int(bounds[2], 16)
                inside, nbytes = start <= address < end, end - start
            elif inside and (field := _FIELD.match(line)) is not None:
                fields[field[1]] = int(field[2]) << 10
    if not fields:
        return None
    page_nbytes = fields.get("KernelPageSize", mmap.PAGESIZE)
    hugetlb_nbytes = fields.get("Shared_Hugetlb", 0) + fields.get("Private_Hugetlb", 0)
    transparent_nbytes = (
        fields.get("ShmemPmdMapped", 0)
        + fields.get("FilePmdMapped", 0)
        + fields.get("AnonHugePages", 0)
    )
    return PageUse(
        nbytes=nbytes,
        page_nbytes=page_nbytes,
        huge_nbytes=hugetlb_nbytes + transparent_nbytes,
        resident_nbytes=fields.get("Rss", 0) + hugetlb_nbytes,
    )


def free_hugetlb_nbytes(page_nbytes: int) -> int:
    """Bytes in huge pages of this size that the operator set aside and nobody took or was promised."""
    folder = _HUGETLB / f"hugepages-{page_nbytes >> 10}kB"
    try:
        free, promised = (
            int((folder / name).read_text(encoding="ascii"))
            for name in ("free_hugepages", "resv_hugepages")
        )
    except (OSError, ValueError):
        return 0
    return max(0, free - promised) * page_nbytes


def collapse(address: int, nbytes: int) -> str:
    """Makes huge pages of a mapping's pages, in place; "" where all were, else the kernel's reason.

    About as long as to make the pages in the first place (0.25 ms per MiB), and the first write is ten times faster.
    """
    wish_huge(address, nbytes)  # for what is mapped later
    for start in range(0, nbytes, _SLICE_NBYTES):
        reason = _advise(address + start, min(_SLICE_NBYTES, nbytes - start), _MADV_COLLAPSE)
        if reason:
            return reason
    return ""


def wish_huge(address: int, nbytes: int) -> None:
    """Asks the kernel for huge pages here, where its settings let it."""
    _advise(address, nbytes, _MADV_HUGEPAGE)


def keep_small(address: int, nbytes: int) -> None:
    """Asks the kernel for no huge pages here."""
    _advise(address, nbytes, _MADV_NOHUGEPAGE)


def _advise(address: int, nbytes: int, advice: int) -> str:
    """Madvise without the GIL; "" or why not."""
    return os.strerror(ctypes.get_errno()) if _libc.madvise(address, nbytes, advice) else ""

"""Whether a pool's pages can be lent on this host: tried with a page of our own, not read off the kernel's version.

Rules kept here: what is said is what was seen just now; no device is opened and no driver loaded. Where anything on the
host may pin a pool's pages for long (a GPU's driver, an RDMA device, XPMEM), nothing is lent: such a pin stays with the
page that leaves the file, and its holder would go on with bytes that are nobody's.

Sources: cuMemHostRegister of the CUDA driver API and ibv_reg_mr(3), which pin; memfd_create(2) of MFD_HUGETLB.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportError
from snowskin.transport.host_probe import HostFiles
from snowskin.transport.lending import Lending
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping
from snowskin.transport.pages import collapse

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is there as soon as a driver is, whatever it is asked: files, and folders with something in them.
_PINNING = {
    "a GPU": (
        "/sys/module/nvidia",
        "/proc/driver/nvidia",
        "/dev/nvidiactl",
        "/dev/nvidia-caps",
        "/dev/dxg",
        "/sys/class/kfd",
        "/dev/kfd",
    ),
    "an RDMA device": ("/sys/class/infiniband", "/sys/class/infiniband_verbs", "/dev/infiniband"),
    "a driver for other processes' memory": ("/dev/xpmem", "/dev/knem"),
}
_OLD, _NEW = 0x5A, 0xA5
_HUGE_NBYTES = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"


def unit_nbytes(*, files: HostFiles | None = None) -> int:
    """The largest folio that can lie in a memfd of this host: whoever maps one may make huge pages (MADV_COLLAPSE).

    Args:
        files: where to read it.
    """
    huge_nbytes = (files or HostFiles()).number(_HUGE_NBYTES)
    return max(ALIGN_NBYTES, huge_nbytes) if huge_nbytes else mmap.PAGESIZE


def why_not_lend(fd: int, *, unit_nbytes: int, files: HostFiles | None = None) -> str:
    """Empty where pages of this memfd can be lent, else why not. A few ms; less the second time.

    Args:
        fd: the pool's.
        unit_nbytes: what would be lent and replaced as a whole.
        files: where to look for devices.
    """
    if os.fstatvfs(fd).f_bsize > mmap.PAGESIZE:
        return "its pages are set aside (hugetlb)"
    files = files or HostFiles()
    for what, names in _PINNING.items():
        if any(_is_there(files, name) for name in names):
            return f"the host has {what}, and what is pinned for it must stay where it is"
    return _tried(min(unit_nbytes, ALIGN_NBYTES))


def try_out(unit_nbytes: int) -> str:
    """Lends a unit to a pipe, takes it back by force and writes it anew; "" where the pipe has the old bytes."""
    fd = os.memfd_create("snowskin-lending", os.MFD_CLOEXEC)
    ends: Sequence[int] = ()
    try:
        os.posix_fallocate(fd, 0, unit_nbytes)
        mapping = Mapping(fd, unit_nbytes, writable=True)
        if unit_nbytes > mmap.PAGESIZE:
            collapse(mapping.address, unit_nbytes)
        view = mapping.array()
        view[: mmap.PAGESIZE] = _OLD
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        num_taken = os.splice(fd, ends[1], mmap.PAGESIZE, offset_src=0)
        with contextlib.closing(Lending(fd, unit_nbytes, unit_nbytes=unit_nbytes)) as lending:
            lending.forsake(lending.lend([(0, unit_nbytes)]))
            if not lending.reclaim(0, unit_nbytes, _nobody):
                return "the kernel keeps pages that somebody refers to in the file"
        view[: mmap.PAGESIZE] = _NEW
        if os.read(ends[0], mmap.PAGESIZE) != bytes([_OLD]) * num_taken or not num_taken:
            return "what was lent is written to nevertheless"
        return ""
    except (OSError, TransportError) as error:
        return f"it cannot be tried out: {error}"
    finally:
        for end in ends:
            os.close(end)
        os.close(fd)


_tried = functools.cache(try_out)


def _nobody(_offset: int, _nbytes: int) -> bool:
    return True


def _is_there(files: HostFiles, name: str) -> bool:
    """A file, or a folder that is not empty; a module's folder always has something."""
    path = files.path(name)
    return bool(files.names(name)) if path.is_dir() else path.exists()

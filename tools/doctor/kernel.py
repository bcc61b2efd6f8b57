"""Checks of the kernel: what it is, its limits and settings, and its clock."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.config import format_nbytes
from snowskin.tools.doctor.finding import Finding, Host, Verdict, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OLDEST_KERNEL = (5, 14)  # MADV_POPULATE_READ and _WRITE
FEW_FILES, ENOUGH_FILES = 256, 4096
HTTP_BACKLOG = 1024  # kvstore.telemetry listens with it
# What kernels allow where nobody changed it. Half of what may be received is window: they count what it takes up.
RECEIVED_AHEAD_NBYTES, SENT_AHEAD_NBYTES = 6 << 20, 4 << 20
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit")
MAX_RESOLUTION_S = 1e-4
NUM_CLOCK_READINGS = 2000
LONG_STALL_S = 0.05


def system(host: Host) -> Finding:
    """Linux, and new enough."""
    text = host.read("/proc/sys/kernel/osrelease")
    numbers = re.match(r"(\d+)\.(\d+)", text or "")
    if numbers is None:
        return Finding(
            name="system",
            verdict=Verdict.FAIL,
            found="no Linux kernel's /proc",
            meaning="pools are Linux memfds: nothing can be served here",
            action="run it on Linux, or in a Linux container with /proc mounted",
        )
    is_new = (int(numbers[1]), int(numbers[2])) >= OLDEST_KERNEL
    return Finding(
        name="system",
        verdict=Verdict.OK if is_new else Verdict.WARN,
        found=f"Linux {text}",
        meaning="pages of a pool are made in one call"
        if is_new
        else "pages are touched one by one: starts and first copies are slower",
        action="" if is_new else f"use Linux {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer",
    )


def try_memfd() -> str:
    """Makes a memfd as a pool does: sealed, and opened anew for reading; "" or what went wrong."""
    try:
        fd = os.memfd_create("snowskin-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, 4096)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(fd)
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def memfd(host: Host, attempt: Callable[[], str] = try_memfd) -> Finding:
    """Whether pools can be made at all."""
    trouble = attempt()
    policy = host.number("/proc/sys/vm/memfd_noexec")
    shown = "" if policy is None else f", vm.memfd_noexec {policy}"
    return Finding(
        name="memfd",
        verdict=Verdict.FAIL if trouble else Verdict.OK,
        found=(trouble or "made, sealed and opened anew") + shown,
        meaning="a pool is a memfd; clients on this host map it and copy without the network",
        action="set vm.memfd_noexec to 0 or 1, mount /proc, and let the container's seccomp profile "
        "allow memfd_create"
        if trouble
        else "",
    )


def _limit(host: Host, name: str) -> float | None:
    """The soft limit in /proc/self/limits; infinity for unlimited, None where it is not said."""
    for line in (host.read("/proc/self/limits") or "").splitlines():
        if line.startswith(name):
            word = line[len(name) :].split()[0]
            return float("inf") if word == "unlimited" else float(word)
    return None


def locked_memory(host: Host, *, pool_nbytes: int) -> Finding:
    """RLIMIT_MEMLOCK: what a network card may be given."""
    limit = _limit(host, "Max locked memory")
    has_rdma = bool(host.names("/sys/class/infiniband"))
    enough = limit is not None and limit >= pool_nbytes
    shown = "unknown" if limit is None else _size(limit)
    if enough or not has_rdma:
        return Finding(
            name="memlock",
            verdict=Verdict.OK,
            found=f"limit {shown}",
            meaning="nothing locks memory yet"
            if not enough
            else "the pools may be registered with a network card",
        )
    return Finding(
        name="memlock",
        verdict=Verdict.WARN,
        found=f"limit {shown}, pools {format_nbytes(pool_nbytes)}, RDMA devices present",
        meaning="a network card cannot be given the pools; copies over TCP and shared memory work",
        action="ulimit -l unlimited; LimitMEMLOCK=infinity; ulimits: memlock: -1 in a compose file",
    )


def open_files(host: Host) -> Finding:
    """RLIMIT_NOFILE: a socket for each client, and its memfds."""
    limit = _limit(host, "Max open files")
    if limit is None:
        verdict = Verdict.WARN
    elif limit < FEW_FILES:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.OK if limit >= ENOUGH_FILES else Verdict.WARN
    return Finding(
        name="open files",
        verdict=verdict,
        found="limit unknown" if limit is None else f"limit {limit:.0f}",
        meaning="each client of a node takes a descriptor, each HTTP request one of the conductor's",
        action="" if verdict is Verdict.OK else f"ulimit -n {ENOUGH_FILES} or more; LimitNOFILE=",
    )


def connection_backlog(host: Host) -> Finding:
    """net.core.somaxconn: connections that may wait to be accepted."""
    backlog = host.number("/proc/sys/net/core/somaxconn")
    is_low = backlog is not None and backlog < HTTP_BACKLOG
    return Finding(
        name="somaxconn",
        verdict=Verdict.WARN if is_low or backlog is None else Verdict.OK,
        found=f"net.core.somaxconn {'unreadable' if backlog is None else backlog}",
        meaning="a burst of new HTTP connections beyond it is refused or delayed by a second",
        action=f"sysctl -w net.core.somaxconn={HTTP_BACKLOG}" if is_low else "",
    )


def socket_buffers(host: Host) -> Finding:
    """The largest of tcp_rmem and tcp_wmem: how much a connection may have on its way."""
    least = {"tcp_rmem": RECEIVED_AHEAD_NBYTES, "tcp_wmem": SENT_AHEAD_NBYTES}
    most = {name: _most(host, name) for name in least}
    low = [name for name, nbytes in most.items() if nbytes is None or nbytes < least[name]]
    shown = (
        f"{name} {'unreadable' if nbytes is None else f'up to {nbytes / (1 << 20):.1f} MiB'}"
        for name, nbytes in most.items()
    )
    return Finding(
        name="socket buffers",
        verdict=Verdict.WARN if low else Verdict.OK,
        found=", ".join(shown),
        meaning="a fast network waits for the ends: too little may be on its way"
        if low
        else "so much of one transfer over TCP may be on its way",
        action="; ".join(
            f"raise the last number of net.ipv4.{name} to {least[name]}" for name in low
        ),
    )


def _most(host: Host, name: str) -> int | None:
    """The last of the three numbers of a tcp_*mem."""
    numbers = (host.read(f"/proc/sys/net/ipv4/{name}") or "").split()
    return int(numbers[2]) if len(numbers) == 3 else None


def overcommit(host: Host, *, wanted_nbytes: int) -> Finding:
    """vm.overcommit_memory: whether the kernel counts what is only promised."""
    mode = host.number("/proc/sys/vm/overcommit_memory")
    if mode != 2:
        return Finding(
            name="overcommit",
            verdict=Verdict.OK,
            found=f"vm.overcommit_memory {'unreadable' if mode is None else mode}",
            meaning="address space that is not used costs nothing; pools take their pages at once",
        )
    memory = table_of(host.read("/proc/meminfo"))
    left = memory.get("CommitLimit", 0) - memory.get("Committed_AS", 0)
    return Finding(
        name="overcommit",
        verdict=Verdict.FAIL if left < wanted_nbytes else Verdict.WARN,
        found=f"vm.overcommit_memory 2, {_size(left)} may still be promised",
        meaning="torch and pools are refused memory that is free but promised to others",
        action="sysctl -w vm.overcommit_memory=0, or raise vm.overcommit_ratio",
    )


def huge_pages(host: Host) -> Finding:
    """Transparent huge pages of shared memory, which is what a memfd is."""
    text = host.read("/sys/kernel/mm/transparent_hugepage/shmem_enabled") or ""
    chosen = re.search(r"\[(\w+)\]", text)
    word = chosen[1] if chosen else "unknown"
    is_on = word in ("always", "advise", "within_size", "force")
    return Finding(
        name="huge pages",
        verdict=Verdict.OK if is_on else Verdict.ABSENT,
        found=f"transparent_hugepage/shmem_enabled {word}",
        meaning="a pool lies in pages of 2 MiB: fewer misses of the TLB in large copies"
        if is_on
        else "a pool lies in pages of 4 KiB: it works, large copies may be slower",
        action=""
        if is_on
        else "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (a pool asks for them)",
    )


def clock_source(host: Host) -> Finding:
    """Where the kernel takes the time from."""
    source = host.read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    is_slow = source in SLOW_CLOCKS
    return Finding(
        name="clock source",
        verdict=Verdict.WARN if is_slow else Verdict.OK,
        found=source or "not said",
        meaning="a look at the time is a system call of microseconds, several times a block"
        if is_slow
        else "a look at the time costs nanoseconds",
        action="boot with clocksource=tsc, if the machine's is stable" if is_slow else "",
    )


def read_clock() -> Sequence[float]:
    """Readings of the monotonic clock, one after the other; seconds."""
    return [time.monotonic() for _ in range(NUM_CLOCK_READINGS)]


def clock(
    readings: Sequence[float], *, resolution_s: float, is_adjustable: bool = False
) -> Finding:
    """The clock that leases end by: never back, in fine steps.

    Args:
        readings: of the monotonic clock, in the order in which they were taken.
        resolution_s: what the system says of it.
        is_adjustable: whether an administrator can set it.
    """
    steps = [later - earlier for earlier, later in itertools.pairwise(readings)]
    least, most = min(steps, default=0.0), max(steps, default=0.0)
    found = (
        f"resolution {resolution_s:.0e} s, longest step of {len(readings)} readings {most:.1e} s"
    )
    meaning = "leases, deadlines and measured times go by it; the time of day is used for logs only"
    if least < 0 or is_adjustable:
        return Finding(
            name="clock",
            verdict=Verdict.FAIL,
            found=f"{found}; it goes back by {-least:.1e} s"
            if least < 0
            else f"{found}; can be set",
            meaning="a lease may end early or never: bytes could be reused under a reader",
            action="use a machine, or a hypervisor setting, with a monotonic clock",
        )
    if resolution_s > MAX_RESOLUTION_S:
        action = "boot with a high resolution clock source; see /sys/devices/system/clocksource"
        return Finding(
            name="clock", verdict=Verdict.WARN, found=found, meaning=meaning, action=action
        )
    if most > LONG_STALL_S:
        return Finding(
            name="clock",
            verdict=Verdict.WARN,
            found=found,
            meaning="this process was not run for that long: leases shorter than this would expire",
            action="look for a CPU quota or a neighbour: /sys/fs/cgroup/cpu.stat, nr_throttled",
        )
    return Finding(name="clock", verdict=Verdict.OK, found=found, meaning=meaning)


def _size(nbytes: float) -> str:
    return "unlimited" if nbytes == float("inf") else f"{nbytes / (1 << 30):.1f} GiB"

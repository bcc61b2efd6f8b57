"""Checks of the machine: memory and what a control group leaves of it, cores, devices, disk, ports."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.tools.cluster.directory import socket_directory
from snowskin.tools.cluster.ports import ephemeral_range
from snowskin.tools.doctor.finding import Finding, Host, Verdict, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIGHT_RATIO = 0.9  # of what is available: the rest is for torch, Python and the page cache
NO_LIMIT_NBYTES = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
SHARED_MEMORY = "/dev/shm"  # noqa: S108  looked at, not written to
LITTLE_DISK_NBYTES, NO_DISK_NBYTES = 1 << 30, 32 << 20


def memory(host: Host, *, wanted_nbytes: int, wanted_by: str) -> Finding:
    """Whether what is configured fits into what is there.

    Args:
        host: to look at.
        wanted_nbytes: pools, KV memory and weights together.
        wanted_by: how that comes about, for a person.
    """
    total = table_of(host.read("/proc/meminfo"))
    available = total.get("MemAvailable", 0)
    limit, used = group_memory(host)
    room = available if limit is None else min(available, max(limit - used, 0))
    group = "" if limit is None else f", control group {_gib(limit)} with {_gib(used)} used"
    swap = f", swap {_gib(total['SwapTotal'])}" if total.get("SwapTotal") else ""
    found = (
        f"{_gib(wanted_nbytes)} wanted ({wanted_by}); {_gib(available)} available of "
        f"{_gib(total.get('MemTotal', 0))}{group}{swap}"
    )
    if wanted_nbytes > room:
        return Finding(
            name="memory",
            verdict=Verdict.FAIL,
            found=found,
            meaning="a pool that does not fit is refused at the start; engines are killed by the kernel",
            action="lower --dram-nbytes and --kv-memory-nbytes, or raise the container's limit",
        )
    is_tight = wanted_nbytes > TIGHT_RATIO * room
    return Finding(
        name="memory",
        verdict=Verdict.WARN if is_tight or swap else Verdict.OK,
        found=found,
        meaning="what is swapped out is read back in the middle of a copy"
        if swap and not is_tight
        else "pools take all their memory at once, so nothing is killed later for it",
        action=(
            "leave a tenth of the memory to torch, Python and the page cache"
            if is_tight
            else "swapoff -a, or memory.swap.max=0 of the control group"
            if swap
            else ""
        ),
    )


def group_memory(host: Host) -> tuple[int | None, int]:
    """Limit (None for none) and use of this process's control group, version 2 or 1; bytes.

    The group's own folder and those above it: a limit above counts too. Inside a container the
    own folder is the root of what is mounted.
    """
    paths = {"": "/"}
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        _, kinds, path = line.split(":", 2)
        paths |= dict.fromkeys(kinds.split(","), path)
    ways = (
        ("/sys/fs/cgroup", paths[""], "memory.max", "memory.current"),
        (
            "/sys/fs/cgroup/memory",
            paths.get("memory", "/"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    )
    found: list[tuple[int, int]] = []
    for mount, path, limit_name, used_name in ways:
        for folder in (Path(path), *Path(path).parents):
            place = f"{mount}/{str(folder).strip('/')}"
            limit = host.number(f"{place}/{limit_name}")
            if limit is not None and limit < NO_LIMIT_NBYTES:
                found.append((limit, host.number(f"{place}/{used_name}") or 0))
    return min(found, key=lambda each: each[0] - each[1], default=(None, 0))


def cores(host: Host, *, num_cores: int, num_threads: int) -> Finding:
    """Cores against compute threads: torch counts cores, a control group counts time.

    Args:
        host: to look at.
        num_cores: that this process may run on.
        num_threads: compute threads of all engines together; 0 where no engine is to run.
    """
    words = (host.read("/sys/fs/cgroup/cpu.max") or "max").split()
    quota, period = (words[0], words[-1])
    if quota == "max":
        quota = host.read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
        period = host.read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "100000"
    try:
        paid = int(quota) / int(period) if int(quota) > 0 else float(num_cores)
    except (ValueError, ZeroDivisionError):
        paid = float(num_cores)
    usable = min(paid, float(num_cores))
    is_over = num_threads > usable
    return Finding(
        name="cores",
        verdict=Verdict.WARN if is_over else Verdict.OK,
        found=f"{num_cores} cores, time for {usable:g}, {num_threads} compute threads",
        meaning="more threads than cores: every step waits for the slowest of them"
        if is_over
        else "each compute thread has a core",
        action=f"give the engines --threads N, {max(1, int(usable))} in all" if is_over else "",
    )


def numa(host: Host) -> Finding:
    """Memory that is nearer to some cores than to others."""
    nodes = [
        name
        for name in host.names("/sys/devices/system/node")
        if name.startswith("node") and name[4:].isdigit()
    ]
    if len(nodes) < 2:
        return Finding(
            name="NUMA",
            verdict=Verdict.ABSENT,
            found=f"{len(nodes)} memory node" + ("" if len(nodes) == 1 else "s"),
            meaning="all memory is equally near",
        )
    return Finding(
        name="NUMA",
        verdict=Verdict.WARN,
        found=f"{len(nodes)} memory nodes",
        meaning="a copy between two of them is slower; nothing is placed by NUMA yet",
        action="one store node for each: numactl --cpunodebind=N --membind=N snowskin node, and its "
        "engines likewise",
    )


def gpu(host: Host) -> Finding:
    """GPUs, of NVIDIA and AMD."""
    version = host.read("/proc/driver/nvidia/version")
    nvidia = [name for name in host.names("/dev") if name[:6] == "nvidia" and name[6:].isdigit()]
    has_amd = host.path("/dev/kfd").exists()
    if not (nvidia or version or has_amd):
        return Finding(
            name="GPU",
            verdict=Verdict.ABSENT,
            found="none",
            meaning="engines compute on the CPU, as they do everywhere in this version",
        )
    driver = version.splitlines()[0] if version else "no driver's word"
    found = f"{len(nvidia)} NVIDIA ({driver})" if nvidia or version else "AMD (/dev/kfd)"
    if version and not nvidia:
        return Finding(
            name="GPU",
            verdict=Verdict.WARN,
            found=found,
            meaning="the driver is loaded, and no device is visible here",
            action="start the container with --gpus all, or load nvidia-uvm",
        )
    return Finding(
        name="GPU",
        verdict=Verdict.OK,
        found=found,
        meaning="seen, and not used: this version's own engines compute on the CPU",
    )


def rdma(host: Host) -> Finding:
    """RDMA devices and the state of their ports."""
    devices = host.names("/sys/class/infiniband")
    if not devices:
        return Finding(
            name="RDMA",
            verdict=Verdict.ABSENT,
            found="none",
            meaning="bytes move by shared memory on one host, and by gRPC between hosts",
        )
    states = {
        f"{device}:{port}": (host.read(f"/sys/class/infiniband/{device}/ports/{port}/state") or "?")
        for device in devices
        for port in host.names(f"/sys/class/infiniband/{device}/ports")
    }
    is_up = any("ACTIVE" in state for state in states.values())
    return Finding(
        name="RDMA",
        verdict=Verdict.OK if is_up else Verdict.WARN,
        found=", ".join(f"{port} {state}" for port, state in states.items()) or devices[0],
        meaning="seen, and not used: this version moves no bytes by RDMA",
        action=""
        if is_up
        else "no port is ACTIVE: ask ibstat for the cable and the subnet manager",
    )


def shared_memory_folder(host: Host) -> Finding:
    """Where named shared memory lies, which pools have no need of."""
    there = host.path(SHARED_MEMORY).is_dir()
    return Finding(
        name=SHARED_MEMORY,
        verdict=Verdict.OK if there else Verdict.ABSENT,
        found="there" if there else "not there",
        meaning="not used: pools are memfds, which its size does not bound; the memory's does",
    )


def sockets_folder(parents: Callable[[], Path | None] = socket_directory) -> Finding:
    """A place for Unix sockets with a path that is short enough."""
    parent = parents()
    return Finding(
        name="sockets",
        verdict=Verdict.FAIL if parent is None else Verdict.OK,
        found="no usable folder" if parent is None else str(parent),
        meaning="`snowskin up` makes its private folder for doors there",
        action=""
        if parent
        else "set XDG_RUNTIME_DIR or TMPDIR to a writable folder, its path under 70 bytes",
    )


def disk(folder: Path, *, what: str, meaning: str) -> Finding:
    """Room on the disk of a folder, or of the nearest one above it that exists."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    if not writable or free < NO_DISK_NBYTES:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.OK if free >= LITTLE_DISK_NBYTES else Verdict.WARN
    return Finding(
        name=f"disk, {what}",
        verdict=verdict,
        found=f"{_gib(free)} free at {place}" + ("" if writable else ", not writable"),
        meaning=meaning,
        action="" if verdict is Verdict.OK else "free some room, or choose another place: TMPDIR=",
    )


def temporary_folder() -> Path:
    """Where logs and sockets of `snowskin up` go, if nothing else is said."""
    return Path(tempfile.gettempdir())


def is_free(host: str, port: int) -> str:
    """Whether a server could listen: the empty text, or what the system says against it."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except OSError as error:
        return "taken" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return ""


def ports(
    host: Host,
    wanted: Sequence[tuple[str, str, int]],
    attempt: Callable[[str, int], str] = is_free,
) -> Finding:
    """Whether the configured ports can be taken.

    Args:
        host: to look at.
        wanted: what it is for, address, port; port 0 takes any and is left out.
        attempt: "" where a server could listen.
    """
    fixed = [each for each in wanted if each[2]]
    troubles = [
        f"{what} {where}:{port} {word}"
        for what, where, port in fixed
        if (word := attempt(where, port))
    ]
    low, high = ephemeral_range(host.read("/proc/sys/net/ipv4/ip_local_port_range") or "")
    inside = [f"{what} {port}" for what, _, port in fixed if low <= port <= high]
    if troubles:
        return Finding(
            name="ports",
            verdict=Verdict.FAIL,
            found="; ".join(troubles),
            meaning="the role would refuse to start",
            action="see who listens: ss -ltnp; or choose another port, 0 takes a free one",
        )
    if inside:
        return Finding(
            name="ports",
            verdict=Verdict.WARN,
            found=f"{', '.join(inside)} within {low} to {high}, where the kernel takes ports for clients",
            meaning="while the server is down, a client may be given its port, and it cannot come back",
            action=f"choose ports below {low}, or add them to net.ipv4.ip_local_reserved_ports",
        )
    shown = ", ".join(f"{what} {port}" for what, _, port in fixed) or "none is fixed"
    return Finding(
        name="ports", verdict=Verdict.OK, found=f"{shown}: free", meaning="servers can listen"
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"

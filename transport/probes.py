"""What each transport could do here, tried once when a process starts.

Rules kept here: a probe does what the transport will do, on a small scale, and gives it back: it
does not ask a version where it can try; it never raises, and says what is missing and what to do;
nothing slow or large is loaded unless the scheme was asked for, and torch never.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.choice import (
    CUDA_IPC_KIND,
    GPUDIRECT_KIND,
    GRPC,
    LOOPBACK,
    RDMA_KIND,
    SHM,
    TCP,
    UCX,
    TransportProbe,
)
from snowskin.transport.host_probe import HostFiles, boot_id, namespace_id
from snowskin.transport.routes import is_everywhere
from snowskin.transport.verbs_probe import load_verbs, registered_page

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from snowskin.transport.addresses import Address
    from snowskin.transport.topology import HostFacts

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NVIDIA = "0x10de"
MAX_MAPS_NBYTES = 16 << 20


def own_identity(files: HostFiles | None = None) -> HostIdentity:
    """Who this process is, for an advertisement; a forked child is another process."""
    return HostIdentity(
        host=boot_id(files),
        process=_process_id(os.getpid()),
        pid_namespace=namespace_id("pid", files),
        net_namespace=namespace_id("net", files),
    )


@functools.cache
def _process_id(_pid: int) -> bytes:
    return secrets.token_bytes(16)


def probe_transports(
    schemes: Collection[str],
    facts: HostFacts,
    *,
    bound: Sequence[Address] = (),
    files: HostFiles | None = None,
) -> dict[str, TransportProbe]:
    """Tries these schemes on this host; about a millisecond, with `ucx` up to a second.

    Args:
        schemes: that the operator allows.
        facts: of this host.
        bound: where tcp is to listen; nothing where this process only reads.
        files: where the UCX libraries' kernel side is looked for.
    """
    probes: dict[str, Callable[[], TransportProbe]] = {
        LOOPBACK: lambda: TransportProbe(scheme=LOOPBACK, available=True, reason="always there"),
        SHM: lambda: probe_shm(facts),
        UCX: lambda: probe_ucx(facts, files=files),
        TCP: lambda: probe_tcp(bound),
        GRPC: lambda: TransportProbe(scheme=GRPC, available=True, reason="the node's gRPC"),
    }
    return {scheme: probe() for scheme, probe in probes.items() if scheme in schemes}


def advertise(
    probes: Mapping[str, TransportProbe],
    *,
    addresses: Mapping[str, Sequence[AdvertisedAddress]] | None = None,
    extras: Mapping[str, bytes] | None = None,
    files: HostFiles | None = None,
) -> Advertisement:
    """What a node tells its peers: the schemes that work here.

    Args:
        probes: of this process.
        addresses: by scheme, as `routes.advertised` made them.
        extras: by scheme, what the transport itself needs, e.g. a UCX worker address.
        files: where this host's identity is read.
    """
    return Advertisement(
        identity=own_identity(files),
        schemes=tuple(
            SchemeAdvertisement(
                scheme=scheme,
                kinds=probe.kinds,
                addresses=tuple((addresses or {}).get(scheme, ())),
                extra=(extras or {}).get(scheme, b""),
            )
            for scheme, probe in probes.items()
            if probe.available and scheme in (SHM, UCX, TCP)
        ),
    )


def probe_shm(facts: HostFacts) -> TransportProbe:
    """Makes a sealed memfd of one page, tries to shrink it, opens it anew for reading, maps that."""
    pages = facts.huge_pages
    known = (
        ("huge pages for memfds", pages.shmem or "not known"),
        ("tmpfs with huge pages", ", ".join(path for path, _ in pages.mounts) or "none"),
    )
    step = "memfd_create"
    try:
        descriptor = os.memfd_create("snowskin-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            step = "fallocate"
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
            step = "seals"
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            if not _refuses_to_shrink(descriptor):
                return TransportProbe(
                    scheme=SHM,
                    available=False,
                    reason="a sealed memfd can be made smaller: readers could be killed by that",
                    remedy="use another kernel or sandbox",
                    facts=known,
                )
            step = "opening it for reading through /proc/self/fd"
            reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                step = "mapping it"
                mmap.mmap(reader, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ).close()
            finally:
                os.close(reader)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError) as error:
        return TransportProbe(
            scheme=SHM,
            available=False,
            reason=f"{step} does not work here: {error}",
            remedy="needs Linux 3.17 or newer, /proc mounted, and a sandbox that lets memfd_create through",
            facts=known,
        )
    return TransportProbe(
        scheme=SHM,
        available=True,
        reason="a sealed memfd was made, opened for reading and mapped",
        facts=known,
    )


def _refuses_to_shrink(descriptor: int) -> bool:
    try:
        os.ftruncate(descriptor, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def probe_tcp(bound: Sequence[Address]) -> TransportProbe:
    """Binds a port that nobody uses at each of these hosts; without any, opens a socket."""
    hosts = list(dict.fromkeys(address.host for address in bound))
    families = _families()
    known = (("families", ", ".join(families) or "none"),)
    failures = {host: failure for host in hosts if (failure := _why_not_bound(host))}
    if not families or failures:
        reason = "; ".join(f"{host or '*'}: {why}" for host, why in failures.items())
        return TransportProbe(
            scheme=TCP,
            available=False,
            reason=f"no port can be bound at {reason}" if failures else "no sockets of TCP here",
            remedy="give addresses that this host has (`ip addr`), or 0.0.0.0 or :: for all of them",
            facts=known,
        )
    spread = [host or "*" for host in hosts if is_everywhere(host)]
    return TransportProbe(
        scheme=TCP,
        available=True,
        reason=(
            f"a port was bound at {', '.join(host or '*' for host in hosts)}"
            + (", every address of this host" if spread else "")
            if hosts
            else "a socket was opened; this process only reads"
        ),
        facts=known,
    )


def _families() -> list[str]:
    """Of IPv4 and IPv6, those in which this host's own loopback address can be bound."""
    found = []
    for name, family, host in (
        ("IPv4", socket.AF_INET, "127.0.0.1"),
        ("IPv6", socket.AF_INET6, "::1"),
    ):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((host, 0))
        except OSError:
            continue
        found.append(name)
    return found


def _why_not_bound(host: str) -> str:
    """Empty where a socket could be bound there. Resolves a name, as the transport will."""
    try:
        found = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        return str(error)
    return ""


def why_no_ucx() -> str | None:
    """Asks the UCX bindings; None where UCX can be used. Loads the library."""
    from snowskin.transport.ucp.binding import why_unavailable

    return why_unavailable()


def probe_ucx(
    facts: HostFacts,
    *,
    files: HostFiles | None = None,
    why_not: Callable[[], str | None] = why_no_ucx,
    verbs: Callable[[], Any | None] = load_verbs,
) -> TransportProbe:
    """Loads UCX; where there are active RDMA ports, registers a page; looks for GPUs.

    Args:
        facts: of this host.
        files: where the loaded libraries are looked up.
        why_not: why UCX cannot be used, or None.
        verbs: libibverbs, or None.
    """
    files = files or HostFiles()
    missing = why_not()
    if missing is not None:
        return TransportProbe(
            scheme=UCX,
            available=False,
            reason=missing,
            remedy="pip install 'snowskin[ucx]', where RDMA or GPUs are to be used",
        )
    modules = _ucx_modules(files)
    kinds, known = _rdma(facts, modules, verbs)
    gpu_kinds, gpu_known = _gpus(facts, files, modules, has_rdma=bool(kinds))
    kinds, known = (*kinds, *gpu_kinds), (*known, *gpu_known)
    return TransportProbe(
        scheme=UCX,
        available=True,
        reason=f"UCX was loaded; its hardware here: {', '.join(kinds) or 'none'}",
        kinds=kinds,
        facts=known,
    )


Facts = tuple[tuple[str, str], ...]


def _rdma(
    facts: HostFacts, modules: list[str], verbs: Callable[[], Any | None]
) -> tuple[tuple[str, ...], Facts]:
    """Link layers over which a page could be registered, and what each port said."""
    active = [device for device in facts.rdma_devices if device.is_active]
    if not active:
        found = f"none active of {len(facts.rdma_devices)}" if facts.rdma_devices else "none"
        return (), (("RDMA ports", found),)
    if not any(module.startswith("libuct_ib") for module in modules):
        # As UCX in wheels: they are built without rdma-core (rapidsai/ucxx issue 737).
        said = f"{len(active)} active, but this UCX has no module libuct_ib: use the system's UCX"
        return (), (("RDMA ports", said),)
    library = verbs()
    if library is None:
        return (), (("RDMA ports", f"{len(active)} active, but libibverbs is not installed"),)
    registered = registered_page(library)
    layers, known = [], []
    for device in active:
        failure = registered.get(device.name, "libibverbs does not list it")
        known.append((f"{device.name}:{device.port}", failure or "registered one page"))
        if not failure and device.link_layer:
            layers.append(f"{RDMA_KIND}{device.link_layer}")
    return tuple(dict.fromkeys(layers)), tuple(known)


def _gpus(
    facts: HostFacts, files: HostFiles, modules: list[str], *, has_rdma: bool
) -> tuple[tuple[str, ...], Facts]:
    """What of CUDA can be told without loading it; torch is asked only if somebody imported it."""
    num_gpus = sum(gpu.vendor == _NVIDIA for gpu in facts.gpus)
    if not num_gpus:
        return (), (
            ("GPUs", f"none of NVIDIA's, {len(facts.gpus)} others" if facts.gpus else "none"),
        )
    known = [("GPUs", f"{num_gpus} of NVIDIA's"), ("torch", _torch_says())]
    has_driver = bool(files.names("/proc/driver/nvidia/gpus"))
    if not has_driver:
        known.append(("CUDA driver", "not in this kernel or container"))
        return (), tuple(known)
    known.append(("CUDA driver", "loaded"))
    kinds = []
    if any(module.startswith("libuct_cuda") for module in modules):
        kinds.append(CUDA_IPC_KIND)
    else:
        known.append(("CUDA in UCX", "its modules libuct_cuda are not beside it"))
    if kinds and has_rdma and files.names("/sys/module/nvidia_peermem"):
        kinds.append(GPUDIRECT_KIND)
    elif has_rdma:
        known.append(("GPUDirect", "nvidia_peermem is not loaded; dmabuf was not tried"))
    return tuple(kinds), tuple(known)


def _torch_says() -> str:
    torch = sys.modules.get("torch")
    if torch is None:
        return "not imported, not asked"
    try:
        return f"{torch.cuda.device_count()} CUDA devices"
    except (AttributeError, RuntimeError) as error:
        return f"CUDA cannot be used: {error}"


def _ucx_modules(files: HostFiles) -> list[str]:
    """What lies in the folder of modules beside the libucp that this process has loaded."""
    for line in files.text("/proc/self/maps", MAX_MAPS_NBYTES).splitlines():
        folder, _, name = line.partition("/")[2].rpartition("/")
        if name.startswith("libucp"):
            return files.names(f"/{folder}/ucx")
    return []

"""Which transport carries an extent, over which paths, and why not the others. Pure.

Rules kept here: same process, then same host, then GPU to GPU, then RDMA, then tcp, then the
store's gRPC stream; a scheme that was asked for by name is taken or it is an error that says what is
missing and what to do, never another one in silence; what is not known of a peer counts as absent.

Memory of a GPU is carried by `ucx` only: the others move host memory, and whoever holds GPU memory
copies it there first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.transport.advertisement import HostIdentity
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.routes import paths_between
from snowskin.transport.topology import HostFacts, Place, ranked_rdma

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from snowskin.transport.advertisement import Advertisement, SchemeAdvertisement
    from snowskin.transport.paths import Path

AUTO = "auto"
LOOPBACK, SHM, UCX, TCP, GRPC = SCHEMES = ("loopback", "shm", "ucx", "tcp", "grpc")

RDMA_KIND = "rdma:"  # with the link layer behind it: two of one layer reach each other
GPUDIRECT_KIND = "gpudirect"
CUDA_IPC_KIND = "cuda_ipc"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportProbe:
    """What trying a scheme at the start of this process showed.

    Attributes:
        reason: what was tried and found; where it is not available, what is missing.
        remedy: what to do about it; empty where it is available.
        kinds: what its hardware can do, as an advertisement tells it.
        facts: numbers and names worth showing.
    """

    scheme: str
    available: bool
    reason: str
    remedy: str = ""
    kinds: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSide:
    """What this process knows of itself.

    Attributes:
        probes: by scheme.
        trusted_network: the operator declares that whoever reaches this network may read this
            process's memory: UCX then moves one-sided without hardware that checks.
    """

    identity: HostIdentity = field(default_factory=HostIdentity)
    facts: HostFacts = field(default_factory=HostFacts)
    probes: Mapping[str, TransportProbe]
    trusted_network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEnd:
    """Memory at one end of a transfer.

    Attributes:
        gpu: PCI address of the GPU that it belongs to; empty for host memory.
        place: NUMA node of host memory, if known; of a GPU, its place if it is this host's.
        is_shareable: it is a memfd whose owner passes the descriptor.
    """

    gpu: str = ""
    place: Place = field(default_factory=Place)
    is_shareable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Encounter:
    """Two ends that are to exchange bytes.

    Attributes:
        peer: what its node published; None where it said nothing.
        has_local_door: this process speaks with the node by its Unix socket, which passes descriptors.
        has_grpc: it reaches the node's gRPC.
    """

    own: OwnSide
    peer: Advertisement | None
    local: MemoryEnd = MemoryEnd()
    remote: MemoryEnd = MemoryEnd(is_shareable=True)
    has_local_door: bool = False
    has_grpc: bool = True

    @property
    def peer_identity(self) -> HostIdentity:
        """Unknown where the peer said nothing."""
        return self.peer.identity if self.peer is not None else HostIdentity()


@dataclass(frozen=True, slots=True, kw_only=True)
class NotTaken:
    """Why a scheme was not taken, and what would change that; `remedy` may be empty."""

    scheme: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How an extent travels.

    Attributes:
        via: for `ucx`: `cuda_ipc`, `gpudirect`, `rdma`, `messages` (the owner validates each request) or
            `emulated` (one-sided over tcp, in a trusted network); else empty.
        paths: for `tcp`, the preferred group first.
        devices: for RDMA, `device:port`, the nearest to the memory first.
        reason: why this one.
        not_taken: the other schemes, in the order in which they would have been.
    """

    scheme: str
    via: str = ""
    paths: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ()
    reason: str
    not_taken: tuple[NotTaken, ...] = ()


def choose(meeting: Encounter, wanted: str = AUTO) -> Choice:
    """The first scheme that can carry it, or the one that was asked for.

    Raises:
        TransportUnavailable: the scheme asked for is unknown or cannot be had here; or, for `auto`,
            none can.
    """
    if wanted != AUTO and wanted not in SCHEMES:
        raise TransportUnavailable(
            f"there is no transport {wanted!r}", hint=f"known are {', '.join(SCHEMES)}, {AUTO}"
        )
    by_name = wanted != AUTO
    verdicts = {scheme: _RULES[scheme](meeting, by_name and scheme == wanted) for scheme in SCHEMES}
    if by_name:
        verdict = verdicts.pop(wanted)
        if isinstance(verdict, NotTaken):
            raise TransportUnavailable(
                f"transport {wanted} was asked for and cannot be had: {verdict.reason}",
                hint=verdict.remedy or "ask for another one, or for auto",
            )
        rest = tuple(
            other
            if isinstance(other, NotTaken)
            else NotTaken(scheme=other.scheme, reason=f"{wanted} was asked for by name")
            for other in verdicts.values()
        )
        return _with(verdict, rest, reason=f"asked for by name; {verdict.reason}")
    taken = next((one for one in verdicts.values() if isinstance(one, Choice)), None)
    if taken is None:
        refused = [one for one in verdicts.values() if isinstance(one, NotTaken)]
        raise TransportUnavailable(
            "no transport can carry this: "
            + "; ".join(f"{one.scheme}: {one.reason}" for one in refused),
            hint=next((one.remedy for one in refused if one.remedy), ""),
        )
    rest = tuple(
        other
        if isinstance(other, NotTaken)
        else NotTaken(scheme=other.scheme, reason=f"{taken.scheme} comes before it")
        for other in verdicts.values()
        if other is not taken
    )
    return _with(taken, rest, reason=taken.reason)


def _with(choice: Choice, not_taken: tuple[NotTaken, ...], *, reason: str) -> Choice:
    return Choice(
        scheme=choice.scheme,
        via=choice.via,
        paths=choice.paths,
        devices=choice.devices,
        reason=reason,
        not_taken=not_taken,
    )


def _loopback(meeting: Encounter, _: bool) -> Choice | NotTaken:
    if refused := _not_here(LOOPBACK, meeting.own):
        return refused
    if not meeting.own.identity.same_process(meeting.peer_identity):
        return NotTaken(scheme=LOOPBACK, reason="another process")
    if refused := _host_memory_only(LOOPBACK, meeting):
        return refused
    return Choice(scheme=LOOPBACK, reason="the same process")


def _shm(meeting: Encounter, _: bool) -> Choice | NotTaken:
    if refused := _not_here(SHM, meeting.own) or _host_memory_only(SHM, meeting):
        return refused
    if not meeting.has_local_door:
        if meeting.own.identity.same_host(meeting.peer_identity):
            return NotTaken(
                scheme=SHM,
                reason="the same host, but no local door of the node, which would pass its memory",
                remedy="let both see the door's socket, e.g. by a shared volume, and name it with --door",
            )
        return NotTaken(
            scheme=SHM,
            reason="another host"
            if meeting.peer is not None
            else "no local door, and the peer does not say on which host it is",
            remedy="memory is mapped on one host only",
        )
    if not meeting.remote.is_shareable:
        return NotTaken(scheme=SHM, reason="the extent is not in memory that its owner can pass")
    return Choice(scheme=SHM, reason="the same host, and its local door passes the memory")


def _ucx(meeting: Encounter, by_name: bool) -> Choice | NotTaken:
    if refused := _not_here(UCX, meeting.own):
        return refused
    theirs = _told(UCX, meeting)
    if isinstance(theirs, NotTaken):
        return theirs
    ours = meeting.own.probes[UCX].kinds
    gpus = [end.gpu for end in (meeting.local, meeting.remote) if end.gpu]
    if len(gpus) == 2 and meeting.own.identity.same_host(meeting.peer_identity):
        missing = _why_no_cuda_ipc(meeting, ours, theirs)
        if not missing:
            return Choice(scheme=UCX, via="cuda_ipc", reason="two GPUs of one host, by CUDA IPC")
    else:
        missing = "two GPUs of one host are needed for CUDA IPC"
    shared = [kind for kind in ours if kind.startswith(RDMA_KIND) and kind in theirs.kinds]
    devices = _devices(meeting, shared)
    if gpus:
        if shared and GPUDIRECT_KIND in ours and GPUDIRECT_KIND in theirs.kinds:
            reason = (
                f"GPU memory over {shared[0].removeprefix(RDMA_KIND)}, without the host's memory"
            )
            return Choice(scheme=UCX, via="gpudirect", devices=devices, reason=reason)
        why_no_rdma = _why_no_rdma(ours, theirs) or "GPUDirect is not available on both sides"
        return NotTaken(
            scheme=UCX,
            reason=f"GPU memory: {missing}; {why_no_rdma}",
            remedy="copy to host memory first, or load nvidia_peermem on both hosts",
        )
    if shared:
        reason = f"both have {shared[0].removeprefix(RDMA_KIND)}, whose NICs check each access"
        return Choice(scheme=UCX, via="rdma", devices=devices, reason=reason)
    why_not = _why_no_rdma(ours, theirs)
    if not by_name:
        return NotTaken(
            scheme=UCX,
            reason=f"{why_not}; without it UCX is slower than tcp",
            remedy="ask for ucx by name to use it over other networks",
        )
    if meeting.own.trusted_network:
        return Choice(scheme=UCX, via="emulated", reason=f"{why_not}, and the network is trusted")
    return Choice(scheme=UCX, via="messages", reason=f"{why_not}: its owner validates each request")


def _tcp(meeting: Encounter, _: bool) -> Choice | NotTaken:
    if refused := _not_here(TCP, meeting.own) or _host_memory_only(TCP, meeting):
        return refused
    theirs = _told(TCP, meeting)
    if isinstance(theirs, NotTaken):
        return theirs
    paths = paths_between(
        meeting.own.facts,
        meeting.local.place,
        theirs.addresses,
        same_network=meeting.own.identity.same_network(meeting.peer_identity),
    )
    if not paths:
        hosts = ", ".join(str(row.address) for row in theirs.addresses) or "no address"
        return NotTaken(
            scheme=TCP,
            reason=f"the peer advertises {hosts}, which does not lead there from this host",
            remedy="have the peer advertise an address that is reached from other hosts",
        )
    num_preferred = sum(path.is_preferred for path in paths)
    return Choice(
        scheme=TCP,
        paths=paths,
        reason=f"the peer serves it at {num_preferred} preferred "
        f"and {len(paths) - num_preferred} other addresses of its host",
    )


def _grpc(meeting: Encounter, _: bool) -> Choice | NotTaken:
    if refused := _host_memory_only(GRPC, meeting):
        return refused
    if not meeting.has_grpc:
        return NotTaken(scheme=GRPC, reason="the node's gRPC is not reached from here")
    return Choice(scheme=GRPC, reason="the slow path that every node has: its Read stream")


_RULES: dict[str, Callable[[Encounter, bool], Choice | NotTaken]] = {
    LOOPBACK: _loopback,
    SHM: _shm,
    UCX: _ucx,
    TCP: _tcp,
    GRPC: _grpc,
}


def _not_here(scheme: str, own: OwnSide) -> NotTaken | None:
    probe = own.probes.get(scheme)
    if probe is None:
        return NotTaken(
            scheme=scheme,
            reason="it was not tried when this process started",
            remedy="allow it in the settings",
        )
    if not probe.available:
        return NotTaken(scheme=scheme, reason=probe.reason, remedy=probe.remedy)
    return None


def _told(scheme: str, meeting: Encounter) -> SchemeAdvertisement | NotTaken:
    if meeting.peer is None:
        return NotTaken(
            scheme=scheme,
            reason="the peer says nothing of its transports",
            remedy="run a release of Snowskin there that does",
        )
    return meeting.peer.scheme(scheme) or NotTaken(
        scheme=scheme,
        reason=f"the peer does not offer {scheme}",
        remedy="`kvctl transports` says why not",
    )


def _host_memory_only(scheme: str, meeting: Encounter) -> NotTaken | None:
    gpus = [end.gpu for end in (meeting.local, meeting.remote) if end.gpu]
    if not gpus:
        return None
    return NotTaken(
        scheme=scheme,
        reason=f"it moves host memory, and this is of GPU {' and '.join(gpus)}",
        remedy="copy to host memory first",
    )


def _why_no_cuda_ipc(meeting: Encounter, ours: tuple[str, ...], theirs: SchemeAdvertisement) -> str:
    """Empty where nothing speaks against it.

    Legacy IPC handles do not cross PID namespaces, and a process cannot open its own (UCX pull
    requests 11514 and 11600).
    """
    if meeting.own.identity.same_process(meeting.peer_identity):
        return "a process cannot open its own CUDA IPC handle: copy on the device"
    if CUDA_IPC_KIND not in ours or CUDA_IPC_KIND not in theirs.kinds:
        return "CUDA IPC is not available on both sides"
    if not meeting.own.identity.same_pids(meeting.peer_identity):
        return "CUDA IPC does not cross PID namespaces"
    return ""


def _why_no_rdma(ours: tuple[str, ...], theirs: SchemeAdvertisement) -> str:
    here = [kind.removeprefix(RDMA_KIND) for kind in ours if kind.startswith(RDMA_KIND)]
    there = [kind.removeprefix(RDMA_KIND) for kind in theirs.kinds if kind.startswith(RDMA_KIND)]
    if here and there:
        return f"RDMA is {' and '.join(here)} here, {' and '.join(there)} there"
    if here or there:
        return f"no RDMA {'there' if here else 'here'}"
    return "no RDMA on either side"


def _devices(meeting: Encounter, shared: list[str]) -> tuple[str, ...]:
    """Ports of a layer that both have, the nearest to this end's memory first."""
    layers = {kind.removeprefix(RDMA_KIND) for kind in shared}
    gpu = meeting.own.facts.gpu(meeting.local.gpu)
    place = gpu.place if gpu is not None else meeting.local.place
    return tuple(
        f"{device.name}:{device.port}"
        for device, _ in ranked_rdma(meeting.own.facts, place)
        if device.link_layer in layers
    )

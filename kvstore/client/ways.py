"""By which transport the bytes of one node's extents travel, and why.

Rules kept here: `transport.choice` decides, this brings it what the node told and what this host
has; a lease is asked for no scheme
that nothing here would take; what was decided is said once, when a node is met. No I/O.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.advertisement import Advertisement
from snowskin.transport.choice import (
    CUDA_IPC_KIND,
    GPUDIRECT_KIND,
    LOOPBACK,
    SHM,
    UCX,
    Choice,
    Encounter,
    MemoryEnd,
    choose,
)
from snowskin.transport.errors import BadDescriptor, TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection

    from snowskin.kvstore.messages import NodeStat
    from snowskin.transport.choice import OwnSide
    from snowskin.transport.memory import MemoryRegion

HOST_MEMORY = MemoryEnd()
A_GPU = MemoryEnd(gpu="of this host")  # CUDA's number of it says not which
BY_THE_DOOR = Choice(scheme=SHM, reason="the node's local door opened: it is on this host")

log = get_logger(__name__)


class Ways:
    """How extents of one node travel.

    Attributes:
        choice: for what lies in host memory at both ends.
        schemes: what leases are asked for, the one of `choice` first; empty where bytes go by gRPC.
    """

    def __init__(self, meeting: Encounter, wanted: str, *, served: Collection[str]) -> None:
        """Chooses, for host memory and for this host's GPUs.

        Args:
            meeting: of this process and the node, host memory at both ends.
            wanted: `auto`, or the scheme that was demanded.
            served: by the node's data plane.

        Raises:
            TransportUnavailable: the scheme that was demanded cannot be had.
        """
        self._meeting = meeting
        self._wanted = wanted
        self._known: dict[tuple[frozenset[str], MemoryEnd], Choice] = {}
        self.choice = choose(meeting, wanted)
        chosen = [self.choice.scheme]
        if _reaches_gpus(meeting.own):
            # Without it, what lies there is copied to host memory first.
            with contextlib.suppress(TransportUnavailable):
                chosen.append(choose(replace(meeting, local=A_GPU), wanted).scheme)
        self.schemes = tuple(scheme for scheme in dict.fromkeys(chosen) if scheme in served)

    def of_extent(self, offered: Collection[str], local: MemoryRegion) -> Choice:
        """How one extent travels, by what was opened for it and where this end of it lies.

        Raises:
            TransportUnavailable: by none of `offered`.
        """
        end = HOST_MEMORY if local.device_index is None else A_GPU
        key = frozenset(offered), end
        choice = self._known.get(key)
        if choice is None:
            probes = {
                scheme: probe
                for scheme, probe in self._meeting.own.probes.items()
                if scheme in offered
            }
            meeting = replace(
                self._meeting,
                own=replace(self._meeting.own, probes=probes),
                local=end,
                has_grpc=False,
            )
            choice = self._known[key] = choose(meeting, self._wanted)
        return choice


def told_by(stat: NodeStat, *, node: str) -> Advertisement | None:
    """What a node tells of its transports; None where it tells nothing, or nothing that this release reads."""
    if not stat.advertisement:
        return None
    try:
        return Advertisement.from_bytes(stat.advertisement)
    except BadDescriptor as error:
        log.warning("what a node tells of its transports is not read", node=node, error=str(error))
        return None


def log_way(choice: Choice, *, node: str) -> None:
    """One line for each node that is met."""
    log.info(
        "way to node",
        node=node,
        scheme=choice.scheme,
        via=choice.via,
        paths=[path.name for path in choice.paths],
        reason=choice.reason,
        not_taken="; ".join(
            f"{one.scheme}: {one.reason}" for one in choice.not_taken if one.scheme != LOOPBACK
        ),
    )


def _reaches_gpus(own: OwnSide) -> bool:
    probe = own.probes.get(UCX)
    return probe is not None and not {GPUDIRECT_KIND, CUDA_IPC_KIND}.isdisjoint(probe.kinds)

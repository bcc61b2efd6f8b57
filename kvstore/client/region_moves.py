"""Moves under a lease's regions: what the data plane opened for it is attached, used once, and let go.

Rules kept here: when a move returns or raises, cancelled or not, nothing of it lands in local memory any more. What a
transport says went wrong is said as gRPC would say it, so that whoever judges nodes by their errors need not know how
the bytes came.

The regions live as long as the lease, which others renew: the owner looks at that before every piece, so this side
does not count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.kvstore.errors import (
    DeadlineExceeded,
    LeaseExpired,
    LeaseUnknown,
    NodeUnavailable,
    ProtocolViolation,
)
from snowskin.kvstore.messages import CommitRequest, MatchRequest, ReserveRequest
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.api import TransferControl
from snowskin.transport.choice import GRPC, Choice
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import (
    BadDescriptor,
    BadFrame,
    GrantRefused,
    PeerLost,
    RegionExpired,
    TransferCancelled,
    TransferTimedOut,
    TransportClosed,
    TransportUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from snowskin.kvstore.client.machine import Move
    from snowskin.kvstore.client.transports import ClientTransports
    from snowskin.kvstore.client.ways import Ways
    from snowskin.kvstore.messages import GrantedRegion, NodeStat, Request
    from snowskin.transport.api import RemoteRegion, Transport
    from snowskin.transport.memory import MemoryRegion
    from snowskin.transport.runs import Run

SETTLE_LOOK_S = 0.002
BY_GRPC = Choice(scheme=GRPC, reason="nothing else may be used")

log = get_logger(__name__)


class RegionMoves:
    """Moves of one connection to a node."""

    def __init__(self, transports: ClientTransports, *, node: str) -> None:
        """`transports` stay their owner's; `node` is named in errors."""
        self._transports = transports
        self._node = node
        self._ways: Ways | None = None
        self._controls: set[TransferControl] = set()
        self._closed = False

    @property
    def way(self) -> Choice:
        """How what lies in host memory travels, and why."""
        return BY_GRPC if self._ways is None else self._ways.choice

    def meet(self, stat: NodeStat) -> None:
        """The node says this of itself; may take as long as `ClientTransports.ways_to`.

        Raises:
            TransportUnavailable: what was demanded cannot be had.
        """
        self._ways = self._transports.ways_to(stat, node=self._node)

    def naming_schemes(self, request: Request) -> Request:
        """The request; where its answer brings, or ends, what the data plane opens, with what this side can use."""
        schemes = () if self._ways is None else self._ways.schemes
        if schemes and isinstance(request, MatchRequest | ReserveRequest | CommitRequest):
            return replace(request, schemes=schemes)
        return request

    async def move(self, step: Move) -> None:
        """Carries a move out, on the transport's threads."""
        deadline_s = time.monotonic() + step.timeout_s
        with self._translating():
            for transport, remote, runs in self._attached(step):
                with contextlib.closing(remote), self._controlled() as control:
                    if step.is_push:
                        moving = transport.push_async(
                            step.local, remote, runs, deadline_s=deadline_s, landed=step.landed,
                            traffic=step.traffic, control=control,
                        )  # fmt: skip
                    else:
                        moving = transport.pull_async(
                            remote, step.local, runs, deadline_s=deadline_s, landed=step.landed,
                            traffic=step.traffic, control=control,
                        )  # fmt: skip
                    await until_settled(moving, step.local)

    def move_blocking(self, step: Move) -> None:
        """Carries a move out, on the calling thread."""
        deadline_s = time.monotonic() + step.timeout_s
        with self._translating():
            for transport, remote, runs in self._attached(step):
                with contextlib.closing(remote), self._controlled() as control:
                    if step.is_push:
                        transport.push(
                            step.local, remote, runs, deadline_s=deadline_s, landed=step.landed,
                            traffic=step.traffic, control=control,
                        )  # fmt: skip
                    else:
                        transport.pull(
                            remote, step.local, runs, deadline_s=deadline_s, landed=step.landed,
                            traffic=step.traffic, control=control,
                        )  # fmt: skip

    def close(self) -> None:
        """Ends the moves under way with NodeUnavailable, from any thread; idempotent."""
        self._closed = True
        for control in list(self._controls):
            control.cancel()

    def _attached(self, step: Move) -> Iterator[tuple[Transport, RemoteRegion, list[Run]]]:
        """For each part of a move the transport, the region, and what to move; the caller closes the region."""
        regions = {region.pool_id: region for region in step.lease.regions}
        for pool_id, runs in step.runs:
            region = regions.get(pool_id)
            if region is None:
                raise ProtocolViolation(
                    f"lease {step.lease.id} of {self._node} opens nothing of pool {pool_id}, where its blocks are"
                )
            transport, descriptor = self._chosen(region, step.local)
            # Its life is the lease's: see above.
            lasting = replace(descriptor, expires_in_s=math.inf)
            yield transport, transport.attach(lasting, writable=step.is_push), runs

    def _chosen(
        self, region: GrantedRegion, local: MemoryRegion
    ) -> tuple[Transport, RegionDescriptor]:
        """By what the bytes of this region travel to or from `local`."""
        by_scheme = {
            descriptor.scheme: descriptor
            for descriptor in map(RegionDescriptor.from_bytes, region.descriptors)
        }
        try:
            if self._ways is not None:
                scheme = self._ways.of_extent(by_scheme, local).scheme
                return self._transports.get(scheme), by_scheme[scheme]
        except TransportUnavailable as error:
            raise ProtocolViolation(
                f"{self._node} opened pool {region.pool_id} by {', '.join(by_scheme) or 'nothing'}, "
                f"not by what can be used: {error.message}",
                hint=error.hint,
            ) from error
        raise ProtocolViolation(
            f"{self._node} opened pool {region.pool_id} by {', '.join(by_scheme) or 'nothing'}, unasked"
        )

    @contextlib.contextmanager
    def _controlled(self) -> Iterator[TransferControl]:
        """A block that makes one transfer, which `close` ends."""
        control = TransferControl()
        self._controls.add(control)
        try:
            if self._closed:
                control.cancel()
            yield control
        finally:
            self._controls.discard(control)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """A block whose errors are those of a call."""
        try:
            yield
        except (TransferCancelled, TransportClosed) as error:
            if not self._closed:  # then it is the caller's own region that was closed
                raise
            raise NodeUnavailable(
                f"the connection to {self._node} was closed during a copy", hint="connect again"
            ) from error
        except TransferTimedOut as error:
            raise DeadlineExceeded(
                f"{self._node} did not move the bytes in time: {error.message}",
                hint="it is stopped or overloaded",
            ) from error
        except PeerLost as error:
            raise NodeUnavailable(
                f"the data plane of {self._node} was lost: {error.message}", hint="connect again"
            ) from error
        except GrantRefused as error:
            raise LeaseUnknown(
                f"{self._node} serves nothing under this lease: {error.message}",
                hint="it ended, or the node restarted: match or reserve again",
            ) from error
        except RegionExpired as error:
            raise LeaseExpired(
                f"the lease ran out during the copy: {error.message}", hint="match or reserve again"
            ) from error
        except (BadDescriptor, BadFrame) as error:
            raise ProtocolViolation(
                f"{self._node} speaks another data plane: {error.message}", hint=error.hint
            ) from error


async def until_settled(moving: Awaitable[object], target: MemoryRegion) -> None:
    """Awaits a copy, and then what an interrupted one may still write into `target`.

    Its caller gives the bytes to others: a piece that is under way must be done first, however often the caller is
    cancelled meanwhile.
    """
    try:
        await moving
    finally:
        cancelled: asyncio.CancelledError | None = None
        while target.quarantined_nbytes and not target.closed:
            try:
                await asyncio.sleep(SETTLE_LOOK_S)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

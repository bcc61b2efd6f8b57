"""The gRPC door: the same requests for other hosts, and the slow path for bytes.

Rules kept here: a gRPC caller has no connection that could be its session (`peers`), so a lease's capability, a MAC
that only this node can make, is the right to it. What the data plane opens under a lease is granted in the same turn
of the loop as the lease, so that nothing can end the one and leave the other. Every chunk of Write and Read asks the
state again whether the lease still lives. A call that is cancelled stops waiting inside the state.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from snowskin.kvstore import tracing
from snowskin.kvstore.call_spans import facts_of_reply
from snowskin.kvstore.errors import BadRequest, CommitRefused, DeadlineExceeded, LeaseUnknown
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Committed,
    GrantedRegion,
    Lease,
    LeaseId,
    Matched,
    MatchRequest,
    ReleaseRequest,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
)
from snowskin.kvstore.node.peers import PeerSessions
from snowskin.kvstore.node.watching import Watchers, WatchLimits
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import reply_to, request_from
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import common_pb2, store_pb2, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import grpc.aio

    from snowskin.kvstore.index.block_index import PlacedSegment
    from snowskin.kvstore.messages import SessionId
    from snowskin.kvstore.node.shell import NodeShell

CHUNK_NBYTES = 1 << 20
CAPABILITY_NBYTES = 16
NO_ANSWER = 0  # as a call id: calls count from 1

log = get_logger(__name__)


@dataclass(slots=True)
class _Waiting:
    """A call whose answer has not come."""

    request: Request
    answered: asyncio.Future[ReplyMessage]


class StoreService(store_pb2_grpc.StoreServicer):
    """The Store service over one node's shell.

    Attributes:
        read_nbytes, written_nbytes: what went by the slow path.
    """

    def __init__(self, shell: NodeShell, watch_limits: WatchLimits | None = None) -> None:
        """Nobody has called yet."""
        self._shell = shell
        self.watchers = Watchers(shell, watch_limits)
        self._secret = secrets.token_bytes(32)
        self._calls = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self.read_nbytes = 0
        self.written_nbytes = 0
        self._peers = PeerSessions(shell, self._answer)

    def close(self) -> None:
        """Ends every session and every waiting call."""
        self._peers.close()
        for waiting in self._waiting.values():
            waiting.answered.cancel()
        self._waiting.clear()

    def _answer(self, call_id: int, reply: ReplyMessage | SnowskinError) -> None:
        waiting = self._waiting.pop(call_id, None)
        if waiting is None or waiting.answered.done():
            self._take_back(reply)
        elif isinstance(reply, SnowskinError):
            waiting.answered.set_exception(reply)
        else:
            waiting.answered.set_result(self._with_rights(waiting.request, reply))

    def _with_rights(self, request: Request, reply: ReplyMessage) -> ReplyMessage:
        """The reply, with what its caller needs to use a lease: its capability, and regions of the data plane."""
        match request, reply:
            case MatchRequest() | ReserveRequest(), Matched(lease=Lease() as lease) | Reserved(
                lease=Lease() as lease
            ):
                extents = [(r.extent.pool_id, r.extent.offset, r.extent.nbytes) for r in reply.runs]
                regions = self._open(request, lease.id, extents, lease.ttl_s)
                capability = self._capability(lease.id)
                return replace(reply, lease=replace(lease, capability=capability, regions=regions))
            case CommitRequest(), Committed() if reply.num_blocks_left:
                now_s = self._shell.clock.now_s()
                left, life_s = self._shell.state.left_to_write(request.lease_id, now_s)
                regions = self._open(request, request.lease_id, left, life_s)
                return replace(reply, regions=regions)
        return reply

    def _open(
        self,
        request: MatchRequest | ReserveRequest | CommitRequest,
        lease_id: LeaseId,
        extents: list[tuple[int, int, int]],
        life_s: float,
    ) -> tuple[GrantedRegion, ...]:
        """The regions of a lease on the data plane; none where it cannot open any: then bytes go the slow path."""
        return self._shell.data_plane.grant(
            lease_id,
            extents,
            request.schemes,
            writable=not isinstance(request, MatchRequest),
            life_s=life_s,
        )

    async def _call(self, session_id: SessionId, name: str, message: Any, response: Any) -> Any:
        request = request_from(name, message)
        call_id = next(self._calls)
        future: asyncio.Future[ReplyMessage] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = _Waiting(request, future)
        try:
            self._shell.request(session_id, call_id, request)
            reply = await future
        except asyncio.CancelledError:
            self._shell.cancel(session_id, call_id)
            if future.done() and not future.cancelled() and future.exception() is None:
                self._take_back(future.result())
            raise
        finally:
            self._waiting.pop(call_id, None)
            self._peers.done()
        if tracing.current() is not None:
            facts = facts_of_reply(reply)
            tracing.annotate(**facts)
            # As the local door's: the request's id is on the line already.
            log.info("call answered", answer=type(reply).__name__.lower(), **facts)
        reply_to(reply, response)
        return response

    def _take_back(self, reply: ReplyMessage | SnowskinError) -> None:
        """Ends the lease of an answer that was made in the same turn of the loop as its call was cancelled."""
        if not isinstance(reply, Matched | Reserved) or reply.lease is None:
            return
        lease_id = reply.lease.id
        unwanted: Request = AbortRequest(lease_id=lease_id)
        if isinstance(reply, Matched):
            unwanted = ReleaseRequest(lease_ids=(lease_id,))
        self._shell.request(self._peers.holder(lease_id), NO_ANSWER, unwanted)

    def _capability(self, lease_id: LeaseId) -> bytes:
        data = b"%d:%d" % (self._shell.state.epoch, lease_id)
        return hashlib.blake2b(data, key=self._secret, digest_size=CAPABILITY_NBYTES).digest()

    def _check(self, ref: common_pb2.LeaseRef) -> LeaseId:
        lease_id = LeaseId(ref.id)
        if not hmac.compare_digest(ref.capability, self._capability(lease_id)):
            raise LeaseUnknown(
                f"the capability does not belong to lease {ref.id} of this node's epoch",
                hint="send the capability that came with the lease, or ask for a new lease",
            )
        return lease_id

    def _by_holder(
        self, refs: Iterable[common_pb2.LeaseRef]
    ) -> dict[SessionId, list[common_pb2.LeaseRef]]:
        """Proven leases by the session that holds them, which is one, unless a caller has changed its name."""
        found: dict[SessionId, list[common_pb2.LeaseRef]] = {}
        for ref in refs:
            found.setdefault(self._peers.holder(self._check(ref)), []).append(ref)
        return found or {self._peers.common: []}

    # --- control; the generated names are the wire's

    async def Reserve(  # noqa: N802
        self, request: store_pb2.ReserveRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.ReserveResponse:
        """Room for a run of blocks."""
        response: store_pb2.ReserveResponse = await self._call(
            self._peers.caller(context), "reserve", request, store_pb2.ReserveResponse()
        )
        return response

    async def Commit(  # noqa: N802
        self, request: store_pb2.CommitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.CommitResponse:
        """Makes the next blocks visible."""
        holder = self._peers.holder(self._check(request.lease))
        response: store_pb2.CommitResponse = await self._call(
            holder, "commit", request, store_pb2.CommitResponse()
        )
        return response

    async def Abort(  # noqa: N802
        self, request: store_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.AbortResponse:
        """Gives a reservation's rest back."""
        holder = self._peers.holder(self._check(request.lease))
        response: store_pb2.AbortResponse = await self._call(
            holder, "abort", request, store_pb2.AbortResponse()
        )
        return response

    async def Probe(  # noqa: N802
        self, request: store_pb2.ProbeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.ProbeResponse:
        """What is here, without a lease."""
        response: store_pb2.ProbeResponse = await self._call(
            self._peers.common, "probe", request, store_pb2.ProbeResponse()
        )
        return response

    async def Match(  # noqa: N802
        self, request: store_pb2.MatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.MatchResponse:
        """The longest run, under a lease."""
        response: store_pb2.MatchResponse = await self._call(
            self._peers.caller(context), "match", request, store_pb2.MatchResponse()
        )
        return response

    async def Renew(  # noqa: N802
        self, request: store_pb2.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.RenewResponse:
        """Prolongs leases."""
        lives: dict[LeaseId, int] = {}
        for holder, refs in self._by_holder(request.leases).items():
            part = store_pb2.RenewRequest(leases=refs, ttl_ms=request.ttl_ms)
            renewed = await self._call(holder, "renew", part, store_pb2.RenewResponse())
            lives |= zip((LeaseId(ref.id) for ref in refs), renewed.ttl_ms, strict=True)
        return store_pb2.RenewResponse(ttl_ms=[lives[LeaseId(ref.id)] for ref in request.leases])

    async def Release(  # noqa: N802
        self, request: store_pb2.ReleaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.ReleaseResponse:
        """Ends read leases."""
        by_holder = self._by_holder(request.leases)
        held = {ref.id for ref in request.leases}
        for complaint in request.complaints:
            if complaint.lease_id not in held:
                raise BadRequest(
                    f"a complaint names lease {complaint.lease_id}, which the call does not release",
                    hint="complain in the call that releases the lease",
                )
        num_unknown = 0
        for holder, refs in by_holder.items():
            held = {ref.id for ref in refs}
            complaints = [c for c in request.complaints if c.lease_id in held]
            part = store_pb2.ReleaseRequest(leases=refs, complaints=complaints)
            released = await self._call(holder, "release", part, store_pb2.ReleaseResponse())
            num_unknown += released.num_unknown
        return store_pb2.ReleaseResponse(num_unknown=num_unknown)

    async def Stat(  # noqa: N802
        self, request: store_pb2.StatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> store_pb2.StatResponse:
        """Counts and sizes."""
        response: store_pb2.StatResponse = await self._call(
            self._peers.common, "stat", request, store_pb2.StatResponse()
        )
        return response

    async def Watch(  # noqa: N802
        self, request: store_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[store_pb2.WatchResponse]:
        """Block changes as they happen; written by hand, since a stream that stalls must be noticed."""
        await self.watchers.serve(request, context)
        nothing: tuple[store_pb2.WatchResponse, ...] = ()
        for message in nothing:  # what makes this a generator, as a stream has to be
            yield message

    # --- bytes, for clients without a transport

    async def Write(  # noqa: N802
        self,
        request_iterator: AsyncIterator[store_pb2.WriteRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> store_pb2.WriteResponse:
        """Writes chunks into a reservation; the first names the lease."""
        lease_id: LeaseId | None = None
        written_nbytes = 0
        async for chunk in _in_time(request_iterator, self._shell.state.limits.write_lease_s):
            if lease_id is None or chunk.HasField("lease"):
                lease_id = self._check(chunk.lease)
            if len(chunk.data) > CHUNK_NBYTES:
                raise BadRequest(
                    f"a chunk of {len(chunk.data)} bytes", hint=f"send at most {CHUNK_NBYTES}"
                )
            hold = self._shell.state.writable(lease_id, self._shell.clock.now_s())
            if chunk.offset < hold.num_committed * hold.blocks[0].segment.block_nbytes:
                raise CommitRefused(
                    f"bytes at {chunk.offset} are committed already", hint="write before you commit"
                )
            places = [(block.segment, block.offset) for block in hold.blocks]
            data = memoryview(chunk.data)
            for pool_id, start, skip, nbytes in _pieces(places, chunk.offset, len(data)):
                buffer = self._shell.arenas[pool_id].buffer
                buffer[start : start + nbytes].data[:] = data[skip : skip + nbytes]
            written_nbytes += len(data)
            self.written_nbytes += len(data)
        return store_pb2.WriteResponse(nbytes=written_nbytes)

    async def Read(  # noqa: N802
        self, request: store_pb2.ReadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[store_pb2.ReadResponse]:
        """Streams the bytes under a read lease; ends with the longest life that the lease can have."""
        lease_id = self._check(request.lease)
        call = asyncio.current_task()
        assert call is not None, "a servicer runs in a task"
        # A caller that does not read holds the stream up between two chunks, where nothing of ours runs.
        timer = asyncio.get_running_loop().call_later(
            self._shell.state.limits.lease_life_s, call.cancel
        )
        try:
            async for chunk in self._chunks(request, lease_id):
                yield chunk
        finally:
            timer.cancel()

    async def _chunks(
        self, request: store_pb2.ReadRequest, lease_id: LeaseId
    ) -> AsyncIterator[store_pb2.ReadResponse]:
        offset = request.offset
        end: int | None = None
        while end is None or offset < end:
            entries = self._shell.state.readable(
                lease_id, request.shard_index, self._shell.clock.now_s()
            )
            places = [(entry.segment, entry.offset) for entry in entries]
            if end is None:
                total = sum(segment.block_nbytes for segment, _ in places)
                end = offset + request.nbytes if request.nbytes else total
                if end > total or offset > total:
                    raise BadRequest(
                        f"bytes {offset} to {end} of a lease over {total}",
                        hint="stay inside the leased blocks",
                    )
                if offset == end:
                    return
            nbytes = min(CHUNK_NBYTES, end - offset)
            data = b"".join(
                self._shell.arenas[pool_id].buffer[start : start + length].tobytes()
                for pool_id, start, _, length in _pieces(places, offset, nbytes)
            )
            self.read_nbytes += nbytes
            yield store_pb2.ReadResponse(offset=offset, data=data)
            offset += nbytes


async def _in_time(
    chunks: AsyncIterator[store_pb2.WriteRequest], timeout_s: float
) -> AsyncIterator[store_pb2.WriteRequest]:
    """The chunks; one that is later than any lease would live ends the call, which is one of a bounded number."""
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded(
                f"no chunk came for {timeout_s} s", hint="send faster, or end the stream"
            ) from None
        yield chunk


def _pieces(
    places: list[tuple[PlacedSegment, int]], offset: int, nbytes: int
) -> list[tuple[int, int, int, int]]:
    """Where `nbytes` from `offset` of the blocks, laid end to end, lie.

    Returns:
        (pool, offset in the pool, offset in the asked range, bytes) in order; neighbours are joined.

    Raises:
        BadRequest: the range is longer than the blocks.
    """
    pieces: list[tuple[int, int, int, int]] = []
    if not places:
        raise BadRequest("the lease covers no blocks")
    block_nbytes = places[0][0].block_nbytes
    if offset + nbytes > block_nbytes * len(places):
        raise BadRequest(
            f"bytes {offset} to {offset + nbytes} of a lease over {block_nbytes * len(places)}",
            hint="stay inside the leased blocks",
        )
    done = 0
    while done < nbytes:
        index, inside = divmod(offset + done, block_nbytes)
        segment, start = places[index]
        length = min(block_nbytes - inside, nbytes - done)
        if pieces and pieces[-1][0] == segment.pool_id:
            pool_id, before, skip, count = pieces[-1]
            if before + count == start + inside:
                pieces[-1] = (pool_id, before, skip, count + length)
                done += length
                continue
        pieces.append((segment.pool_id, start + inside, done, length))
        done += length
    return pieces

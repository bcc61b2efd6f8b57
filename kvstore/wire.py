"""The only place where protobuf becomes our own values, and back.

Rules kept here: a field of the wire that cannot be understood raises BadRequest (from a client) before anything is
done; nothing here allocates more than the message itself. Milliseconds become seconds here and nowhere else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import DecodeError, Message

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.errors import BadRequest, ProtocolViolation, from_reason
from snowskin.kvstore.extent import Extent
from snowskin.kvstore.messages import (
    Aborted,
    AbortRequest,
    Access,
    BlockChange,
    CommitRequest,
    Committed,
    Complaint,
    GrantedRegion,
    Greeting,
    Lease,
    LeaseId,
    Matched,
    MatchRequest,
    NodeStat,
    PoolGrant,
    PoolStat,
    Probed,
    ProbeRequest,
    Released,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
    Run,
    SessionId,
    StatRequest,
    TailSpec,
    WakeReason,
    Watched,
    WatchRequest,
)
from snowskin.v1 import common_pb2, door_pb2, store_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.errors import SnowskinError

TIERS = {"hbm": common_pb2.TIER_HBM, "dram": common_pb2.TIER_DRAM, "nvme": common_pb2.TIER_NVME}
TIER_NAMES = {number: name for name, number in TIERS.items()}
CRC32C_KEYED = common_pb2.CHECKSUM_ALGORITHM_CRC32C_KEYED
EMPTY_KEYS = KeyColumn(packed=b"", width=32)
MAX_TIMEOUT_S = 2**31 / 1000

_MessageT = TypeVar("_MessageT", bound=Message)


def to_ms(seconds: float) -> int:
    """Relative milliseconds, rounded up: a wait is never shortened to nothing."""
    if seconds <= 0:
        return 0
    # Less a nanosecond: to a float, 1.001 s may be 1,001.0000000000001 ms.
    return max(1, math.ceil(min(seconds, MAX_TIMEOUT_S) * 1000 - 1e-6))


def parse(kind: type[_MessageT], data: bytes | memoryview) -> _MessageT:
    """`data` as a message; raises ProtocolViolation where it is none."""
    message = kind()
    try:
        message.ParseFromString(data)  # type: ignore[arg-type]
    except DecodeError as error:
        raise ProtocolViolation(
            f"{len(data)} bytes are not a {kind.__name__}", hint="check the wire version"
        ) from error
    return message


def keys_from(column: common_pb2.KeyColumn) -> KeyColumn:
    """The column, checked; an unset one is empty."""
    if not column.packed and not column.width:
        return EMPTY_KEYS
    return KeyColumn(packed=column.packed, width=column.width)


def _checksums_from(checksums: common_pb2.Checksums) -> bytes:
    if checksums.algorithm != CRC32C_KEYED:
        raise BadRequest(
            f"checksum algorithm {checksums.algorithm} is not known here",
            hint="use CHECKSUM_ALGORITHM_CRC32C_KEYED",
        )
    return checksums.packed


# --- errors


def error_to_detail(error: SnowskinError) -> common_pb2.ErrorDetail:
    """What crosses the wire of an error."""
    detail = common_pb2.ErrorDetail(
        reason=error.reason, status=error.status, message=error.message, hint=error.hint
    )
    if error.retry_after_s is not None:
        detail.retry_after_ms = max(1, round(error.retry_after_s * 1000))
    return detail


def detail_to_error(detail: common_pb2.ErrorDetail) -> SnowskinError:
    """The same error on the other side."""
    retry_after_s = detail.retry_after_ms / 1000 if detail.HasField("retry_after_ms") else None
    return from_reason(detail.reason, detail.message, hint=detail.hint, retry_after_s=retry_after_s)


# --- requests, node's side


def _reserve_from(message: store_pb2.ReserveRequest) -> ReserveRequest:
    tail = None
    if message.HasField("tail"):
        tail = TailSpec(request_id=message.tail.request_id, nbytes=message.tail.nbytes)
    return ReserveRequest(
        namespace=message.namespace,
        keys=keys_from(message.keys),
        parent_key=message.parent_key,
        block_nbytes=message.block_nbytes,
        tail=tail,
        one_reader=message.one_reader,
        ttl_s=message.ttl_ms / 1000,
        timeout_s=message.timeout_ms / 1000,
        schemes=tuple(message.schemes),
    )


def _commit_from(message: store_pb2.CommitRequest) -> CommitRequest:
    return CommitRequest(
        lease_id=LeaseId(message.lease.id),
        num_blocks=message.num_blocks,
        checksums=_checksums_from(message.checksums),
        schemes=tuple(message.schemes),
    )


def _abort_from(message: store_pb2.AbortRequest) -> AbortRequest:
    return AbortRequest(lease_id=LeaseId(message.lease.id))


def _probe_from(message: store_pb2.ProbeRequest) -> ProbeRequest:
    return ProbeRequest(namespaces=tuple(message.namespaces), keys=keys_from(message.keys))


def _match_from(message: store_pb2.MatchRequest) -> MatchRequest:
    return MatchRequest(
        namespaces=tuple(message.namespaces),
        keys=keys_from(message.keys),
        max_blocks=message.max_blocks,
        ttl_s=message.ttl_ms / 1000,
        wait_blocks=message.wait_blocks,
        timeout_s=message.timeout_ms / 1000,
        tail_request_id=message.tail_request_id,
        schemes=tuple(message.schemes),
    )


def _renew_from(message: store_pb2.RenewRequest) -> RenewRequest:
    return RenewRequest(
        lease_ids=tuple(LeaseId(lease.id) for lease in message.leases), ttl_s=message.ttl_ms / 1000
    )


def _release_from(message: store_pb2.ReleaseRequest) -> ReleaseRequest:
    return ReleaseRequest(
        lease_ids=tuple(LeaseId(lease.id) for lease in message.leases),
        complaints=tuple(
            Complaint(lease_id=LeaseId(c.lease_id), block_indices=tuple(c.block_indices))
            for c in message.complaints
        ),
    )


_REQUEST_FROM: dict[str, Callable[[Any], Request]] = {
    "reserve": _reserve_from,
    "commit": _commit_from,
    "abort": _abort_from,
    "probe": _probe_from,
    "match": _match_from,
    "renew": _renew_from,
    "release": _release_from,
    "stat": lambda _: StatRequest(),
}


def request_from(name: str, message: Message) -> Request:
    """The request in field `name` of a DoorRequest, or of the gRPC method of that name."""
    return _REQUEST_FROM[name](message)


# --- requests, client's side


def _set_keys(column: common_pb2.KeyColumn, keys: KeyColumn) -> None:
    if len(keys):
        column.packed = keys.packed
        column.width = keys.width


def request_to(request: Request, capability: bytes = b"") -> tuple[str, Message]:
    """(name, message) of a request; `capability` goes with each lease that it names."""
    match request:
        case MatchRequest():
            match_message = store_pb2.MatchRequest(
                namespaces=request.namespaces,
                max_blocks=request.max_blocks,
                ttl_ms=to_ms(request.ttl_s),
                wait_blocks=request.wait_blocks,
                timeout_ms=to_ms(request.timeout_s),
                tail_request_id=request.tail_request_id,
                schemes=request.schemes,
            )
            _set_keys(match_message.keys, request.keys)
            return "match", match_message
        case ReleaseRequest():
            return "release", store_pb2.ReleaseRequest(
                leases=[_ref(lease_id, capability) for lease_id in request.lease_ids],
                complaints=[
                    store_pb2.Complaint(lease_id=c.lease_id, block_indices=c.block_indices)
                    for c in request.complaints
                ],
            )
        case ReserveRequest():
            reserve_message = store_pb2.ReserveRequest(
                namespace=request.namespace,
                parent_key=request.parent_key,
                block_nbytes=request.block_nbytes,
                one_reader=request.one_reader,
                ttl_ms=to_ms(request.ttl_s),
                timeout_ms=to_ms(request.timeout_s),
                schemes=request.schemes,
            )
            _set_keys(reserve_message.keys, request.keys)
            if request.tail is not None:
                reserve_message.tail.request_id = request.tail.request_id
                reserve_message.tail.nbytes = request.tail.nbytes
            return "reserve", reserve_message
        case CommitRequest():
            return "commit", store_pb2.CommitRequest(
                lease=_ref(request.lease_id, capability),
                num_blocks=request.num_blocks,
                checksums=common_pb2.Checksums(algorithm=CRC32C_KEYED, packed=request.checksums),
                schemes=request.schemes,
            )
        case AbortRequest():
            return "abort", store_pb2.AbortRequest(lease=_ref(request.lease_id, capability))
        case ProbeRequest():
            probe_message = store_pb2.ProbeRequest(namespaces=request.namespaces)
            _set_keys(probe_message.keys, request.keys)
            return "probe", probe_message
        case RenewRequest():
            return "renew", store_pb2.RenewRequest(
                leases=[_ref(lease_id, capability) for lease_id in request.lease_ids],
                ttl_ms=to_ms(request.ttl_s),
            )
        case StatRequest():
            return "stat", store_pb2.StatRequest()


def _ref(lease_id: LeaseId, capability: bytes) -> common_pb2.LeaseRef:
    return common_pb2.LeaseRef(id=lease_id, capability=capability)


# --- replies, node's side


def _set_run(message: common_pb2.Run, run: Run) -> None:
    extent, source = message.extent, run.extent
    extent.tier = TIERS[source.tier]
    extent.pool_id = source.pool_id
    extent.offset = source.offset
    extent.nbytes = source.nbytes
    extent.generation = source.generation
    message.first_block_index = run.first_block_index
    message.num_blocks = run.num_blocks
    message.shard_index = run.shard_index


def _set_lease(message: common_pb2.Lease, lease: Lease) -> None:
    message.id = lease.id
    # Rounded down: the holder must never believe in more life than the node gave.
    message.ttl_ms = int(lease.ttl_s * 1000)
    if lease.capability:
        message.capability = lease.capability
        _add_regions(message.regions, lease.regions)


def _add_regions(messages: Any, regions: tuple[GrantedRegion, ...]) -> None:
    for region in regions:
        messages.add(pool_id=region.pool_id, descriptors=region.descriptors)


def reply_to(reply: ReplyMessage, message: Any) -> None:
    """Fills `message`, the protobuf of the same name."""
    match reply:
        case Matched():
            message.num_blocks = reply.num_blocks
            message.wake_reason = reply.wake_reason
            message.node_epoch = reply.node_epoch
            message.num_blocks_withheld = reply.num_blocks_withheld
            if reply.lease is not None:
                _set_lease(message.lease, reply.lease)
            for run in reply.runs:
                _set_run(message.runs.add(), run)
            for packed in reply.checksums:
                message.checksums.add(algorithm=CRC32C_KEYED, packed=packed)
        case Released():
            message.SetInParent()
            message.num_unknown = reply.num_unknown
        case Reserved():
            message.SetInParent()
            if reply.lease is not None:
                _set_lease(message.lease, reply.lease)
            for run in reply.runs:
                _set_run(message.runs.add(), run)
        case Committed():
            message.SetInParent()
            message.existing_block_indices.extend(reply.existing_block_indices)
            message.num_blocks_left = reply.num_blocks_left
            _add_regions(message.regions, reply.regions)
        case Aborted():
            message.SetInParent()
            message.freed_nbytes = reply.freed_nbytes
        case Probed():
            message.num_blocks = reply.num_blocks
            message.present_bitmap = reply.present_bitmap
            message.node_epoch = reply.node_epoch
        case Renewed():
            message.SetInParent()
            message.ttl_ms.extend(int(ttl_s * 1000) for ttl_s in reply.ttl_s)
        case NodeStat():
            _set_stat(message, reply)


_COUNTS = (
    "num_blocks",
    "num_read_leases",
    "num_write_leases",
    "num_sessions",
    "num_waiting_matches",
    "num_waiting_reserves",
)
_POOL_NBYTES = (
    "capacity_nbytes",
    "free_nbytes",
    "committed_nbytes",
    "reserved_nbytes",
    "quarantined_nbytes",
    "largest_hole_nbytes",
    "leased_nbytes",
)


def _set_stat(message: store_pb2.StatResponse, stat: NodeStat) -> None:
    message.node_id = stat.node_id
    message.node_epoch = stat.node_epoch
    message.draining = stat.draining
    message.door = stat.door
    message.transports.extend(stat.transports)
    message.advertisement = stat.advertisement
    for name in _COUNTS:
        setattr(message, name, getattr(stat, name))
    for name, count in stat.counters.items():
        message.counters[name] = count
    for pool in stat.pools:
        sizes = {name: getattr(pool, name) for name in _POOL_NBYTES}
        message.pools.add(pool_id=pool.pool_id, tier=TIERS[pool.tier], tenant=pool.tenant, **sizes)


# --- replies, client's side


def _run_from(message: common_pb2.Run, node_id: str) -> Run:
    extent = message.extent
    tier = TIER_NAMES.get(extent.tier)
    if tier is None or not extent.nbytes:
        raise ProtocolViolation(
            f"an extent of {extent.nbytes} bytes in tier {extent.tier} came from node {node_id}",
            hint="check the wire version",
        )
    return Run(
        extent=Extent(
            node_id=node_id,
            tier=tier,
            pool_id=extent.pool_id,
            offset=extent.offset,
            nbytes=extent.nbytes,
            generation=extent.generation,
        ),
        first_block_index=message.first_block_index,
        num_blocks=message.num_blocks,
        shard_index=message.shard_index,
    )


def _lease_from(message: Any) -> Lease | None:
    if not message.HasField("lease"):
        return None
    lease = message.lease
    capability = lease.capability
    return Lease(
        id=LeaseId(lease.id),
        ttl_s=lease.ttl_ms / 1000,
        capability=capability,
        # None come by the local door: half a microsecond saved.
        regions=_regions_from(lease.regions) if capability else (),
    )


def _regions_from(messages: Any) -> tuple[GrantedRegion, ...]:
    return tuple(
        [
            GrantedRegion(pool_id=message.pool_id, descriptors=tuple(message.descriptors))
            for message in messages
        ]
    )


# A newer node may know more of them; what it matched is clear without.
_WAKE_REASONS = {reason.value: reason for reason in WakeReason}


def _matched_from(message: store_pb2.MatchResponse, node_id: str) -> Matched:
    reason = message.wake_reason
    return Matched(
        num_blocks=message.num_blocks,
        lease=_lease_from(message),
        runs=tuple([_run_from(run, node_id) for run in message.runs]),
        checksums=tuple([_checksums_from(column) for column in message.checksums]),
        wake_reason=_WAKE_REASONS.get(reason, WakeReason.SATISFIED),
        node_epoch=message.node_epoch,
        num_blocks_withheld=message.num_blocks_withheld,
    )


def stat_from(message: store_pb2.StatResponse) -> NodeStat:
    """A node's counts and sizes."""
    return NodeStat(
        node_id=message.node_id,
        node_epoch=message.node_epoch,
        draining=message.draining,
        door=message.door,
        transports=tuple(message.transports),
        advertisement=message.advertisement,
        counters=dict(message.counters),
        pools=tuple(
            PoolStat(
                pool_id=pool.pool_id,
                tier=TIER_NAMES.get(pool.tier, "dram"),
                tenant=pool.tenant,
                **{name: getattr(pool, name) for name in _POOL_NBYTES},
            )
            for pool in message.pools
        ),
        **{name: getattr(message, name) for name in _COUNTS},
    )


def reply_from(name: str, message: Any, node_id: str) -> ReplyMessage:
    """The reply in field `name` of a DoorResponse, or of the gRPC method of that name."""
    match name:
        case "match":
            return _matched_from(message, node_id)
        case "release":
            return Released(num_unknown=message.num_unknown)
        case "reserve":
            runs = tuple([_run_from(run, node_id) for run in message.runs])
            return Reserved(lease=_lease_from(message), runs=runs)
        case "commit":
            return Committed(
                existing_block_indices=tuple(message.existing_block_indices),
                num_blocks_left=message.num_blocks_left,
                regions=_regions_from(message.regions),
            )
        case "abort":
            return Aborted(freed_nbytes=message.freed_nbytes)
        case "probe":
            return Probed(
                num_blocks=message.num_blocks,
                present_bitmap=message.present_bitmap,
                node_epoch=message.node_epoch,
            )
        case "renew":
            return Renewed(ttl_s=tuple(ms / 1000 for ms in message.ttl_ms))
        case "stat":
            return stat_from(message)
    raise ProtocolViolation(f"the node answered with {name!r}, which is no reply")


# --- what a node tells those who watch its blocks


def watch_request_to(request: WatchRequest) -> store_pb2.WatchRequest:
    """Where a subscriber stands."""
    return store_pb2.WatchRequest(node_epoch=request.node_epoch, sequence=request.sequence)


def watch_request_from(message: store_pb2.WatchRequest) -> WatchRequest:
    """Where a subscriber says that it stands."""
    return WatchRequest(node_epoch=message.node_epoch, sequence=message.sequence)


def watched_to(watched: Watched) -> store_pb2.WatchResponse:
    """One message of a Watch."""
    message = store_pb2.WatchResponse(
        node_epoch=watched.node_epoch,
        sequence=watched.sequence,
        snapshot_begins=watched.snapshot_begins,
        in_sync=watched.in_sync,
        num_blocks=watched.num_blocks,
        digest=watched.digest,
    )
    for change in watched.changes:
        record = message.changes.add(namespace=change.namespace, removed=change.removed)
        _set_keys(record.keys, change.keys)
    return message


def watched_from(message: store_pb2.WatchResponse) -> Watched:
    """One message of a Watch; BadKeyColumn where a record's keys are none."""
    return Watched(
        node_epoch=message.node_epoch,
        sequence=message.sequence,
        snapshot_begins=message.snapshot_begins,
        in_sync=message.in_sync,
        num_blocks=message.num_blocks,
        digest=message.digest,
        changes=tuple(
            [
                BlockChange(
                    namespace=record.namespace,
                    keys=keys_from(record.keys),
                    removed=record.removed,
                )
                for record in message.changes
            ]
        ),
    )


# --- greeting of the local door


def greeting_to(greeting: Greeting, message: door_pb2.HelloResponse, wire_version: int) -> None:
    """Fills the answer to a Hello."""
    message.wire_version = wire_version
    message.node_id = greeting.node_id
    message.node_epoch = greeting.node_epoch
    message.session_id = greeting.session_id
    message.max_keys = greeting.max_keys
    message.max_extent_nbytes = greeting.max_extent_nbytes
    for pool in greeting.pools:
        message.pools.add(
            pool_id=pool.pool_id, tier=TIERS[pool.tier], nbytes=pool.nbytes, region=pool.region
        )


def greeting_from(message: door_pb2.HelloResponse) -> Greeting:
    """What the node said of itself."""
    return Greeting(
        node_id=message.node_id,
        node_epoch=message.node_epoch,
        session_id=SessionId(message.session_id),
        pools=tuple(
            PoolGrant(
                pool_id=pool.pool_id,
                tier=TIER_NAMES.get(pool.tier, "dram"),
                nbytes=pool.nbytes,
                region=pool.region,
            )
            for pool in message.pools
        ),
        max_keys=message.max_keys,
        max_extent_nbytes=message.max_extent_nbytes,
    )


def access_from(number: int) -> Access:
    """What a Hello asks for; an unset one reads."""
    return Access.WRITE if number == door_pb2.POOL_ACCESS_WRITE else Access.READ

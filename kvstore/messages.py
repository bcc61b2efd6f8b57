"""What node, doors and client say to one another: requests, replies, effects, as frozen values.

Rules kept here: nothing in this file knows protobuf, sockets or clocks. Times that travel are relative seconds.
`Run` is the unit that everybody speaks of: consecutive blocks of one shard that lie side by side in one extent.
"""

from __future__ import annotations

from dataclasses import field
from enum import IntEnum
from typing import TYPE_CHECKING, NewType

from snowskin.kvstore.value import value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.kvstore.extent import Extent
    from snowskin.transport.errors import SnowskinError

SessionId = NewType("SessionId", int)
LeaseId = NewType("LeaseId", int)

WIRE_VERSION = 1


class WakeReason(IntEnum):
    """Why a Match answered when it did."""

    SATISFIED = 1
    TIMEOUT = 2
    WRITER_GONE = 3


class Access(IntEnum):
    """What a session may do with the pools that it maps."""

    READ = 1
    WRITE = 2


@value()
class Run:
    """Blocks `first_block_index .. + num_blocks` of a key column, contiguous in `extent`."""

    extent: Extent
    first_block_index: int
    num_blocks: int
    shard_index: int = 0


@value()
class GrantedRegion:
    """What a lease opens of one pool: the region descriptors of the transports that node and caller share."""

    pool_id: int
    descriptors: tuple[bytes, ...]


@value()
class Lease:
    """A time-bounded right, as granted: its holder counts `ttl_s` from when it sent the request.

    `regions` are what the data plane serves under it, one a pool.
    """

    id: LeaseId
    ttl_s: float
    capability: bytes = b""
    regions: tuple[GrantedRegion, ...] = ()


# --- requests


@value()
class TailSpec:
    """The partial last block of one request: `nbytes`, for the one reader that names `request_id`."""

    request_id: str
    nbytes: int


@value()
class ReserveRequest:
    """Room for the blocks of `keys` (or for a tail) that are new to the node; `schemes` as in a match."""

    namespace: bytes
    keys: KeyColumn
    parent_key: bytes = b""
    block_nbytes: int = 0
    tail: TailSpec | None = None
    one_reader: bool = False
    ttl_s: float = 0.0
    timeout_s: float = 0.0
    schemes: tuple[str, ...] = ()


@value()
class CommitRequest:
    """The next `num_blocks` new blocks of a reservation are complete; `checksums` has 4 bytes for each.

    `schemes` as in a match, for the blocks that are left.
    """

    lease_id: LeaseId
    num_blocks: int
    checksums: bytes
    schemes: tuple[str, ...] = ()


@value()
class AbortRequest:
    """Nothing more will be written under this lease."""

    lease_id: LeaseId


@value()
class ProbeRequest:
    """What of `keys` is committed in every one of `namespaces`; without a lease."""

    namespaces: tuple[bytes, ...]
    keys: KeyColumn


@value()
class MatchRequest:
    """The longest gapless run of `keys` in all `namespaces` (or a tail), under a read lease.

    `schemes` are the transports by which the caller can read, the preferred one first.
    """

    namespaces: tuple[bytes, ...]
    keys: KeyColumn
    max_blocks: int = 0
    ttl_s: float = 0.0
    wait_blocks: int = 0
    timeout_s: float = 0.0
    tail_request_id: str = ""
    schemes: tuple[str, ...] = ()


@value()
class RenewRequest:
    """Prolong leases by `ttl_s` from now."""

    lease_ids: tuple[LeaseId, ...]
    ttl_s: float


@value()
class Complaint:
    """Blocks of a leased match whose bytes were not what was committed under their keys."""

    lease_id: LeaseId
    block_indices: tuple[int, ...]


@value()
class ReleaseRequest:
    """The holder reads no more under these leases."""

    lease_ids: tuple[LeaseId, ...]
    complaints: tuple[Complaint, ...] = ()


@value()
class StatRequest:
    """Counts and sizes of the node."""


Request = (
    ReserveRequest
    | CommitRequest
    | AbortRequest
    | ProbeRequest
    | MatchRequest
    | RenewRequest
    | ReleaseRequest
    | StatRequest
)

# --- replies


@value()
class Reserved:
    """Writable runs in prefix order; `lease` is None where nothing was new."""

    lease: Lease | None
    runs: tuple[Run, ...]


@value()
class Committed:
    """Blocks that another writer had committed first, and how many are still to come.

    `regions` open what is left: a commit ends those that the lease had brought.
    """

    existing_block_indices: tuple[int, ...]
    num_blocks_left: int
    regions: tuple[GrantedRegion, ...] = ()


@value()
class Aborted:
    """Bytes that are free again."""

    freed_nbytes: int


@value()
class Probed:
    """Gapless run from the first key, and a bit for each key (least significant first)."""

    num_blocks: int
    present_bitmap: bytes
    node_epoch: int


@value()
class Matched:
    """Leased runs by shard; `checksums` has a column for each shard, 4 bytes a block.

    `num_blocks_withheld` are here too, behind the leased ones: the caps on leases allowed no more at once.
    """

    num_blocks: int
    lease: Lease | None
    runs: tuple[Run, ...]
    checksums: tuple[bytes, ...]
    wake_reason: WakeReason
    node_epoch: int
    num_blocks_withheld: int = 0


@value()
class Renewed:
    """Seconds of life from now on, in the order of the request; 0 where the lease is gone."""

    ttl_s: tuple[float, ...]


@value()
class Released:
    """How many of the leases were unknown or had expired."""

    num_unknown: int


@value()
class PoolStat:
    """One pool: capacity = free + committed + reserved + quarantined, always."""

    pool_id: int
    tier: str
    tenant: str
    capacity_nbytes: int
    free_nbytes: int
    committed_nbytes: int
    reserved_nbytes: int
    quarantined_nbytes: int
    largest_hole_nbytes: int
    leased_nbytes: int


@value()
class NodeStat:
    """Counts and sizes of one node at one moment."""

    node_id: str
    node_epoch: int
    pools: tuple[PoolStat, ...]
    num_blocks: int
    num_read_leases: int
    num_write_leases: int
    num_sessions: int
    num_waiting_matches: int
    num_waiting_reserves: int
    counters: Mapping[str, int] = field(default_factory=dict)
    draining: bool = False
    door: str = ""
    transports: tuple[str, ...] = ()
    advertisement: bytes = b""


ReplyMessage = Reserved | Committed | Aborted | Probed | Matched | Renewed | Released | NodeStat

# --- what a node tells those who watch its blocks


@value()
class WatchRequest:
    """Where a subscriber stands: the epoch that it saw and the last change that it took in; zeros mean nowhere."""

    node_epoch: int = 0
    sequence: int = 0


@value()
class BlockChange:
    """Blocks of one namespace that can be matched now or, where `removed`, cannot any more."""

    namespace: bytes
    keys: KeyColumn
    removed: bool = False


@value()
class Watched:
    """One message of a Watch; `num_blocks` and `digest` are of meaning where `in_sync`."""

    node_epoch: int
    sequence: int
    changes: tuple[BlockChange, ...] = ()
    snapshot_begins: bool = False
    in_sync: bool = False
    num_blocks: int = 0
    digest: int = 0


# --- effects of the node's state machine


@value(kw_only=False)
class Reply:
    """Answer the call."""

    session_id: SessionId
    call_id: int
    message: ReplyMessage


@value(kw_only=False)
class Fail:
    """Answer the call with an error."""

    session_id: SessionId
    call_id: int
    error: SnowskinError


Effect = Reply | Fail

# --- greeting of the local door


@value()
class PoolGrant:
    """A pool that a session maps: `region` is the transport's descriptor of it."""

    pool_id: int
    tier: str
    nbytes: int
    region: bytes


@value()
class Greeting:
    """What the node says of itself when a session opens."""

    node_id: str
    node_epoch: int
    session_id: SessionId
    pools: tuple[PoolGrant, ...]
    max_keys: int
    max_extent_nbytes: int

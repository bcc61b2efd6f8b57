from snowskin.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WakeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAKE_REASON_UNSPECIFIED: _ClassVar[WakeReason]
    WAKE_REASON_SATISFIED: _ClassVar[WakeReason]
    WAKE_REASON_TIMEOUT: _ClassVar[WakeReason]
    WAKE_REASON_WRITER_GONE: _ClassVar[WakeReason]
WAKE_REASON_UNSPECIFIED: WakeReason
WAKE_REASON_SATISFIED: WakeReason
WAKE_REASON_TIMEOUT: WakeReason
WAKE_REASON_WRITER_GONE: WakeReason

class ReserveRequest(_message.Message):
    __slots__ = ("namespace", "keys", "parent_key", "block_nbytes", "tail", "one_reader", "ttl_ms", "timeout_ms", "schemes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    ONE_READER_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    SCHEMES_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: _common_pb2.KeyColumn
    parent_key: bytes
    block_nbytes: int
    tail: TailSpec
    one_reader: bool
    ttl_ms: int
    timeout_ms: int
    schemes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ..., parent_key: _Optional[bytes] = ..., block_nbytes: _Optional[int] = ..., tail: _Optional[_Union[TailSpec, _Mapping]] = ..., one_reader: bool = ..., ttl_ms: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., schemes: _Optional[_Iterable[str]] = ...) -> None: ...

class TailSpec(_message.Message):
    __slots__ = ("request_id", "nbytes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    nbytes: int
    def __init__(self, request_id: _Optional[str] = ..., nbytes: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("lease", "runs")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.Lease
    runs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Run]
    def __init__(self, lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[_common_pb2.Run, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease", "num_blocks", "checksums", "schemes")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    SCHEMES_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    num_blocks: int
    checksums: _common_pb2.Checksums
    schemes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., num_blocks: _Optional[int] = ..., checksums: _Optional[_Union[_common_pb2.Checksums, _Mapping]] = ..., schemes: _Optional[_Iterable[str]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("existing_block_indices", "num_blocks_left", "regions")
    EXISTING_BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_LEFT_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    existing_block_indices: _containers.RepeatedScalarFieldContainer[int]
    num_blocks_left: int
    regions: _containers.RepeatedCompositeFieldContainer[_common_pb2.GrantedRegion]
    def __init__(self, existing_block_indices: _Optional[_Iterable[int]] = ..., num_blocks_left: _Optional[int] = ..., regions: _Optional[_Iterable[_Union[_common_pb2.GrantedRegion, _Mapping]]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("freed_nbytes",)
    FREED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    freed_nbytes: int
    def __init__(self, freed_nbytes: _Optional[int] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("namespaces", "keys")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedScalarFieldContainer[bytes]
    keys: _common_pb2.KeyColumn
    def __init__(self, namespaces: _Optional[_Iterable[bytes]] = ..., keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("num_blocks", "present_bitmap", "node_epoch")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_BITMAP_FIELD_NUMBER: _ClassVar[int]
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    present_bitmap: bytes
    node_epoch: int
    def __init__(self, num_blocks: _Optional[int] = ..., present_bitmap: _Optional[bytes] = ..., node_epoch: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("namespaces", "keys", "max_blocks", "ttl_ms", "wait_blocks", "timeout_ms", "tail_request_id", "schemes")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TAIL_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEMES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedScalarFieldContainer[bytes]
    keys: _common_pb2.KeyColumn
    max_blocks: int
    ttl_ms: int
    wait_blocks: int
    timeout_ms: int
    tail_request_id: str
    schemes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespaces: _Optional[_Iterable[bytes]] = ..., keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ..., max_blocks: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., wait_blocks: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., tail_request_id: _Optional[str] = ..., schemes: _Optional[_Iterable[str]] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("num_blocks", "lease", "runs", "checksums", "wake_reason", "node_epoch", "num_blocks_withheld")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    WAKE_REASON_FIELD_NUMBER: _ClassVar[int]
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_WITHHELD_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    lease: _common_pb2.Lease
    runs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Run]
    checksums: _containers.RepeatedCompositeFieldContainer[_common_pb2.Checksums]
    wake_reason: WakeReason
    node_epoch: int
    num_blocks_withheld: int
    def __init__(self, num_blocks: _Optional[int] = ..., lease: _Optional[_Union[_common_pb2.Lease, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[_common_pb2.Run, _Mapping]]] = ..., checksums: _Optional[_Iterable[_Union[_common_pb2.Checksums, _Mapping]]] = ..., wake_reason: _Optional[_Union[WakeReason, str]] = ..., node_epoch: _Optional[int] = ..., num_blocks_withheld: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("leases", "ttl_ms")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_common_pb2.LeaseRef]
    ttl_ms: int
    def __init__(self, leases: _Optional[_Iterable[_Union[_common_pb2.LeaseRef, _Mapping]]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ttl_ms: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("leases", "complaints")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    COMPLAINTS_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_common_pb2.LeaseRef]
    complaints: _containers.RepeatedCompositeFieldContainer[Complaint]
    def __init__(self, leases: _Optional[_Iterable[_Union[_common_pb2.LeaseRef, _Mapping]]] = ..., complaints: _Optional[_Iterable[_Union[Complaint, _Mapping]]] = ...) -> None: ...

class Complaint(_message.Message):
    __slots__ = ("lease_id", "block_indices")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    block_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., block_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("num_unknown",)
    NUM_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    num_unknown: int
    def __init__(self, num_unknown: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("node_id", "node_epoch", "pools", "num_blocks", "num_read_leases", "num_write_leases", "num_sessions", "num_waiting_matches", "num_waiting_reserves", "counters", "draining", "door", "transports", "advertisement")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_READ_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_WRITE_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_MATCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_RESERVES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DOOR_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ADVERTISEMENT_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    node_epoch: int
    pools: _containers.RepeatedCompositeFieldContainer[PoolStat]
    num_blocks: int
    num_read_leases: int
    num_write_leases: int
    num_sessions: int
    num_waiting_matches: int
    num_waiting_reserves: int
    counters: _containers.ScalarMap[str, int]
    draining: bool
    door: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    advertisement: bytes
    def __init__(self, node_id: _Optional[str] = ..., node_epoch: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[PoolStat, _Mapping]]] = ..., num_blocks: _Optional[int] = ..., num_read_leases: _Optional[int] = ..., num_write_leases: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_waiting_matches: _Optional[int] = ..., num_waiting_reserves: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., draining: bool = ..., door: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., advertisement: _Optional[bytes] = ...) -> None: ...

class PoolStat(_message.Message):
    __slots__ = ("pool_id", "tier", "tenant", "capacity_nbytes", "free_nbytes", "committed_nbytes", "reserved_nbytes", "quarantined_nbytes", "largest_hole_nbytes", "leased_nbytes")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_NBYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    LARGEST_HOLE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    tier: _common_pb2.Tier
    tenant: str
    capacity_nbytes: int
    free_nbytes: int
    committed_nbytes: int
    reserved_nbytes: int
    quarantined_nbytes: int
    largest_hole_nbytes: int
    leased_nbytes: int
    def __init__(self, pool_id: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., tenant: _Optional[str] = ..., capacity_nbytes: _Optional[int] = ..., free_nbytes: _Optional[int] = ..., committed_nbytes: _Optional[int] = ..., reserved_nbytes: _Optional[int] = ..., quarantined_nbytes: _Optional[int] = ..., largest_hole_nbytes: _Optional[int] = ..., leased_nbytes: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("node_epoch", "sequence")
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    node_epoch: int
    sequence: int
    def __init__(self, node_epoch: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("node_epoch", "sequence", "snapshot_begins", "in_sync", "changes", "num_blocks", "digest")
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BEGINS_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    node_epoch: int
    sequence: int
    snapshot_begins: bool
    in_sync: bool
    changes: _containers.RepeatedCompositeFieldContainer[BlockChange]
    num_blocks: int
    digest: int
    def __init__(self, node_epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., snapshot_begins: bool = ..., in_sync: bool = ..., changes: _Optional[_Iterable[_Union[BlockChange, _Mapping]]] = ..., num_blocks: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class BlockChange(_message.Message):
    __slots__ = ("namespace", "removed", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    removed: bool
    keys: _common_pb2.KeyColumn
    def __init__(self, namespace: _Optional[bytes] = ..., removed: bool = ..., keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("lease", "offset", "data")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    offset: int
    data: bytes
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("nbytes",)
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    nbytes: int
    def __init__(self, nbytes: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("lease", "offset", "nbytes", "shard_index")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_INDEX_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    offset: int
    nbytes: int
    shard_index: int
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ..., shard_index: _Optional[int] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

from snowskin.v1 import common_pb2 as _common_pb2
from snowskin.v1 import engine_pb2 as _engine_pb2
from snowskin.v1 import store_pb2 as _store_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_KIND_UNSPECIFIED: _ClassVar[LeaseKind]
    LEASE_KIND_READ: _ClassVar[LeaseKind]
    LEASE_KIND_WRITE: _ClassVar[LeaseKind]

class LeaseState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_STATE_UNSPECIFIED: _ClassVar[LeaseState]
    LEASE_STATE_ACTIVE: _ClassVar[LeaseState]
    LEASE_STATE_GRACE: _ClassVar[LeaseState]
    LEASE_STATE_QUARANTINED: _ClassVar[LeaseState]
LEASE_KIND_UNSPECIFIED: LeaseKind
LEASE_KIND_READ: LeaseKind
LEASE_KIND_WRITE: LeaseKind
LEASE_STATE_UNSPECIFIED: LeaseState
LEASE_STATE_ACTIVE: LeaseState
LEASE_STATE_GRACE: LeaseState
LEASE_STATE_QUARANTINED: LeaseState

class ClusterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatusResponse(_message.Message):
    __slots__ = ("instances", "model_name", "num_requests_running", "num_requests_finished", "num_requests_refused", "num_requests_failed", "nodes")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    model_name: str
    num_requests_running: int
    num_requests_finished: int
    num_requests_refused: int
    num_requests_failed: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeKnowledge]
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., model_name: _Optional[str] = ..., num_requests_running: _Optional[int] = ..., num_requests_finished: _Optional[int] = ..., num_requests_refused: _Optional[int] = ..., num_requests_failed: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeKnowledge, _Mapping]]] = ...) -> None: ...

class NodeKnowledge(_message.Message):
    __slots__ = ("address", "state", "num_blocks", "seconds_since_message", "sequence", "node_epoch", "num_astray")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ASTRAY_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: str
    num_blocks: int
    seconds_since_message: float
    sequence: int
    node_epoch: int
    num_astray: int
    def __init__(self, address: _Optional[str] = ..., state: _Optional[str] = ..., num_blocks: _Optional[int] = ..., seconds_since_message: _Optional[float] = ..., sequence: _Optional[int] = ..., node_epoch: _Optional[int] = ..., num_astray: _Optional[int] = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("instance_id", "role", "address", "node_address", "load", "state", "seconds_since_report", "block_size")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_REPORT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: str
    address: str
    node_address: str
    load: _engine_pb2.InstanceLoad
    state: str
    seconds_since_report: float
    block_size: int
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., node_address: _Optional[str] = ..., load: _Optional[_Union[_engine_pb2.InstanceLoad, _Mapping]] = ..., state: _Optional[str] = ..., seconds_since_report: _Optional[float] = ..., block_size: _Optional[int] = ...) -> None: ...

class NodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("address", "stat", "error", "knowledge")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    KNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    address: str
    stat: _store_pb2.StatResponse
    error: str
    knowledge: NodeKnowledge
    def __init__(self, address: _Optional[str] = ..., stat: _Optional[_Union[_store_pb2.StatResponse, _Mapping]] = ..., error: _Optional[str] = ..., knowledge: _Optional[_Union[NodeKnowledge, _Mapping]] = ...) -> None: ...

class MatchPromptRequest(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: bytes
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

class MatchPromptResponse(_message.Message):
    __slots__ = ("num_tokens", "num_blocks", "block_size", "nodes")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_blocks: int
    block_size: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeMatch]
    def __init__(self, num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeMatch, _Mapping]]] = ...) -> None: ...

class NodeMatch(_message.Message):
    __slots__ = ("address", "num_blocks", "num_blocks_present", "error")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_PRESENT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    address: str
    num_blocks: int
    num_blocks_present: int
    error: str
    def __init__(self, address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_blocks_present: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("namespace", "key_prefix", "leased_only", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    LEASED_ONLY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    key_prefix: bytes
    leased_only: bool
    page_size: int
    page_token: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., key_prefix: _Optional[bytes] = ..., leased_only: bool = ..., page_size: _Optional[int] = ..., page_token: _Optional[bytes] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    next_page_token: bytes
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., next_page_token: _Optional[bytes] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("namespace", "key", "extent", "parent_key", "num_children", "num_read_leases", "age_s", "idle_s", "one_reader")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_CHILDREN_FIELD_NUMBER: _ClassVar[int]
    NUM_READ_LEASES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    ONE_READER_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    key: bytes
    extent: _common_pb2.Extent
    parent_key: bytes
    num_children: int
    num_read_leases: int
    age_s: float
    idle_s: float
    one_reader: bool
    def __init__(self, namespace: _Optional[bytes] = ..., key: _Optional[bytes] = ..., extent: _Optional[_Union[_common_pb2.Extent, _Mapping]] = ..., parent_key: _Optional[bytes] = ..., num_children: _Optional[int] = ..., num_read_leases: _Optional[int] = ..., age_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., one_reader: bool = ...) -> None: ...

class ShowBlockRequest(_message.Message):
    __slots__ = ("namespace", "key")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    key: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., key: _Optional[bytes] = ...) -> None: ...

class ShowBlockResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ShownBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[ShownBlock, _Mapping]]] = ...) -> None: ...

class ShownBlock(_message.Message):
    __slots__ = ("block", "checksum", "leases")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    block: BlockInfo
    checksum: _common_pb2.Checksums
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    def __init__(self, block: _Optional[_Union[BlockInfo, _Mapping]] = ..., checksum: _Optional[_Union[_common_pb2.Checksums, _Mapping]] = ..., leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping]]] = ...) -> None: ...

class LeaseInfo(_message.Message):
    __slots__ = ("id", "kind", "state", "client", "age_s", "seconds_left", "num_blocks", "nbytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: LeaseKind
    state: LeaseState
    client: str
    age_s: float
    seconds_left: float
    num_blocks: int
    nbytes: int
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[_Union[LeaseKind, str]] = ..., state: _Optional[_Union[LeaseState, str]] = ..., client: _Optional[str] = ..., age_s: _Optional[float] = ..., seconds_left: _Optional[float] = ..., num_blocks: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class ListLeasesRequest(_message.Message):
    __slots__ = ("kind", "client", "page_size", "page_token")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    kind: LeaseKind
    client: str
    page_size: int
    page_token: bytes
    def __init__(self, kind: _Optional[_Union[LeaseKind, str]] = ..., client: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[bytes] = ...) -> None: ...

class ListLeasesResponse(_message.Message):
    __slots__ = ("leases", "next_page_token")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    next_page_token: bytes
    def __init__(self, leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping]]] = ..., next_page_token: _Optional[bytes] = ...) -> None: ...

class RevokeLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class RevokeLeaseResponse(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseInfo
    def __init__(self, lease: _Optional[_Union[LeaseInfo, _Mapping]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace", "keys", "all", "dry_run")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: _common_pb2.KeyColumn
    all: bool
    dry_run: bool
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ..., all: bool = ..., dry_run: bool = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("num_blocks", "nbytes", "num_held", "num_unknown")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    nbytes: int
    num_held: int
    num_unknown: int
    def __init__(self, num_blocks: _Optional[int] = ..., nbytes: _Optional[int] = ..., num_held: _Optional[int] = ..., num_unknown: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_read_leases", "num_write_leases")
    NUM_READ_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_WRITE_LEASES_FIELD_NUMBER: _ClassVar[int]
    num_read_leases: int
    num_write_leases: int
    def __init__(self, num_read_leases: _Optional[int] = ..., num_write_leases: _Optional[int] = ...) -> None: ...

class ListTransportsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTransportsResponse(_message.Message):
    __slots__ = ("transports", "advertisement", "host", "door")
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ADVERTISEMENT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DOOR_FIELD_NUMBER: _ClassVar[int]
    transports: _containers.RepeatedCompositeFieldContainer[TransportInfo]
    advertisement: bytes
    host: HostInfo
    door: str
    def __init__(self, transports: _Optional[_Iterable[_Union[TransportInfo, _Mapping]]] = ..., advertisement: _Optional[bytes] = ..., host: _Optional[_Union[HostInfo, _Mapping]] = ..., door: _Optional[str] = ...) -> None: ...

class TransportInfo(_message.Message):
    __slots__ = ("scheme", "available", "reason", "remedy", "kinds", "facts", "bound", "advertised", "open", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    ADVERTISED_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    scheme: str
    available: bool
    reason: str
    remedy: str
    kinds: _containers.RepeatedScalarFieldContainer[str]
    facts: _containers.RepeatedCompositeFieldContainer[NamedFact]
    bound: _containers.RepeatedScalarFieldContainer[str]
    advertised: _containers.RepeatedScalarFieldContainer[str]
    open: bool
    counters: _containers.ScalarMap[str, int]
    def __init__(self, scheme: _Optional[str] = ..., available: bool = ..., reason: _Optional[str] = ..., remedy: _Optional[str] = ..., kinds: _Optional[_Iterable[str]] = ..., facts: _Optional[_Iterable[_Union[NamedFact, _Mapping]]] = ..., bound: _Optional[_Iterable[str]] = ..., advertised: _Optional[_Iterable[str]] = ..., open: bool = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class NamedFact(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class HostInfo(_message.Message):
    __slots__ = ("numa_nodes", "nics", "rdma_ports", "gpus", "huge_pages", "kernel")
    NUMA_NODES_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    RDMA_PORTS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    HUGE_PAGES_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    numa_nodes: _containers.RepeatedCompositeFieldContainer[NumaNodeInfo]
    nics: _containers.RepeatedCompositeFieldContainer[NicInfo]
    rdma_ports: _containers.RepeatedCompositeFieldContainer[RdmaPortInfo]
    gpus: _containers.RepeatedCompositeFieldContainer[GpuInfo]
    huge_pages: HugePagesInfo
    kernel: _containers.RepeatedCompositeFieldContainer[NamedFact]
    def __init__(self, numa_nodes: _Optional[_Iterable[_Union[NumaNodeInfo, _Mapping]]] = ..., nics: _Optional[_Iterable[_Union[NicInfo, _Mapping]]] = ..., rdma_ports: _Optional[_Iterable[_Union[RdmaPortInfo, _Mapping]]] = ..., gpus: _Optional[_Iterable[_Union[GpuInfo, _Mapping]]] = ..., huge_pages: _Optional[_Union[HugePagesInfo, _Mapping]] = ..., kernel: _Optional[_Iterable[_Union[NamedFact, _Mapping]]] = ...) -> None: ...

class HugePagesInfo(_message.Message):
    __slots__ = ("shmem", "anonymous", "page_nbytes", "mounts", "reserved")
    SHMEM_FIELD_NUMBER: _ClassVar[int]
    ANONYMOUS_FIELD_NUMBER: _ClassVar[int]
    PAGE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    shmem: str
    anonymous: str
    page_nbytes: int
    mounts: _containers.RepeatedCompositeFieldContainer[NamedFact]
    reserved: _containers.RepeatedCompositeFieldContainer[ReservedPagesInfo]
    def __init__(self, shmem: _Optional[str] = ..., anonymous: _Optional[str] = ..., page_nbytes: _Optional[int] = ..., mounts: _Optional[_Iterable[_Union[NamedFact, _Mapping]]] = ..., reserved: _Optional[_Iterable[_Union[ReservedPagesInfo, _Mapping]]] = ...) -> None: ...

class ReservedPagesInfo(_message.Message):
    __slots__ = ("page_nbytes", "num_pages", "num_free")
    PAGE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_FIELD_NUMBER: _ClassVar[int]
    page_nbytes: int
    num_pages: int
    num_free: int
    def __init__(self, page_nbytes: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_free: _Optional[int] = ...) -> None: ...

class DevicePlace(_message.Message):
    __slots__ = ("numa_node", "pci_path")
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    PCI_PATH_FIELD_NUMBER: _ClassVar[int]
    numa_node: int
    pci_path: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, numa_node: _Optional[int] = ..., pci_path: _Optional[_Iterable[str]] = ...) -> None: ...

class NumaNodeInfo(_message.Message):
    __slots__ = ("index", "cpus", "memory_nbytes", "distances")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_NBYTES_FIELD_NUMBER: _ClassVar[int]
    DISTANCES_FIELD_NUMBER: _ClassVar[int]
    index: int
    cpus: str
    memory_nbytes: int
    distances: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., cpus: _Optional[str] = ..., memory_nbytes: _Optional[int] = ..., distances: _Optional[_Iterable[int]] = ...) -> None: ...

class NicInfo(_message.Message):
    __slots__ = ("name", "speed_bytes_per_s", "up", "loopback", "addresses", "places")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEED_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    LOOPBACK_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    name: str
    speed_bytes_per_s: float
    up: bool
    loopback: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    places: _containers.RepeatedCompositeFieldContainer[DevicePlace]
    def __init__(self, name: _Optional[str] = ..., speed_bytes_per_s: _Optional[float] = ..., up: bool = ..., loopback: bool = ..., addresses: _Optional[_Iterable[str]] = ..., places: _Optional[_Iterable[_Union[DevicePlace, _Mapping]]] = ...) -> None: ...

class RdmaPortInfo(_message.Message):
    __slots__ = ("device", "port", "link_layer", "active", "speed_bytes_per_s", "place", "nics")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    LINK_LAYER_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    SPEED_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    device: str
    port: int
    link_layer: str
    active: bool
    speed_bytes_per_s: float
    place: DevicePlace
    nics: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device: _Optional[str] = ..., port: _Optional[int] = ..., link_layer: _Optional[str] = ..., active: bool = ..., speed_bytes_per_s: _Optional[float] = ..., place: _Optional[_Union[DevicePlace, _Mapping]] = ..., nics: _Optional[_Iterable[str]] = ...) -> None: ...

class GpuInfo(_message.Message):
    __slots__ = ("address", "vendor", "device", "place")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    address: str
    vendor: str
    device: str
    place: DevicePlace
    def __init__(self, address: _Optional[str] = ..., vendor: _Optional[str] = ..., device: _Optional[str] = ..., place: _Optional[_Union[DevicePlace, _Mapping]] = ...) -> None: ...

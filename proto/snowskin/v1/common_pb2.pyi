from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChecksumAlgorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_ALGORITHM_UNSPECIFIED: _ClassVar[ChecksumAlgorithm]
    CHECKSUM_ALGORITHM_CRC32C_KEYED: _ClassVar[ChecksumAlgorithm]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HBM: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]

class CachePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_POLICY_UNSPECIFIED: _ClassVar[CachePolicy]
    CACHE_POLICY_READ_WRITE: _ClassVar[CachePolicy]
    CACHE_POLICY_OFF: _ClassVar[CachePolicy]
CHECKSUM_ALGORITHM_UNSPECIFIED: ChecksumAlgorithm
CHECKSUM_ALGORITHM_CRC32C_KEYED: ChecksumAlgorithm
TIER_UNSPECIFIED: Tier
TIER_HBM: Tier
TIER_DRAM: Tier
TIER_NVME: Tier
CACHE_POLICY_UNSPECIFIED: CachePolicy
CACHE_POLICY_READ_WRITE: CachePolicy
CACHE_POLICY_OFF: CachePolicy

class KeyColumn(_message.Message):
    __slots__ = ("packed", "width")
    PACKED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    packed: bytes
    width: int
    def __init__(self, packed: _Optional[bytes] = ..., width: _Optional[int] = ...) -> None: ...

class Checksums(_message.Message):
    __slots__ = ("algorithm", "packed")
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    algorithm: ChecksumAlgorithm
    packed: bytes
    def __init__(self, algorithm: _Optional[_Union[ChecksumAlgorithm, str]] = ..., packed: _Optional[bytes] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("tier", "pool_id", "offset", "nbytes", "generation")
    TIER_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    pool_id: int
    offset: int
    nbytes: int
    generation: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., pool_id: _Optional[int] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("extent", "first_block_index", "num_blocks", "shard_index")
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARD_INDEX_FIELD_NUMBER: _ClassVar[int]
    extent: Extent
    first_block_index: int
    num_blocks: int
    shard_index: int
    def __init__(self, extent: _Optional[_Union[Extent, _Mapping]] = ..., first_block_index: _Optional[int] = ..., num_blocks: _Optional[int] = ..., shard_index: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "ttl_ms", "capability", "regions")
    ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    id: int
    ttl_ms: int
    capability: bytes
    regions: _containers.RepeatedCompositeFieldContainer[GrantedRegion]
    def __init__(self, id: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., capability: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[GrantedRegion, _Mapping]]] = ...) -> None: ...

class GrantedRegion(_message.Message):
    __slots__ = ("pool_id", "descriptors")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    descriptors: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, pool_id: _Optional[int] = ..., descriptors: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LeaseRef(_message.Message):
    __slots__ = ("id", "capability")
    ID_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    id: int
    capability: bytes
    def __init__(self, id: _Optional[int] = ..., capability: _Optional[bytes] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "status", "message", "hint", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    status: str
    message: str
    hint: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., status: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

from snowskin.v1 import common_pb2 as _common_pb2
from snowskin.v1 import store_pb2 as _store_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolAccess(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_ACCESS_UNSPECIFIED: _ClassVar[PoolAccess]
    POOL_ACCESS_READ: _ClassVar[PoolAccess]
    POOL_ACCESS_WRITE: _ClassVar[PoolAccess]
POOL_ACCESS_UNSPECIFIED: PoolAccess
POOL_ACCESS_READ: PoolAccess
POOL_ACCESS_WRITE: PoolAccess

class DoorRequest(_message.Message):
    __slots__ = ("call_id", "request_id", "hello", "reserve", "commit", "abort", "probe", "match", "renew", "release", "stat", "cancel", "traceparent", "tracestate")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    request_id: str
    hello: Hello
    reserve: _store_pb2.ReserveRequest
    commit: _store_pb2.CommitRequest
    abort: _store_pb2.AbortRequest
    probe: _store_pb2.ProbeRequest
    match: _store_pb2.MatchRequest
    renew: _store_pb2.RenewRequest
    release: _store_pb2.ReleaseRequest
    stat: _store_pb2.StatRequest
    cancel: Cancel
    traceparent: str
    tracestate: str
    def __init__(self, call_id: _Optional[int] = ..., request_id: _Optional[str] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., reserve: _Optional[_Union[_store_pb2.ReserveRequest, _Mapping]] = ..., commit: _Optional[_Union[_store_pb2.CommitRequest, _Mapping]] = ..., abort: _Optional[_Union[_store_pb2.AbortRequest, _Mapping]] = ..., probe: _Optional[_Union[_store_pb2.ProbeRequest, _Mapping]] = ..., match: _Optional[_Union[_store_pb2.MatchRequest, _Mapping]] = ..., renew: _Optional[_Union[_store_pb2.RenewRequest, _Mapping]] = ..., release: _Optional[_Union[_store_pb2.ReleaseRequest, _Mapping]] = ..., stat: _Optional[_Union[_store_pb2.StatRequest, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("call_id",)
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    def __init__(self, call_id: _Optional[int] = ...) -> None: ...

class DoorResponse(_message.Message):
    __slots__ = ("call_id", "error", "hello", "reserve", "commit", "abort", "probe", "match", "renew", "release", "stat")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    error: _common_pb2.ErrorDetail
    hello: HelloResponse
    reserve: _store_pb2.ReserveResponse
    commit: _store_pb2.CommitResponse
    abort: _store_pb2.AbortResponse
    probe: _store_pb2.ProbeResponse
    match: _store_pb2.MatchResponse
    renew: _store_pb2.RenewResponse
    release: _store_pb2.ReleaseResponse
    stat: _store_pb2.StatResponse
    def __init__(self, call_id: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ..., hello: _Optional[_Union[HelloResponse, _Mapping]] = ..., reserve: _Optional[_Union[_store_pb2.ReserveResponse, _Mapping]] = ..., commit: _Optional[_Union[_store_pb2.CommitResponse, _Mapping]] = ..., abort: _Optional[_Union[_store_pb2.AbortResponse, _Mapping]] = ..., probe: _Optional[_Union[_store_pb2.ProbeResponse, _Mapping]] = ..., match: _Optional[_Union[_store_pb2.MatchResponse, _Mapping]] = ..., renew: _Optional[_Union[_store_pb2.RenewResponse, _Mapping]] = ..., release: _Optional[_Union[_store_pb2.ReleaseResponse, _Mapping]] = ..., stat: _Optional[_Union[_store_pb2.StatResponse, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("wire_version", "client_name", "access")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    client_name: str
    access: PoolAccess
    def __init__(self, wire_version: _Optional[int] = ..., client_name: _Optional[str] = ..., access: _Optional[_Union[PoolAccess, str]] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("wire_version", "node_id", "node_epoch", "session_id", "pools", "max_keys", "max_extent_nbytes")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_EXTENT_NBYTES_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    node_id: str
    node_epoch: int
    session_id: int
    pools: _containers.RepeatedCompositeFieldContainer[PoolDescriptor]
    max_keys: int
    max_extent_nbytes: int
    def __init__(self, wire_version: _Optional[int] = ..., node_id: _Optional[str] = ..., node_epoch: _Optional[int] = ..., session_id: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[PoolDescriptor, _Mapping]]] = ..., max_keys: _Optional[int] = ..., max_extent_nbytes: _Optional[int] = ...) -> None: ...

class PoolDescriptor(_message.Message):
    __slots__ = ("pool_id", "tier", "nbytes", "region")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    tier: _common_pb2.Tier
    nbytes: int
    region: bytes
    def __init__(self, pool_id: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., nbytes: _Optional[int] = ..., region: _Optional[bytes] = ...) -> None: ...

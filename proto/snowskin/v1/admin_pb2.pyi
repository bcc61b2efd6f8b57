from snowskin.v1 import engine_pb2 as _engine_pb2
from snowskin.v1 import store_pb2 as _store_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClusterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatusResponse(_message.Message):
    __slots__ = ("instances", "model_name", "num_requests_running", "num_requests_finished", "num_requests_refused", "num_requests_failed")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    model_name: str
    num_requests_running: int
    num_requests_finished: int
    num_requests_refused: int
    num_requests_failed: int
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., model_name: _Optional[str] = ..., num_requests_running: _Optional[int] = ..., num_requests_finished: _Optional[int] = ..., num_requests_refused: _Optional[int] = ..., num_requests_failed: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("address", "stat", "error")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    address: str
    stat: _store_pb2.StatResponse
    error: str
    def __init__(self, address: _Optional[str] = ..., stat: _Optional[_Union[_store_pb2.StatResponse, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

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

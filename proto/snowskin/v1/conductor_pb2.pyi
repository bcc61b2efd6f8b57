from snowskin.v1 import common_pb2 as _common_pb2
from snowskin.v1 import engine_pb2 as _engine_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScheduleRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "max_tokens", "cache_policy")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    max_tokens: int
    cache_policy: _common_pb2.CachePolicy
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., cache_policy: _Optional[_Union[_common_pb2.CachePolicy, str]] = ...) -> None: ...

class ScheduleResponse(_message.Message):
    __slots__ = ("prefill_instance_id", "prefill_address", "decode_instance_id", "decode_address", "num_cached_blocks", "ttft_s", "transfer_s", "queue_s", "prefill_s", "prompt")
    PREFILL_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    prefill_instance_id: str
    prefill_address: str
    decode_instance_id: str
    decode_address: str
    num_cached_blocks: int
    ttft_s: float
    transfer_s: float
    queue_s: float
    prefill_s: float
    prompt: _engine_pb2.Prompt
    def __init__(self, prefill_instance_id: _Optional[str] = ..., prefill_address: _Optional[str] = ..., decode_instance_id: _Optional[str] = ..., decode_address: _Optional[str] = ..., num_cached_blocks: _Optional[int] = ..., ttft_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., prompt: _Optional[_Union[_engine_pb2.Prompt, _Mapping]] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("instance_id", "instance_epoch", "role", "address", "node_address", "namespaces", "layout_json", "block_size", "block_nbytes", "model_name", "max_context_tokens", "load")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    instance_epoch: int
    role: str
    address: str
    node_address: str
    namespaces: _containers.RepeatedScalarFieldContainer[bytes]
    layout_json: str
    block_size: int
    block_nbytes: int
    model_name: str
    max_context_tokens: int
    load: _engine_pb2.InstanceLoad
    def __init__(self, instance_id: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., node_address: _Optional[str] = ..., namespaces: _Optional[_Iterable[bytes]] = ..., layout_json: _Optional[str] = ..., block_size: _Optional[int] = ..., block_nbytes: _Optional[int] = ..., model_name: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., load: _Optional[_Union[_engine_pb2.InstanceLoad, _Mapping]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("report_interval_ms",)
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    report_interval_ms: int
    def __init__(self, report_interval_ms: _Optional[int] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("instance_id", "instance_epoch", "load", "draining")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    instance_epoch: int
    load: _engine_pb2.InstanceLoad
    draining: bool
    def __init__(self, instance_id: _Optional[str] = ..., instance_epoch: _Optional[int] = ..., load: _Optional[_Union[_engine_pb2.InstanceLoad, _Mapping]] = ..., draining: bool = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...

from snowskin.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Prompt(_message.Message):
    __slots__ = ("token_ids", "block_keys", "namespace", "cache_policy", "node_addresses")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    block_keys: _common_pb2.KeyColumn
    namespace: bytes
    cache_policy: _common_pb2.CachePolicy
    node_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_ids: _Optional[bytes] = ..., block_keys: _Optional[_Union[_common_pb2.KeyColumn, _Mapping]] = ..., namespace: _Optional[bytes] = ..., cache_policy: _Optional[_Union[_common_pb2.CachePolicy, str]] = ..., node_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "seed", "max_tokens", "stop_token_ids", "top_k")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "prompt", "sampling", "timeout_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    timeout_ms: int
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("handoff", "stats")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    handoff: Handoff
    stats: PrefillStats
    def __init__(self, handoff: _Optional[_Union[Handoff, _Mapping]] = ..., stats: _Optional[_Union[PrefillStats, _Mapping]] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("first_token_id", "position", "tail_nbytes", "node_address", "finish_reason")
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TAIL_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    position: int
    tail_nbytes: int
    node_address: str
    finish_reason: str
    def __init__(self, first_token_id: _Optional[int] = ..., position: _Optional[int] = ..., tail_nbytes: _Optional[int] = ..., node_address: _Optional[str] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class PrefillStats(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_cached_tokens", "num_computed_tokens", "num_blocks_pulled", "pulled_nbytes", "num_blocks_published", "published_nbytes", "num_blocks_corrupt", "queue_s", "pull_s", "compute_s", "publish_s")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULLED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_S_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int
    num_blocks_pulled: int
    pulled_nbytes: int
    num_blocks_published: int
    published_nbytes: int
    num_blocks_corrupt: int
    queue_s: float
    pull_s: float
    compute_s: float
    publish_s: float
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_blocks_pulled: _Optional[int] = ..., pulled_nbytes: _Optional[int] = ..., num_blocks_published: _Optional[int] = ..., published_nbytes: _Optional[int] = ..., num_blocks_corrupt: _Optional[int] = ..., queue_s: _Optional[float] = ..., pull_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., publish_s: _Optional[float] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("start", "handoff")
    START_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    start: DecodeStart
    handoff: Handoff
    def __init__(self, start: _Optional[_Union[DecodeStart, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ...) -> None: ...

class DecodeStart(_message.Message):
    __slots__ = ("request_id", "prompt", "sampling", "handoff_timeout_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    handoff_timeout_ms: int
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., handoff_timeout_ms: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("token_ids", "finish_reason", "stats")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    stats: DecodeStats
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., stats: _Optional[_Union[DecodeStats, _Mapping]] = ...) -> None: ...

class DecodeStats(_message.Message):
    __slots__ = ("num_blocks_pulled", "pulled_nbytes", "pull_s", "first_byte_s", "handoff_s", "num_blocks_published", "published_nbytes", "num_blocks_corrupt", "num_recomputed_tokens", "num_generated_tokens")
    NUM_BLOCKS_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULLED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_BYTE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_blocks_pulled: int
    pulled_nbytes: int
    pull_s: float
    first_byte_s: float
    handoff_s: float
    num_blocks_published: int
    published_nbytes: int
    num_blocks_corrupt: int
    num_recomputed_tokens: int
    num_generated_tokens: int
    def __init__(self, num_blocks_pulled: _Optional[int] = ..., pulled_nbytes: _Optional[int] = ..., pull_s: _Optional[float] = ..., first_byte_s: _Optional[float] = ..., handoff_s: _Optional[float] = ..., num_blocks_published: _Optional[int] = ..., published_nbytes: _Optional[int] = ..., num_blocks_corrupt: _Optional[int] = ..., num_recomputed_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("instance_id", "role", "load", "draining", "node_connected")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NODE_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: str
    load: InstanceLoad
    draining: bool
    node_connected: bool
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[str] = ..., load: _Optional[_Union[InstanceLoad, _Mapping]] = ..., draining: bool = ..., node_connected: bool = ...) -> None: ...

class InstanceLoad(_message.Message):
    __slots__ = ("num_waiting", "num_running", "num_waiting_tokens", "num_kv_blocks", "num_kv_blocks_free", "num_tokens_computed", "prefill_tokens_per_s", "pull_bytes_per_s", "decode_step_s", "num_nodes_silent", "num_silences", "num_calls_late")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PULL_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_SILENT_FIELD_NUMBER: _ClassVar[int]
    NUM_SILENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_LATE_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    num_waiting_tokens: int
    num_kv_blocks: int
    num_kv_blocks_free: int
    num_tokens_computed: int
    prefill_tokens_per_s: float
    pull_bytes_per_s: float
    decode_step_s: float
    num_nodes_silent: int
    num_silences: int
    num_calls_late: int
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., num_kv_blocks_free: _Optional[int] = ..., num_tokens_computed: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., pull_bytes_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., num_nodes_silent: _Optional[int] = ..., num_silences: _Optional[int] = ..., num_calls_late: _Optional[int] = ...) -> None: ...

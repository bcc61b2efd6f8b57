"""What instances are asked and what they answer, as frozen values.

Rules kept here: nothing in this file knows protobuf, sockets or clocks; times are relative seconds.
Field for field these are the messages of `engine.proto`, where each one is documented.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Not at run time: it would bring torch to whoever only passes messages on.
    from snowskin.engines.model.sampler import SamplingParams
    from snowskin.kvstore.blocks import KeyColumn


class CachePolicy(Enum):
    """How a request treats the shared cache."""

    READ_WRITE = 1
    # Neither reads cached blocks nor leaves any: its keys are its own, its blocks have one reader.
    OFF = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sequence as every instance sees it; `block_keys` has one key for each full block."""

    token_ids: tuple[int, ...]
    block_keys: KeyColumn
    namespace: bytes
    cache_policy: CachePolicy = CachePolicy.READ_WRITE
    node_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """Compute this prompt's KV, publish it, sample the first token."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """What decode needs besides the KV bytes; `finish_reason` where the first token ended it all."""

    first_token_id: int
    position: int
    tail_nbytes: int = 0
    node_address: str = ""
    finish_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStats:
    """The work of one prefill: `num_prompt_tokens` = cached + computed, always."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillResponse:
    """The hand-off, and what it cost."""

    handoff: Handoff
    stats: PrefillStats


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStart:
    """Get ready to decode: room, and the KV that prefill publishes."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    handoff_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStats:
    """The work of one decode; `num_generated_tokens` does not count the hand-off's first token."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutput:
    """Tokens as they come; the last message has `finish_reason` and `stats`, and no tokens."""

    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    stats: DecodeStats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """What an instance is doing, and how its nodes answer; rates are moving averages, 0 while unknown."""

    num_waiting: int
    num_running: int
    num_waiting_tokens: int
    num_kv_blocks: int
    num_kv_blocks_free: int
    num_tokens_computed: int
    prefill_tokens_per_s: float
    pull_bytes_per_s: float
    decode_step_s: float
    num_nodes_silent: int = 0
    num_silences: int = 0
    num_calls_late: int = 0

"""What a policy decides about and what it answers: a request, a placement, a refusal.

Rules kept here: frozen values without behaviour beyond arithmetic; no clock, no I/O. A request
reaches a policy after its prompt was tokenised and its cached blocks were looked up; what could not
be learnt in time is simply not in `presence`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from snowskin.kvstore.directory.presence import PlannedPull, Presence


class Stage(StrEnum):
    """The part of a request's work that one instance does; also the role of that instance."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What two instances must share before one can use the other's KV.

    Attributes:
        namespaces: shards that an instance reads and writes, 32 bytes each.
        block_size: tokens of a block.
        block_nbytes: bytes of a block.
    """

    namespaces: tuple[bytes, ...]
    block_size: int
    block_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as a policy sees it.

    Attributes:
        num_tokens: tokens of the prompt (on a replay: with what was generated before).
        max_tokens: tokens still to generate at most.
        presence: which blocks of the prompt are on which nodes.
        excluded: instances that have failed this request already.
    """

    request_id: str
    shape: CacheShape
    num_tokens: int
    max_tokens: int
    presence: Presence = field(default_factory=Presence)
    excluded: frozenset[str] = frozenset()

    @property
    def num_usable_blocks(self) -> int:
        """Cached blocks of use to prefill: the last token's logits are always computed."""
        return (self.num_tokens - 1) // self.shape.block_size

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of KV memory that decode needs for prompt and answer together."""
        return -(-(self.num_tokens + self.max_tokens) // self.shape.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds from placement to first token, by cause."""

    transfer_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """The sum."""
        return self.transfer_s + self.queue_s + self.prefill_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One stage of a request on one instance.

    Attributes:
        num_cached_blocks: blocks that the placement counts on pulling, from whatever nodes.
        num_new_tokens: prompt tokens that the instance is expected to compute.
        num_kv_blocks: blocks of KV memory that it is expected to hold.
        estimate: for prefill; None for decode, which does not delay the first token.
        pulls: what to pull from whom, in order.
        replicas: nodes that hold some of it too, should one of these fail; who holds most first.
    """

    stage: Stage
    instance_id: str
    num_cached_blocks: int = 0
    num_new_tokens: int = 0
    num_kv_blocks: int = 0
    estimate: Estimate | None = None
    pulls: tuple[PlannedPull, ...] = ()
    replicas: tuple[str, ...] = ()

    @property
    def node_addresses(self) -> tuple[str, ...]:
        """The nodes of the pulls, in the order in which they are needed first, then the others."""
        return tuple(dict.fromkeys([*(pull.address for pull in self.pulls), *self.replicas]))


class RefusalReason(StrEnum):
    """Why a request is not served now."""

    TOO_MANY_REQUESTS = "too_many_requests"
    QUEUE_TOO_LONG = "queue_too_long"
    TTFT_TOO_LONG = "ttft_too_long"
    NO_INSTANCE = "no_instance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Not now: the reason, the numbers, what to do, and when it may be otherwise."""

    reason: RefusalReason
    message: str
    hint: str
    retry_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """The request may be placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defer:
    """Nobody could serve the request at this moment; ask again when the cluster has changed."""

    message: str


Admission = Accept | Defer | Refusal

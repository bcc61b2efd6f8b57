"""A request on its way through the conductor, and what comes back of it.

Rules kept here: frozen values; what a job needs of the outside (its seed, its arrival, its salt) was
chosen at the border, so that the same job gives the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.engines.conductor.request import Estimate
    from snowskin.engines.messages import DecodeStats, PrefillStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the fields are those of `SamplingParams` on the wire."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate.

    Attributes:
        request_id: the user's, or one made at the border; 1 to 96 characters.
        token_ids: of the prompt, at least one.
        max_tokens: tokens wanted at most; None takes `default_max_tokens`, or what is left of the
            context where that is less.
        default_max_tokens: None is the conductor's own.
        use_cache: whether cached blocks are read and new ones left.
        salt: unguessable; parts the block keys of a job without cache from all others.
        arrived_at_s: when the request reached the conductor; TTFT counts from here.
        traceparent: W3C trace context that the request came with, unread; as `tracestate`.
        user: a keyed hash of the end user whom the request names, or "": for logs, to tell who asks
            much without saying who.
    """

    request_id: str
    token_ids: Sequence[int] = field(repr=False)
    sampling: Sampling
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    use_cache: bool = True
    salt: str = ""
    arrived_at_s: float = 0.0
    traceparent: str = ""
    tracestate: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of the answer, straight from prefill."""

    token_id: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens after it, in order, each once."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: `stop` or `length`."""

    finish_reason: str


Event = FirstToken | Tokens | Finished


@dataclass(slots=True, kw_only=True)
class JobReport:
    """What a job cost so far; filled in by the pipeline while it runs.

    Attributes:
        num_cached_tokens: prompt tokens that the first prefill did not compute; None before it.
        prefill: of the last prefill, as `decode`: where a decode instance was lost there are more.
    """

    num_prompt_tokens: int
    num_generated_tokens: int = 0
    num_cached_tokens: int | None = None
    ttft_s: float | None = None
    num_prefill_retries: int = 0
    num_decode_retries: int = 0
    prefill_instance_id: str = ""
    decode_instance_id: str = ""
    estimate: Estimate | None = None
    prefill: PrefillStats | None = None
    decode: DecodeStats | None = None

"""Refuse early: a request that would wait too long is told so before any instance works for it.

Rules kept here: the number of requests is looked at first, before anything is done for one, so that
a flood of them costs little; limits are checked in a fixed order (requests, waiting tokens,
estimated TTFT), so that equal views give equal answers; the limit on waiting never refuses what meets an empty queue,
or it could never be served; every refusal says the numbers and when to come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.conductor.request import (
    Accept,
    Admission,
    CacheShape,
    Defer,
    Refusal,
    RefusalReason,
    Request,
    Stage,
)
from snowskin.engines.errors import PromptTooLong

if TYPE_CHECKING:
    from snowskin.engines.conductor.cost_model import CostModel
    from snowskin.engines.conductor.view import ClusterView

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What is refused.

    Attributes:
        max_requests: in flight in this conductor.
        max_waiting_tokens: prompt tokens that wait for prefill, over all instances.
        max_ttft_s: estimated time to first token on the best instance.
    """

    max_requests: int = 256
    max_waiting_tokens: int = 1 << 20
    max_ttft_s: float = 120.0


def admit(
    request: Request, view: ClusterView, *, limits: AdmissionLimits, cost_model: CostModel
) -> Admission:
    """Accepts, refuses with a reason, or defers while no instance of a role is ready."""
    if (too_many := check_number(view.num_requests - 1, limits)) is not None:
        return too_many
    candidates = view.candidates(request, Stage.PREFILL)
    for stage in Stage:
        if not view.candidates(request, stage):
            return Defer(message=f"no {stage} instance is ready")
    num_waiting_tokens = sum(
        instance.num_waiting_tokens for instance in view.ready(Stage.PREFILL, request.shape)
    )
    best = min(
        (cost_model.estimate(request, instance) for instance in candidates),
        key=lambda estimate: estimate.ttft_s,
    )
    if num_waiting_tokens and num_waiting_tokens + request.num_tokens > limits.max_waiting_tokens:
        return Refusal(
            reason=RefusalReason.QUEUE_TOO_LONG,
            message=f"{num_waiting_tokens} prompt tokens wait for prefill and the request has "
            f"{request.num_tokens}, the limit is {limits.max_waiting_tokens}",
            hint="retry later, or raise the conductor's max_waiting_tokens",
            retry_after_s=_bounded(best.queue_s),
        )
    if best.ttft_s > limits.max_ttft_s:
        return Refusal(
            reason=RefusalReason.TTFT_TOO_LONG,
            message=f"the first token is estimated in {best.ttft_s:.1f} s (transfer "
            f"{best.transfer_s:.1f}, queue {best.queue_s:.1f}, prefill {best.prefill_s:.1f}), "
            f"the limit is {limits.max_ttft_s:.1f} s",
            hint="retry later, shorten the prompt, or raise the conductor's max_ttft_s",
            retry_after_s=_bounded(best.ttft_s - limits.max_ttft_s),
        )
    return Accept()


def check_number(num_in_flight: int, limits: AdmissionLimits) -> Refusal | None:
    """Why there is no place for one request more, or None; needs to know nothing of the request."""
    if num_in_flight < limits.max_requests:
        return None
    return Refusal(
        reason=RefusalReason.TOO_MANY_REQUESTS,
        message=f"{num_in_flight} requests are in flight, the limit is {limits.max_requests}",
        hint="retry later, or raise the conductor's max_requests",
        retry_after_s=MIN_RETRY_S,
    )


def check_context(num_tokens: int, max_tokens: int, view: ClusterView, shape: CacheShape) -> None:
    """Refuses a request that no retry could serve.

    Raises:
        PromptTooLong: prompt and wanted tokens exceed what a ready instance can hold.
    """
    limit = view.context_limit_tokens(shape)
    if limit and num_tokens + max_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens and {max_tokens} more are wanted, "
            f"{num_tokens + max_tokens} together; the limit is {limit}",
            hint="shorten the prompt, or lower max_tokens",
        )
    prompt_limit = view.prompt_limit_tokens(shape)
    if prompt_limit and num_tokens > prompt_limit:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens, prefill's KV memory holds {prompt_limit}",
            hint="shorten the prompt, or raise the prefill instances' kv_memory_nbytes",
        )


def _bounded(retry_after_s: float) -> float:
    return min(MAX_RETRY_S, max(MIN_RETRY_S, retry_after_s))

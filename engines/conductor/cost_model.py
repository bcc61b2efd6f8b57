"""Seconds to the first token on an instance.

The whole rule: TTFT = transfer + queue + prefill, where

    transfer = a fixed cost + bytes of the cached blocks / pull rate    (0 where nothing is cached)
    queue    = prompt tokens ahead of us                 / prefill rate
    prefill  = prompt tokens that are not cached         / prefill rate

Rules kept here: pure arithmetic over what instances report; rates that an instance has not measured
yet are the defaults below. The prefill rate is an average, so attention's quadratic share is in it
only as far as recent prompts were as long as this one: for a far longer one the estimate is too
small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.conductor.request import Estimate, Request

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import InstanceView


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Estimates; the fields are what is assumed of an instance that has not measured itself.

    Attributes:
        prefill_tokens_per_s: a 40 M parameter model on one CPU core; an engine's warm-up
            replaces it at once.
        pull_bytes_per_s: one memcpy with a checksum on one core.
        pull_fixed_s: match, lease and release of one pull.
    """

    prefill_tokens_per_s: float = 1_000.0
    pull_bytes_per_s: float = 1e9
    pull_fixed_s: float = 0.001

    def num_cached_blocks(self, request: Request, instance: InstanceView) -> int:
        """Blocks that prefill can pull from the instance's own node."""
        found = request.cached_blocks.get(instance.node_address, 0)
        return max(0, min(found, request.num_usable_blocks))

    def estimate(self, request: Request, instance: InstanceView) -> Estimate:
        """Seconds to the first token, were the request's prefill placed on `instance` now."""
        tokens_per_s = instance.load.prefill_tokens_per_s or self.prefill_tokens_per_s
        bytes_per_s = instance.load.pull_bytes_per_s or self.pull_bytes_per_s
        num_cached_blocks = self.num_cached_blocks(request, instance)
        num_new_tokens = request.num_tokens - num_cached_blocks * request.shape.block_size
        transfer_s = 0.0
        if num_cached_blocks:
            nbytes = num_cached_blocks * request.shape.block_nbytes
            transfer_s = self.pull_fixed_s + nbytes / bytes_per_s
        return Estimate(
            transfer_s=transfer_s,
            queue_s=instance.num_waiting_tokens / tokens_per_s,
            prefill_s=num_new_tokens / tokens_per_s,
        )

"""least_ttft: prefill where the first token comes soonest, decode where the least is going on.

- prefill: least transfer + queue + prefill by the cost model; cached blocks are worth the prefill
  that they save less their way, which is short from the instance's own node.
- an instance that has computed nothing yet knows its rate from a warm-up alone, while all started
  together: it counts as fast as the fastest, or a slow start would keep work from it for good.
- decode: instances with room in KV memory before those without; of these the fewest requests, then
  the most free blocks.
- ties: the lowest instance id.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from snowskin.engines.conductor.policies.api import Policy
from snowskin.engines.conductor.request import Request, Stage

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import ClusterView, InstanceView


class LeastTtft(Policy):
    """The default."""

    name: ClassVar[str] = "least_ttft"

    def choose(
        self, request: Request, stage: Stage, candidates: list[InstanceView], view: ClusterView
    ) -> InstanceView:
        """The cheapest candidate; of equals `min` keeps the first, hence the lowest id."""
        if stage is Stage.PREFILL:
            fastest = max(each.load.prefill_tokens_per_s for each in candidates)
            return min(
                candidates,
                key=lambda each: self.cost_model.estimate(request, _hoped(each, fastest)).ttft_s,
            )
        return min(
            candidates,
            key=lambda each: (
                each.num_free_blocks < request.num_kv_blocks,
                each.num_requests,
                -each.num_free_blocks,
            ),
        )


def _hoped(instance: InstanceView, fastest_tokens_per_s: float) -> InstanceView:
    """The instance as it may be, where nothing is known of it yet."""
    if instance.load.num_tokens_computed:
        return instance
    return replace(instance, load=replace(instance.load, prefill_tokens_per_s=fastest_tokens_per_s))

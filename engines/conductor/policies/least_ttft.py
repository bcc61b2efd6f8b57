"""least_ttft: prefill where the first token comes soonest, decode where the least is going on.

- prefill: least transfer + queue + prefill by the cost model; cached blocks are worth the prefill
  that they save less their way, which is short from the instance's own node.
- decode: instances with room in KV memory before those without; of these the fewest requests, then
  the most free blocks.
- ties: the lowest instance id.
"""

from __future__ import annotations

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
            return min(candidates, key=lambda each: self.cost_model.estimate(request, each).ttft_s)
        return min(
            candidates,
            key=lambda each: (
                each.num_free_blocks < request.num_kv_blocks,
                each.num_requests,
                -each.num_free_blocks,
            ),
        )

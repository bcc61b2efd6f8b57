"""round_robin: each stage goes to the next instance in turn, by id, whatever its load or cache.

The turn is the number of placements so far, which the view carries: the policy itself remembers
nothing. The yardstick that other policies are measured against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from snowskin.engines.conductor.policies.api import Policy

if TYPE_CHECKING:
    from snowskin.engines.conductor.request import Request, Stage
    from snowskin.engines.conductor.view import ClusterView, InstanceView


class RoundRobin(Policy):
    """Takes turns."""

    name: ClassVar[str] = "round_robin"

    def choose(
        self, request: Request, stage: Stage, candidates: list[InstanceView], view: ClusterView
    ) -> InstanceView:
        """The candidate whose turn it is."""
        return candidates[view.num_placements.get(stage, 0) % len(candidates)]

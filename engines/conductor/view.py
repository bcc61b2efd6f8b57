"""What a policy may know of the cluster at one moment.

Rules kept here: a view is a frozen picture; asking it changes nothing, and two equal views give
equal answers. Instances stand in the order of their ids, so that ties are broken the same way
everywhere. Loads are what the instance last reported plus what this conductor has placed there
since: without the second part all requests of one report interval would herd to one instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from snowskin.engines.conductor.request import CacheShape, Request, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from snowskin.engines.messages import InstanceLoad


class InstanceState(StrEnum):
    """Whether an instance is given requests; only `READY` ones are."""

    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance.

    Attributes:
        epoch: new at each start of its process.
        address: where its Engine service listens, `host:port`.
        node_address: gRPC address of its own node.
        max_context_tokens: prompt and answer together; 0 where it does not say.
        num_placed_requests: placed by this conductor since the last report and not ended.
        num_placed_tokens: prompt tokens of these that are still to compute.
        num_placed_blocks: KV blocks that these will hold.
    """

    instance_id: str
    epoch: int
    role: str
    address: str
    node_address: str
    shape: CacheShape
    model_name: str
    max_context_tokens: int
    load: InstanceLoad
    state: InstanceState
    seconds_since_report: float
    num_placed_requests: int = 0
    num_placed_tokens: int = 0
    num_placed_blocks: int = 0

    @property
    def num_requests(self) -> int:
        """Requests that wait or run here, those placed since the report included."""
        return self.load.num_waiting + self.load.num_running + self.num_placed_requests

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens to compute before a new request's."""
        return self.load.num_waiting_tokens + self.num_placed_tokens

    @property
    def num_free_blocks(self) -> int:
        """Blocks of KV memory that a new request can have now; never negative."""
        return max(0, self.load.num_kv_blocks_free - self.num_placed_blocks)

    @property
    def memory_limit_tokens(self) -> int:
        """Tokens whose KV fills all of the instance's KV memory; 0 is unknown."""
        return self.load.num_kv_blocks * self.shape.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The cluster.

    Attributes:
        instances: all known ones, by id, whatever their state.
        num_requests: in flight in this conductor, the one to be decided included.
        num_placements: placements of each stage since this conductor's start.
    """

    instances: tuple[InstanceView, ...] = ()
    num_requests: int = 0
    num_placements: Mapping[Stage, int] = field(default_factory=dict)

    def ready(self, role: str, shape: CacheShape) -> list[InstanceView]:
        """Instances that may be given work of this role and cache shape, by id."""
        return [
            instance
            for instance in self.instances
            if instance.state is InstanceState.READY
            and instance.role == role
            and instance.shape == shape
        ]

    def candidates(self, request: Request, stage: Stage) -> list[InstanceView]:
        """Ready instances that can take this stage of this request, by id."""
        return [
            instance
            for instance in self.ready(stage, request.shape)
            if instance.instance_id not in request.excluded
        ]

    def shape(self) -> CacheShape | None:
        """The cache shape to serve a request with; None while no shape has both roles ready.

        Of several the one with the most ready instances, then the smallest namespace.
        """
        found: dict[CacheShape, dict[str, int]] = {}
        for instance in self.instances:
            if instance.state is InstanceState.READY:
                roles = found.setdefault(instance.shape, {})
                roles[instance.role] = roles.get(instance.role, 0) + 1
        whole = [shape for shape, roles in found.items() if all(stage in roles for stage in Stage)]
        return min(
            whole,
            key=lambda shape: (
                -sum(found[shape].values()),
                shape.namespaces,
                shape.block_size,
                shape.block_nbytes,
            ),
            default=None,
        )

    def context_limit_tokens(self, shape: CacheShape) -> int:
        """Prompt and answer at most: by the model, and by decode's KV memory; 0 is unknown."""
        decode = self.ready(Stage.DECODE, shape)
        limits = [each.max_context_tokens for each in (*self.ready(Stage.PREFILL, shape), *decode)]
        limits += [each.memory_limit_tokens for each in decode]
        return min((limit for limit in limits if limit > 0), default=0)

    def prompt_limit_tokens(self, shape: CacheShape) -> int:
        """The prompt alone at most: by prefill's KV memory; 0 is unknown."""
        limits = [each.memory_limit_tokens for each in self.ready(Stage.PREFILL, shape)]
        return min((limit for limit in limits if limit > 0), default=0)

    def missing_roles(self) -> tuple[str, ...]:
        """Roles without a ready instance."""
        ready = {each.role for each in self.instances if each.state is InstanceState.READY}
        return tuple(stage.value for stage in Stage if stage not in ready)

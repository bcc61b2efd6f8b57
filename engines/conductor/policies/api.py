"""What a conductor policy is: a small class over a read-only `ClusterView`.

Laws, each a test in `tests/contract/test_policies.py`:

- the same request and view give the same answer; asking changes neither the view nor the policy;
- only a ready instance of the stage's role and the request's cache shape is chosen, and never one
  that the request excludes;
- where such an instance exists a stage is placed; where none exists the answer is `NO_INSTANCE`;
- `admit` defers exactly while a role has no candidate, unless a limit is passed before.

A policy knows no gRPC and no clock, so that a simulator can call the same object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from snowskin.engines.conductor import admission
from snowskin.engines.conductor.admission import AdmissionLimits
from snowskin.engines.conductor.cost_model import CostModel
from snowskin.engines.conductor.request import (
    Admission,
    Placement,
    Refusal,
    RefusalReason,
    Request,
    Stage,
)

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import ClusterView, InstanceView
    from snowskin.kvstore.directory.presence import PlannedPull

MAX_REPLICAS = 2  # of one plan, beside the nodes that it pulls from


class Policy(ABC):
    """Overrides the hooks it needs; `choose` it must."""

    name: ClassVar[str]

    def __init__(
        self, cost_model: CostModel | None = None, limits: AdmissionLimits | None = None
    ) -> None:
        """Keeps what estimates are made with, and what is refused."""
        self.cost_model = cost_model or CostModel()
        self.limits = limits or AdmissionLimits()

    def admit(self, request: Request, view: ClusterView) -> Admission:
        """Whether the request may be placed now."""
        return admission.admit(request, view, limits=self.limits, cost_model=self.cost_model)

    def place(self, request: Request, stage: Stage, view: ClusterView) -> Placement | Refusal:
        """The instance for one stage of the request."""
        candidates = view.candidates(request, stage)
        if not candidates:
            return Refusal(
                reason=RefusalReason.NO_INSTANCE,
                message=f"no {stage} instance is ready",
                hint=f"start one (snowskin {stage}), or wait for its restart",
                retry_after_s=admission.MIN_RETRY_S,
            )
        return self._placed(request, stage, self.choose(request, stage, candidates, view))

    @abstractmethod
    def choose(
        self, request: Request, stage: Stage, candidates: list[InstanceView], view: ClusterView
    ) -> InstanceView:
        """One of `candidates`, which is never empty and stands in the order of ids."""

    def _placed(self, request: Request, stage: Stage, instance: InstanceView) -> Placement:
        if stage is Stage.DECODE:
            # Its tail comes from prefill, all full blocks may come from wherever they are.
            num_blocks = request.num_tokens // request.shape.block_size
            pulls = tuple(request.presence.pulls(own=instance.node_address, limit=num_blocks))
            return Placement(
                stage=stage,
                instance_id=instance.instance_id,
                num_kv_blocks=request.num_kv_blocks,
                pulls=pulls,
                replicas=_replicas(request, pulls),
            )
        pulls = self.cost_model.pulls(request, instance)
        num_cached_blocks = sum(pull.num_blocks for pull in pulls)
        return Placement(
            stage=stage,
            instance_id=instance.instance_id,
            num_cached_blocks=num_cached_blocks,
            num_new_tokens=request.num_tokens - num_cached_blocks * request.shape.block_size,
            num_kv_blocks=-(-request.num_tokens // request.shape.block_size),
            estimate=self.cost_model.estimate(request, instance),
            pulls=pulls,
            replicas=_replicas(request, pulls),
        )


def _replicas(request: Request, pulls: tuple[PlannedPull, ...]) -> tuple[str, ...]:
    """Who else holds some of what is pulled, should a node fail in the middle of it."""
    num_blocks = sum(pull.num_blocks for pull in pulls)
    planned = {pull.address for pull in pulls}
    others = (each for each in request.presence.holders(num_blocks) if each not in planned)
    return tuple(islice(others, MAX_REPLICAS))

"""The conductor's picture of the cluster: events and the time in, a `ClusterView` out.

Rules kept here:
- time is an argument, nothing runs by itself; a view is computed from what is known at `now_s`;
- an instance is suspect, and given nothing, after `suspect_after_s` without a report, or at once
  when a call to it failed, until its next report; an event of an earlier epoch changes nothing;
- registering again replaces, and so does another instance at the same address: the old process is
  gone;
- a placement counts until its stage ends or the instance's next report, which knows of it;
- requests are conserved: arrived = running + finished + refused + failed + cancelled, always.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from snowskin.engines.conductor.request import CacheShape, Placement, Stage
from snowskin.engines.conductor.view import ClusterView, InstanceState, InstanceView

if TYPE_CHECKING:
    from snowskin.engines.messages import InstanceLoad


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What an instance says of itself once; `layout_json` is for people."""

    instance_id: str
    epoch: int
    role: str
    address: str
    node_address: str
    shape: CacheShape
    model_name: str
    max_context_tokens: int = 0
    layout_json: str = ""


@dataclass(slots=True, kw_only=True)
class _Instance:
    registration: Registration
    load: InstanceLoad
    reported_at_s: float
    draining: bool = False
    failed: bool = False
    # (request id, stage) of placements that the last report cannot know of.
    placed: dict[tuple[str, Stage], Placement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """Requests since start, by what became of them."""

    num_running: int
    num_arrived: int
    num_finished: int
    num_refused: int
    num_failed: int
    num_cancelled: int


class ConductorState:
    """Owner of everything the conductor knows.

    Attributes:
        version: rises whenever an instance may have become available; waiters watch it.
    """

    def __init__(self, *, suspect_after_s: float = 1.5, forget_after_s: float = 60.0) -> None:
        """Knows nobody yet."""
        self.version = 0
        self._suspect_after_s = suspect_after_s
        self._forget_after_s = forget_after_s
        self._instances: dict[str, _Instance] = {}
        self._running: set[str] = set()
        self._num_arrived = 0
        self._num_ended = dict.fromkeys(Outcome, 0)
        self._num_placements = dict.fromkeys(Stage, 0)

    # --- instances

    def on_registered(self, registration: Registration, load: InstanceLoad, now_s: float) -> None:
        """An instance has started, or has found out that this conductor did."""
        for other_id, other in list(self._instances.items()):
            if other.registration.address == registration.address:
                del self._instances[other_id]
        self._instances[registration.instance_id] = _Instance(
            registration=registration, load=load, reported_at_s=now_s
        )
        self.version += 1

    def on_reported(
        self, instance_id: str, epoch: int, load: InstanceLoad, *, draining: bool, now_s: float
    ) -> bool:
        """A heartbeat; False where the instance must register first."""
        instance = self._of_epoch(instance_id, epoch)
        if instance is None:
            return False
        if instance.failed or self._is_silent(instance, now_s) or instance.draining != draining:
            self.version += 1
        instance.load = load
        instance.reported_at_s = now_s
        instance.draining = draining
        instance.failed = False
        instance.placed.clear()
        return True

    def on_failed(self, instance_id: str, epoch: int) -> None:
        """A call to the instance broke; a process started since then is not to blame."""
        instance = self._of_epoch(instance_id, epoch)
        if instance is not None:
            instance.failed = True

    def forget_silent(self, now_s: float) -> list[str]:
        """Drops instances that have not reported for long, and names them."""
        gone = [
            instance_id
            for instance_id, instance in self._instances.items()
            if now_s - instance.reported_at_s > self._forget_after_s
        ]
        for instance_id in gone:
            del self._instances[instance_id]
        return gone

    # --- requests

    def on_request_started(self, request_id: str) -> None:
        """A request has arrived; `request_id` is not running yet."""
        assert request_id not in self._running, f"request {request_id} runs already"
        self._running.add(request_id)
        self._num_arrived += 1

    def on_request_turned_away(self) -> None:
        """A request was refused at the door: it has arrived and left."""
        self._num_arrived += 1
        self._num_ended[Outcome.REFUSED] += 1

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return len(self._running)

    def on_placed(self, request_id: str, placement: Placement) -> None:
        """A stage was given to an instance."""
        self._num_placements[placement.stage] += 1
        instance = self._instances.get(placement.instance_id)
        if instance is not None:
            instance.placed[request_id, placement.stage] = placement

    def on_stage_ended(self, request_id: str, placement: Placement) -> None:
        """A stage is over, however it ended."""
        instance = self._instances.get(placement.instance_id)
        if instance is not None:
            instance.placed.pop((request_id, placement.stage), None)

    def on_request_ended(self, request_id: str, outcome: Outcome) -> None:
        """A request has left."""
        self._running.remove(request_id)
        self._num_ended[outcome] += 1

    # --- pictures

    def counts(self) -> RequestCounts:
        """Requests since start."""
        return RequestCounts(
            num_running=len(self._running),
            num_arrived=self._num_arrived,
            num_finished=self._num_ended[Outcome.FINISHED],
            num_refused=self._num_ended[Outcome.REFUSED],
            num_failed=self._num_ended[Outcome.FAILED],
            num_cancelled=self._num_ended[Outcome.CANCELLED],
        )

    def view(self, now_s: float) -> ClusterView:
        """What policies may know at `now_s`."""
        return ClusterView(
            instances=tuple(
                self._viewed(self._instances[instance_id], now_s)
                for instance_id in sorted(self._instances)
            ),
            num_requests=len(self._running),
            num_placements=dict(self._num_placements),
        )

    def check(self) -> None:
        """Asserts what must always hold."""
        assert self._num_arrived == len(self._running) + sum(self._num_ended.values())
        addresses = [each.registration.address for each in self._instances.values()]
        assert len(set(addresses)) == len(addresses), f"two instances at one address: {addresses}"

    def _of_epoch(self, instance_id: str, epoch: int) -> _Instance | None:
        instance = self._instances.get(instance_id)
        return instance if instance and instance.registration.epoch == epoch else None

    def _is_silent(self, instance: _Instance, now_s: float) -> bool:
        return now_s - instance.reported_at_s > self._suspect_after_s

    def _viewed(self, instance: _Instance, now_s: float) -> InstanceView:
        state = InstanceState.READY
        if instance.failed or self._is_silent(instance, now_s):
            state = InstanceState.SUSPECT
        elif instance.draining:
            state = InstanceState.DRAINING
        about, placed = instance.registration, instance.placed.values()
        return InstanceView(
            instance_id=about.instance_id,
            epoch=about.epoch,
            role=about.role,
            address=about.address,
            node_address=about.node_address,
            shape=about.shape,
            model_name=about.model_name,
            max_context_tokens=about.max_context_tokens,
            load=instance.load,
            state=state,
            seconds_since_report=now_s - instance.reported_at_s,
            num_placed_requests=len(placed),
            num_placed_tokens=sum(each.num_new_tokens for each in placed),
            num_placed_blocks=sum(each.num_kv_blocks for each in placed),
        )

"""The conductor: the real state, policies and admission, driven as scheduler.py and run.py drive them.

Rules kept here: a request is counted from its arrival to its end, whatever the end is; a stage counts on its instance
until it ends or the instance reports; a lost or full instance is tried elsewhere, each stage a few times; all that a
request has under way is over before it is. The model beside it knows, from what instances said and calls came to,
which of them may be given work.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from snowskin.engines.conductor.admission import AdmissionLimits
from snowskin.engines.conductor.errors import NoInstanceReady, RequestRefused, RequestTimedOut
from snowskin.engines.conductor.policies.registry import POLICIES, make_policy
from snowskin.engines.conductor.request import Defer, Placement, Refusal, Request, Stage
from snowskin.engines.conductor.state import ConductorState, Outcome
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.directory.view import DirectoryView
from snowskin.transport.errors import SnowskinError
from tests.simulation.instances import SHAPE, TOKENS
from tests.simulation.kernel import Cancelled, Future, Process, Task, Violation, all_of, first_of
from tests.simulation.memory import NAMESPACES, key
from tests.simulation.watching import Watching

if TYPE_CHECKING:
    from snowskin.engines.conductor.state import Registration
    from snowskin.engines.messages import InstanceLoad
    from snowskin.kvstore.directory.presence import Presence
    from tests.simulation.instances import SimInstance
    from tests.simulation.serving import Serving

SUSPECT_S = 0.35
FORGET_S = 1.0
INSTANCE_WAIT_S = 2.0
REQUEST_S = 8.0
MAX_RETRIES = 2
DECODE_S = 6.0


@dataclass(slots=True)
class Known:
    """What the model knows of one instance."""

    epoch: int
    stage: str
    heard_at_s: float
    is_draining: bool = False
    has_failed: bool = False
    placed: set[tuple[str, Stage]] = field(default_factory=set)


class SimConductor:
    """A conductor over all its lives."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.kernel = serving.kernel
        rng = self.kernel.rng
        limits = AdmissionLimits(
            max_requests=rng.choice((3, 32)),
            max_waiting_tokens=rng.choice((40, 1 << 20)),
            max_ttft_s=rng.choice((0.04, 120.0)),
        )
        self._policy = make_policy(rng.choice(sorted(POLICIES)), limits=limits)
        self._life = 0
        self._num_requests = 0
        self.start()

    def start(self) -> None:
        """A new process that knows nobody."""
        self._life += 1
        self.process = Process(self.kernel, f"conductor.{self._life}")
        self.state = ConductorState(suspect_after_s=SUSPECT_S, forget_after_s=FORGET_S)
        self.view = DirectoryView(doubt_s=0.5)
        self.known: dict[str, Known] = {}
        self.running: set[str] = set()
        self._changed = Future()
        self.watchings = [
            Watching(self.process, node, self.view) for node in self._serving.world.nodes
        ]
        self.process.start(self._forget(), "forget")

    def thaw(self) -> None:
        self.process.thaw()

    def _forget(self) -> Any:
        while True:
            yield self.process.sleep(0.5)
            for name in self.state.forget_silent(self.kernel.now_s):
                if self.kernel.now_s - self.known[name].heard_at_s <= FORGET_S:
                    raise Violation(f"{name} was forgotten, though it reports")
                del self.known[name]
                self.kernel.seen["instances forgotten"] += 1

    # --- what instances say

    def serve_register(self, registration: Registration, load: InstanceLoad) -> Any:
        now_s = self.kernel.now_s
        self.state.on_registered(registration, load, now_s)
        self.known[registration.instance_id] = Known(registration.epoch, registration.role, now_s)
        self._wake()
        return True
        yield

    def serve_report(self, name: str, epoch: int, load: InstanceLoad, draining: bool) -> Any:
        version, now_s = self.state.version, self.kernel.now_s
        is_known = self.state.on_reported(name, epoch, load, draining=draining, now_s=now_s)
        known = self.known.get(name)
        if is_known is not (known is not None and known.epoch == epoch):
            raise Violation(f"a report of {name} in epoch {epoch} was answered {is_known}")
        if known is not None and is_known:
            known.heard_at_s, known.is_draining, known.has_failed = now_s, draining, False
            known.placed.clear()
        if self.state.version != version:
            self._wake()
        return is_known
        yield

    def _wake(self) -> None:
        changed, self._changed = self._changed, Future()
        changed.set_result()

    # --- one request

    def arrive(self, names: list[str], num_new: int) -> Task:
        """A user asks; the task is the user's connection."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        steps = self._serve(request_id, names, num_new)
        watched = self._serving.world.operations.run(
            self.process, f"request {request_id}", REQUEST_S + 1.0, steps
        )
        return self.process.start(watched, request_id)

    def _serve(self, request_id: str, names: list[str], num_new: int) -> Any:
        self.state.on_request_started(request_id)
        self.running.add(request_id)
        self.kernel.seen["requests"] += 1
        outcome = Outcome.CANCELLED
        work = self.process.start(self._generate(request_id, names, num_new), f"work {request_id}")
        try:
            yield first_of(work.done, self.process.sleep(REQUEST_S))
            if not work.done.is_done:
                raise RequestTimedOut(f"{request_id} was not finished in time")
            work.done.value()
            outcome = Outcome.FINISHED
        except RequestRefused as error:
            outcome = Outcome.REFUSED
            self.kernel.seen[f"requests refused: {error.reason}"] += 1
        except SnowskinError as error:
            outcome = Outcome.FAILED
            self.kernel.seen[f"requests failed: {error.reason}"] += 1
        except Cancelled:
            self.kernel.seen["users who hung up"] += 1
        finally:
            if not work.done.is_done:
                work.cancel()
                yield from self._settled([work])
            self.state.on_request_ended(request_id, outcome)
            self.running.discard(request_id)
            self.kernel.seen[f"requests {outcome}"] += 1
            self.kernel.say(self.process.name, f"request {request_id}: {outcome}")

    def _settled(self, tasks: list[Task]) -> Any:
        """Waits until they are over, however often this one is cancelled meanwhile."""
        ended = all_of(task.done for task in tasks)
        while not ended.is_done:
            try:
                yield ended
            except Cancelled:
                continue

    def _generate(self, request_id: str, names: list[str], num_new: int) -> Any:
        request = Request(
            request_id=request_id,
            shape=SHAPE,
            num_tokens=len(names) * TOKENS + 1,
            max_tokens=num_new,
            presence=self._locate(names),
        )
        yield from self._admitted(request)
        has_tail = Future()
        prefill = self.process.start(
            self._staged(request, Stage.PREFILL, names, num_new, has_tail), "prefill"
        )
        decode = self.process.start(
            self._staged(request, Stage.DECODE, names, num_new, has_tail), "decode"
        )
        try:
            yield first_of(prefill.done, decode.done)
            if prefill.done.is_done:
                prefill.done.value()
            yield decode.done
        finally:
            prefill.cancel()
            decode.cancel()
            yield from self._settled([prefill, decode])

    def _locate(self, names: list[str]) -> Presence:
        keys = KeyColumn.of([key(name) for name in names])
        presence = self.view.locate([NAMESPACES[0]], keys, self.kernel.now_s)
        for address in presence.bitmaps:
            if not self.view.is_in_sync(address):
                raise Violation(f"the view speaks of {address}, which is not in sync")
        self.kernel.seen["requests with hits"] += bool(presence.bitmaps)
        return presence

    def _admitted(self, request: Request) -> Any:
        deadline_s = self.kernel.now_s + INSTANCE_WAIT_S
        while True:
            changed = self._changed
            answer = self._policy.admit(request, self.state.view(self.kernel.now_s))
            if isinstance(answer, Refusal):
                raise RequestRefused.because(answer)
            if not isinstance(answer, Defer):
                return
            self.kernel.seen["requests that waited for an instance"] += 1
            yield from self._wait(changed, deadline_s, answer.message)

    def _wait(self, changed: Future, deadline_s: float, why: str) -> Any:
        yield first_of(changed, self.process.sleep(max(0.0, deadline_s - self.kernel.now_s)))
        if not changed.is_done:
            raise NoInstanceReady(why)

    def _staged(
        self, request: Request, stage: Stage, names: list[str], num_new: int, has_tail: Future
    ) -> Any:
        """One stage, on as many instances as it takes; it counts on each only while it is there."""
        num_retries = 0
        while True:
            placement = yield from self._placed(request, stage)
            instance = self._serving.instance(placement.instance_id)
            epoch = self.known[placement.instance_id].epoch
            self._count(request.request_id, placement, True)
            try:
                return (yield from self._asked(instance, request, stage, names, num_new, has_tail))
            except SnowskinError as error:
                if error.status not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
                    raise
                if error.status == "UNAVAILABLE":
                    self._on_failed(placement.instance_id, epoch)
                else:
                    excluded = request.excluded | {placement.instance_id}
                    request = replace(request, excluded=excluded)
                    if not self.state.view(self.kernel.now_s).candidates(request, stage):
                        raise
                num_retries += 1
                self.kernel.seen["stages tried elsewhere"] += 1
                if num_retries > MAX_RETRIES:
                    raise
            finally:
                self._count(request.request_id, placement, False)

    def _placed(self, request: Request, stage: Stage) -> Any:
        deadline_s = self.kernel.now_s + INSTANCE_WAIT_S
        while True:
            changed, view = self._changed, self.state.view(self.kernel.now_s)
            answer = self._policy.place(request, stage, view)
            if isinstance(answer, Placement):
                self._check_may_be_given_work(answer, request)
                return answer
            yield from self._wait(changed, deadline_s, answer.message)

    def _asked(
        self,
        instance: SimInstance,
        request: Request,
        stage: Stage,
        names: list[str],
        num_new: int,
        has_tail: Future,
    ) -> Any:
        request_id = request.request_id
        if stage is Stage.PREFILL:
            num_cached, tail = yield from self._call(
                instance, lambda: instance.serve_prefill(request_id, names), "Prefill", DECODE_S
            )
            expected = request.presence.run(instance.node.node_id)
            if num_cached < min(expected, len(names)):
                # A stale hint costs what it costs, but it is not believed again.
                keys = KeyColumn.of([key(name) for name in names[num_cached:expected]])
                address = instance.node.node_id
                now_s = self.kernel.now_s
                self.kernel.seen["hints taken back"] += self.view.doubt(
                    address, [NAMESPACES[0]], keys, now_s
                )
            has_tail.set_result(tail)
            return None
        call = self.process.start(
            self._call(
                instance,
                lambda: instance.serve_decode(request_id, names, num_new),
                "Decode",
                DECODE_S,
            ),
            "decode call",
        )
        try:
            yield first_of(call.done, has_tail)
            if not call.done.is_done:
                tail = has_tail.result
                yield from self._call(
                    instance, lambda: instance.serve_handoff(request_id, tail), "HandOff", 0.5
                )
            return (yield call.done)
        finally:
            call.cancel()
            yield from self._settled([call])

    def _call(self, instance: SimInstance, serve: Any, name: str, timeout_s: float) -> Any:
        return (
            yield from self._serving.network.call(
                self.process,
                lambda: instance.process,
                serve,
                timeout_s=timeout_s,
                name=f"{name} on {instance.name}",
            )
        )

    # --- the model

    def _count(self, request_id: str, placement: Placement, is_begun: bool) -> None:
        known = self.known.get(placement.instance_id)
        if is_begun:
            self.kernel.seen[f"placed: {placement.stage}"] += 1
            self.state.on_placed(request_id, placement)
            if known is not None:
                known.placed.add((request_id, placement.stage))
        else:
            self.state.on_stage_ended(request_id, placement)
            if known is not None:
                known.placed.discard((request_id, placement.stage))
        self.check_counts()

    def _on_failed(self, name: str, epoch: int) -> None:
        self.kernel.seen["instances marked as failed"] += 1
        self.state.on_failed(name, epoch)
        known = self.known.get(name)
        if known is not None and known.epoch == epoch:
            known.has_failed = True

    def _check_may_be_given_work(self, placement: Placement, request: Request) -> None:
        name = placement.instance_id
        known = self.known.get(name)
        if known is None or known.stage != placement.stage.value:
            raise Violation(f"{placement.stage} was placed on {name}, which is not there for it")
        silent_s = self.kernel.now_s - known.heard_at_s
        if known.is_draining or known.has_failed or silent_s > SUSPECT_S:
            raise Violation(f"{placement.stage} was placed on {name}, which is gone: {known}")
        if name in request.excluded:
            raise Violation(f"{placement.stage} was placed on {name} again, which is full")

    def check_counts(self) -> None:
        """What the state counts is what is there."""
        if not self.process.is_alive:
            return
        self.state.check()
        if self.state.counts().num_running != len(self.running):
            raise Violation(f"{self.state.counts()} but {sorted(self.running)} run")
        for instance in self.state.view(self.kernel.now_s).instances:
            placed = self.known[instance.instance_id].placed
            if instance.num_placed_requests != len(placed):
                raise Violation(
                    f"{instance.num_placed_requests} requests count on {instance.instance_id}, "
                    f"placed and not ended are {sorted(placed)}"
                )

    def check_baseline(self) -> None:
        """Nobody is served any more."""
        self.check_counts()
        counts = self.state.counts()
        if counts.num_running:
            raise Violation(f"requests run for ever: {sorted(self.running)}")
        for instance in self.state.view(self.kernel.now_s).instances:
            load = (
                instance.num_placed_requests,
                instance.num_placed_tokens,
                instance.num_placed_blocks,
            )
            if any(load):
                raise Violation(f"{instance.instance_id} still counts {load} of nobody")

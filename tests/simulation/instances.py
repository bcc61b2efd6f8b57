"""Prefill and decode instances: clients of the store, asked by the conductor, which they report to.

Rules kept here: what an engine does with the store is done here by the same flows (pull what is cached, publish what
was computed, a tail for one reader, pull what prefill publishes while it does); computing is a pause. Whatever KV is
missing is computed, so a store that fails never fails a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.engines.conductor.request import CacheShape, Stage
from snowskin.engines.conductor.state import Registration
from snowskin.engines.errors import HandoffMissing, InstanceDraining, InstanceOverloaded
from snowskin.engines.messages import InstanceLoad
from snowskin.kvstore.errors import PoolExhausted
from snowskin.transport.errors import SnowskinError
from tests.simulation.kernel import Cancelled, Future, Process, Violation, first_of
from tests.simulation.memory import BLOCK, NAMESPACES
from tests.simulation.storing import connect

if TYPE_CHECKING:
    from tests.simulation.node import SimNode
    from tests.simulation.serving import Serving
    from tests.simulation.storing import Storing

TOKENS = 4  # of a block
SHAPE = CacheShape(namespaces=(NAMESPACES[0],), block_size=TOKENS, block_nbytes=BLOCK)
REPORT_S = 0.1
CALL_S = 0.3
MAX_RUNNING = 3
HANDOFF_S = 4.0


class SimInstance:
    """One engine over all its lives."""

    def __init__(self, serving: Serving, stage: Stage, index: int, node: SimNode) -> None:
        self.name = f"{stage}{index}"
        self.stage = stage
        self.node = node
        self.epoch = 0
        self._serving = serving
        self._kernel = serving.kernel
        self._settings = serving.world.flow_settings()
        self.start()

    def start(self) -> None:
        """A new process, with a new epoch."""
        self.epoch += 1
        self.process = Process(self._kernel, f"{self.name}.{self.epoch}")
        self.num_running = 0
        self.num_tokens = 0
        self.is_draining = False
        self.is_stopping = False
        self._store: Storing | None = None
        self._handoffs: dict[str, Future] = {}
        self.process.start(self._live(), "live")
        self.process.start(self._keep_connected(), "connect")

    def thaw(self) -> None:
        self.process.thaw()

    @property
    def load(self) -> InstanceLoad:
        """What it reports."""
        return InstanceLoad(
            num_waiting=0,
            num_running=self.num_running,
            num_waiting_tokens=self.num_tokens,
            num_kv_blocks=64,
            num_kv_blocks_free=64 - 8 * self.num_running,
            num_tokens_computed=0,
            prefill_tokens_per_s=1000.0,
            pull_bytes_per_s=1e9,
            decode_step_s=0.001,
        )

    # --- registering and reporting, as engines/registration.py does

    def _live(self) -> Any:
        conductor = self._serving.conductor
        is_known = False
        while not self.is_stopping:
            try:
                if is_known:
                    load, draining = self.load, self.is_draining
                    is_known = yield from self._tell(
                        lambda load=load, draining=draining: conductor.serve_report(
                            self.name, self.epoch, load, draining
                        ),
                        "Report",
                    )
                    if not is_known:
                        self._kernel.seen["instances asked to register again"] += 1
                        continue
                else:
                    registration, load = self.registration(), self.load
                    yield from self._tell(
                        lambda registration=registration, load=load: conductor.serve_register(
                            registration, load
                        ),
                        "Register",
                    )
                    is_known = True
            except SnowskinError:
                self._kernel.seen["reports that failed"] += 1
            if not self._serving.world.is_calm and self._kernel.chance(0.01):
                self.is_draining = not self.is_draining
            yield self.process.sleep(REPORT_S)

    def registration(self) -> Registration:
        """What it says of itself."""
        return Registration(
            instance_id=self.name,
            epoch=self.epoch,
            role=self.stage.value,
            address=f"host:{self.name}",
            node_address=self.node.node_id,
            shape=SHAPE,
            model_name="m",
            max_context_tokens=1000,
        )

    def _tell(self, serve: Any, name: str) -> Any:
        """A call to the conductor; where the network doubles it, it comes twice."""
        network, process, conductor = self._serving.network, self.process, self._serving.conductor
        if self._kernel.chance(network.weather.double_probability):
            self._kernel.seen["messages doubled"] += 1
            again = network.call(
                process, lambda: conductor.process, serve, timeout_s=CALL_S, name=name
            )
            process.start(_quietly(again), "doubled")
        return (
            yield from network.call(
                process, lambda: conductor.process, serve, timeout_s=CALL_S, name=name
            )
        )

    def _keep_connected(self) -> Any:
        world = self._serving.world
        while not self.is_stopping:
            if self._store is None or not self._store.is_open:
                try:
                    self._store = yield from connect(
                        self.process,
                        self.node,
                        world.network,
                        world.truth,
                        world.operations,
                        self._settings,
                        by_door=True,
                    )
                except SnowskinError:
                    self._kernel.seen["engines without a store"] += 1
            yield self.process.sleep(0.1)
        while self.num_running:
            yield self.process.sleep(0.1)
        if self._store is not None:
            self._store.close()

    # --- work

    def _counted(self, num_tokens: int, steps: Any) -> Any:
        if self.is_draining:
            raise InstanceDraining(f"{self.name} is draining")
        if self.num_running >= MAX_RUNNING:
            raise InstanceOverloaded(f"{self.name} runs {self.num_running} requests")
        self.num_running += 1
        self.num_tokens += num_tokens
        try:
            return (yield from steps)
        finally:
            self.num_running -= 1
            self.num_tokens -= num_tokens

    def serve_prefill(self, request_id: str, names: list[str]) -> Any:
        """Pulls, computes, publishes; answers with (blocks cached, whether there is a tail)."""
        return (yield from self._counted(len(names) * TOKENS, self._prefill(request_id, names)))

    def _prefill(self, request_id: str, names: list[str]) -> Any:
        num_cached = yield from self._pulled(names, wait_s=0.0)
        if self._kernel.chance(0.05):
            self._kernel.seen["blocks computed again though cached"] += num_cached
            num_cached = 0
        for first in range(num_cached, len(names), 2):
            yield self.process.sleep(self._kernel.rng.uniform(0.001, 0.02))
            parent = names[first - 1] if first else ""
            yield from self._published(names[first : first + 2], parent)
        has_tail = False
        if self._store is not None:
            try:
                yield from self._store.publish_tail(f"{request_id}.tail", timeout_s=0.2)
                has_tail = True
            except SnowskinError:
                self._kernel.seen["tails not published"] += 1
        return num_cached, has_tail

    def serve_decode(self, request_id: str, names: list[str], num_new: int) -> Any:
        """Pulls while prefill publishes, waits for the hand-off, generates, publishes."""
        return (yield from self._counted(0, self._decode(request_id, names, num_new)))

    def _decode(self, request_id: str, names: list[str], num_new: int) -> Any:
        if request_id in self._handoffs:
            raise Violation(f"{request_id} was started twice on {self.name}")
        handoff = self._handoffs[request_id] = Future()
        try:
            pulled = yield from self._pulled(names, wait_s=HANDOFF_S / 2)
            yield first_of(handoff, self.process.sleep(HANDOFF_S))
            if not handoff.is_done:
                raise HandoffMissing(f"no hand-off of {request_id} came")
            if pulled < len(names):
                pulled = yield from self._pulled(names, wait_s=0.0)
            if handoff.result and self._store is not None:
                try:
                    yield from self._store.pull_tail(f"{request_id}.tail", timeout_s=0.1)
                except SnowskinError:
                    self._kernel.seen["tails computed again"] += 1
            if pulled < len(names):
                self._kernel.seen["prompts computed again by decode"] += 1
                yield self.process.sleep(0.02)
            for _ in range(num_new):
                yield self.process.sleep(self._kernel.rng.uniform(0.0005, 0.005))
            yield from self._published([f"{names[-1]}+"], names[-1])
            return num_new
        finally:
            del self._handoffs[request_id]

    def serve_handoff(self, request_id: str, has_tail: bool) -> Any:
        """Decode may go on."""
        handoff = self._handoffs.get(request_id)
        if handoff is None:
            raise HandoffMissing(f"{request_id} does not run on {self.name}")
        handoff.set_result(has_tail)
        return True
        yield  # a task's steps, of which there are none

    def serve_discard(self, request_id: str) -> Any:
        """Nobody will read the tail of this request."""
        if self._store is not None:
            self._kernel.seen["leftovers discarded"] += 1
            yield from self._store.discard(
                NAMESPACES[0], [f"none{request_id}"], f"{request_id}.tail"
            )

    def _pulled(self, names: list[str], *, wait_s: float) -> Any:
        if self._store is None:
            return 0
        try:
            wait_blocks = len(names) if wait_s else 0
            pulled = yield from self._store.pull(
                NAMESPACES[0], names, wait_blocks=wait_blocks, timeout_s=wait_s
            )
        except SnowskinError:
            self._kernel.seen["pulls of engines that failed"] += 1
            return 0
        return pulled.num_blocks

    def _published(self, names: list[str], parent: str) -> Any:
        if self._store is None:
            return
        try:
            yield from self._store.publish(NAMESPACES[0], names, parent=parent, timeout_s=0.1)
        except PoolExhausted:
            self._kernel.seen["publishes given up"] += 1
        except SnowskinError:
            self._kernel.seen["publishes of engines that failed"] += 1


def _quietly(steps: Any) -> Any:
    try:
        yield from steps
    except (SnowskinError, Cancelled):
        return

"""One run: a world made from a seed, its steps, what must hold at each, and the way back to the baseline.

Rules kept here: everything about a run follows from its seed and its number of steps; the number of steps decides
only when the trouble ends. Then what is frozen goes on, what is dead is started again, nothing new is begun, and
within the times that the product promises all must be as if nothing had happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.machine import FlowSettings
from snowskin.kvstore.messages import Reply, Reserved, ReserveRequest
from snowskin.kvstore.node.limits import NodeLimits
from tests.simulation.kernel import Violation
from tests.simulation.memory import BLOCK, Truth
from tests.simulation.nemesis import Nemesis
from tests.simulation.network import Network, Weather
from tests.simulation.node import NodeSettings, SimNode
from tests.simulation.serving import Serving
from tests.simulation.storing import Operations, RandomClient, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.kernel import Kernel, Process

MAX_QUIET_STEPS = 60_000
QUIET_S = 60.0  # more than any lease, wait and grace of a run together
CALM = Weather(slow_probability=0.0)
NOT_WHEN_CALM = (
    "blocks refused by checksum",
    "calls past their deadline",
    "instances marked as failed",
    "leases nobody waited for",
    "quarantines",
    "read leases expired",
    "requests failed: DEADLINE_EXCEEDED",
    "requests failed: HANDOFF_MISSING",
    "silent watches",
    "told: DEADLINE_EXCEEDED",
    "told: LEASE_EXPIRED",
    "told: LEASE_UNKNOWN",
    "told: NODE_UNAVAILABLE",
    "told: TRANSFER_TIMED_OUT",
    "unmapped write leases expired",
    "watchers dropped",
)


class World:
    """All that is simulated."""

    def __init__(self, kernel: Kernel, *, checks_books: bool = True) -> None:
        self.kernel = kernel
        rng = self.kernel.rng
        # Now and then nothing goes wrong, and then nothing may be told to have gone wrong.
        self.is_calm = rng.random() < 0.1
        self.network = Network(self.kernel, CALM if self.is_calm else _weather(rng))
        self.truth = Truth()
        self.operations = Operations(self.kernel)
        self.spoils = not self.is_calm and rng.random() < 0.15
        self._verify_ratio = rng.choice((0.0, 0.6, 1.0))
        self.limits = NodeLimits(
            watch_ring_nbytes=4096,  # some twenty changes
            max_quarantined_ratio=rng.choice((0.05, 0.25)),
            read_lease_s=rng.choice((0.1, 0.4)),
            write_lease_s=rng.choice((0.1, 0.4)),
            grace_s=rng.choice((0.05, 0.2)),
            lease_life_s=rng.choice((1.5, 5.0)),
            max_extent_nbytes=rng.choice((4096, 65536)),
            max_timeout_s=rng.choice((0.5, 10.0)),
        )
        self.nodes = [
            SimNode(
                self.network,
                self.truth,
                f"node{index}",
                NodeSettings(num_blocks=rng.choice((8, 16, 24)), limits=self.limits),
            )
            for index in range(rng.choice((1, 1, 2)))
        ]
        for node in self.nodes:
            node.checks_books = checks_books
        self.clients = [
            RandomClient(
                f"client{index}",
                self.kernel,
                self._opener(),
                cancels=not self.is_calm,
                pace_per_s=rng.choice((3.0, 10.0, 30.0)),
            )
            for index in range(rng.randint(1, 4))
        ]
        self.serving = Serving(self) if rng.random() < 0.6 else None
        self.nemesis = Nemesis(self)

    def _opener(self) -> Callable[[Process], Any]:
        """How one client opens its store: to which node, by which door, with which patience."""
        rng = self.kernel.rng
        node, by_door = rng.choice(self.nodes), rng.random() < 0.65
        settings = self.flow_settings()
        return lambda process: connect(
            process, node, self.network, self.truth, self.operations, settings, by_door=by_door
        )

    def flow_settings(self) -> FlowSettings:
        """A client's patience; where bytes are spoilt on purpose everybody verifies."""
        rng = self.kernel.rng
        return FlowSettings(
            verify=self.spoils or self.is_calm or rng.random() < self._verify_ratio,
            call_timeout_s=rng.choice((0.2, 1.0)),
            move_timeout_s=rng.choice((1.0, 3.0) if self.is_calm else (0.2, 1.0, 3.0)),
            read_ttl_s=rng.choice((0.0, 0.08)),
            write_ttl_s=rng.choice((0.0, 0.08)),
        )

    # --- the run

    def run(self, num_steps: int) -> None:
        """Trouble for `num_steps`, then the way back.

        Raises:
            Violation: a rule was broken.
        """
        try:
            self._run(num_steps)
        finally:
            for node in self.nodes:
                node.memory.before_write = None
            for process in self.kernel.processes:
                process.kill()

    def _run(self, num_steps: int) -> None:
        while self.kernel.num_steps < num_steps and self.kernel.step():
            self.check()
        self.nemesis.end()
        for client in self.clients:
            client.is_stopping = True
        if self.serving is not None:
            self.serving.stop()
        until_s = self.kernel.now_s + QUIET_S
        for _ in range(MAX_QUIET_STEPS):
            if not self.kernel.step():
                break
            self.check()
            if self.kernel.now_s > until_s:
                left = self._going_on()
                raise Violation(f"goes on {QUIET_S} s after the trouble ended: {left}")
            if not self._going_on():
                break
        self._check_baseline()

    def check(self) -> None:
        """After every step."""
        for node in self.nodes:
            node.check()
            node.check_is_timely()
        self.operations.check()
        if self.serving is not None:
            self.serving.check()

    def _going_on(self) -> list[str]:
        """What is not over yet."""
        left = [task.name for client in self.clients for task in client.process.tasks]
        if self.serving is not None:
            left += self.serving.going_on()
        if left:
            return left
        for node in self.nodes:
            node.end_idle_rpc_sessions()
            state = node.state
            left += [f"session of {session.client_name}" for session in state.sessions]
            if state.next_time_s() is not None:
                left.append(f"something can run out on {node.node_id}")
        return left

    def _check_baseline(self) -> None:
        if left := self._going_on():
            raise Violation(f"goes on, though nothing will happen any more: {left}")
        if self.serving is not None:
            self.serving.check_baseline()
        for node in self.nodes:
            node.note_counters()
            node.check_baseline()
            if self.is_calm:
                self._check_nothing_went_wrong()
            self._check_whole_pool_can_be_had(node)

    def _check_nothing_went_wrong(self) -> None:
        """Everybody was well: no lease may have been left to run out, and nobody may have been late."""
        self.kernel.seen["calm runs"] += 1
        wrong = {name: self.kernel.seen[name] for name in NOT_WHEN_CALM if self.kernel.seen[name]}
        if wrong:
            raise Violation(f"all was calm, and yet: {wrong}")

    def _check_whole_pool_can_be_had(self, node: SimNode) -> None:
        """Nothing that is left may keep anybody from having all of it."""
        names = [b"last%d" % index + b"." * 24 for index in range(node.settings.num_blocks)]
        session = node.state.open_session("last", maps_memory=True)
        request = ReserveRequest(
            namespace=b"L" * 32,
            keys=KeyColumn.of([name.ljust(32, b".")[:32] for name in names]),
            block_nbytes=BLOCK,
        )
        (effect,) = node.state.on_request(session.id, 1, request, self.kernel.now_s)
        if not (isinstance(effect, Reply) and isinstance(effect.message, Reserved)):
            raise Violation(f"the whole pool cannot be had in the end: {effect}")


def _weather(rng: Any) -> Weather:
    return Weather(
        max_delay_s=rng.choice((0.0005, 0.005)),
        slow_probability=rng.choice((0.0, 0.02, 0.1)),
        slow_s=rng.choice((0.05, 0.3)),
        loss_probability=rng.choice((0.0, 0.0, 0.02)),
        double_probability=rng.choice((0.0, 0.1)),
        split_probability=rng.choice((0.0, 0.1)),
    )

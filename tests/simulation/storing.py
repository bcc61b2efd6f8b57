"""What clients of a store do, and what they check: publishes, pulls, tails, discards, cancelled at any step.

Rules kept here: whatever a pull says is good must be bytes that somebody wrote under that very key, whether it
verified or not; a checksum may refuse only what was spoilt, or was read after the lease; each operation ends, with
its result or a typed error, within the time that its steps may take, or its process was not running.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client import machine
from snowskin.kvstore.errors import (
    ChecksumMismatch,
    CommitRefused,
    LeaseExpired,
    NamespaceMismatch,
    NodeUnavailable,
    ProtocolViolation,
)
from snowskin.transport.errors import OutOfBounds, SnowskinError
from tests.simulation.client import DoorLink, RpcLink, StoreSession, local_memory
from tests.simulation.kernel import Cancelled, Process, Violation
from tests.simulation.memory import BLOCK, NAMESPACES, TAIL_NBYTES, key

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.kvstore.client.machine import FlowSettings, Pulled
    from tests.simulation.kernel import Kernel
    from tests.simulation.memory import Truth
    from tests.simulation.network import Network
    from tests.simulation.node import SimNode

# What no client of ours may ever be told: it would have said something wrong.
NEVER = (ProtocolViolation, NamespaceMismatch, CommitRefused, OutOfBounds)
CHAINS = ("a", "b", "c")
CHAIN_BLOCKS = 6
SLACK_S = 0.5  # for messages, and pieces of copies


@dataclass(eq=False, slots=True)
class Operation:
    """Something under way, for the rule that everything ends."""

    process: Process
    name: str
    ends_by_s: float
    frozen_before_s: float

    def is_overdue(self, now_s: float) -> bool:
        """Whether it should have ended; time in which its process was stopped does not count."""
        process = self.process
        if not process.is_alive or process.is_behind:
            return False
        return now_s > self.ends_by_s + process.frozen_s - self.frozen_before_s


class Operations:
    """All that is under way."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._open: dict[Operation, None] = {}

    def run(self, process: Process, name: str, limit_s: float, steps: Any) -> Any:
        """`steps`, watched: they must end within `limit_s`."""
        kernel = self._kernel
        operation = Operation(process, name, kernel.now_s + limit_s, process.frozen_s)
        self._open[operation] = None
        try:
            return (yield from steps)
        finally:
            del self._open[operation]

    def check(self) -> None:
        """Nothing is late."""
        now_s = self._kernel.now_s
        for operation in self._open:
            if operation.is_overdue(now_s):
                raise Violation(
                    f"{operation.name} of {operation.process.name} was to end by "
                    f"{operation.ends_by_s:.3f}, and goes on at {now_s:.3f}"
                )


class Storing:
    """The operations of one client process on one node."""

    def __init__(
        self,
        process: Process,
        session: StoreSession,
        node: SimNode,
        truth: Truth,
        operations: Operations,
    ) -> None:
        self._process = process
        self._session = session
        self._node = node
        self._truth = truth
        self._operations = operations
        self._kernel = process.kernel
        self._memory = node.memory

    @property
    def is_open(self) -> bool:
        """Whether the next operation may succeed."""
        return self._session.link.is_open

    def publish(
        self,
        namespace: bytes,
        names: list[str],
        *,
        parent: str = "",
        one_reader: bool = False,
        timeout_s: float = 0.0,
    ) -> Any:
        """Blocks with new bytes."""
        local = local_memory(len(names), BLOCK)
        keys = [key(name) for name in names]
        for index, block_key in enumerate(keys):
            content = self._truth.make((namespace, block_key), BLOCK)
            local.buffer[index * BLOCK : (index + 1) * BLOCK] = np.frombuffer(content, np.uint8)
        flow = machine.publish(
            self._session.settings,
            namespace=namespace,
            keys=KeyColumn.of(keys),
            parent_key=key(parent) if parent else b"",
            block_nbytes=BLOCK,
            local=local,
            local_offsets=range(0, len(names) * BLOCK, BLOCK),
            one_reader=one_reader,
            timeout_s=timeout_s,
        )
        return (yield from self._run(f"publish {' '.join(names)}", flow, timeout_s))

    def publish_tail(self, tail_id: str, *, timeout_s: float = 0.0) -> Any:
        """A tail with new bytes."""
        local = local_memory(1, TAIL_NBYTES)
        content = self._truth.make((b"", tail_id.encode()), TAIL_NBYTES)
        local.buffer[:] = np.frombuffer(content, np.uint8)
        flow = machine.publish_tail(
            self._session.settings,
            namespace=NAMESPACES[0],
            tail_id=tail_id,
            local=local,
            local_offset=0,
            nbytes=TAIL_NBYTES,
            timeout_s=timeout_s,
        )
        return (yield from self._run(f"publish tail {tail_id}", flow, timeout_s))

    def pull(
        self, namespace: bytes, names: list[str], *, wait_blocks: int = 0, timeout_s: float = 0.0
    ) -> Any:
        """Blocks, and looks at what came."""
        local = local_memory(len(names), BLOCK)
        keys = [key(name) for name in names]
        # Backwards, so that blocks side by side in the pool are not so here.
        offsets = range((len(names) - 1) * BLOCK, -1, -BLOCK)
        if self._kernel.chance(0.7):
            offsets = range(0, len(names) * BLOCK, BLOCK)
        flow = machine.pull(
            self._session.settings,
            namespace=namespace,
            keys=KeyColumn.of(keys),
            block_nbytes=BLOCK,
            local=local,
            local_offsets=offsets,
            wait_blocks=wait_blocks,
            timeout_s=timeout_s,
        )
        note: dict[str, float] = {}
        name = f"pull {' '.join(names)}"
        pulled: Pulled = yield from self._run(name, flow, timeout_s, note)
        for index in range(pulled.num_blocks):
            data = local.buffer[offsets[index] : offsets[index] + BLOCK].tobytes()
            if not self._truth.knows((namespace, keys[index]), data):
                raise Violation(f"{name}: wrong bytes for {names[index]}")
        self._kernel.seen["blocks pulled"] += pulled.num_blocks
        self._check_verdict(name, bool(pulled.corrupt_blocks), note)
        return pulled

    def pull_tail(self, tail_id: str, *, timeout_s: float = 0.0) -> Any:
        """A tail, and looks at what came."""
        local = local_memory(1, TAIL_NBYTES)
        flow = machine.pull_tail(
            self._session.settings,
            namespace=NAMESPACES[0],
            tail_id=tail_id,
            nbytes=TAIL_NBYTES,
            local=local,
            local_offset=0,
            timeout_s=timeout_s,
        )
        note: dict[str, float] = {}
        name = f"pull tail {tail_id}"
        try:
            yield from self._run(name, flow, timeout_s, note)
        except ChecksumMismatch:
            self._check_verdict(name, True, note)
            raise
        if not self._truth.knows((b"", tail_id.encode()), local.buffer.tobytes()):
            raise Violation(f"{name}: wrong bytes")
        self._kernel.seen["tails pulled"] += 1

    def discard(self, namespace: bytes, names: list[str], tail_id: str = "") -> Any:
        """Frees what was left for a reader that does not come."""
        flow = machine.discard(
            self._session.settings,
            namespace=namespace,
            keys=KeyColumn.of([key(name) for name in names]),
            tail_id=tail_id,
        )
        return (yield from self._run(f"discard {' '.join(names)}", flow, 0.0, num_calls=8))

    def close(self) -> None:
        """Ends the session."""
        self._session.link.close()

    def _run(
        self,
        name: str,
        flow: Any,
        timeout_s: float,
        note: dict[str, float] | None = None,
        num_calls: int = 2,
    ) -> Any:
        settings = self._session.settings
        limit_s = (
            settings.call_timeout_s * num_calls + timeout_s + settings.move_timeout_s + SLACK_S
        )
        kernel, who = self._kernel, self._process.name
        kernel.say(who, f"begins to {name}")
        steps = self._session.run(flow, note)
        try:
            result = yield from self._operations.run(self._process, name, limit_s, steps)
        except NEVER as error:
            raise Violation(f"{name}: {type(error).__name__}: {error}") from error
        except SnowskinError as error:
            kernel.seen[f"told: {error.reason}"] += 1
            kernel.say(who, f"{name}: {error.reason}")
            if isinstance(error, LeaseExpired):
                kernel.seen["late holders told so"] += 1
            raise
        except Cancelled:
            kernel.seen["operations cancelled"] += 1
            kernel.say(who, f"{name}: cancelled")
            raise
        if kernel.is_traced:
            kernel.say(who, f"{name}: {result}")
        return result

    def _check_verdict(self, name: str, is_refused: bool, note: dict[str, float]) -> None:
        if not is_refused:
            return
        self._kernel.seen["blocks refused by checksum"] += 1
        until_s = note.get("leased_until_s", 0.0) + self._node.settings.limits.grace_s
        if self._memory is not self._node.memory or self._kernel.now_s > until_s:
            self._kernel.seen["late reads refused by checksum"] += 1
        elif not self._node.is_spoilt:
            raise Violation(f"{name}: good bytes were refused by their checksum")


def connect(
    process: Process,
    node: SimNode,
    network: Network,
    truth: Truth,
    operations: Operations,
    settings: FlowSettings,
    *,
    by_door: bool,
) -> Any:
    """A client of a node, as a task's steps; raises NodeUnavailable."""
    link: DoorLink | RpcLink
    if by_door:
        link = DoorLink(process, node)
        yield from link.open()
    else:
        if not node.process.is_alive:
            raise NodeUnavailable(f"no node {node.node_id} answers")
        link = RpcLink(process, node, network)
    session = StoreSession(process, link, settings)
    return Storing(process, session, node, truth, operations)


class RandomClient:
    """A client that does this and that, in its own process, until it is told to stop."""

    def __init__(
        self,
        name: str,
        kernel: Kernel,
        open_store: Callable[[Process], Any],
        *,
        cancels: bool = True,
        pace_per_s: float = 20.0,
        max_tasks: int = 3,
    ) -> None:
        self.name = name
        self._kernel = kernel
        self._open_store = open_store
        self._cancels = cancels
        self._pace_per_s = pace_per_s
        self._max_tasks = max_tasks
        self._life = 0
        self.is_stopping = False
        self.start()

    def start(self) -> None:
        """A new process."""
        self._life += 1
        self.process = Process(self._kernel, f"{self.name}.{self._life}")
        self.process.start(self._live(self.process), "live")

    def _live(self, process: Process) -> Any:
        rng = self._kernel.rng
        store: Storing | None = None
        while not self.is_stopping:
            yield process.sleep(rng.expovariate(self._pace_per_s))
            if store is None or not store.is_open:
                try:
                    store = yield from self._open_store(process)
                except SnowskinError:
                    yield process.sleep(0.3)
                    continue
            if self._cancels and rng.random() < 0.01:
                self._kernel.seen["sessions closed by their client"] += 1
                store.close()
                continue
            if len(process.tasks) <= self._max_tasks:
                task = process.start(self._guard(self._one(store)), "operation")
                if self._cancels and rng.random() < 0.12:
                    process.at(rng.expovariate(30.0), task.cancel, is_io=False)
        while len(process.tasks) > 1:
            yield process.sleep(0.1)
        if store is not None:
            store.close()

    def _guard(self, steps: Any) -> Any:
        try:
            yield from steps
        except (SnowskinError, Cancelled):
            return

    def _one(self, store: Storing) -> Any:
        rng = self._kernel.rng
        namespace = NAMESPACES[0] if rng.random() < 0.8 else NAMESPACES[1]
        chain, start = rng.choice(CHAINS), rng.choice((0, 0, 0, 1, 2, 4))
        names = [f"{chain}{i}" for i in range(start, min(CHAIN_BLOCKS, start + rng.randint(1, 6)))]
        timeout_s = rng.choice((0.0, 0.0, 0.3, 1.5))
        chance = rng.random()
        if chance < 0.3:
            yield from store.publish(
                namespace,
                names,
                parent=f"{chain}{start - 1}" if start else "",
                one_reader=rng.random() < 0.15,
                timeout_s=timeout_s,
            )
        elif chance < 0.44:
            crowd = [f"x{rng.randrange(200)}" for _ in range(rng.randint(1, 6))]
            yield from store.publish(namespace, list(dict.fromkeys(crowd)), timeout_s=timeout_s)
        elif chance < 0.82:
            wait_blocks = rng.randint(0, len(names)) if timeout_s else 0
            yield from store.pull(namespace, names, wait_blocks=wait_blocks, timeout_s=timeout_s)
        elif chance < 0.88:
            yield from store.publish_tail(f"t{rng.randrange(6)}", timeout_s=timeout_s)
        elif chance < 0.95:
            yield from store.pull_tail(f"t{rng.randrange(6)}", timeout_s=timeout_s)
        else:
            yield from store.discard(namespace, names, rng.choice(("", f"t{rng.randrange(6)}")))

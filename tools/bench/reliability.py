"""What a dead, stopped or slow store costs a request before its first token, against a healthy one in the same run.

Rules kept here: a request is the conductor's question and a whole prefill of a prompt that nobody has cached, so that
the model computes the same with and without a store; what the model took is subtracted. *Before*: each request finds
breakers that know of nothing. *After*: it finds them open. What is added is what requests with a fault took beyond
those without it, p50 against p50 and p99 against p99: a busy host is no fault. The store is a process of its own,
killed and stopped by signals, slowed down by a relay between it and the instance.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from snowskin.engines.cancellation import ended
from snowskin.engines.conductor.nodes import Nodes
from snowskin.engines.limits import EngineLimits
from snowskin.engines.link import StoreLink
from snowskin.engines.messages import PrefillRequest, Prompt
from snowskin.engines.model.random_model import make_random_model
from snowskin.engines.model.sampler import SamplingParams
from snowskin.engines.nodes import NodeLinks
from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.clock import SystemClock
from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.relay import relaying
from snowskin.tools.bench.report import Goal, Report, Row, make_row
from snowskin.tools.bench.store_process import StoreProcess, store_process

if TYPE_CHECKING:
    from pathlib import Path

    from snowskin.engines.prefill import PrefillInstance
    from snowskin.tools.bench.registry import BenchOptions

QUESTION = "What does a dead, stopped or slow store cost a request before its first token?"

NAMESPACE = b"reliability-bench".ljust(32, b"\0")
BLOCK_SIZE = 16
NUM_TOKENS = 4 * BLOCK_SIZE + 1
DRAM_NBYTES = 256 << 20
DELAY_S = 0.5
GOAL_BEFORE_MS = 20.0
GOAL_AFTER_MS = 1.0
GOAL_BACK_S = 5.0
SHARES = {"p50": 0.5, "p99": 0.99}
AT_LAST_S = 30.0
LOOK_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One way to a store and one fault: milliseconds that a request took beyond what the model did.

    Attributes:
        fault: what was done to the store, and how it is reached.
        healthy_ms: of each request before the fault.
        before_ms: with the fault, the breakers knowing of nothing.
        after_ms: with the fault, the breakers open.
        back_s: from the end of the fault until the store was used again.
    """

    fault: str
    healthy_ms: list[float] = field(default_factory=list)
    before_ms: list[float] = field(default_factory=list)
    after_ms: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)


class Subject:
    """One prefill instance and one conductor's connections to one store."""

    def __init__(self, prefill: PrefillInstance, link: StoreLink, nodes: Nodes, asked: str) -> None:
        """Use `subject`; `asked` is where the conductor asks."""
        self.link = link
        self._prefill = prefill
        self._nodes = nodes
        self._asked = asked
        self._num_requests = 0
        self._random = np.random.default_rng(0)

    async def request_ms(self) -> float:
        """One request that hits nothing: milliseconds of it in which the model did not compute."""
        token_ids = self._random.integers(32, 127, NUM_TOKENS).tolist()
        keys = KeyColumn.of(block_hashes(token_ids, BLOCK_SIZE))
        prompt = Prompt(token_ids=tuple(token_ids), block_keys=keys, namespace=NAMESPACE)
        self._num_requests += 1
        request = PrefillRequest(
            request_id=f"r{self._num_requests}",
            prompt=prompt,
            sampling=SamplingParams(max_tokens=2),
        )
        began_s = time.perf_counter()
        await self._nodes.probe([self._asked], namespaces=(NAMESPACE,), keys=keys)
        response = await self._prefill.prefill(request)
        seconds = time.perf_counter() - began_s - response.stats.compute_s
        assert response.stats.num_computed_tokens == NUM_TOKENS, "nothing of it was cached"
        return seconds * 1000

    def forget(self) -> None:
        """The breakers know of nothing, as before the fault."""
        self.link.guard.forget()
        self._nodes.guard(self._asked).forget()

    @property
    def usable(self) -> bool:
        """Whether both sides use the store."""
        return self.link.usable and self._nodes.is_usable(self._asked)

    @property
    def given_up(self) -> bool:
        """Whether neither side asks the store any more."""
        return not self.link.usable and not self._nodes.is_usable(self._asked)

    async def until(self, is_so: Callable[[], bool]) -> float:
        """Waits until it is so; the seconds that took."""
        began_s = time.perf_counter()
        async with asyncio.timeout(AT_LAST_S):
            while not is_so():
                self._nodes.want(self._asked)  # as a registered instance's reports do
                await asyncio.sleep(LOOK_S)
        return time.perf_counter() - began_s


@contextlib.asynccontextmanager
async def subject(model: Path, own: str, asked: str) -> AsyncIterator[Subject]:
    """An instance whose node is at `own`, and a conductor that asks at `asked`; both are connected."""
    from snowskin.engines.model.kv_memory import KvMemory
    from snowskin.engines.model.llama import load_model
    from snowskin.engines.prefill import PrefillInstance
    from snowskin.engines.runner import ModelRunner

    loaded = load_model(model)
    limits = EngineLimits(
        namespace=NAMESPACE,
        vocab_size=loaded.config.vocab_size,
        block_size=BLOCK_SIZE,
        max_context_tokens=512,
    )
    connect = functools.partial(StoreClient.connect, client_name="reliability")
    async with contextlib.AsyncExitStack() as stack:
        memory = KvMemory(loaded.config, 64, BLOCK_SIZE)
        runner = await stack.enter_async_context(ModelRunner(loaded, memory))
        link = StoreLink(
            functools.partial(connect, own),
            memory.host_view(),
            namespace=NAMESPACE,
            block_nbytes=memory.block_nbytes,
            name=own,
        )
        nodes = Nodes(connect, SystemClock())
        stack.push_async_callback(nodes.close)
        running = asyncio.create_task(link.run())
        stack.push_async_callback(ended, running)
        stack.callback(running.cancel)
        nodes.want(asked)
        made = Subject(PrefillInstance(runner, NodeLinks(link), limits), link, nodes, asked)
        async with asyncio.timeout(AT_LAST_S):
            await link.wait_connected()
            while not made.usable:  # noqa: ASYNC110  connecting has no event for others
                await asyncio.sleep(LOOK_S)
        for _ in range(40):  # both sides warm, and what a look-up usually takes is known
            await made.request_ms()
        yield made


async def samples(made: Subject, num: int, before_each: Callable[[], object]) -> list[float]:
    """Milliseconds of so many requests, each after the same preparation."""
    taken = []
    for _ in range(num):
        before_each()
        taken.append(await made.request_ms())
    return taken


async def faulted(
    made: Subject,
    cost: Cost,
    num: int,
    begin: Callable[[], object],
    end: Callable[[], object],
) -> None:
    """A fault that can begin and end while connections stand: a stop, a delay."""
    cost.healthy_ms.extend(await samples(made, num, lambda: None))
    begin()
    try:
        cost.before_ms.extend(await samples(made, num, made.forget))
        await made.until(lambda: made.given_up)
        cost.after_ms.extend(await samples(made, num, lambda: None))
    finally:
        end()
    cost.back_s.append(await made.until(lambda: made.usable))


async def stopped(model: Path, cost: Cost, num: int, own: Callable[[StoreProcess], str]) -> None:
    """SIGSTOP and SIGCONT."""
    with store_process(dram_nbytes=DRAM_NBYTES) as store:
        async with subject(model, own(store), store.address) as made:
            await faulted(
                made,
                cost,
                num,
                lambda: os.kill(store.pid, signal.SIGSTOP),
                lambda: os.kill(store.pid, signal.SIGCONT),
            )


async def delayed(model: Path, cost: Cost, num: int) -> None:
    """Half a second in each direction, on the way of both sides."""
    with store_process(dram_nbytes=DRAM_NBYTES) as store:
        async with (
            relaying(store.address) as relay,
            subject(model, relay.address, relay.address) as made,
        ):

            def delay(seconds: float) -> None:
                relay.delay_s = seconds

            await faulted(made, cost, num, lambda: delay(DELAY_S), lambda: delay(0.0))


async def killed(model: Path, cost: Cost, num: int, own: Callable[[StoreProcess], str]) -> None:
    """SIGKILL in the moment of a request, and another life behind the same door and port."""
    with store_process(dram_nbytes=DRAM_NBYTES) as store:
        async with subject(model, own(store), store.address) as made:
            cost.healthy_ms.extend(await samples(made, num, lambda: None))
            os.kill(store.pid, signal.SIGKILL)
            while not made.given_up:  # each side learns of it by a request at the latest
                cost.before_ms.append(await made.request_ms())
            cost.after_ms.extend(await samples(made, num, lambda: None))
            with store_process(dram_nbytes=DRAM_NBYTES, like=store):
                cost.back_s.append(await made.until(lambda: made.usable))


def door_of(store: StoreProcess) -> str:
    """The instance's way on its own host."""
    return store.door


def port_of(store: StoreProcess) -> str:
    """Its way from another host."""
    return store.address


Measure = Callable[["Path", Cost, int], Coroutine[None, None, None]]
FAULTS: dict[str, Measure] = {
    "kill -9, local door": functools.partial(killed, own=door_of),
    "kill -9, gRPC": functools.partial(killed, own=port_of),
    "SIGSTOP, local door": functools.partial(stopped, own=door_of),
    "SIGSTOP, gRPC": functools.partial(stopped, own=port_of),
    "500 ms delay, gRPC": delayed,
}


def measure(model: Path, fault: str, *, rounds: int, num: int) -> Cost:
    """So many rounds of one fault, `num` requests of each kind in each."""
    cost = Cost(fault=fault)
    for _ in range(rounds):
        asyncio.run(FAULTS[fault](model, cost, num))
    return cost


def small_model(folder: str) -> Path:
    """A model that computes a prompt in milliseconds."""
    return make_random_model(
        folder + "/model",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        max_position=512,
    )


def percentile(samples_ms: list[float], share: float) -> float:
    """The sample that so large a share does not exceed."""
    ordered = sorted(samples_ms)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rows_of(cost: Cost) -> list[Row]:
    """What the fault added to requests, before and after the breakers opened, and for how long."""
    rows = [
        make_row(f"{cost.fault}: healthy, {name}", [percentile(cost.healthy_ms, share)], "ms")
        for name, share in SHARES.items()
    ]
    for when, taken, bound in (
        ("before the breaker opens", cost.before_ms, GOAL_BEFORE_MS),
        ("after", cost.after_ms, GOAL_AFTER_MS),
    ):
        for name, share in SHARES.items():
            added = percentile(taken, share) - percentile(cost.healthy_ms, share)
            rows.append(
                make_row(
                    f"{cost.fault}: added {when}, {name} of {len(taken)}",
                    [added],
                    "ms",
                    goal=Goal(of="value", relation="<=", bound=bound),
                )
            )
    rows.append(
        make_row(
            f"{cost.fault}: used again after",
            cost.back_s,
            "s",
            goal=Goal(of="value", relation="<=", bound=GOAL_BACK_S),
        )
    )
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that all this is meant to cause."""
    logger = logging.getLogger("snowskin")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(options: BenchOptions) -> Report:
    """Each fault with a store of its own."""
    rows: list[Row] = []
    faults = list(FAULTS)[-1:] if options.smoke else FAULTS
    with quiet(), tempfile.TemporaryDirectory(prefix="snowskin-") as folder:
        model = small_model(folder)
        for fault in faults:
            is_kill = fault.startswith("kill")  # a life has one death
            rounds = 1 if options.smoke else options.runs if is_kill else 3
            num = 3 if options.smoke else 20 if is_kill else 50
            rows += rows_of(measure(model, fault, rounds=rounds, num=num))
    return Report(bench="reliability", host=host_facts(), rows=tuple(rows))

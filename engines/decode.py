"""A decode instance: pull the KV that prefill publishes, take the hand-off, generate, publish.

Rules kept here: pulling begins with `start` and goes on while prefill still computes; after the
hand-off nothing more will be published, so what one more pull does not bring is lost, and is
computed here; no lost KV fails a request. A sequence joins the running batch when its KV is
complete up to what it will compute itself, and gives its blocks back on every way out, after the
last step or transfer that touched them.

    hold KV blocks -> pull ... pull -> hand-off -> last pull, tail -> [batch: recompute, generate]
    -> last publish -> free
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from snowskin.engines.batch import Batch, Plan
from snowskin.engines.errors import HandoffMissing, InstanceDraining, KvMemoryExhausted
from snowskin.engines.kv_room import KvRoom
from snowskin.engines.leftovers import discard_leftovers
from snowskin.engines.link import Waiting
from snowskin.engines.messages import (
    CachePolicy,
    DecodeOutput,
    DecodeStart,
    DecodeStats,
    Handoff,
    InstanceLoad,
)
from snowskin.engines.meter import Meter
from snowskin.engines.publisher import BlockPublisher, PublishRules
from snowskin.engines.sequence import LENGTH, Drawn, KeyChain, Sequence
from snowskin.kvstore import tracing
from snowskin.kvstore.client.breaker import LookupBudget
from snowskin.kvstore.errors import BadRequest
from snowskin.kvstore.messages import WakeReason
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from snowskin.engines.limits import EngineLimits
    from snowskin.engines.link import StoreLink
    from snowskin.engines.nodes import NodeLinks
    from snowskin.engines.runner import ModelRunner, Step
    from snowskin.kvstore.client.machine import Pulled

Emit = Callable[[DecodeOutput], Awaitable[None]]

MAX_PUBLISHES = 2
WAIT_S = 0.25  # one wait for the writer's next commit
BACKOFF_S = (0.02, 0.05, 0.1, 0.25)

log = get_logger(__name__)


@dataclass(slots=True)
class _Tally:
    """What one decode did, while it does it."""

    began_s: float
    num_blocks_pulled: int = 0
    pulled_nbytes: int = 0
    pull_s: float = 0.0
    first_byte_s: float = 0.0
    handoff_s: float = 0.0
    num_blocks_corrupt: int = 0
    num_recomputed_tokens: int = 0


class DecodeInstance:
    """Generates; `run` computes and must be running.

    Attributes:
        draining: new requests are refused.
        num_pull_failures: pulls that raised.
        num_publish_failures: sequences whose generated blocks could not be published whole.
        meter: what is measured on the way.
    """

    def __init__(self, runner: ModelRunner, nodes: NodeLinks, limits: EngineLimits) -> None:
        """One batch over one KV memory."""
        self.draining = False
        self.num_pull_failures = 0
        self.num_publish_failures = 0
        self.meter = Meter()
        self._runner = runner
        self._nodes = nodes
        self._limits = limits
        self._room = KvRoom(
            runner.memory, max_held=limits.max_running, max_waiting=limits.max_waiting
        )
        self._batch = Batch(runner, token_budget=limits.chunk_tokens, on_step=self._measure)
        self._publish_gate = asyncio.Semaphore(MAX_PUBLISHES)
        self._num_requests = 0

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return self._num_requests

    def load(self) -> InstanceLoad:
        """What the instance is doing now; requests that still wait for KV count as waiting."""
        memory = self._runner.memory
        return InstanceLoad(
            num_waiting=max(0, self._num_requests - self._batch.num_running),
            num_running=self._batch.num_running,
            num_waiting_tokens=self._batch.num_pending_tokens,
            num_kv_blocks=memory.num_blocks,
            num_kv_blocks_free=memory.num_free,
            num_tokens_computed=self._runner.num_tokens_computed,
            prefill_tokens_per_s=self.meter.prefill_tokens_per_s.value,
            pull_bytes_per_s=self.meter.pull_bytes_per_s.value,
            decode_step_s=self.meter.decode_step_s.value,
            **asdict(self._nodes.standing()),
        )

    async def run(self) -> None:
        """Computes until cancelled; sequences that still run end with InstanceDraining."""
        await self._batch.run()

    async def decode(
        self, start: DecodeStart, handoff: asyncio.Future[Handoff], emit: Emit
    ) -> None:
        """Generates one answer, telling `emit` of tokens as they come and of the end.

        A token that stopped the answer is emitted too. Cancelling frees what it held, after the
        step or transfer under way.

        Args:
            start: the prompt, and how to sample.
            handoff: resolves to the hand-off, or to the error that ends the request.
            emit: may wait; only this answer waits with it.

        Raises:
            SnowskinError: what `EngineLimits.check` refuses; InstanceOverloaded, InstanceDraining,
                KvMemoryExhausted, HandoffMissing, LogitsNotFinite.
        """
        self._limits.check(start.request_id, start.prompt)
        if self.draining:
            raise InstanceDraining(
                "this decode instance is shutting down", hint="use another", retry_after_s=1.0
            )
        prompt = start.prompt
        num_tokens = len(prompt.token_ids)
        max_tokens = self._limits.max_new_tokens(num_tokens, start.sampling.max_tokens)
        sequence = Sequence(
            request_id=start.request_id,
            token_ids=list(prompt.token_ids),
            block_ids=[],
            sampling=start.sampling,
            max_length=num_tokens + max_tokens,
        )
        self._num_requests += 1
        try:
            async with AsyncExitStack() as stack:
                tally = _Tally(began_s=time.monotonic())
                await self._hold_room(stack, start, sequence)
                await self._run(start, sequence, handoff, emit, tally)
        except asyncio.CancelledError:
            await self._discard(start)
            raise
        finally:
            self._num_requests -= 1

    async def _discard(self, start: DecodeStart, budget: LookupBudget | None = None) -> None:
        # The conductor names the node first to which prefill publishes.
        writer = await self._nodes.at(next(iter(start.prompt.node_addresses), ""))
        await discard_leftovers(
            writer or self._nodes.own,
            start.prompt,
            block_size=self._limits.block_size,
            budget=budget,
            request_id=start.request_id,
        )

    async def _hold_room(
        self, stack: AsyncExitStack, start: DecodeStart, sequence: Sequence
    ) -> None:
        # The last token of an answer is never computed, so it needs no room.
        num_blocks = self._limits.num_blocks(sequence.max_length - 1)
        try:
            async with asyncio.timeout(start.handoff_timeout_s):
                sequence.block_ids = await stack.enter_async_context(self._room.hold(num_blocks))
        except TimeoutError:
            raise KvMemoryExhausted(
                f"no room for {num_blocks} KV blocks within {start.handoff_timeout_s:.1f} s, "
                f"{self._runner.memory.num_free} of {self._runner.memory.num_blocks} are free",
                hint="send the request to another instance, or later",
                retry_after_s=1.0,
            ) from None

    async def _run(
        self,
        start: DecodeStart,
        sequence: Sequence,
        handoff: asyncio.Future[Handoff],
        emit: Emit,
        tally: _Tally,
    ) -> None:
        keys = KeyChain(start.prompt, self._limits.block_size)
        # For what is pulled after the hand-off; before it, waiting costs nothing. Twice a prefill's:
        # the user has the first token, and what is not found has been computed once already.
        budget = LookupBudget(2 * self._nodes.own.guard.budget_s)
        await self._pull_early(start, sequence, keys, handoff, tally, budget)
        received = await self._await_handoff(start, sequence, handoff, tally)
        if received.finish_reason or sequence.max_length == sequence.num_prompt_tokens + 1:
            stats = _stats(sequence, tally, None)
            reason = received.finish_reason or LENGTH
            await emit(DecodeOutput(finish_reason=reason, stats=stats))
            return
        await self._pull_rest(start, sequence, keys, received, tally, budget)
        log.info(
            "pulled",
            num_blocks=tally.num_blocks_pulled,
            nbytes=tally.pulled_nbytes,
            seconds=round(tally.pull_s, 4),
        )
        tally.num_recomputed_tokens = sequence.num_pending
        if sequence.num_pending:
            log.warning("KV lost, computing it here", num_tokens=sequence.num_pending)
        sequence.token_ids.append(received.first_token_id)
        keys.extend([received.first_token_id])
        rules = PublishRules(
            max_blocks=self._limits.chunk_tokens // self._limits.block_size,
            one_reader=False,
            timeout_s=self._limits.publish_timeout_s,
            gate=self._publish_gate,
            traffic=TrafficClass.PREFETCH,  # for a later turn: nobody waits for it now
        )
        async with BlockPublisher(
            self._nodes.own, keys, sequence.block_ids, rules, request_id=start.request_id
        ) as publisher:
            publisher.skip(sequence.num_prompt_tokens // self._limits.block_size)
            publishes = start.prompt.cache_policy is not CachePolicy.OFF
            reason = await self._generate(sequence, keys, publisher if publishes else None, emit)
            await self._finish_publishing(publisher)
            stats = _stats(sequence, tally, publisher)
        self.num_publish_failures += publisher.failed
        await emit(DecodeOutput(finish_reason=reason, stats=stats))

    async def _pull_early(
        self,
        start: DecodeStart,
        sequence: Sequence,
        keys: KeyChain,
        handoff: asyncio.Future[Handoff],
        tally: _Tally,
        budget: LookupBudget,
    ) -> None:
        """Pulls blocks as they are committed, until all are here or the hand-off is."""
        num_blocks = sequence.num_prompt_tokens // self._limits.block_size
        deadline_s = tally.began_s + start.handoff_timeout_s
        num_empty = 0
        while self._num_here(sequence) < num_blocks and not handoff.done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0:
                return
            # Looked up each time: a node may have gone, or come back.
            links = await self._nodes.among(start.prompt.node_addresses)
            if len(links) > 1 and await self._pull_round(links, sequence, keys, tally):
                continue
            # The conductor names the node first to which prefill publishes.
            writer = await self._nodes.at(next(iter(start.prompt.node_addresses), ""))
            pulled = None
            if writer is not None and writer.usable:
                waiting = Waiting(min(WAIT_S, left_s), handoff, budget)
                pulled = await self._pull(writer, sequence, keys, tally, waiting=waiting)
            if pulled is not None and pulled.num_blocks:
                num_empty = 0
            elif pulled is None or pulled.wake_reason is not WakeReason.TIMEOUT:
                # No node, no writer, or a broken block: prefill may yet publish, but not at once.
                backoff_s = BACKOFF_S[min(num_empty, len(BACKOFF_S) - 1)]
                num_empty += 1
                await asyncio.wait([handoff], timeout=min(backoff_s, left_s))

    @tracing.traced("await hand-off")
    async def _await_handoff(
        self,
        start: DecodeStart,
        sequence: Sequence,
        handoff: asyncio.Future[Handoff],
        tally: _Tally,
    ) -> Handoff:
        left_s = tally.began_s + start.handoff_timeout_s - time.monotonic()
        await asyncio.wait([handoff], timeout=max(0.0, left_s))
        if not handoff.done():
            raise HandoffMissing(
                f"no hand-off within {start.handoff_timeout_s:.1f} s of the start of decode",
                hint="send it sooner, or start with a longer handoff_timeout",
            )
        received = handoff.result()
        tally.handoff_s = tally.handoff_s or time.monotonic() - tally.began_s
        log.info("hand-off received", seconds=round(tally.handoff_s, 4))
        if received.position != sequence.num_prompt_tokens:
            raise BadRequest(
                f"hand-off at position {received.position}, the prompt has "
                f"{sequence.num_prompt_tokens} tokens",
                hint="send the hand-off of the same prompt",
            )
        if not 0 <= received.first_token_id < self._limits.vocab_size:
            raise BadRequest(
                f"first token {received.first_token_id} is outside the vocabulary of "
                f"{self._limits.vocab_size}",
                hint="send the hand-off of an instance of the same model",
            )
        return received

    @tracing.traced("pull rest")
    async def _pull_rest(
        self,
        start: DecodeStart,
        sequence: Sequence,
        keys: KeyChain,
        received: Handoff,
        tally: _Tally,
        budget: LookupBudget,
    ) -> None:
        """What is committed by now: blocks, then the tail; the rest is lost."""
        num_blocks = sequence.num_prompt_tokens // self._limits.block_size
        writer = await self._nodes.at(received.node_address) or self._nodes.own
        if self._num_here(sequence) < num_blocks:
            named = (received.node_address, *start.prompt.node_addresses)
            links = await self._nodes.among(named)
            while await self._pull_round(links, sequence, keys, tally, budget):
                continue
        if self._num_here(sequence) < num_blocks:
            await self._discard(start, budget)  # of no use without the blocks before them
            return
        if sequence.num_pending == 0 or received.tail_nbytes != writer.block_nbytes:
            return
        began_s = time.monotonic()
        try:
            pulled = await writer.pull_tail(
                sequence.block_ids[num_blocks],
                budget=budget,
                timeout_s=self._limits.pull_timeout_s,
                request_id=sequence.request_id,
            )
        except SnowskinError as error:
            self._count_failure(error, tally)
            return
        self._count(pulled, began_s, tally, waited=False)
        sequence.num_computed = sequence.num_prompt_tokens

    async def _pull_round(
        self,
        links: list[StoreLink],
        sequence: Sequence,
        keys: KeyChain,
        tally: _Tally,
        budget: LookupBudget | None = None,
    ) -> bool:
        """One pull from each node of what is still missing; whether anything came."""
        num_before = self._num_here(sequence)
        num_blocks = sequence.num_prompt_tokens // self._limits.block_size
        for link in links:
            if self._num_here(sequence) < num_blocks and link.usable:
                await self._pull(link, sequence, keys, tally, budget=budget)
        return self._num_here(sequence) > num_before

    def _num_here(self, sequence: Sequence) -> int:
        return sequence.num_computed // self._limits.block_size

    @tracing.traced("pull")
    async def _pull(
        self,
        link: StoreLink,
        sequence: Sequence,
        keys: KeyChain,
        tally: _Tally,
        *,
        budget: LookupBudget | None = None,
        waiting: Waiting | None = None,
    ) -> Pulled | None:
        """One pull behind what is here; None where it failed, or found nothing before the hand-off."""
        num_here = self._num_here(sequence)
        num_blocks = sequence.num_prompt_tokens // self._limits.block_size
        began_s = time.monotonic()
        try:
            pulled = await link.pull(
                keys.column(num_here, num_blocks),
                sequence.block_ids[num_here:num_blocks],
                budget=budget,
                waiting=waiting,
                timeout_s=self._limits.pull_timeout_s,
                request_id=sequence.request_id,
            )
        except SnowskinError as error:
            self._count_failure(error, tally)
            return None
        if pulled is None:
            return None
        if pulled.broken_by is not None:
            self._count_failure(pulled.broken_by, tally)
        self._count(pulled, began_s, tally, waited=waiting is not None)
        tally.num_blocks_pulled += pulled.num_blocks
        sequence.num_computed += pulled.num_blocks * self._limits.block_size
        return pulled

    def _count(self, pulled: Pulled, began_s: float, tally: _Tally, *, waited: bool) -> None:
        tally.pulled_nbytes += pulled.nbytes
        tally.num_blocks_corrupt += len(pulled.corrupt_blocks)
        if pulled.first_byte_s is None:
            return
        tally.first_byte_s = tally.first_byte_s or began_s - tally.began_s + pulled.first_byte_s
        if waited:
            # Waiting for the writer is no pulling.
            tally.pull_s += pulled.seconds - pulled.first_byte_s
        else:
            tally.pull_s += pulled.seconds
            self.meter.pulled(nbytes=pulled.nbytes, seconds=pulled.seconds)

    def _count_failure(self, error: SnowskinError, tally: _Tally) -> None:
        self.num_pull_failures += 1
        tally.num_blocks_corrupt += error.status == "DATA_LOSS"
        log.warning("pull failed", reason=error.reason, error=str(error))

    @tracing.traced("generate")
    async def _generate(
        self,
        sequence: Sequence,
        keys: KeyChain,
        publisher: BlockPublisher | None,
        emit: Emit,
    ) -> str:
        """Runs a sequence through the batch; the reason for which it ended."""
        self._batch.join(sequence)
        try:
            while True:
                drawn = [await sequence.outputs.get()]
                while not sequence.outputs.empty():
                    drawn.append(sequence.outputs.get_nowait())
                tokens = [item for item in drawn if isinstance(item, Drawn)]
                token_ids = tuple(item.token_id for item in tokens)
                keys.extend(token_ids)
                if publisher is not None:
                    num_computed = sequence.num_computed // self._limits.block_size
                    publisher.ready(min(num_computed, len(keys)))
                if token_ids:
                    await emit(DecodeOutput(token_ids=token_ids))
                for item in drawn:
                    if isinstance(item, SnowskinError):
                        raise item
                if tokens and tokens[-1].finish_reason:
                    return tokens[-1].finish_reason
        finally:
            await self._batch.leave(sequence)
            num_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
            tracing.annotate(num_tokens=num_tokens, step_s=self.meter.decode_step_s.value)

    async def _finish_publishing(self, publisher: BlockPublisher) -> None:
        try:
            async with asyncio.timeout(self._limits.publish_timeout_s):
                await publisher.finish(self._nodes.own.new_budget())
        except TimeoutError:
            log.warning("publishing cut short", seconds=self._limits.publish_timeout_s)

    def _measure(self, plan: Plan, step: Step) -> None:
        if all(num_tokens == 1 for _, num_tokens in plan):
            self.meter.decoded(seconds=step.seconds)
        elif len(plan) == 1:
            self.meter.prefilled(num_tokens=plan[0][1], seconds=step.seconds)


def _stats(sequence: Sequence, tally: _Tally, publisher: BlockPublisher | None) -> DecodeStats:
    return DecodeStats(
        num_blocks_pulled=tally.num_blocks_pulled,
        pulled_nbytes=tally.pulled_nbytes,
        pull_s=tally.pull_s,
        first_byte_s=tally.first_byte_s,
        handoff_s=tally.handoff_s,
        num_blocks_published=publisher.num_blocks if publisher else 0,
        published_nbytes=publisher.nbytes if publisher else 0,
        num_blocks_corrupt=tally.num_blocks_corrupt,
        num_recomputed_tokens=tally.num_recomputed_tokens,
        num_generated_tokens=max(0, len(sequence.token_ids) - sequence.num_prompt_tokens - 1),
    )

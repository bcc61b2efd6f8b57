"""A prefill instance: pull what is cached, compute the rest in chunks, publish, hand off.

Rules kept here: prompts are computed one at a time in the order of asking; at most (n - 1) // B
cached blocks are used, so that at least one token is computed and gives the first logits; each
chunk's full blocks are published while the next chunk is computed, and the answer leaves only after
the last commit, so that whoever reads after it need not wait; a store that fails costs computation
and never the request. KV blocks are given back on every way out.

    hold KV blocks -> [turn: pull cached -> chunk ... chunk -> sample] -> last publish, tail -> free
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from snowskin.engines.errors import InstanceDraining, InstanceOverloaded
from snowskin.engines.kv_room import KvRoom
from snowskin.engines.leftovers import discard_leftovers
from snowskin.engines.messages import (
    CachePolicy,
    Handoff,
    InstanceLoad,
    PrefillResponse,
    PrefillStats,
)
from snowskin.engines.meter import Meter
from snowskin.engines.model.sampler import SampledToken
from snowskin.engines.publisher import BlockPublisher, PublishRules
from snowskin.engines.runner import Draw
from snowskin.engines.sequence import Drawn, KeyChain, Sequence
from snowskin.kvstore import tracing
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from snowskin.engines.limits import EngineLimits
    from snowskin.engines.link import StoreLink
    from snowskin.engines.messages import PrefillRequest
    from snowskin.engines.nodes import NodeLinks
    from snowskin.engines.runner import ModelRunner
    from snowskin.kvstore.client.breaker import LookupBudget

MAX_PUBLISHES = 2  # of the whole instance at once, a chunk each: what may be reserved, uncommitted

log = get_logger(__name__)


@dataclass(slots=True)
class _Tally:
    """What one prefill did, while it does it."""

    began_s: float
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_blocks_pulled: int = 0
    pulled_nbytes: int = 0
    num_blocks_corrupt: int = 0
    queue_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0


class PrefillInstance:
    """Computes prompts.

    Attributes:
        draining: new requests are refused.
        num_pull_failures: prompts whose cached blocks could not be asked for.
        num_publish_failures: prompts whose KV could not be published whole.
        meter: what is measured on the way.
    """

    def __init__(self, runner: ModelRunner, nodes: NodeLinks, limits: EngineLimits) -> None:
        """Publishes to its own node, whose address hand-offs tell."""
        self.draining = False
        self.num_pull_failures = 0
        self.num_publish_failures = 0
        self.meter = Meter()
        self._runner = runner
        self._nodes = nodes
        self._limits = limits
        # Who waits is bounded in `_admit`, before anything is asked of the room.
        self._room = KvRoom(
            runner.memory, max_held=limits.max_running, max_waiting=limits.max_waiting
        )
        self._turn = asyncio.Lock()
        self._publish_gate = asyncio.Semaphore(MAX_PUBLISHES)
        self._active: set[Sequence] = set()
        self._waiting: set[Sequence] = set()

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._active)

    def load(self) -> InstanceLoad:
        """What the instance is doing now."""
        memory = self._runner.memory
        return InstanceLoad(
            num_waiting=len(self._waiting),
            num_running=len(self._active) - len(self._waiting),
            num_waiting_tokens=sum(
                sequence.num_prompt_tokens - sequence.num_computed for sequence in self._active
            ),
            num_kv_blocks=memory.num_blocks,
            num_kv_blocks_free=memory.num_free,
            num_tokens_computed=self._runner.num_tokens_computed,
            prefill_tokens_per_s=self.meter.prefill_tokens_per_s.value,
            pull_bytes_per_s=self.meter.pull_bytes_per_s.value,
            decode_step_s=0.0,
            **asdict(self._nodes.standing()),
        )

    async def prefill(self, request: PrefillRequest) -> PrefillResponse:
        """Computes one prompt; a cancelled call ends after the chunk under way.

        Raises:
            SnowskinError: what `EngineLimits.check` refuses; InstanceOverloaded, InstanceDraining;
                LogitsNotFinite.
        """
        prompt = request.prompt
        self._limits.check(request.request_id, prompt)
        self._admit()
        num_tokens = len(prompt.token_ids)
        max_tokens = self._limits.max_new_tokens(num_tokens, request.sampling.max_tokens)
        sequence = Sequence(
            request_id=request.request_id,
            token_ids=list(prompt.token_ids),
            block_ids=[],
            sampling=request.sampling,
            max_length=num_tokens + max_tokens,
        )
        tally = _Tally(began_s=time.monotonic())
        self._active.add(sequence)
        self._waiting.add(sequence)
        try:
            async with self._room.hold(self._limits.num_blocks(num_tokens)) as block_ids:
                sequence.block_ids = block_ids
                try:
                    return await self._run(request, sequence, tally)
                except asyncio.CancelledError:
                    await discard_leftovers(
                        self._nodes.own,
                        prompt,
                        block_size=self._limits.block_size,
                        request_id=request.request_id,
                    )
                    raise
        finally:
            self._active.discard(sequence)
            self._waiting.discard(sequence)

    def _admit(self) -> None:
        if self.draining:
            raise InstanceDraining(
                "this prefill instance is shutting down", hint="use another", retry_after_s=1.0
            )
        if len(self._waiting) >= self._limits.max_waiting:
            raise InstanceOverloaded(
                f"{len(self._waiting)} prompts wait here, {self._limits.max_waiting} may",
                hint="send the request to another instance, or later",
                retry_after_s=1.0,
            )

    async def _run(
        self, request: PrefillRequest, sequence: Sequence, tally: _Tally
    ) -> PrefillResponse:
        limits, prompt = self._limits, request.prompt
        keys = KeyChain(prompt, limits.block_size)
        rules = PublishRules(
            max_blocks=limits.chunk_tokens // limits.block_size,
            one_reader=prompt.cache_policy is CachePolicy.OFF,
            timeout_s=limits.publish_timeout_s,
            gate=self._publish_gate,
        )
        num_tokens = len(prompt.token_ids)
        has_tail = num_tokens % limits.block_size > 0
        # One for the whole way to the first token.
        budget = self._nodes.own.new_budget()
        async with BlockPublisher(
            self._nodes.own, keys, sequence.block_ids, rules, request_id=request.request_id
        ) as publisher:
            async with self._turn:
                self._waiting.discard(sequence)
                tally.queue_s = time.monotonic() - tally.began_s
                tracing.record("queue", seconds=tally.queue_s)
                if prompt.cache_policy is not CachePolicy.OFF:
                    # What came from other nodes is published too: the own one lacks it.
                    publisher.skip(await self._pull_cached(request, sequence, keys, tally, budget))
                    publisher.ready(sequence.num_computed // limits.block_size)
                elif sequence.max_length == num_tokens + 1:
                    # No decode follows, and nobody else may read these blocks.
                    publisher.skip(num_tokens // limits.block_size)
                if has_tail:
                    # Its whole block travels; the slots behind the prompt must be nobody's bytes.
                    self._runner.memory.zero(sequence.block_ids[-1])
                drawn = await self._compute(sequence, publisher, tally)
            await publisher.finish(budget)
            # A request that its first token ended has no decode that would read the tail.
            tail_sent = (
                has_tail
                and not drawn.finish_reason
                and await publisher.publish_tail(sequence.block_ids[-1], budget)
            )
        self.num_publish_failures += publisher.failed
        log.info(
            "published",
            num_blocks=publisher.num_blocks,
            nbytes=publisher.nbytes,
            has_tail=tail_sent,
            seconds=round(publisher.seconds, 4),
        )
        return PrefillResponse(
            handoff=Handoff(
                first_token_id=drawn.token_id,
                position=num_tokens,
                tail_nbytes=self._nodes.own.block_nbytes if tail_sent else 0,
                node_address=self._nodes.own_address,
                finish_reason=drawn.finish_reason,
            ),
            stats=_stats(num_tokens, tally, publisher),
        )

    @tracing.traced("pull cached")
    async def _pull_cached(
        self,
        request: PrefillRequest,
        sequence: Sequence,
        keys: KeyChain,
        tally: _Tally,
        budget: LookupBudget,
    ) -> int:
        """Pulls what any node has of the prompt; how many blocks the own node gave first.

        Where a node fails, breaks off or gives a broken block, the next one goes on behind what is
        here; only what none of them has is computed.
        """
        block_size = self._limits.block_size
        num_blocks = (len(sequence.token_ids) - 1) // block_size
        num_own = 0
        if num_blocks == 0:
            return num_own
        began_s = time.monotonic()
        links = await self._nodes.among(request.prompt.node_addresses)
        num_before = -1
        # A node may hold what follows another one's blocks: around until a round brings nothing.
        while num_before < sequence.num_computed < num_blocks * block_size:
            num_before = sequence.num_computed
            for link in links:
                is_first = sequence.num_computed == 0
                if sequence.num_computed < num_blocks * block_size and link.usable:
                    await self._pull(link, sequence, keys, num_blocks, tally, budget)
                if link is self._nodes.own and is_first:
                    num_own = sequence.num_computed // block_size
            if len(links) == 1:
                break
        tally.num_cached_tokens = sequence.num_computed
        tally.pull_s = time.monotonic() - began_s
        log.info(
            "pulled",
            num_blocks=tally.num_blocks_pulled,
            nbytes=tally.pulled_nbytes,
            seconds=round(tally.pull_s, 4),
        )
        return num_own

    async def _pull(
        self,
        link: StoreLink,
        sequence: Sequence,
        keys: KeyChain,
        num_blocks: int,
        tally: _Tally,
        budget: LookupBudget,
    ) -> None:
        first = sequence.num_computed // self._limits.block_size
        try:
            pulled = await link.pull(
                keys.column(first, num_blocks),
                sequence.block_ids[first:num_blocks],
                budget=budget,
                timeout_s=self._limits.pull_timeout_s,
                request_id=sequence.request_id,
            )
        except SnowskinError as error:
            self._count_failure(error)
            return
        assert pulled is not None, "a pull that waits for nothing has an answer"
        if pulled.broken_by is not None:
            self._count_failure(pulled.broken_by)
        # Blocks before a corrupt one are good; what follows is computed again.
        sequence.num_computed += pulled.num_blocks * self._limits.block_size
        tally.num_blocks_pulled += pulled.num_blocks
        tally.pulled_nbytes += pulled.nbytes
        tally.num_blocks_corrupt += len(pulled.corrupt_blocks)
        self.meter.pulled(nbytes=pulled.nbytes, seconds=pulled.seconds)

    def _count_failure(self, error: SnowskinError) -> None:
        self.num_pull_failures += 1
        log.warning("pull failed, going on without", reason=error.reason, error=str(error))

    async def _compute(self, sequence: Sequence, publisher: BlockPublisher, tally: _Tally) -> Drawn:
        while True:
            num_tokens = min(self._limits.chunk_tokens, sequence.num_pending)
            is_last = num_tokens == sequence.num_pending
            draw = Draw(sequence.sampling, len(sequence.token_ids)) if is_last else None
            step = await self._runner.step([sequence.span(num_tokens)], [draw])
            sequence.num_computed += num_tokens
            tally.num_computed_tokens += num_tokens
            tally.compute_s += step.seconds
            tracing.record("chunk", seconds=step.seconds, num_tokens=num_tokens)
            self.meter.prefilled(num_tokens=num_tokens, seconds=step.seconds)
            publisher.ready(sequence.num_computed // self._limits.block_size)
            if is_last:
                (token,) = step.tokens
                if not isinstance(token, SampledToken):
                    assert token is not None, "the last chunk draws"
                    raise token
                return sequence.append(token.token_id)


def _stats(num_tokens: int, tally: _Tally, publisher: BlockPublisher) -> PrefillStats:
    assert tally.num_cached_tokens + tally.num_computed_tokens == num_tokens
    return PrefillStats(
        num_prompt_tokens=num_tokens,
        num_cached_tokens=tally.num_cached_tokens,
        num_computed_tokens=tally.num_computed_tokens,
        num_blocks_pulled=tally.num_blocks_pulled,
        pulled_nbytes=tally.pulled_nbytes,
        num_blocks_published=publisher.num_blocks,
        published_nbytes=publisher.nbytes,
        num_blocks_corrupt=tally.num_blocks_corrupt,
        queue_s=tally.queue_s,
        pull_s=tally.pull_s,
        compute_s=tally.compute_s,
        publish_s=publisher.seconds,
    )

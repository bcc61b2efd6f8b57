"""Between pure decisions and the world: prepares a prompt, asks the policy, waits for instances.

What of a prompt is cached where is looked up in the directory; nodes that it does not speak of are
asked, within a small budget.

Rules kept here: a decision is made on a view taken in the same step of the loop, and what it places
is counted before anyone else decides; block keys are computed once per request and cache shape, off
the loop where the prompt is long; a missing instance is waited for (`instance_wait_s`: it may be
restarting), never longer.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snowskin.engines.conductor.admission import check_context
from snowskin.engines.conductor.errors import NoInstanceReady, RequestRefused
from snowskin.engines.conductor.request import (
    CacheShape,
    Defer,
    Placement,
    Refusal,
    Request,
    Stage,
)
from snowskin.engines.messages import CachePolicy, Prompt
from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.directory.presence import Presence, num_leading_ones
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import traced

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from snowskin.engines.conductor.directory import Directory
    from snowskin.engines.conductor.nodes import NodeHit, Nodes
    from snowskin.engines.conductor.policies.api import Policy
    from snowskin.engines.conductor.state import ConductorState
    from snowskin.engines.conductor.view import ClusterView, InstanceView
    from snowskin.kvstore.clock import Clock

OFF_LOOP_TOKENS = 2_000  # hashing so many takes about a millisecond

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How long the scheduler waits, and for what.

    Attributes:
        instance_wait_s: for a ready instance of a role.
        default_max_tokens: where a request does not say, as far as the context allows.
        max_waiting: new requests that wait for an instance at once; who comes then is not kept. Those
            that lost their instance on the way wait besides: they have been promised an answer.
    """

    instance_wait_s: float = 10.0
    default_max_tokens: int = 512
    max_waiting: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prompt with its keys, as policies and instances want it."""

    request: Request
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placement and the instance as it was then."""

    placement: Placement
    instance: InstanceView


class Scheduler:
    """Owner of the waiting; the state owns the facts, the policy the decisions."""

    def __init__(
        self,
        state: ConductorState,
        policy: Policy,
        nodes: Nodes,
        directory: Directory,
        clock: Clock,
        limits: SchedulerLimits | None = None,
    ) -> None:
        """Decides by `policy` over `state`."""
        self.state = state
        self.policy = policy
        self.nodes = nodes
        self.directory = directory
        self.limits = limits or SchedulerLimits()
        self._clock = clock
        self._changed = asyncio.Event()
        self._num_waiting = 0

    def view(self) -> ClusterView:
        """The cluster now."""
        return self.state.view(self._clock.now_s())

    def wake(self) -> None:
        """An instance may have become available: whoever waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def shape(self, *, is_new: bool = False) -> CacheShape:
        """The cache shape that requests are served with.

        Args:
            is_new: whether the request may be sent away where too many wait.

        Raises:
            NoInstanceReady: prefill or decode has no ready instance, and none came.
        """
        deadline_s = self._clock.now_s() + self.limits.instance_wait_s
        while True:
            changed, view = self._changed, self.view()
            shape = view.shape()
            if shape is not None:
                return shape
            missing = " and no ".join(view.missing_roles())
            why = f"no {missing} instance is ready"
            if not missing:
                why = "no prefill and decode instance of one layout are ready"
            await self._wait(changed, deadline_s, why, is_new=is_new)

    @traced("prepare")
    async def prepare(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None,
        default_max_tokens: int | None = None,
        use_cache: bool = True,
        salt: str = "",
        is_new: bool = False,
    ) -> Prepared:
        """Keys, limits and hits of a prompt.

        Args:
            request_id: for the policy.
            token_ids: the prompt, at least one.
            max_tokens: wanted at most; None takes the default or what the context leaves.
            default_max_tokens: this request's default, if it is not the conductor's.
            use_cache: False salts the keys, so that nothing is hit and nothing hits them.
            salt: what they are salted with then.
            is_new: as `shape`.

        Raises:
            NoInstanceReady: as `shape`.
            PromptTooLong: no instance could ever serve it.
        """
        shape = await self.shape(is_new=is_new)
        view = self.view()
        if max_tokens is None:
            default = default_max_tokens or self.limits.default_max_tokens
            limit = view.context_limit_tokens(shape)
            max_tokens = max(1, min(default, limit - len(token_ids) if limit else default))
        check_context(len(token_ids), max_tokens, view, shape)
        keys = await self.block_keys(token_ids, shape, salt=None if use_cache else salt)
        presence = await self.locate(shape, keys) if use_cache else Presence()
        return Prepared(
            request=Request(
                request_id=request_id,
                shape=shape,
                num_tokens=len(token_ids),
                max_tokens=max_tokens,
                presence=presence,
            ),
            prompt=Prompt(
                token_ids=tuple(token_ids),
                block_keys=keys,
                namespace=shape.namespaces[0],
                cache_policy=CachePolicy.READ_WRITE if use_cache else CachePolicy.OFF,
            ),
        )

    async def block_keys(
        self, token_ids: Sequence[int], shape: CacheShape, *, salt: str | None = None
    ) -> KeyColumn:
        """Keys of the prompt's full blocks."""

        def compute() -> KeyColumn:
            return KeyColumn.of(block_hashes(token_ids, shape.block_size, cache_salt=salt))

        if len(token_ids) > OFF_LOOP_TOKENS:
            return await asyncio.to_thread(compute)
        return compute()

    async def locate(self, shape: CacheShape, keys: KeyColumn) -> Presence:
        """Which of `keys` are on which nodes: by the directory, and by asking who is not in it."""
        wanted = self._node_addresses(shape)
        asked = [each for each in wanted if not self.directory.is_in_sync(each)]
        hits = await self._ask(asked, shape, keys) if asked else []
        # Looked up last, so that no answer that was waited for makes it old.
        known = self.directory.locate(shape.namespaces, keys).only(wanted)
        return Presence(
            bitmaps={hit.address: hit.bitmap for hit in hits if hit.bitmap} | dict(known.bitmaps)
        )

    def on_prefilled(self, prepared: Prepared, placement: Placement, num_cached_tokens: int) -> int:
        """Doubts the hints that a prefill did not find so; how many hints that takes back.

        It asks every node of its plan for the next block until none has it. So what all of them
        are said to have at the place where it began to compute, none of them gave.
        """
        shape = prepared.request.shape
        first = num_cached_tokens // shape.block_size
        if first >= placement.num_cached_blocks:
            return 0
        num_doubted = 0
        for address in placement.node_addresses:
            bitmap = prepared.request.presence.bitmaps.get(address, 0) >> first
            run = prepared.prompt.block_keys[first : first + num_leading_ones(bitmap)]
            num_doubted += self.directory.doubt(address, shape.namespaces, run)
        log.info(
            "planned blocks not found",
            num_planned=placement.num_cached_blocks,
            num_found=first,
            hints_doubted=num_doubted,
        )
        return num_doubted

    async def probe(
        self, shape: CacheShape, keys: KeyColumn, *, timeout_s: float | None = None
    ) -> list[NodeHit]:
        """What the nodes of instances with this cache shape hold of `keys`, each asked now."""
        return await self._ask(self._node_addresses(shape), shape, keys, timeout_s=timeout_s)

    def _node_addresses(self, shape: CacheShape) -> list[str]:
        """Of the nodes of instances with this cache shape."""
        return sorted(
            {
                each.node_address
                for each in self.view().instances
                if each.shape == shape and each.node_address
            }
        )

    async def _ask(
        self,
        addresses: list[str],
        shape: CacheShape,
        keys: KeyColumn,
        *,
        timeout_s: float | None = None,
    ) -> list[NodeHit]:
        return await self.nodes.probe(
            addresses,
            namespaces=shape.namespaces,
            keys=keys,
            timeout_s=timeout_s,
        )

    @traced("admit")
    async def admit(self, request: Request, *, is_counted: bool = True) -> None:
        """Returns when the request may be placed.

        Args:
            request: prepared.
            is_counted: whether the state knows that it is in flight.

        Raises:
            RequestRefused: a limit is passed.
            NoInstanceReady: a role has no ready instance, and none came.
        """
        deadline_s = self._clock.now_s() + self.limits.instance_wait_s
        while True:
            changed = self._changed
            view = self.view()
            if not is_counted:
                view = replace(view, num_requests=view.num_requests + 1)
            answer = self.policy.admit(request, view)
            if isinstance(answer, Refusal):
                raise RequestRefused.because(answer)
            if not isinstance(answer, Defer):
                return
            await self._wait(changed, deadline_s, answer.message, is_new=True)

    def plan(self, request: Request, stage: Stage) -> Placed:
        """Where a stage would go now, without giving it to anyone.

        Raises:
            NoInstanceReady: no instance of the role is ready.
        """
        view = self.view()
        answer = self.policy.place(request, stage, view)
        if isinstance(answer, Refusal):
            raise NoInstanceReady(
                answer.message, hint=answer.hint, retry_after_s=answer.retry_after_s
            )
        (instance,) = (each for each in view.instances if each.instance_id == answer.instance_id)
        return Placed(placement=answer, instance=instance)

    @asynccontextmanager
    async def placed(
        self, request: Request, stage: Stage, excluded: frozenset[str] = frozenset()
    ) -> AsyncIterator[Placed]:
        """A stage on an instance; it counts as the instance's load while the block lasts.

        Raises:
            NoInstanceReady: none is ready, and none came.
        """
        request = replace(request, excluded=excluded)
        placed = await self._wait_for_place(request, stage)
        self.state.on_placed(request.request_id, placed.placement)
        log.info(
            "placed",
            stage=str(stage),
            instance=placed.instance.instance_id,
            num_cached_blocks=placed.placement.num_cached_blocks,
        )
        try:
            yield placed
        finally:
            self.state.on_stage_ended(request.request_id, placed.placement)

    @traced("place")
    async def _wait_for_place(self, request: Request, stage: Stage) -> Placed:
        deadline_s = self._clock.now_s() + self.limits.instance_wait_s
        while True:
            changed = self._changed
            try:
                return self.plan(request, stage)
            except NoInstanceReady as error:
                await self._wait(changed, deadline_s, error.message, is_new=False)

    async def _wait(
        self, changed: asyncio.Event, deadline_s: float, why: str, *, is_new: bool
    ) -> None:
        """Returns after a change; `changed` was taken before what is waited for was looked at."""
        if is_new and self._num_waiting >= self.limits.max_waiting:
            raise NoInstanceReady(
                f"{why}, and {self._num_waiting} requests wait for one already",
                hint="start one, or look at why it does not report: kvctl status",
                retry_after_s=1.0,
            )
        self._num_waiting += is_new
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.now_s())):
                await changed.wait()
        except TimeoutError:
            raise NoInstanceReady(
                f"{why}, and none came within {self.limits.instance_wait_s} s",
                hint="start one, or look at why it does not report: kvctl status",
                retry_after_s=1.0,
            ) from None
        finally:
            self._num_waiting -= is_new

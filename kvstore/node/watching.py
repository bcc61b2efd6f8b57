"""Watch on the gRPC door: one stream a subscriber, at the pace at which it reads.

Rules kept here: a subscriber holds up nobody else. Of what it should hear at most two messages are made ahead, when
the ones before were taken; who takes none for `stall_s`, or falls behind what the node kept, is dropped with
WatcherTooSlow and comes again. A subscriber that knows all hears something every `beat_s`, so that silence means
trouble. There are at most `max_watchers`. A drain ends all streams.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.errors import BadSetting, LimitExceeded, NodeDraining, WatcherTooSlow
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import watch_request_from, watched_to

if TYPE_CHECKING:
    import grpc.aio

    from snowskin.kvstore.messages import Watched
    from snowskin.kvstore.node.events import Subscription
    from snowskin.kvstore.node.shell import NodeShell
    from snowskin.v1 import store_pb2

# A message at most this often, so that many commits become one message; the first after a silence goes at once.
GAP_S = 0.005

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchLimits:
    """What subscribers get.

    Attributes:
        beat_s: seconds of silence at most.
        stall_s: how long a subscriber may take nothing of what it is sent.
        max_watchers: subscribers at once; while its snapshot lasts, each costs a list of a namespace's keys, 8 bytes
            a block.
    """

    beat_s: float = 2.0
    stall_s: float = 10.0
    max_watchers: int = 16

    def __post_init__(self) -> None:
        """Refuses numbers that cannot work."""
        for name in ("beat_s", "stall_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise BadSetting(
                    f"watch_{name} is {getattr(self, name)}", hint="give seconds > 0, at most 3600"
                )
        if self.max_watchers < 0:
            raise BadSetting(f"max_watchers is {self.max_watchers}", hint="give 0 or more")


class Watchers:
    """The subscribers of one node."""

    def __init__(self, shell: NodeShell, limits: WatchLimits | None = None) -> None:
        """Nobody watches."""
        self._shell = shell
        self._limits = limits or WatchLimits()
        self._num_watchers = 0
        self.num_dropped = 0

    def __len__(self) -> int:
        """Subscribers now."""
        return self._num_watchers

    async def serve(
        self, message: store_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One subscriber, from its call to its end.

        Raises:
            LimitExceeded: there are `max_watchers` already.
            WatcherTooSlow: it did not read in time.
            NodeDraining: what is here can be matched no more.
        """
        if self._num_watchers >= self._limits.max_watchers:
            raise LimitExceeded(
                f"{self._num_watchers} subscribers watch node {self._shell.state.node_id} already",
                hint="watch through one of them, or raise max_watchers",
                retry_after_s=self._limits.beat_s,
            )
        subscription = self._shell.state.watch(watch_request_from(message))
        news = asyncio.Event()
        self._num_watchers += 1
        self._shell.on_change(news.set)
        log.info("watch begins", peer=context.peer(), behind=subscription.num_behind)
        try:
            await self._stream(subscription, news, context)
        except WatcherTooSlow:
            self.num_dropped += 1
            # Its error comes behind what it has not read; if it never reads, the call ends without.
            call = asyncio.current_task()
            assert call is not None, "a servicer runs in a task"
            asyncio.get_running_loop().call_later(self._limits.stall_s, call.cancel)
            raise
        finally:
            self._num_watchers -= 1
            self._shell.no_change_for(news.set)
            log.info("watch ended", peer=context.peer())

    async def _stream(
        self,
        subscription: Subscription,
        news: asyncio.Event,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        state = self._shell.state
        while not state.draining:
            news.clear()
            messages = subscription.next_messages()
            if not messages:
                try:
                    async with asyncio.timeout(self._limits.beat_s):
                        await news.wait()
                except TimeoutError:
                    messages = [subscription.beat()]
            for message in messages:
                await self._send(message, context)
            if messages and messages[-1].in_sync:
                await asyncio.sleep(GAP_S)
        raise NodeDraining(
            f"node {state.node_id} is draining", hint="watch it again when it is back"
        )

    async def _send(self, message: Watched, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_s):
                await context.write(watched_to(message))
        except TimeoutError:
            raise WatcherTooSlow(
                f"the subscriber took nothing for {self._limits.stall_s} s",
                hint="watch again with what you have, and read faster",
            ) from None

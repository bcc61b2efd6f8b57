"""The conductor's directory: every node that instances name is watched, and what it tells is kept.

Rules kept here: a node has one stream and one task, from when it is first wanted until nobody names
it; a stream that breaks, falls silent for `silence_s` or tells what does not follow is opened anew
after a growing, jittered pause, from where the view stands; nothing that a node does ends its task.
Until a node is in sync the view does not speak of it, and whoever asks has to ask the node itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import ended
from snowskin.kvstore.directory.view import DirectoryView, NodeKnowledge, Sync
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.messages import Watched, WatchRequest
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import of_no_request
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.kvstore.clock import Clock
    from snowskin.kvstore.directory.presence import Presence

Watch = Callable[[str, WatchRequest], AsyncGenerator[Watched, None]]

MIN_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0
SILENCE_S = 6.0  # three of a node's heart-beats

log = get_logger(__name__)


class Directory:
    """Keeps one view by watching nodes.

    Attributes:
        view: what is known; ask it through this class, which brings the time.
    """

    def __init__(self, watch: Watch, clock: Clock, *, silence_s: float = SILENCE_S) -> None:
        """Watches nobody yet; `watch(address, request)` is a stream of a node's messages."""
        self.view = DirectoryView()
        self._watch = watch
        self._clock = clock
        self._silence_s = silence_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    # --- whom it watches

    def want(self, address: str) -> None:
        """Watches this node from now on."""
        if address and not self._closed and address not in self._tasks:
            self._tasks[address] = asyncio.create_task(
                self._follow(address), name=f"watch {address}", context=of_no_request()
            )

    async def keep_only(self, addresses: Collection[str]) -> None:
        """Lets go of nodes that no instance names any more, and frees what was known of them."""
        gone = [each for each in self._tasks if each not in addresses]
        tasks = [self._tasks.pop(each) for each in gone]
        for task in tasks:
            task.cancel()
        try:
            await ended(*tasks)
        finally:
            for address in gone:
                if address not in self._tasks:  # else it was wanted again meanwhile, and goes on
                    self.view.forget(address)
        while self.view.sweep():  # noqa: ASYNC110  a piece at a time: requests come first
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Ends all streams."""
        self._closed = True
        await self.keep_only(())

    # --- what it is asked

    def is_in_sync(self, address: str) -> bool:
        """Whether `locate` speaks of this node."""
        return self.view.is_in_sync(address)

    async def wait_in_sync(self, address: str) -> None:
        """Returns once the node is in sync; the caller bounds the wait."""
        while not self.view.is_in_sync(address):
            await self._changed.wait()

    def locate(self, namespaces: Sequence[bytes], keys: KeyColumn) -> Presence:
        """Which of `keys` are on which nodes in sync."""
        return self.view.locate(namespaces, keys, self._clock.now_s())

    def doubt(self, address: str, namespaces: Sequence[bytes], keys: KeyColumn) -> int:
        """A reader did not get these blocks there; how many hints that takes back."""
        return self.view.doubt(address, namespaces, keys, self._clock.now_s())

    def knowledge(self, address: str) -> NodeKnowledge:
        """What is known of a node, in numbers."""
        return self.view.knowledge(address, self._clock.now_s())

    # --- one node

    async def _follow(self, address: str) -> None:
        """Streams of one node, one after the other, until cancelled."""
        pause_s, last_error = MIN_PAUSE_S, ""
        try:
            while True:
                try:
                    await self._take_stream(address)
                except SnowskinError as error:
                    reason, text = error.reason, str(error)
                except Exception as error:
                    reason, text = type(error).__name__, repr(error)
                    log.error("watching a node broke", node=address, error=text, exc_info=error)
                else:
                    reason, text = "", "the stream ended"
                if self.view.knowledge(address, 0.0).sync is Sync.IN_SYNC:
                    pause_s, last_error = MIN_PAUSE_S, ""
                self.view.suspect(address)
                if reason != last_error:
                    log.warning("node not in sync", node=address, reason=reason, error=text)
                last_error = reason
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  spread, no secret
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            self.view.suspect(address)

    async def _take_stream(self, address: str) -> None:
        async with aclosing(self._watch(address, self.view.request(address))) as stream:
            while True:
                try:
                    async with asyncio.timeout(self._silence_s):
                        message = await anext(stream, None)
                except TimeoutError:
                    raise NodeUnavailable(
                        f"node {address} told nothing for {self._silence_s} s",
                        hint="look at its log; its heart-beats come every watch_beat_s",
                    ) from None
                if message is None:
                    return
                was_in_sync = self.view.is_in_sync(address)
                self.view.take(address, message, self._clock.now_s())
                if not was_in_sync and self.view.is_in_sync(address):
                    self._on_sync(address)

    def _on_sync(self, address: str) -> None:
        about = self.knowledge(address)
        log.info(
            "node in sync",
            node=address,
            epoch=about.node_epoch,
            blocks=about.num_blocks,
            sequence=about.sequence,
        )
        self._changed.set()
        self._changed = asyncio.Event()

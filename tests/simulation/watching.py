"""A node's Watch, and a directory view that takes it in: the real `Subscription`, the real `DirectoryView`.

Rules kept here: as in the gRPC door a subscriber has few messages under way; one that takes none for a while, or
falls behind what the node kept, is dropped and comes again with what it has. The stream may break at any message.
Whenever a view says that it is in sync it must have just the blocks that the node had when it said so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.kvstore.errors import WatchAstray, WatcherTooSlow
from snowskin.kvstore.frames import FrameReader, frame
from snowskin.kvstore.wire import (
    parse,
    watch_request_from,
    watch_request_to,
    watched_from,
    watched_to,
)
from snowskin.v1 import store_pb2
from tests.simulation.kernel import Future, Violation, first_of

if TYPE_CHECKING:
    from snowskin.kvstore.directory.view import DirectoryView
    from snowskin.kvstore.messages import Watched
    from tests.simulation.kernel import Process
    from tests.simulation.network import End
    from tests.simulation.node import SimNode

BUDGET_NBYTES = 512  # a few keys in a message: snapshots have several pages
BEAT_S = 0.3
SILENCE_S = 1.0  # then something is wrong with the stream
STALL_S = 0.3
GAP_S = 0.005
NUM_UNDER_WAY = 2


class Watching:
    """One node as one view knows it; runs in the process of whose view it is."""

    def __init__(self, process: Process, node: SimNode, view: DirectoryView) -> None:
        self._process = process
        self._kernel = process.kernel
        self._node = node
        self._view = view
        self._heard = Future()
        self._end: End | None = None
        self._slow_until_s = 0.0
        process.start(self._live(), f"watch {node.node_id}")

    def cut(self) -> None:
        """The network breaks the stream."""
        if self._end is not None and self._end.is_open:
            self._kernel.seen["watches cut"] += 1
            self._end.cut()

    def slow_down(self) -> None:
        """For a while messages are read late: the node has to wait, or to drop this subscriber."""
        self._slow_until_s = self._kernel.now_s + self._kernel.rng.uniform(0.1, 1.0)

    def _live(self) -> Any:
        rng, address = self._kernel.rng, self._node.node_id
        while True:
            request = self._view.request(address)
            if self._node.process.is_alive:
                self._begin(watch_request_to(request).SerializeToString(), bool(request.sequence))
            while self._end is not None and self._end.is_open:
                self._heard = Future()
                silence = self._process.sleep(SILENCE_S)
                yield first_of(self._heard, silence)
                if not self._heard.is_done:
                    self._kernel.seen["silent watches"] += 1
                    self._end.close()
            self._view.suspect(address)
            if self._view.sweep(8):
                self._kernel.seen["sweeps of views"] += 1
            yield self._process.sleep(rng.uniform(0.01, 0.3))

    def _begin(self, request: bytes, has_some: bool) -> None:
        near, far = self._node.network.connect(self._process, self._node.process)
        _Stream(self._node, far, request)
        reader = FrameReader()
        self._end = near
        is_first = True

        def on_data(data: bytes) -> None:
            nonlocal is_first
            for payload in reader.feed(data):
                watched = watched_from(parse(store_pb2.WatchResponse, payload))
                if is_first and has_some:
                    begins = "snapshot" if watched.snapshot_begins else "sequence"
                    self._kernel.seen[f"resyncs by {begins}"] += 1
                is_first = False
                if near.is_open:
                    self._take(near, watched)
            self._heard.set_result()

        def on_end() -> None:
            near.close()
            self._heard.set_result()

        near.on_data, near.on_end = on_data, on_end

    def _take(self, end: End, watched: Watched) -> None:
        address = self._node.node_id
        try:
            self._view.take(address, watched, self._kernel.now_s)
        except WatchAstray as error:
            raise Violation(f"a whole stream went astray: {error}") from error
        self._process.at(self._slow_until_s - self._kernel.now_s, lambda: end.send(b"+"))
        if not watched.in_sync:
            return
        self._kernel.seen["views in sync"] += 1
        told = self._node.told.get((watched.node_epoch, watched.sequence))
        if told is not None and self._view.blocks(address) != told:
            missing, extra = told - self._view.blocks(address), self._view.blocks(address) - told
            raise Violation(f"a view in sync lacks {sorted(missing)} and has {sorted(extra)}")


class _Stream:
    """The node's side of one Watch."""

    def __init__(self, node: SimNode, end: End, request: bytes) -> None:
        self._node = node
        self._end = end
        self._num_taken = self._num_sent = 0
        self._taken = Future()
        self._news = Future()
        end.on_data = self._on_taken
        end.on_end = self._on_end
        message = watch_request_from(parse(store_pb2.WatchRequest, request))

        def arrive() -> None:
            node.process.start(self._serve(message), "watch")

        node.process.at(node.network.delay_s(), arrive)

    def _on_taken(self, data: bytes) -> None:
        self._num_taken += len(data)
        self._taken.set_result()

    def _on_end(self) -> None:
        self._end.close()
        self._taken.set_result()
        self._news.set_result()

    def _on_news(self) -> None:
        self._news.set_result()

    def _serve(self, message: Any) -> Any:
        node, process = self._node, self._node.process
        subscription = node.state.watch(message, budget_nbytes=BUDGET_NBYTES)
        node.on_change[self._on_news] = None
        try:
            while self._end.is_open:
                self._news = Future()
                messages = subscription.next_messages()
                if not messages:
                    yield first_of(self._news, process.sleep(BEAT_S))
                    if not self._news.is_done:
                        messages = [subscription.beat()]
                for watched in messages:
                    self._note(watched)
                for watched in messages:
                    yield from self._send(watched)
                if messages and messages[-1].in_sync:
                    yield process.sleep(GAP_S)
        except WatcherTooSlow:
            node.kernel.seen["watchers dropped"] += 1
        finally:
            node.on_change.pop(self._on_news, None)
            self._end.close()

    def _note(self, watched: Watched) -> None:
        """What the node has at this moment, for the view that will say that it has the same."""
        if not watched.in_sync:
            return
        told = self._node.told
        told[watched.node_epoch, watched.sequence] = self._node.visible_blocks()
        while len(told) > 64:
            del told[next(iter(told))]

    def _send(self, watched: Watched) -> Any:
        process = self._node.process
        while self._end.is_open and self._num_sent - self._num_taken >= NUM_UNDER_WAY:
            self._taken = Future()
            yield first_of(self._taken, process.sleep(STALL_S))
            if not self._taken.is_done:
                raise WatcherTooSlow("the subscriber took nothing")
        self._num_sent += 1
        if self._node.kernel.is_traced:
            self._node.say(f"tells a watcher {watched}")
        self._end.send(frame(watched_to(watched).SerializeToString()))

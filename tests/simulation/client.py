"""A client process: the real `Conversation` and the real flows, over virtual connections.

Rules kept here: what the asyncio driver does around them (futures by call id, timers, giving back what came too late
or to nobody, renewing during a long copy, letting a piece that is under way land before it speaks again) is done here
in the same order. Bytes move in pieces that take time; a piece that has begun lands, however late its process is by
then.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from snowskin.kvstore.client.conversation import Conversation, giving_back, is_plain_release
from snowskin.kvstore.client.machine import Call, Done, FlowSettings, Move, Step, Tell
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.messages import Access, Lease, Matched, RenewRequest, ReplyMessage, Request
from snowskin.transport.errors import SnowskinError, TransferTimedOut
from tests.simulation.kernel import Cancelled, Future, Process, Violation
from tests.simulation.node import pushed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from snowskin.transport.memory import MemoryRegion
    from tests.simulation.network import Network
    from tests.simulation.node import Board, SimNode

GREETING_TIMEOUT_S = 2.0
TELL_TIMEOUT_S = 1.0
MAX_PIECE_S = 0.0002


class DoorLink:
    """A session on a node's local door."""

    def __init__(self, process: Process, node: SimNode) -> None:
        self.is_open = False
        self.node_epoch = 0
        self._process = process
        self._kernel = process.kernel
        self._node = node
        self._conversation = Conversation()
        self._waiting: dict[int, Future] = {}
        self._greeted = Future()
        self._under_way: dict[Future, Callable[[], None]] = {}  # pieces, and how they land

    def open(self) -> Any:
        """Connects and greets."""
        self._end = self._node.accept(self._process)
        self._memory, self._boards = self._node.memory, self._node.boards
        self._end.on_data, self._end.on_end = self._on_data, self._on_end
        self.is_open = True
        self._end.send(self._conversation.hello(self._process.name, Access.WRITE))
        timer = self._process.at(GREETING_TIMEOUT_S, self._greeted.set_result, is_io=False)
        try:
            yield self._greeted
        except BaseException:
            self._break("not wanted any more")
            raise
        finally:
            timer.cancel()
        greeting = self._conversation.greeting
        if greeting is None or not self.is_open:
            self._break("not greeted")
            raise NodeUnavailable(f"node {self._node.node_id} did not greet")
        self.node_epoch = greeting.node_epoch
        self._session_id = greeting.session_id
        self._board: Board = self._boards.get(greeting.session_id) or _no_board()

    def call(self, request: Request, timeout_s: float, lease: Lease | None = None) -> Any:
        call_id, data = self._conversation.call(request)
        future = self._waiting[call_id] = Future()
        timer = self._process.at(timeout_s, lambda: self._on_late(call_id), is_io=False)
        try:
            self._send(data)
            return (yield future)
        except BaseException:
            if future.is_done and future.error is None:
                self._kernel.seen["answers of the moment of a cancellation"] += 1
                self._give_back(future.result)
            raise
        finally:
            timer.cancel()
            self._waiting.pop(call_id, None)
            if (unwanted := self._conversation.forget(call_id)) and self.is_open:
                self._send(unwanted)

    def tell(self, request: Request, lease: Lease) -> None:
        if self.is_open and self._process.is_alive and is_plain_release(request):
            if self._board.post(lease.id):
                return
            self._kernel.seen["full boards"] += 1
        self._send(self._conversation.tell(request))

    def move(self, step: Move) -> Any:
        rng = self._kernel.rng
        deadline_s = self._kernel.now_s + step.timeout_s
        piece_nbytes = rng.choice((512, 1024, 4096))
        slowness = 1.0 if rng.random() < 0.8 else 200.0
        for _, runs in step.runs:
            for remote, local, nbytes in runs:
                for start in range(0, nbytes, piece_nbytes):
                    length = min(piece_nbytes, nbytes - start)
                    if self._kernel.now_s >= deadline_s:
                        raise TransferTimedOut("the copy took too long")
                    if not self.is_open:
                        raise NodeUnavailable("the connection ended during a copy")
                    yield from self._piece(
                        step, remote + start, local + start, length, rng.random() * slowness
                    )

    def _piece(self, step: Move, remote: int, local: int, nbytes: int, share: float) -> Any:
        """Whatever comes meanwhile, it lands; only then is anything else done."""
        lands = self._process.sleep(share * MAX_PIECE_S)
        self._under_way[lands] = lambda: self._land(step, remote, local, nbytes)
        self._kernel.on_copy(self._process)
        cancelled: Cancelled | None = None
        while not lands.is_done:
            try:
                yield lands
            except Cancelled as error:
                cancelled = error
        land = self._under_way.pop(lands, None)
        if land is None:  # unmapping the pools waited for this piece: it landed before the end
            raise cancelled or NodeUnavailable("the connection ended during a copy")
        land()
        if step.landed is not None:
            step.landed(local, nbytes)
        if cancelled is not None:
            raise cancelled

    def _land(self, step: Move, remote: int, local: int, nbytes: int) -> None:
        buffer = step.local.buffer
        if step.is_push:
            data = buffer[local : local + nbytes].tobytes()
            self._memory.write(self._session_id, remote, data)
        else:
            data = self._memory.read(remote, nbytes)
            buffer[local : local + nbytes] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        self._break("closed by this side")

    def _send(self, data: bytes) -> None:
        if not self.is_open:
            raise NodeUnavailable("the connection is broken")
        self._end.send(data)

    def _on_data(self, data: bytes) -> None:
        try:
            answers, replies = self._conversation.receive(data)
            for reply in replies:
                self._kernel.seen["answers that came too late"] += 1
                self._send(reply)
        except SnowskinError as error:
            raise Violation(f"a node said what its client cannot read: {error}") from error
        if self._conversation.greeting is not None:
            self._greeted.set_result()
        for call_id, answer in answers:
            self._resolve(call_id, answer)

    def _on_end(self) -> None:
        self._kernel.seen["connections ended by the other side"] += 1
        self._break("the node closed")

    def _resolve(self, call_id: int, answer: ReplyMessage | SnowskinError) -> None:
        future = self._waiting.pop(call_id, None)
        if future is None or future.is_done:
            self._give_back(answer)
        elif isinstance(answer, SnowskinError):
            future.set_error(answer)
        else:
            future.set_result(answer)

    def _give_back(self, answer: object) -> None:
        unwanted = giving_back(answer)
        if unwanted is not None and self.is_open:
            self._send(self._conversation.tell(unwanted))

    def _on_late(self, call_id: int) -> None:
        self._kernel.seen["calls past their deadline"] += 1
        self._resolve(call_id, DeadlineExceeded("the node did not answer in time"))

    def _break(self, reason: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        for land in self._under_way.values():
            land()
        self._under_way.clear()
        self._end.close()
        self._greeted.set_result()
        for call_id in list(self._waiting):
            self._resolve(call_id, NodeUnavailable(f"the connection ended: {reason}"))


class RpcLink:
    """A way to a node by gRPC; it has no state but its address."""

    def __init__(self, process: Process, node: SimNode, network: Network) -> None:
        self.is_open = True
        self.node_epoch = node.epoch
        self._process = process
        self._node = node
        self._network = network

    def call(self, request: Request, timeout_s: float, lease: Lease | None = None) -> Any:
        node, process = self._node, self._process
        capability = lease.capability if lease else None
        name = type(request).__name__
        return (
            yield from self._ask(
                lambda: node.serve_call(process, request, capability), timeout_s, name
            )
        )

    def tell(self, request: Request, lease: Lease) -> None:
        if self._process.is_alive and self.is_open:
            self._process.start(self._told(request, lease), "tell")

    def _told(self, request: Request, lease: Lease) -> Any:
        try:
            yield from self.call(request, TELL_TIMEOUT_S, lease)
        except SnowskinError:
            return

    def move(self, step: Move) -> Any:
        node, lease = self._node, step.lease
        if step.is_push:
            data, name = pushed(step), self._process.name
            self._land(step, data)
            yield from self._ask(
                lambda: node.serve_write(lease, name, data), step.timeout_s, "Write"
            )
            return
        data = yield from self._ask(lambda: node.serve_read(lease), step.timeout_s, "Read")
        self._land(step, data)

    def _land(self, step: Move, data: bytes) -> None:
        done = 0
        for _, runs in step.runs:
            for _, local, nbytes in runs:
                if not step.is_push:
                    piece = np.frombuffer(data[done : done + nbytes], np.uint8)
                    step.local.buffer[local : local + nbytes] = piece
                if step.landed is not None:
                    step.landed(local, nbytes)
                done += nbytes

    def _ask(self, serve: Callable[[], Any], timeout_s: float, name: str) -> Any:
        if not self.is_open:
            raise NodeUnavailable("the channel was closed")
        node = self._node
        return (
            yield from self._network.call(
                self._process, lambda: node.process, serve, timeout_s=timeout_s, name=name
            )
        )

    def close(self) -> None:
        self.is_open = False


class StoreSession:
    """Runs flows over a link, as `StoreClient` does."""

    def __init__(self, process: Process, link: DoorLink | RpcLink, settings: FlowSettings) -> None:
        self.process = process
        self.link = link
        self.settings = settings

    def run(self, flow: Generator[Step, Done, Any], note: dict[str, float] | None = None) -> Any:
        """The flow's result. `note["leased_until_s"]` is when what it read was no longer promised."""
        try:
            step = next(flow)
            while True:
                try:
                    done = yield from self._do(step)
                except BaseException as error:  # noqa: BLE001  the flow gives back what it holds, and raises it
                    step = flow.throw(error)
                else:
                    if note is not None and isinstance(done.reply, Matched) and done.reply.lease:
                        note["leased_until_s"] = done.began_at_s + done.reply.lease.ttl_s
                    step = flow.send(done)
        except StopIteration as end:
            return end.value

    def _do(self, step: Step) -> Any:
        kernel = self.process.kernel
        began_at_s = kernel.now_s
        reply: ReplyMessage | None = None
        match step:
            case Call(request=request, timeout_s=timeout_s, lease=lease):
                reply = yield from self.link.call(request, timeout_s, lease)
            case Move():
                yield from self._move(step)
            case Tell(request=request, lease=lease):
                with contextlib.suppress(NodeUnavailable):
                    self.link.tell(request, lease)
        return Done(reply, began_at_s, kernel.now_s)

    def _move(self, step: Move) -> Any:
        every_s = step.lease.ttl_s / 3
        if step.timeout_s <= every_s:
            yield from self.link.move(step)
            return
        renewing = self.process.start(self._keep_alive(step.lease, every_s), "renewing")
        try:
            yield from self.link.move(step)
        finally:
            renewing.cancel()

    def _keep_alive(self, lease: Lease, every_s: float) -> Any:
        while True:
            yield self.process.sleep(every_s)
            try:
                yield from self.link.call(
                    RenewRequest(lease_ids=(lease.id,), ttl_s=lease.ttl_s),
                    self.settings.call_timeout_s,
                    lease,
                )
            except SnowskinError:
                return


def local_memory(num_blocks: int, block_nbytes: int) -> MemoryRegion:
    """Memory of a client's own, as flows want it."""
    buffer = np.zeros(num_blocks * block_nbytes, np.uint8)
    return cast("MemoryRegion", SimpleNamespace(buffer=buffer))


def _no_board() -> Any:
    return SimpleNamespace(post=lambda _: False)

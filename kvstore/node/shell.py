"""Runs the node's state machine on an event loop: brings it the time, carries its effects out.

Rules kept here: one loop, one thread, so no lock; an answer goes to the door whose session asked, or nowhere if that
session is gone; one timer is armed, for the next thing that can run out.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from snowskin.kvstore.messages import (
    Effect,
    Fail,
    Greeting,
    LeaseId,
    NodeStat,
    PoolGrant,
    ReleaseRequest,
    Reply,
    ReplyMessage,
    Request,
    ReserveRequest,
    SessionId,
    StatRequest,
)
from snowskin.kvstore.node.data_plane import DataPlane
from snowskin.kvstore.release_board import ReleaseBoard, make_descriptor
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.memory import Memfd, MemoryRegion
from snowskin.transport.shm import ShmTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.kvstore.admin_messages import Evicted, LeaseInfo
    from snowskin.kvstore.clock import Clock
    from snowskin.kvstore.node.state import NodeState
    from snowskin.kvstore.pool.arena import Arena
    from snowskin.kvstore.session import Session
    from snowskin.transport.api import Transport
    from snowskin.transport.descriptor import RegionDescriptor
    from snowskin.transport.errors import SnowskinError
    from snowskin.transport.lending import Lending

Answer = Callable[[int, "ReplyMessage | SnowskinError"], None]
"""Called as `answer(call_id, reply or error)`."""

# While somebody waits for room, what readers leave on their boards is looked for this often.
BOARD_LOOK_S = 0.002

log = get_logger(__name__)


class NodeShell:
    """A node's state with its memory, clock and sessions' ways back.

    Attributes:
        data_plane: what sessions that map no memory pull from and push to.
    """

    def __init__(
        self,
        state: NodeState,
        arenas: dict[int, Arena],
        clock: Clock,
        transports: Sequence[Transport] = (),
    ) -> None:
        """Owns `arenas` (by pool id) and the data plane's `transports`, and closes them."""
        self.state = state
        self.arenas = arenas
        self.clock = clock
        self._answers: dict[SessionId, Answer] = {}
        self._brief: set[SessionId] = set()
        self._boards: dict[SessionId, ReleaseBoard] = {}
        self._mapped: dict[SessionId, list[RegionDescriptor]] = {}
        self._watchers: list[Callable[[], None]] = []
        self._num_told = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0
        self._transport = ShmTransport()
        self._regions = {pool_id: self._register(arena) for pool_id, arena in arenas.items()}
        self.data_plane = DataPlane(transports, arenas, epoch=state.epoch)
        state.settle_leases_by(self._read_boards)
        state.keep_grants_by(self.data_plane)
        state.transports = self.data_plane.schemes

    def open_session(
        self,
        client_name: str,
        answer: Answer,
        *,
        maps_memory: bool,
        may_write: bool = True,
        is_brief: bool = False,
    ) -> Session:
        """A client connected; its answers go to `answer`. Brief sessions, of one lease or so, are not logged."""
        session = self.state.open_session(client_name, maps_memory=maps_memory, may_write=may_write)
        self._answers[session.id] = answer
        if is_brief:
            self._brief.add(session.id)
        else:
            log.info("session opened", session=session.id, client=client_name, maps=maps_memory)
        return session

    def end_session(self, session: Session) -> None:
        """A client is gone."""
        if self._answers.pop(session.id, None) is None:
            return
        self._close_board(session)
        for descriptor in self._mapped.pop(session.id, ()):
            self._transport.revoke(descriptor)
        if session.id in self._brief:
            self._brief.remove(session.id)
        else:
            log.info("session ended", session=session.id, client=session.client_name)
        self._carry_out(self.state.end_session(session.id, self.clock.now_s()))

    def fence_session(self, session: Session) -> bool:
        """A client is cut off that may live, and asks nothing more.

        Returns:
            Whether it keeps room that its stores may still land in: then its session goes on until `end_session`,
            which must come when it has closed. Otherwise the session has ended.
        """
        self._close_board(session)
        self._carry_out(self.state.fence_session(session.id, self.clock.now_s()))
        if self.state.holds_nothing(session.id):
            self.end_session(session)
            return False
        log.warning("session fenced", session=session.id, client=session.client_name)
        return True

    def request(self, session_id: SessionId, call_id: int, request: Request) -> None:
        """One call; its answer comes by the session's `answer`, now or later."""
        now_s = self.clock.now_s()
        if isinstance(request, ReserveRequest | StatRequest) or (
            # One that was read must not be matched again.
            self.state.residence.num_for_one_reader
        ):
            self._read_boards(now_s)
        self._carry_out(self.state.on_request(session_id, call_id, request, now_s))
        # The answer is out; the rest is done while its reader works.
        self.state.residence.note_touches()
        if (board := self._boards.get(session_id)) is not None:
            self._read_board(session_id, board, now_s)

    def open_board(self, session: Session) -> int:
        """The descriptor of a new release board of this session; the caller closes it."""
        descriptor = make_descriptor()
        self._boards[session.id] = ReleaseBoard(descriptor)
        return descriptor

    def stat(self) -> NodeStat:
        """Counts and sizes, what readers left on their boards included."""
        self._read_boards(self.clock.now_s())
        return self.state.stat()

    def is_idle(self) -> bool:
        """Whether no lease is out."""
        self._read_boards(self.clock.now_s())
        return self.state.is_idle()

    def cancel(self, session_id: SessionId, call_id: int) -> None:
        """Nobody waits for this call any more."""
        self._carry_out(self.state.cancel(session_id, call_id, self.clock.now_s()))

    def drain(self) -> None:
        """Grants no new leases from now on."""
        self._carry_out(self.state.drain())
        for wake in self._watchers:
            wake()

    def revoke_lease(self, lease_id: LeaseId) -> LeaseInfo:
        """Ends a lease's life; LeaseUnknown where there is none."""
        now_s = self.settled_now_s()
        info, effects = self.state.revoke_lease(lease_id, now_s)
        self._carry_out(effects)
        return info

    def evict(
        self, namespaces: Sequence[bytes], keys: Sequence[bytes], *, dry_run: bool
    ) -> Evicted:
        """Takes blocks out that nobody holds, or only counts them."""
        evicted, effects = self.state.evict(namespaces, keys, self.settled_now_s(), dry_run=dry_run)
        self._carry_out(effects)
        return evicted

    def settled_now_s(self) -> float:
        """The time now, with all that readers left on their boards taken in."""
        now_s = self.clock.now_s()
        self._read_boards(now_s)
        return now_s

    def on_change(self, wake: Callable[[], None]) -> None:
        """Calls `wake` after every event in which a block became visible or went, and at a drain."""
        self._watchers.append(wake)

    def no_change_for(self, wake: Callable[[], None]) -> None:
        """Ends what `on_change` began."""
        self._watchers.remove(wake)

    def greeting(self, session: Session) -> Greeting:
        """What a session on the local door is told; the descriptors go beside it, in the same order."""
        limits = self.state.limits
        pools = self.state.residence.pools
        return Greeting(
            node_id=self.state.node_id,
            node_epoch=self.state.epoch,
            session_id=session.id,
            max_keys=limits.max_keys,
            max_extent_nbytes=limits.max_extent_nbytes,
            pools=tuple(
                PoolGrant(
                    pool_id=pool_id,
                    tier=pools[pool_id].tier,
                    nbytes=arena.nbytes,
                    region=self._describe(session, pool_id).to_bytes(),
                )
                for pool_id, arena in self.arenas.items()
                if pools[pool_id].tenant == session.tenant
            ),
        )

    def pages(self) -> tuple[tuple[str, str], ...]:
        """On what pages each pool lies, for people."""
        return tuple(
            (f"pages of pool {pool_id}", str(arena.page_use() or "not known"))
            for pool_id, arena in self.arenas.items()
        )

    def lendings(self) -> dict[int, Lending]:
        """Of each pool whose pages are lent to sockets."""
        return {
            pool_id: arena.lending
            for pool_id, arena in self.arenas.items()
            if arena.lending is not None
        }

    def close(self) -> None:
        """Stops the timer and frees the memory; idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for board in self._boards.values():
            board.close()
        self._boards.clear()
        self.data_plane.close()
        for region in self._regions.values():
            region.close()
        self._transport.close()
        for arena in self.arenas.values():
            arena.close()

    def _close_board(self, session: Session) -> None:
        if (board := self._boards.pop(session.id, None)) is not None:
            board.close()

    def _register(self, arena: Arena) -> MemoryRegion:
        descriptor = arena.open_read_write()
        try:
            return self._transport.register(Memfd(fd=descriptor))
        finally:
            os.close(descriptor)

    def _describe(self, session: Session, pool_id: int) -> RegionDescriptor:
        """What a session on the local door maps, until it ends."""
        descriptor = self._transport.describe(
            self._regions[pool_id], writable=session.may_write, epoch=self.state.epoch
        )
        self._mapped.setdefault(session.id, []).append(descriptor)
        return descriptor

    def _read_boards(self, now_s: float) -> None:
        for session_id, board in list(self._boards.items()):
            self._read_board(session_id, board, now_s)

    def _read_board(self, session_id: SessionId, board: ReleaseBoard, now_s: float) -> None:
        if released := board.take():
            request = ReleaseRequest(lease_ids=tuple(LeaseId(number) for number in released))
            # Its own answer (call 0) nobody wants; what else comes of it are calls that waited for the room.
            _, *served = self.state.on_request(session_id, 0, request, now_s)
            if served:
                self._carry_out(served)

    def _tell_watchers(self) -> None:
        num_noted = sum(events.num_noted for events in self.state.residence.events.values())
        if num_noted != self._num_told:
            self._num_told = num_noted
            for wake in self._watchers:
                wake()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            answer = self._answers.get(effect.session_id)
            if answer is None:
                continue
            match effect:
                case Reply(call_id=call_id, message=message):
                    answer(call_id, message)
                case Fail(call_id=call_id, error=error):
                    answer(call_id, error)
        if self._watchers:
            self._tell_watchers()
        self._arm_timer()

    def _arm_timer(self) -> None:
        due_s = self.state.next_time_s()
        if due_s is None:
            return
        if self._boards and self.state.has_waiting_reserves:
            due_s = min(due_s, self.clock.now_s() + BOARD_LOOK_S)
        if self._timer is not None:
            if self._timer_at_s <= due_s:
                return  # it will find this one later, and arm itself again
            self._timer.cancel()
        self._timer_at_s = due_s
        delay_s = max(0.0, due_s - self.clock.now_s())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self.clock.now_s()
        self._read_boards(now_s)  # what is released there must not be seen to run out
        self._carry_out(self.state.on_time(now_s))

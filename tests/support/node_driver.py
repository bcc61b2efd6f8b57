"""A node's state driven by hand: sessions, calls and time; the books are checked after every step.

Rules kept here: blocks are named by short texts, and every block has `BLOCK` bytes. Time moves only by `wait`, through
every moment at which the state asked to be called. No call is answered twice, nor one that was cancelled.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.eviction.registry import make_eviction
from snowskin.kvstore.messages import (
    Aborted,
    AbortRequest,
    CommitRequest,
    Committed,
    Complaint,
    Effect,
    LeaseId,
    Matched,
    MatchRequest,
    Probed,
    ProbeRequest,
    Released,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Reply,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
    SessionId,
    TailSpec,
)
from snowskin.kvstore.node.limits import NodeLimits
from snowskin.kvstore.node.state import NodeState
from snowskin.kvstore.pool.pool import Pool
from snowskin.kvstore.session import DEFAULT_TENANT, Session
from snowskin.kvstore.wire import EMPTY_KEYS
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BLOCK = 4096
NAMESPACE = b"N" * 32
OTHER_NAMESPACE = b"M" * 32

Answer = ReplyMessage | SnowskinError
ReplyT = TypeVar("ReplyT")


def key(name: str) -> bytes:
    """A block's key, readable in failures; no name, no key (as for a parent)."""
    return name.encode().ljust(32, b".") if name else b""


def column(names: str | Iterable[str]) -> KeyColumn:
    """Keys of the blocks named, e.g. `"a b c"`."""
    names = names.split() if isinstance(names, str) else names
    return KeyColumn.of([key(name) for name in names])


def record(name: str) -> bytes:
    """Four bytes that stand for the checksum of this block."""
    return name.encode()[:4].ljust(4, b"-")


class NodeDriver:
    """One `NodeState`, its clock, and who was answered what."""

    def __init__(
        self, *, blocks: int = 8, tenants: tuple[str, ...] = (DEFAULT_TENANT,), **limits: Any
    ) -> None:
        """A pool of `blocks` blocks for each tenant; no caps but those of `limits`."""
        pools = [Pool(i, blocks * BLOCK, tenant=tenant) for i, tenant in enumerate(tenants)]
        caps = ("max_leased_ratio", "max_client_leased_ratio", "max_quarantined_ratio")
        no_caps = dict.fromkeys(caps, 1.0)
        self.limits = NodeLimits(**(no_caps | limits))
        self.state = NodeState(
            node_id="n", epoch=7, pools=pools, eviction=make_eviction("lru"), limits=self.limits
        )
        self.now_s = 1000.0
        self.checks_books = True
        self.on_call: Callable[[Session, int, Request], None] | None = None
        self.on_answer: Callable[[SessionId, int, Answer], None] | None = None
        self.answers: dict[tuple[SessionId, int], Answer] = {}
        self._asked: set[tuple[SessionId, int]] = set()
        self._last_call_id = 0

    # --- steps

    def session(
        self,
        name: str = "writer",
        *,
        maps: bool = True,
        may_write: bool = True,
        tenant: str = DEFAULT_TENANT,
    ) -> Session:
        """A client connects."""
        return self.state.open_session(name, maps_memory=maps, may_write=may_write, tenant=tenant)

    def call(self, session: Session, request: Request) -> int:
        """One call; its answer, when it comes, is in `answers`."""
        self._last_call_id += 1
        call_id = self._last_call_id
        self._asked.add((session.id, call_id))
        if self.on_call is not None:
            self.on_call(session, call_id, request)
        self.take(self.state.on_request(session.id, call_id, request, self.now_s))
        return call_id

    def ask(self, session: Session, request: Request, kind: type[ReplyT]) -> ReplyT:
        """A call that is answered at once; raises the error that it is answered with."""
        answer = self.answer(session, self.call(session, request))
        if isinstance(answer, SnowskinError):
            raise answer
        assert isinstance(answer, kind), f"answered {answer}"
        return answer

    def answer(self, session: Session, call_id: int) -> Answer | None:
        """What the call was answered, None while it waits."""
        return self.answers.get((session.id, call_id))

    def cancel(self, session: Session, call_id: int) -> None:
        """The caller waits no more."""
        self._asked.discard((session.id, call_id))
        self.take(self.state.cancel(session.id, call_id, self.now_s))

    def end(self, session: Session) -> None:
        """The client is gone."""
        self._asked = {asked for asked in self._asked if asked[0] != session.id}
        self.take(self.state.end_session(session.id, self.now_s))

    def fence(self, session: Session) -> None:
        """The client is cut off, and lives."""
        self._asked = {asked for asked in self._asked if asked[0] != session.id}
        self.take(self.state.fence_session(session.id, self.now_s))

    def wait(self, seconds: float) -> None:
        """Time passes."""
        until_s = self.now_s + seconds
        while (due_s := self.state.next_time_s()) is not None and due_s <= until_s:
            assert due_s > self.now_s - 1e-9, "the state asks for a time that it was given already"
            self.now_s = max(self.now_s, due_s)
            self.take(self.state.on_time(self.now_s))
            later_s = self.state.next_time_s()
            assert later_s is None or later_s > self.now_s, "on_time left something due"
        self.now_s = until_s
        self.take(self.state.on_time(self.now_s))

    def take(self, effects: list[Effect]) -> None:
        """Files the answers and checks the books."""
        for effect in effects:
            asked = (effect.session_id, effect.call_id)
            assert asked in self._asked, f"call {asked} was answered, but nobody waits for it"
            self._asked.remove(asked)
            answer = effect.message if isinstance(effect, Reply) else effect.error
            self.answers[asked] = answer
            if self.on_answer is not None:
                self.on_answer(effect.session_id, effect.call_id, answer)
        if self.checks_books:
            self.check()

    def check(self) -> None:
        """The books agree."""
        self.state.check()
        for pool in self.state.stat().pools:
            used = pool.committed_nbytes + pool.reserved_nbytes + pool.quarantined_nbytes
            assert pool.free_nbytes + used == pool.capacity_nbytes

    # --- what clients say

    def reserve(
        self,
        session: Session,
        names: str,
        *,
        parent: str = "",
        namespace: bytes = NAMESPACE,
        one_reader: bool = False,
        ttl_s: float = 0.0,
    ) -> Reserved:
        """Room for these blocks, at once."""
        request = reserving(
            names, parent=parent, namespace=namespace, one_reader=one_reader, ttl_s=ttl_s
        )
        return self.ask(session, request, Reserved)

    def commit(self, session: Session, lease_id: LeaseId, names: str) -> Committed:
        """The next blocks of a reservation are written; raises what it is refused with."""
        names_ = names.split()
        request = CommitRequest(
            lease_id=lease_id,
            num_blocks=len(names_),
            checksums=b"".join(record(name) for name in names_),
        )
        return self.ask(session, request, Committed)

    def publish(
        self,
        session: Session,
        names: str,
        *,
        parent: str = "",
        namespace: bytes = NAMESPACE,
        one_reader: bool = False,
    ) -> Reserved:
        """Reserves and commits these blocks; all must be new."""
        reserved = self.reserve(
            session, names, parent=parent, namespace=namespace, one_reader=one_reader
        )
        self.commit(session, lease_of(reserved), names)
        return reserved

    def publish_tail(self, session: Session, request_id: str) -> Reserved:
        """Reserves and commits one tail of a block's length."""
        reserved = self.ask(session, reserving_tail(request_id), Reserved)
        self.commit(session, lease_of(reserved), request_id)
        return reserved

    def abort(self, session: Session, lease_id: LeaseId) -> Aborted:
        """The rest is given back."""
        return self.ask(session, AbortRequest(lease_id=lease_id), Aborted)

    def match(self, session: Session, names: str, *, ttl_s: float = 0.0) -> Matched:
        """The longest run, at once."""
        return self.ask(session, matching(names, ttl_s=ttl_s), Matched)

    def match_tail(self, session: Session, request_id: str) -> Matched:
        """The tail, at once."""
        return self.ask(session, matching_tail(request_id), Matched)

    def release(self, session: Session, *lease_ids: LeaseId, wrong: tuple[int, ...] = ()) -> int:
        """Ends leases, complaining of blocks of the first; how many were unknown."""
        complaints = (Complaint(lease_id=lease_ids[0], block_indices=wrong),) if wrong else ()
        request = ReleaseRequest(lease_ids=lease_ids, complaints=complaints)
        return self.ask(session, request, Released).num_unknown

    def renew(self, session: Session, *lease_ids: LeaseId, ttl_s: float = 0.0) -> tuple[float, ...]:
        """Lives from now on."""
        request = RenewRequest(lease_ids=lease_ids, ttl_s=ttl_s)
        return self.ask(session, request, Renewed).ttl_s

    def probe(self, session: Session, names: str, *, namespace: bytes = NAMESPACE) -> str:
        """Which blocks are here, one letter each: `x` here, `.` not."""
        request = ProbeRequest(namespaces=(namespace,), keys=column(names))
        bitmap = self.ask(session, request, Probed).present_bitmap
        return "".join(
            "x" if bitmap[i >> 3] >> (i & 7) & 1 else "." for i in range(len(names.split()))
        )

    def num_blocks(self, what: str, pool_id: int = 0) -> float:
        """How many blocks' bytes are `free`, `committed`, `reserved`, `quarantined` or `leased`."""
        nbytes: int = getattr(self.state.stat().pools[pool_id], f"{what}_nbytes")
        return nbytes / BLOCK

    def books(self) -> dict[str, float]:
        """Blocks by use, those that are not 0."""
        uses = ("free", "committed", "reserved", "quarantined")
        return dict(Counter({use: self.num_blocks(use) for use in uses}) + Counter())


def reserving(
    names: str,
    *,
    parent: str = "",
    namespace: bytes = NAMESPACE,
    block_nbytes: int = BLOCK,
    one_reader: bool = False,
    ttl_s: float = 0.0,
    timeout_s: float = 0.0,
) -> ReserveRequest:
    """A request for room."""
    return ReserveRequest(
        namespace=namespace,
        keys=column(names),
        parent_key=key(parent),
        block_nbytes=block_nbytes,
        one_reader=one_reader,
        ttl_s=ttl_s,
        timeout_s=timeout_s,
    )


def reserving_tail(
    request_id: str, *, nbytes: int = BLOCK, timeout_s: float = 0.0
) -> ReserveRequest:
    """A request for the room of a tail."""
    return ReserveRequest(
        namespace=NAMESPACE,
        keys=EMPTY_KEYS,
        tail=TailSpec(request_id=request_id, nbytes=nbytes),
        timeout_s=timeout_s,
    )


def matching(
    names: str,
    *,
    wait_blocks: int = 0,
    timeout_s: float = 0.0,
    max_blocks: int = 0,
    ttl_s: float = 0.0,
    namespaces: tuple[bytes, ...] = (NAMESPACE,),
) -> MatchRequest:
    """A request for a run."""
    return MatchRequest(
        namespaces=namespaces,
        keys=column(names),
        wait_blocks=wait_blocks,
        timeout_s=timeout_s,
        max_blocks=max_blocks,
        ttl_s=ttl_s,
    )


def matching_tail(request_id: str, *, timeout_s: float = 0.0) -> MatchRequest:
    """A request for a tail."""
    return MatchRequest(
        namespaces=(),
        keys=EMPTY_KEYS,
        tail_request_id=request_id,
        wait_blocks=1 if timeout_s else 0,
        timeout_s=timeout_s,
    )


def lease_of(answer: Reserved | Matched) -> LeaseId:
    """The lease that came."""
    assert answer.lease is not None, "no lease was granted"
    return answer.lease.id


def ranges(answer: Reserved | Matched) -> list[tuple[int, int]]:
    """(first byte, last byte + 1) of each run."""
    return [(run.extent.offset, run.extent.offset + run.extent.nbytes) for run in answer.runs]

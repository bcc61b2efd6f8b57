"""Sessions of gRPC callers: one for each client that holds anything, so that caps and queues count it by itself.

Rules kept here: who names itself (`x-snowskin-client`) is one client of its host, over however many connections; who
does not is one by connection. What holds nothing (a probe, a stat) makes no session. A call about a lease belongs to
the session that holds the lease, whoever makes it: the lease's capability is the right to it. A session is there for
as long as it holds anything: a lease, a place in a queue, blocks that wait for their one reader. There is a bound on
them; beyond it newcomers are refused.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.errors import LimitExceeded
from snowskin.kvstore.rpc import CLIENT_HEADER

if TYPE_CHECKING:
    import grpc.aio

    from snowskin.kvstore.messages import LeaseId, SessionId
    from snowskin.kvstore.node.shell import Answer, NodeShell
    from snowskin.kvstore.session import Session

MAX_PEERS = 256
MAX_NAME = 64
# How soon a session ends whose last lease ran out by itself; where a call ends it, that is at once.
LOOK_S = 1.0

PeerKey = tuple[str, str]
"""Name (may be empty) and address of a caller."""


class PeerSessions:
    """Who calls by gRPC."""

    def __init__(self, shell: NodeShell, answer: Answer, *, max_peers: int = MAX_PEERS) -> None:
        """Opens the session that stands for all who hold nothing.

        Args:
            shell: of the node.
            answer: where the answers of all of them go.
            max_peers: how many there may be.
        """
        self._shell = shell
        self._answer = answer
        self._max_peers = max_peers
        self._common = shell.open_session("grpc", answer, maps_memory=False)
        self._sessions: dict[PeerKey, Session] = {}
        self._keys: dict[SessionId, PeerKey] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Clients that hold anything."""
        return len(self._sessions)

    @property
    def common(self) -> SessionId:
        """For calls that hold nothing."""
        return self._common.id

    def caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> SessionId:
        """The session of who calls now, for a call that may lease something; `done` follows.

        Raises:
            LimitExceeded: it has none, and there are as many as may be.
        """
        key = _key_of(context)
        session = self._sessions.get(key)
        if session is None:
            self._check_room()
            name, address = key
            session = self._shell.open_session(
                name or address, self._answer, maps_memory=False, is_brief=True
            )
            self._sessions[key] = session
            self._keys[session.id] = key
            self._arm_timer()
        return session.id

    def holder(self, lease_id: LeaseId) -> SessionId:
        """The session that a call about this lease belongs to."""
        return self._shell.state.holder_of(lease_id) or self.common

    def done(self) -> None:
        """A call is over: the sessions that hold nothing any more end; a read tail may have been another one's."""
        for session_id, key in list(self._keys.items()):
            if self._shell.state.holds_nothing(session_id):
                del self._keys[session_id]
                self._shell.end_session(self._sessions.pop(key))

    def close(self) -> None:
        """Ends all of them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for session in self._sessions.values():
            self._shell.end_session(session)
        self._sessions.clear()
        self._keys.clear()
        self._shell.end_session(self._common)

    def _check_room(self) -> None:
        if len(self._sessions) < self._max_peers:
            return
        self.done()
        if len(self._sessions) >= self._max_peers:
            raise LimitExceeded(
                f"{len(self._sessions)} clients hold leases by gRPC, which is as many as may",
                hint="come back later, or use the local door",
                retry_after_s=self._shell.state.limits.read_lease_s,
            )

    def _arm_timer(self) -> None:
        if self._timer is None and self._sessions:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.done()
        self._arm_timer()


def _key_of(context: grpc.aio.ServicerContext[Any, Any]) -> PeerKey:
    """Who calls; gRPC says `ipv4:10.0.0.7:51234`, or `ipv6:%5B::1%5D:51234`."""
    metadata = dict(context.invocation_metadata() or ())
    said = metadata.get(CLIENT_HEADER, "")
    name = said[:MAX_NAME] if isinstance(said, str) else ""
    address = context.peer()
    return (name, address.rpartition(":")[0]) if name else ("", address)

"""Sessions: one client's connection to a node.

Rules kept here: everything a client holds belongs to its session, and ends with it. A session on the local door maps
the pools, so its stores can land at any time until it ends; a session of the gRPC door cannot reach memory by itself,
on the data plane neither: so its leases need no grace, and what it leaves no quarantine. The tenant is set by the
door, from the credential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.kvstore.messages import SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One client."""

    id: SessionId
    client_name: str
    tenant: str = DEFAULT_TENANT
    maps_memory: bool
    may_write: bool = True


class SessionTable:
    """The open sessions of one node."""

    def __init__(self) -> None:
        """Empty."""
        self._sessions: dict[SessionId, Session] = {}
        self._last_id = 0

    def __len__(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """All of them."""
        return iter(self._sessions.values())

    def open(
        self, client_name: str, *, tenant: str = DEFAULT_TENANT, maps_memory: bool, may_write: bool
    ) -> Session:
        """A new session; ids are never used twice within one epoch of the node."""
        self._last_id += 1
        session = Session(
            id=SessionId(self._last_id),
            client_name=client_name,
            tenant=tenant,
            maps_memory=maps_memory,
            may_write=may_write,
        )
        self._sessions[session.id] = session
        return session

    def get(self, session_id: SessionId) -> Session | None:
        """The session, while it is open."""
        return self._sessions.get(session_id)

    def end(self, session_id: SessionId) -> Session | None:
        """Takes it out; None where it had ended before."""
        return self._sessions.pop(session_id, None)

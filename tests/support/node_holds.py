"""What sessions of the node's model hold, and wait for, as they know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snowskin.kvstore.messages import LeaseId, Request
    from snowskin.kvstore.session import Session

Name = tuple[bytes, bytes]
"""Namespace (empty for a tail) and key of a block."""
Place = tuple[int, int]
"""First byte and number of bytes."""


@dataclass(eq=False)
class Written:
    """A write lease as its holder knows it."""

    id: LeaseId
    session: Session
    names: list[Name]
    key_indices: list[int]
    places: list[Place]
    expires_at_s: float
    granted_at_s: float
    is_over: bool = False
    pins: list[Name] = field(default_factory=list)  # at most: what it named, and was here

    def is_protected(self, now_s: float, grace_s: float) -> bool:
        """Whether its bytes may be given to nobody else."""
        if self.is_over or not self.places:
            return False
        return self.session.maps_memory or now_s < self.expires_at_s


@dataclass(eq=False)
class Read:
    """A read lease as its holder knows it, and the tokens that it was promised."""

    id: LeaseId
    session: Session
    names: list[Name]
    promised: list[tuple[Place, int]]
    expires_at_s: float
    granted_at_s: float
    is_over: bool = False
    new_to_client: set[Place] = field(default_factory=set)
    new_to_all: set[Place] = field(default_factory=set)

    def is_protected(self, now_s: float, grace_s: float) -> bool:
        """Whether its bytes must not change; of who reaches none by itself, for as long as it is served."""
        if not self.session.maps_memory:
            grace_s = 0.0
        return not self.is_over and now_s < self.expires_at_s + grace_s


@dataclass(eq=False)
class Waiting:
    """A call that is not answered yet."""

    session: Session
    call_id: int
    request: Request
    asked_at_s: float

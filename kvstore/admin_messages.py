"""What a node tells an operator of its blocks, leases and transports: frozen values.

Rules kept here: nothing in this file knows protobuf, sockets or clocks. Times are relative seconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from snowskin.kvstore.value import value

if TYPE_CHECKING:
    from snowskin.kvstore.extent import Extent
    from snowskin.kvstore.messages import LeaseId
    from snowskin.transport.choice import TransportProbe
    from snowskin.transport.topology import HostFacts

BlockName = tuple[bytes, bytes]
"""Namespace and key."""


class LeaseKind(StrEnum):
    """Whose lease it is."""

    READ = "read"
    WRITE = "write"


class LeaseState(StrEnum):
    """Where a lease is in its life."""

    ACTIVE = "active"
    GRACE = "grace"
    QUARANTINED = "quarantined"


@value()
class BlockInfo:
    """One visible block.

    Attributes:
        parent_key: empty at the start of a sequence, or where the writer named none.
        num_children: blocks here that name it as their parent; those for one reader are not counted.
        num_read_leases: over its segment, that is over it or a block that was placed with it: while there is one,
            it is not evicted.
        age_s: since it was committed.
        idle_s: since it, or a block that was placed with it, was matched last, or since it was committed.
        one_reader: it goes with its first reader.
    """

    namespace: bytes
    key: bytes
    extent: Extent
    parent_key: bytes
    num_children: int
    num_read_leases: int
    age_s: float
    idle_s: float
    one_reader: bool


@value()
class LeaseInfo:
    """One lease.

    Attributes:
        client: name of the session that holds it.
        age_s: since it was granted.
        seconds_left: until its state ends, if it is not prolonged; 0 where only the end of its session ends it.
        num_blocks, nbytes: what it reads, or has not committed yet.
    """

    id: LeaseId
    kind: LeaseKind
    state: LeaseState
    client: str
    age_s: float
    seconds_left: float
    num_blocks: int
    nbytes: int


@value()
class ShownBlock:
    """Everything about one block: its checksum's record, and the leases over its segment."""

    block: BlockInfo
    checksum: bytes
    leases: tuple[LeaseInfo, ...]


@value()
class BlockPage:
    """Some blocks, and what asks for the next ones; empty where these were the last."""

    blocks: tuple[BlockInfo, ...]
    next_page_token: bytes = b""


@value()
class LeasePage:
    """Some leases, and what asks for the next ones; empty where these were the last."""

    leases: tuple[LeaseInfo, ...]
    next_page_token: bytes = b""


@value()
class Evicted:
    """What an operator's eviction took out, or would take out.

    Attributes:
        num_held: blocks that stay: somebody reads them, a writer builds on them, or their one reader is to come.
        num_unknown: keys asked for that are not here.
    """

    num_blocks: int = 0
    nbytes: int = 0
    num_held: int = 0
    num_unknown: int = 0

    def plus(self, other: Evicted) -> Evicted:
        """Both together."""
        return Evicted(
            num_blocks=self.num_blocks + other.num_blocks,
            nbytes=self.nbytes + other.nbytes,
            num_held=self.num_held + other.num_held,
            num_unknown=self.num_unknown + other.num_unknown,
        )


@value()
class Drained:
    """What a draining node still serves."""

    num_read_leases: int
    num_write_leases: int


@value()
class ListedTransport:
    """One scheme of a node.

    Attributes:
        probe: what trying it at the node's start showed.
        bound, advertised: addresses where it listens, and that peers are told.
        is_open: it serves; without that there are no counters.
        counters: its statistics by name, since it was opened.
    """

    probe: TransportProbe
    bound: tuple[str, ...] = ()
    advertised: tuple[str, ...] = ()
    is_open: bool = False
    counters: tuple[tuple[str, int], ...] = ()


@value()
class TransportsReport:
    """How a node's memory can be reached.

    Attributes:
        advertisement: as peers get it; empty where the node tells nothing.
        host: when the node started.
        door: its local door, `unix:/path`; may be empty.
    """

    transports: tuple[ListedTransport, ...]
    advertisement: bytes
    host: HostFacts
    door: str = ""

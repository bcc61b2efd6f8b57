"""What an operator is told of a node's blocks and leases, and may take away.

Rules kept here: looking changes nothing, no recency either. A page is found a piece at a time, so that a node with a
million blocks answers others in between. A lease that is revoked is over as if its time had run out: a reader keeps
its grace, if it can read by itself; a writer who maps memory is fenced at once, which is as safe as later, and tells
those who wait for its blocks. What somebody reads, builds on, or is to come for as its one reader, is not evicted.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from snowskin.kvstore.admin_messages import (
    BlockInfo,
    Evicted,
    LeaseInfo,
    LeaseKind,
    LeaseState,
    ShownBlock,
)
from snowskin.kvstore.errors import LeaseUnknown
from snowskin.kvstore.node.residence import TAIL_NAMESPACE
from snowskin.kvstore.node.writing import Outcome
from snowskin.kvstore.pool.pool import Use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snowskin.kvstore.admin_messages import BlockName
    from snowskin.kvstore.index.block_index import BlockEntry, BlockIndex, PlacedSegment
    from snowskin.kvstore.lease import GrantedLease
    from snowskin.kvstore.messages import LeaseId, SessionId
    from snowskin.kvstore.node.reading import ReadHold, Reading
    from snowskin.kvstore.node.residence import Residence
    from snowskin.kvstore.node.writing import WriteLease, Writing
    from snowskin.kvstore.session import SessionTable

PIECE_KEYS = 4096
"""Keys that one step looks at: a fraction of a millisecond."""


class BlockListing:
    """Names of the next visible blocks behind a place, by namespace, then key; `step` until there is no more to do."""

    def __init__(
        self,
        index: BlockIndex,
        tenant: str,
        *,
        namespace: bytes,
        key_prefix: bytes,
        is_wanted: Callable[[BlockEntry], bool] | None,
        behind: BlockName | None,
        limit: int,
    ) -> None:
        """Nothing looked at yet.

        Args:
            index: where the blocks are.
            tenant: whose.
            namespace: only this one; empty means all.
            key_prefix: only keys that begin so.
            is_wanted: only these; None means all.
            behind: the last block that was told before; None begins.
            limit: blocks at most.
        """
        self.found: list[BlockName] = []
        self._index = index
        self._tenant = tenant
        self._key_prefix = key_prefix
        self._is_wanted = is_wanted
        self._behind = behind or (b"", b"")
        self._limit = limit
        self._namespaces = [
            name
            for name in reversed(shards(index, tenant))
            if namespace in (b"", name) and name >= self._behind[0]
        ]
        self._namespace = b""
        self._blocks: dict[bytes, BlockEntry] = {}
        self._keys: list[bytes] = []
        self._best: list[bytes] = []

    def step(self) -> bool:
        """Looks at some more keys; whether there are more to look at."""
        if self._keys:
            piece = self._keys[-PIECE_KEYS:]
            del self._keys[-PIECE_KEYS:]
            room = self._limit - len(self.found)
            self._best = heapq.nsmallest(room, [*self._best, *self._wanted(piece, room)])
            return True
        self.found += [(self._namespace, key) for key in self._best]
        self._best = []
        if not self._namespaces or len(self.found) >= self._limit:
            return False
        self._namespace = self._namespaces.pop()
        scope = self._index.scope(self._tenant, self._namespace)
        self._blocks = scope.blocks if scope else {}
        self._keys = list(self._blocks)  # as a snapshot of `events` does, and for the same reason
        return True

    def _wanted(self, keys: list[bytes], room: int) -> Iterator[bytes]:
        namespace, last_key = self._behind
        floor = last_key if namespace == self._namespace else b""
        worst = self._best[-1] if len(self._best) >= room else None
        for key in keys:
            if key <= floor or (worst is not None and key > worst):
                continue
            if not key.startswith(self._key_prefix):
                continue
            if self._is_wanted is not None:
                entry = self._blocks.get(key)
                if entry is None or not self._is_wanted(entry):
                    continue
            yield key


def shards(index: BlockIndex, tenant: str) -> list[bytes]:
    """Namespaces of the tenant's visible blocks, in order; that of the tails is none."""
    return [name for name in index.namespaces(tenant) if name != TAIL_NAMESPACE]


class Inspection:
    """One node as its operator sees it."""

    def __init__(
        self,
        residence: Residence,
        sessions: SessionTable,
        *,
        reading: Reading,
        writing: Writing,
    ) -> None:
        """Looks at what the two sides hold."""
        self._residence = residence
        self._sessions = sessions
        self._reading = reading
        self._writing = writing

    # --- blocks

    def list_blocks(
        self,
        tenant: str,
        *,
        namespace: bytes,
        key_prefix: bytes,
        leased_only: bool,
        behind: BlockName | None,
        limit: int,
    ) -> BlockListing:
        """A listing that has looked at nothing yet."""
        is_wanted: Callable[[BlockEntry], bool] | None = None
        if leased_only:
            leased = self._num_read_leases()
            is_wanted = lambda entry: entry.segment in leased  # noqa: E731  one of two
        return BlockListing(
            self._residence.index,
            tenant,
            namespace=namespace,
            key_prefix=key_prefix,
            is_wanted=is_wanted,
            behind=behind,
            limit=limit,
        )

    def describe(
        self, tenant: str, names: Sequence[BlockName], now_s: float
    ) -> tuple[BlockInfo, ...]:
        """Those of these blocks that are here still."""
        num_leases = self._num_read_leases()
        return tuple(
            self._info(name[0], entry, num_leases[entry.segment], now_s)
            for name in names
            if (entry := self._entry(tenant, name)) is not None
        )

    def show_block(
        self, tenant: str, namespace: bytes, key: bytes, now_s: float
    ) -> tuple[ShownBlock, ...]:
        """One block in one shard, or in every shard that has it."""
        shown = []
        for name in [namespace] if namespace else shards(self._residence.index, tenant):
            entry = self._entry(tenant, (name, key))
            if entry is None:
                continue
            leases = tuple(
                self._read_lease(lease, now_s)
                for lease in self._reading.leases
                if entry.segment in lease.hold.segments
            )
            block = self._info(name, entry, len(leases), now_s)
            shown.append(ShownBlock(block=block, checksum=entry.checksum, leases=leases))
        return tuple(shown)

    def _entry(self, tenant: str, name: BlockName) -> BlockEntry | None:
        scope = self._residence.index.scope(tenant, name[0])
        return scope.blocks.get(name[1]) if scope and name[0] != TAIL_NAMESPACE else None

    def _num_read_leases(self) -> Counter[PlacedSegment]:
        """How many read leases there are over each segment."""
        num_leases: Counter[PlacedSegment] = Counter()
        for lease in self._reading.leases:
            num_leases.update(set(lease.hold.segments))
        return num_leases

    def _info(
        self, namespace: bytes, entry: BlockEntry, num_read_leases: int, now_s: float
    ) -> BlockInfo:
        return BlockInfo(
            namespace=namespace,
            key=entry.key,
            extent=self._residence.extent(entry.segment, entry.offset, 1),
            parent_key=entry.parent_id[1] if entry.parent_id else b"",
            num_children=self._residence.num_children(entry),
            num_read_leases=num_read_leases,
            age_s=now_s - entry.committed_at_s,
            idle_s=now_s - max(entry.committed_at_s, entry.segment.matched_at_s),
            one_reader=entry.one_reader,
        )

    def evict(
        self, tenant: str, namespaces: Sequence[bytes], keys: Sequence[bytes], *, dry_run: bool
    ) -> Evicted:
        """Takes these blocks out of these shards; the caller serves those who wait for room."""
        num_blocks = nbytes = num_held = num_unknown = 0
        for key in keys:
            found = [e for name in namespaces if (e := self._entry(tenant, (name, key)))]
            num_unknown += not found
            for entry in found:
                if entry.segment.num_leases or entry.one_reader:
                    num_held += 1
                    continue
                num_blocks += 1
                nbytes += entry.segment.block_nbytes
                if not dry_run:
                    self._residence.remove(entry)
        if not dry_run:
            self._residence.counters["blocks_evicted_by_operator"] += num_blocks
        return Evicted(
            num_blocks=num_blocks, nbytes=nbytes, num_held=num_held, num_unknown=num_unknown
        )

    # --- leases

    def list_leases(
        self, *, kind: LeaseKind | None, client: str, behind: int, limit: int, now_s: float
    ) -> tuple[LeaseInfo, ...]:
        """The next leases by id; of one kind, and of one client, where these are given."""
        ids: list[LeaseId] = []
        if kind is not LeaseKind.WRITE:
            ids += [r.id for r in self._reading.leases if self._is_of(client, r.session_id)]
        if kind is not LeaseKind.READ:
            ids += [w.id for w in self._writing.leases if self._is_of(client, w.session_id)]
        chosen = heapq.nsmallest(limit, (lease_id for lease_id in ids if lease_id > behind))
        return tuple(self.lease(lease_id, now_s) for lease_id in chosen)

    def lease(self, lease_id: LeaseId, now_s: float) -> LeaseInfo:
        """One lease; LeaseUnknown where there is none."""
        read = self._reading.leases.get(lease_id)
        if read is not None:
            return self._read_lease(read, now_s)
        write = self._writing.leases.get(lease_id)
        if write is not None:
            return self._write_lease(write, now_s)
        raise LeaseUnknown(
            f"there is no lease {lease_id} on this node",
            hint="it ended, or the node restarted: kvctl leases ls",
        )

    def revoke(self, lease_id: LeaseId, now_s: float) -> tuple[LeaseInfo, Outcome]:
        """Ends a lease's life now; what that means for others is in the outcome."""
        outcome = Outcome()
        before = self.lease(lease_id, now_s)
        if self._reading.leases.run_out(lease_id, now_s) is None:
            write = self._writing.leases.run_out(lease_id, now_s)
            if write is not None:
                outcome = self._writing.fence_if_mapped(write)
        info = self.lease(lease_id, now_s)
        if info.state is not before.state:  # asked once more, it changes nothing
            self._residence.counters["leases_revoked"] += 1
        return info, outcome

    def _is_of(self, client: str, session_id: SessionId) -> bool:
        return not client or self._client(session_id) == client

    def _client(self, session_id: SessionId) -> str:
        session = self._sessions.get(session_id)
        return session.client_name if session else ""

    def _read_lease(self, lease: GrantedLease[ReadHold], now_s: float) -> LeaseInfo:
        shards_ = lease.hold.shards
        return self._lease_info(
            lease,
            LeaseKind.READ,
            num_blocks=sum(len(entries) for entries in shards_),
            nbytes=sum(len(run) * run[0].segment.block_nbytes for run in shards_ if run),
            now_s=now_s,
        )

    def _write_lease(self, lease: WriteLease, now_s: float) -> LeaseInfo:
        left = lease.hold.left
        return self._lease_info(
            lease,
            LeaseKind.WRITE,
            num_blocks=len(left),
            nbytes=sum(block.segment.block_nbytes for block in left),
            is_quarantined=lease.hold.use is Use.QUARANTINED,
            now_s=now_s,
        )

    def _lease_info(
        self,
        lease: GrantedLease[ReadHold] | WriteLease,
        kind: LeaseKind,
        *,
        num_blocks: int,
        nbytes: int,
        now_s: float,
        is_quarantined: bool = False,
    ) -> LeaseInfo:
        state, ends_at_s = LeaseState.ACTIVE, lease.expires_at_s
        if is_quarantined:
            state, ends_at_s = LeaseState.QUARANTINED, now_s
        elif not lease.is_live(now_s):
            state, ends_at_s = LeaseState.GRACE, lease.expires_at_s + lease.grace_s
        return LeaseInfo(
            id=lease.id,
            kind=kind,
            state=state,
            client=self._client(lease.session_id),
            age_s=now_s - lease.granted_at_s,
            seconds_left=max(0.0, ends_at_s - now_s),
            num_blocks=num_blocks,
            nbytes=nbytes,
        )

"""What a node's NodeAdmin service answers, as plain values.

Rules kept here: protobuf ends in this file; every call has a deadline, and says who asks; an error is the type that the
node raised, or says that it cannot be reached.
"""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING, TypeVar

from snowskin.kvstore import admin_wire
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.rpc import CLIENT_HEADER
from snowskin.tools.kvctl.asking import Asker
from snowskin.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from snowskin.kvstore.admin_messages import (
        BlockInfo,
        Drained,
        Evicted,
        LeaseInfo,
        LeaseKind,
        ShownBlock,
        TransportsReport,
    )

MAX_PAGE_SIZE = 1000
Item = TypeVar("Item")


def operator_name() -> str:
    """Who asks, for the node's log: printable ASCII, as metadata has to be."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        user = "?"
    name = f"kvctl {user}@{socket.gethostname()}"
    return name.encode("ascii", "replace").decode()


class NodeAdminClient(Asker):
    """Asks one node; an asynchronous context manager."""

    PEER = "node"
    STUB = admin_pb2_grpc.NodeAdminStub

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """Connects lazily to `address`, `host:port`; every call gets `timeout_s` and says who asks."""
        super().__init__(address, timeout_s=timeout_s, metadata=((CLIENT_HEADER, operator_name()),))

    async def list_blocks(
        self,
        *,
        limit: int,
        namespace: bytes = b"",
        key_prefix: bytes = b"",
        leased_only: bool = False,
    ) -> tuple[list[BlockInfo], bool]:
        """At most `limit` blocks, page by page, and whether there are more.

        Raises:
            NodeUnavailable, DeadlineExceeded: the node does not answer.
        """

        async def page(size: int, token: bytes) -> tuple[Sequence[BlockInfo], bytes]:
            request = admin_pb2.ListBlocksRequest(
                namespace=namespace,
                key_prefix=key_prefix,
                leased_only=leased_only,
                page_size=size,
                page_token=token,
            )
            answer = await self._ask(self._stub.ListBlocks, request)
            found = admin_wire.block_page_from(answer, self.address)
            return found.blocks, found.next_page_token

        return await _pages(page, limit)

    async def show_block(self, key: bytes, *, namespace: bytes = b"") -> tuple[ShownBlock, ...]:
        """One block in each of its shards, or none; raises as `list_blocks`."""
        request = admin_pb2.ShowBlockRequest(namespace=namespace, key=key)
        answer = await self._ask(self._stub.ShowBlock, request)
        return admin_wire.shown_from(answer, self.address)

    async def list_leases(
        self, *, limit: int, kind: LeaseKind | None = None, client: str = ""
    ) -> tuple[list[LeaseInfo], bool]:
        """At most `limit` leases, and whether there are more; raises as `list_blocks`."""

        async def page(size: int, token: bytes) -> tuple[Sequence[LeaseInfo], bytes]:
            request = admin_pb2.ListLeasesRequest(
                kind=admin_wire.kind_to(kind), client=client, page_size=size, page_token=token
            )
            found = admin_wire.lease_page_from(await self._ask(self._stub.ListLeases, request))
            return found.leases, found.next_page_token

        return await _pages(page, limit)

    async def transports(self) -> TransportsReport:
        """How the node's memory can be reached; raises as `list_blocks`."""
        answer = await self._ask(self._stub.ListTransports, admin_pb2.ListTransportsRequest())
        return admin_wire.transports_from(answer)

    async def revoke_lease(self, lease_id: int) -> LeaseInfo:
        """Ends a lease; LeaseUnknown where there is none; raises as `list_blocks`."""
        request = admin_pb2.RevokeLeaseRequest(lease_id=lease_id)
        answer = await self._ask(self._stub.RevokeLease, request)
        return admin_wire.lease_from(answer.lease)

    async def evict(
        self, keys: Sequence[bytes], *, namespace: bytes = b"", dry_run: bool
    ) -> Evicted:
        """Takes these blocks out, or all where there are no keys; raises as `list_blocks`."""
        request = admin_pb2.EvictRequest(namespace=namespace, all=not keys, dry_run=dry_run)
        if keys:
            column = KeyColumn.of(keys, width=len(keys[0]))
            request.keys.packed, request.keys.width = column.packed, column.width
        answer = await self._ask(self._stub.Evict, request)
        return admin_wire.evicted_from(answer)

    async def drain(self) -> Drained:
        """No new leases from now on; raises as `list_blocks`."""
        answer = await self._ask(self._stub.Drain, admin_pb2.DrainRequest())
        return admin_wire.drained_from(answer)


async def _pages(
    page: Callable[[int, bytes], Awaitable[tuple[Sequence[Item], bytes]]], limit: int
) -> tuple[list[Item], bool]:
    """At most `limit` items of `page(size, token)`, asked until there is no token; whether there are more."""
    found: list[Item] = []
    token = b""
    while len(found) < limit:
        items, token = await page(min(MAX_PAGE_SIZE, limit - len(found)), token)
        found += items
        if not token:
            break
    return found, bool(token)

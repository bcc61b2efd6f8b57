"""What a node's NodeAdmin service answers, as plain values.

Rules kept here: protobuf ends in this file; every call has a deadline, and says who asks; an error is the type that the
node raised, or says that it cannot be reached.
"""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING

from snowskin.kvstore import admin_wire
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.rpc import CLIENT_HEADER, open_channel, translating
from snowskin.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import grpc.aio

    from snowskin.kvstore.admin_messages import (
        BlockInfo,
        Drained,
        Evicted,
        LeaseInfo,
        LeaseKind,
        ShownBlock,
    )

MAX_PAGE_SIZE = 1000


def operator_name() -> str:
    """Who asks, for the node's log: printable ASCII, as metadata has to be."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        user = "?"
    name = f"kvctl {user}@{socket.gethostname()}"
    return name.encode("ascii", "replace").decode()


class NodeAdminClient:
    """Asks one node; an asynchronous context manager."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """Connects lazily to `address`, `host:port`; every call gets `timeout_s`."""
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = ((CLIENT_HEADER, operator_name()),)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> NodeAdminClient:
        """Opens the channel."""
        self._channel = open_channel(self.address)
        self._stub = admin_pb2_grpc.NodeAdminStub(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close(None)

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
        blocks: list[BlockInfo] = []
        token = b""
        while len(blocks) < limit:
            request = admin_pb2.ListBlocksRequest(
                namespace=namespace,
                key_prefix=key_prefix,
                leased_only=leased_only,
                page_size=min(MAX_PAGE_SIZE, limit - len(blocks)),
                page_token=token,
            )
            with translating(f"node {self.address}"):
                answer = await self._stub.ListBlocks(
                    request, timeout=self._timeout_s, metadata=self._metadata
                )
            page = admin_wire.block_page_from(answer, self.address)
            blocks += page.blocks
            token = page.next_page_token
            if not token:
                break
        return blocks, bool(token)

    async def show_block(self, key: bytes, *, namespace: bytes = b"") -> tuple[ShownBlock, ...]:
        """One block in each of its shards, or none; raises as `list_blocks`."""
        request = admin_pb2.ShowBlockRequest(namespace=namespace, key=key)
        with translating(f"node {self.address}"):
            answer = await self._stub.ShowBlock(
                request, timeout=self._timeout_s, metadata=self._metadata
            )
        return admin_wire.shown_from(answer, self.address)

    async def list_leases(
        self, *, limit: int, kind: LeaseKind | None = None, client: str = ""
    ) -> tuple[list[LeaseInfo], bool]:
        """At most `limit` leases, and whether there are more; raises as `list_blocks`."""
        leases: list[LeaseInfo] = []
        token = b""
        while len(leases) < limit:
            request = admin_pb2.ListLeasesRequest(
                kind=admin_wire.kind_to(kind),
                client=client,
                page_size=min(MAX_PAGE_SIZE, limit - len(leases)),
                page_token=token,
            )
            with translating(f"node {self.address}"):
                answer = await self._stub.ListLeases(
                    request, timeout=self._timeout_s, metadata=self._metadata
                )
            page = admin_wire.lease_page_from(answer)
            leases += page.leases
            token = page.next_page_token
            if not token:
                break
        return leases, bool(token)

    async def revoke_lease(self, lease_id: int) -> LeaseInfo:
        """Ends a lease; LeaseUnknown where there is none; raises as `list_blocks`."""
        request = admin_pb2.RevokeLeaseRequest(lease_id=lease_id)
        with translating(f"node {self.address}"):
            answer = await self._stub.RevokeLease(
                request, timeout=self._timeout_s, metadata=self._metadata
            )
        return admin_wire.lease_from(answer.lease)

    async def evict(
        self, keys: Sequence[bytes], *, namespace: bytes = b"", dry_run: bool
    ) -> Evicted:
        """Takes these blocks out, or all where there are no keys; raises as `list_blocks`."""
        request = admin_pb2.EvictRequest(namespace=namespace, all=not keys, dry_run=dry_run)
        if keys:
            column = KeyColumn.of(keys, width=len(keys[0]))
            request.keys.packed, request.keys.width = column.packed, column.width
        with translating(f"node {self.address}"):
            answer = await self._stub.Evict(
                request, timeout=self._timeout_s, metadata=self._metadata
            )
        return admin_wire.evicted_from(answer)

    async def drain(self) -> Drained:
        """No new leases from now on; raises as `list_blocks`."""
        with translating(f"node {self.address}"):
            answer = await self._stub.Drain(
                admin_pb2.DrainRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        return admin_wire.drained_from(answer)

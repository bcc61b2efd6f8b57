"""A node in this process that fills and evicts quickly: blocks of any namespace and key come by a word.

Beside `served_node`, which publishes numbers into one namespace.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.messages import CommitRequest, Reserved, ReserveRequest
from snowskin.kvstore.node.daemon import NodeSettings, make_shell
from snowskin.kvstore.node.service import StoreService
from snowskin.kvstore.rpc import serving
from snowskin.v1 import store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

BLOCK_NBYTES = 8 << 10  # 128 of them fill the pool


class WatchedNode:
    """What a test holds of the node; its blocks' bytes are zeros."""

    def __init__(self, settings: NodeSettings) -> None:
        self.shell = make_shell(settings)
        self.service = StoreService(self.shell, settings.watch_limits())
        self.address = ""
        self._replies: list[Any] = []
        self._session = self.shell.open_session(
            "writer", lambda _, reply: self._replies.append(reply), maps_memory=False
        )

    def publish(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """Commits blocks as one run; those that are here already stay."""
        column = KeyColumn.of(keys)
        request = ReserveRequest(namespace=namespace, keys=column, block_nbytes=BLOCK_NBYTES)
        self.shell.request(self._session.id, 1, request)
        reserved = self._replies.pop()
        assert isinstance(reserved, Reserved), reserved
        if reserved.lease is None:
            return
        count = sum(run.num_blocks for run in reserved.runs)
        self.shell.request(
            self._session.id,
            2,
            CommitRequest(lease_id=reserved.lease.id, num_blocks=count, checksums=bytes(4 * count)),
        )
        self._replies.clear()

    def blocks(self) -> set[tuple[bytes, bytes]]:
        """(namespace, key) of all that is here."""
        index = self.shell.state.residence.index
        found = set()
        for namespace in index.namespaces("default"):
            scope = index.scope("default", namespace)
            found |= {(namespace, key) for key in (scope.blocks if scope else ())}
        return found


@asynccontextmanager
async def watched_node(*, port: int = 0, **settings: Any) -> AsyncIterator[WatchedNode]:
    """A node that answers while the block lasts; `port` is the one of a life before."""
    values = {"dram_nbytes": 1 << 20, "watch_beat_s": 30.0, **settings}
    node = WatchedNode(NodeSettings(**values))
    async with serving(
        [(store_pb2_grpc.add_StoreServicer_to_server, node.service)],
        host="127.0.0.1",
        port=port,
        service_names=[],
        role="node",
    ) as server:
        node.address = server.address
        try:
            yield node
        finally:
            node.shell.drain()
            node.service.close()
    node.shell.close()

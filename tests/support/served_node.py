"""A node's shell behind a real gRPC server, both in the test's own loop; blocks come straight into its state."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.messages import CommitRequest, NodeStat, Reserved, ReserveRequest
from snowskin.kvstore.node.admin import NodeAdminService
from snowskin.kvstore.node.daemon import NodeSettings, make_shell
from snowskin.kvstore.node.service import StoreService
from snowskin.kvstore.rpc import serving
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    SchemeAdvertisement,
)
from snowskin.transport.probes import own_identity
from snowskin.v1 import admin_pb2_grpc, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 64
NAMESPACE = b"N" * 32


def key_of(number: int) -> bytes:
    """Numbers that rise make keys that rise."""
    return number.to_bytes(8, "big") * 4


def advertisement_of(transports) -> Advertisement:
    """What a node in this process tells of these transports."""
    told = {transport.scheme: getattr(transport, "reachability", None) for transport in transports}
    return Advertisement(
        identity=own_identity(),
        schemes=tuple(
            SchemeAdvertisement(
                scheme=scheme,
                addresses=tuple(
                    AdvertisedAddress(address=address)
                    for address in (reachability.addresses if reachability else ())
                ),
            )
            for scheme, reachability in told.items()
        ),
    )


def stat_of(transports, advertisement=None) -> NodeStat:
    """What a node says of itself that serves these schemes, and is found as advertised; nothing told if None."""
    return NodeStat(
        node_id="n",
        node_epoch=1,
        pools=(),
        num_blocks=0,
        num_read_leases=0,
        num_write_leases=0,
        num_sessions=0,
        num_waiting_matches=0,
        num_waiting_reserves=0,
        transports=tuple(transports),
        advertisement=b"" if advertisement is None else advertisement.to_bytes(),
    )


class ServedNode:
    """One node; `session` is that of a writer."""

    def __init__(self, *, transports=(), **settings) -> None:
        settings = {"dram_nbytes": 1 << 20, "watch_beat_s": 30.0, "watch_stall_s": 30.0, **settings}
        self.settings = NodeSettings(**settings)
        self.shell = make_shell(self.settings, transports)
        self.shell.state.advertisement = advertisement_of(transports).to_bytes()
        self.service = StoreService(self.shell, self.settings.watch_limits())
        self.admin = NodeAdminService(self.shell)
        self.replies: list = []
        self.session = self.shell.open_session(
            "writer", lambda _, reply: self.replies.append(reply), maps_memory=False
        )
        self.address = ""

    def request(self, request):
        """The answer to a call of the writer's."""
        self.shell.request(self.session.id, 1, request)
        return self.replies.pop()

    def publish(self, numbers) -> None:
        """Commits new blocks of these numbers, as one run."""
        num_new = self.publish_keys(NAMESPACE, [key_of(number) for number in numbers], BLOCK)
        assert num_new

    def publish_keys(self, namespace: bytes, keys: Iterable[bytes], block_nbytes: int) -> int:
        """Commits blocks as one run, those that are here already stay; how many are new."""
        column = KeyColumn.of(keys)
        reserved = self.request(
            ReserveRequest(namespace=namespace, keys=column, block_nbytes=block_nbytes)
        )
        assert isinstance(reserved, Reserved), reserved
        if reserved.lease is None:
            return 0
        count = sum(run.num_blocks for run in reserved.runs)
        self.request(
            CommitRequest(lease_id=reserved.lease.id, num_blocks=count, checksums=bytes(4 * count))
        )
        return count

    @property
    def keys(self) -> set[bytes]:
        """Of all blocks that are here."""
        return {entry.key for entry in self.shell.state.residence.index}

    def blocks(self) -> set[tuple[bytes, bytes]]:
        """(namespace, key) of all that is here."""
        index = self.shell.state.residence.index
        found = set()
        for namespace in index.namespaces("default"):
            scope = index.scope("default", namespace)
            found |= {(namespace, key) for key in (scope.blocks if scope else ())}
        return found


@asynccontextmanager
async def served_node(*, port: int = 0, transports=(), **settings):
    """A node that serves Store and NodeAdmin, drained on leaving; `port` is the one of a life before.

    `transports` are those of its data plane.
    """
    served = ServedNode(transports=transports, **settings)
    async with serving(
        [
            (store_pb2_grpc.add_StoreServicer_to_server, served.service),
            (admin_pb2_grpc.add_NodeAdminServicer_to_server, served.admin),
        ],
        host="127.0.0.1",
        port=port,
        service_names=[],
        role="node",
    ) as server:
        served.address = server.address
        try:
            yield served
        finally:
            served.shell.drain()
            served.service.close()
    served.shell.close()

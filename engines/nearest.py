"""The shortest way to another node: by its local door where that is on this host, else by gRPC.

Rules kept here: a node is asked by gRPC where its door is; the door is taken if it opens and the
same epoch of the node answers there, so that a path that means another node on this host, or
nothing, changes nothing but the speed; of a node that tells that it runs elsewhere none is tried.
Where another transport than shared memory was demanded, no door is looked for; where shared memory
was, there must be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.client.store import DOOR_PREFIX
from snowskin.kvstore.client.ways import told_by
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.advertisement import UNKNOWN_ID
from snowskin.transport.errors import SnowskinError, TransportUnavailable
from snowskin.transport.probes import own_identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snowskin.kvstore.client.store import StoreClient
    from snowskin.kvstore.client.transports import ClientTransports
    from snowskin.kvstore.messages import NodeStat

log = get_logger(__name__)


async def connect_nearest(
    address: str,
    connect: Callable[[str], Awaitable[StoreClient]],
    transports: ClientTransports,
) -> StoreClient:
    """A client of the node at `address`.

    Args:
        address: of either kind.
        connect: makes a client by an address, with these `transports`.
        transports: which may be used.

    Raises:
        NodeUnavailable: the node does not answer at `address`.
        TransportUnavailable: it cannot be reached by the transport that was demanded.
    """
    far = await connect(address)
    if address.startswith(DOOR_PREFIX) or not transports.may_map:
        return far
    near: StoreClient | None = None
    try:
        stat = await far.stat()
        door = stat.door
        if door.startswith(DOOR_PREFIX) and not _is_elsewhere(stat, address):
            near = await connect(door)
            if near.node_epoch == far.node_epoch:
                log.info("node is on this host", node=address, door=door)
                await far.close()
                return near
            await near.close()
    except SnowskinError as error:
        log.debug("node has no door here", node=address, error=str(error))
    except BaseException:
        for client in (near, far):
            if client is not None:
                await client.close()
        raise
    if transports.is_demanded:
        await far.close()
        raise TransportUnavailable(
            f"transport {transports.choice} was demanded, and node {address} has no local door on this host",
            hint="run the engine on the node's host, or use --transport auto",
        )
    return far


def _is_elsewhere(stat: NodeStat, node: str) -> bool:
    """Whether the node surely runs on another host: its door's path means nothing here."""
    told, here = told_by(stat, node=node), own_identity()
    if told is None or UNKNOWN_ID in (told.identity.host, here.host):
        return False
    return not here.same_host(told.identity)

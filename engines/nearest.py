"""The shortest way to another node: by its local door where that is on this host, else by gRPC.

Rules kept here: a node is asked by gRPC where its door is; the door is taken if it opens and the
same epoch of the node answers there, so that a path that means another node on this host, or
nothing, changes nothing but the speed. Where another transport than shared memory was demanded, no
door is looked for; where shared memory was, there must be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.client.store import DOOR_PREFIX
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError, TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snowskin.kvstore.client.store import StoreClient
    from snowskin.kvstore.client.transports import ClientTransports

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
        door = (await far.stat()).door
        if door.startswith(DOOR_PREFIX):
            near = await connect(door)
            if near.node_epoch == far.node_epoch:
                log.debug("node is on this host", node=address, door=door)
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

"""The shortest way to another node: by its local door where that is on this host, else by gRPC.

Rules kept here: a node is asked by gRPC where its door is; the door is taken if it opens and the
same epoch of the node answers there, so that a path that means another node on this host, or
nothing, changes nothing but the speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.client.store import DOOR_PREFIX
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snowskin.kvstore.client.store import StoreClient

log = get_logger(__name__)


async def connect_nearest(
    address: str, connect: Callable[[str], Awaitable[StoreClient]]
) -> StoreClient:
    """A client of the node at `address`; `connect` makes one by an address of either kind.

    Raises:
        NodeUnavailable: the node does not answer at `address`.
    """
    far = await connect(address)
    if address.startswith(DOOR_PREFIX):
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
    return far

"""The nodes that an instance reaches: its own, always; others when a prompt names them.

Rules kept here: the own node is asked first and by its local door; another one is connected when it
is first named, by gRPC, and stays connected; one that does not answer is left alone for a while and
costs a request at most `CONNECT_TIMEOUT_S`. An address that turns out to be the own node is the own
node.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from snowskin.engines.link import StoreLink

CONNECT_TIMEOUT_S = 0.5
RETRY_S = 2.0
MAX_OTHERS = 64

log = get_logger(__name__)


class NodeLinks:
    """Links by address.

    Attributes:
        own: the link to the instance's own node.
        own_address: its gRPC address, as others name it; may be empty.
    """

    def __init__(
        self,
        own: StoreLink,
        *,
        own_address: str = "",
        link_to: Callable[[str], StoreLink] | None = None,
    ) -> None:
        """`link_to` makes an unopened link to an address; without it only the own node is known."""
        self.own = own
        self.own_address = own_address
        self._link_to = link_to
        self._others: dict[str, StoreLink] = {}
        self._retry_at_s: dict[str, float] = {}
        self._opening = asyncio.Lock()

    async def among(self, addresses: Iterable[str]) -> list[StoreLink]:
        """The own node's link, then those of `addresses` that answer, each node once."""
        links = [self.own]
        for address in addresses:
            link = await self.at(address)
            if link is not None and link not in links:
                links.append(link)
        return links

    async def at(self, address: str) -> StoreLink | None:
        """The link to the node at `address`; None where it cannot be reached now."""
        if not address or address == self.own_address:
            return self.own
        if self._link_to is None:
            return None
        async with self._opening:
            link = self._others.get(address)
            if link is None or not link.connected:
                link = await self._open(address)
        if link is not None and link.node_epoch == self.own.node_epoch:
            return self.own
        return link

    async def close(self) -> None:
        """Closes the links to other nodes; the own one belongs to whoever runs it."""
        for link in self._others.values():
            await link.close()
        self._others.clear()

    async def _open(self, address: str) -> StoreLink | None:
        lost = self._others.pop(address, None)
        if lost is not None:
            await lost.close()
        if time.monotonic() < self._retry_at_s.get(address, 0.0) or (
            len(self._others) >= MAX_OTHERS
        ):
            return None
        assert self._link_to is not None, "checked by the caller"
        link = self._link_to(address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await link.open()
        except (SnowskinError, TimeoutError) as error:
            log.warning("another node is unreachable", node=address, error=str(error))
            if len(self._retry_at_s) >= MAX_OTHERS:
                self._retry_at_s.clear()
            self._retry_at_s[address] = time.monotonic() + RETRY_S
            return None
        self._others[address] = link
        return link

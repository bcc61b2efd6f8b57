"""The nodes that an instance reaches: its own, always; others when a prompt names them.

Rules kept here: the own node is asked first and by its local door; another one is connected in the
background when it is first named, stays connected while it is named now and then, and is connected
again by itself when it is lost. No request waits for a connection that failed before; for a first
one it waits a moment. An address that turns out to be the own node is the own node.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import ended
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import of_no_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from snowskin.engines.link import StoreLink

# A first connection, to a node that lives, takes some milliseconds, and happens once.
FIRST_CONNECT_S = 0.1
IDLE_S = 60.0  # a node that nobody has named for so long is let go
MAX_OTHERS = 64

log = get_logger(__name__)


@dataclass(slots=True)
class _Other:
    """Another node: its link, and the task that keeps it connected."""

    link: StoreLink
    keeping: asyncio.Task[None]
    named_at_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStanding:
    """How an instance's nodes answer.

    Attributes:
        num_nodes_silent: nodes that are left alone now.
        num_silences: how often one was.
        num_calls_late: calls that were given up.
    """

    num_nodes_silent: int = 0
    num_silences: int = 0
    num_calls_late: int = 0


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
        self._others: dict[str, _Other] = {}
        self._closed = False
        self._past = NodeStanding()  # of nodes that were let go

    def standing(self) -> NodeStanding:
        """How the nodes answer."""
        guards = [link.guard for link in self.links]
        return NodeStanding(
            num_nodes_silent=sum(not guard.usable for guard in guards),
            num_silences=sum(
                (guard.breaker.num_opened for guard in guards), self._past.num_silences
            ),
            num_calls_late=sum((guard.num_late for guard in guards), self._past.num_calls_late),
        )

    @property
    def links(self) -> list[StoreLink]:
        """To the own node and to every other one that is known now."""
        return [self.own, *(other.link for other in self._others.values())]

    async def among(self, addresses: Iterable[str]) -> list[StoreLink]:
        """Links to nodes that can be asked now: the own one, then those of `addresses`, each once."""
        links = [self.own] if self.own.usable else []
        wanted = list(dict.fromkeys(addresses))
        await self._first_connections(wanted)
        for address in wanted:
            link = self._connected(address)
            if link is not None and link.usable and link not in links:
                links.append(link)
        return links

    async def at(self, address: str) -> StoreLink | None:
        """The link to the node at `address`; None where it is not connected now."""
        await self._first_connections([address])
        return self._connected(address)

    async def _first_connections(self, addresses: list[str]) -> None:
        """Gives nodes that are named for the first time a moment to connect, one for all of them."""
        others = [self._other(address) for address in addresses]
        links = [other.link for other in others if other and not other.link.tried.is_set()]
        try:
            async with asyncio.timeout(FIRST_CONNECT_S):
                for link in links:
                    await link.tried.wait()
        except TimeoutError:
            for link in links:
                link.tried.set()  # nobody else waits for it

    def _connected(self, address: str) -> StoreLink | None:
        if not address or address == self.own_address:
            return self.own
        other = self._others.get(address)
        if other is None or not other.link.connected:
            return None
        return self.own if other.link.node_epoch == self.own.node_epoch else other.link

    async def close(self) -> None:
        """Closes the links to other nodes; the own one belongs to whoever runs it."""
        self._closed = True
        others = list(self._others.values())
        for other in others:
            other.keeping.cancel()
        for other in others:
            await ended(other.keeping)

    def _other(self, address: str) -> _Other | None:
        """The other node at this address, from now on kept connected; None where that cannot be."""
        other = self._others.get(address)
        if other is not None:
            other.named_at_s = time.monotonic()
            return other
        if self._link_to is None or not address or address == self.own_address or self._closed:
            return None
        if len(self._others) >= MAX_OTHERS:
            log.warning("too many nodes are named", node=address, num_nodes=len(self._others))
            return None
        link = self._link_to(address)
        keeping = asyncio.create_task(
            self._keep(address, link), name=f"link to {address}", context=of_no_request()
        )
        other = self._others[address] = _Other(link, keeping)
        return other

    async def _keep(self, address: str, link: StoreLink) -> None:
        """Keeps one link connected until nobody has named its node for a while."""
        running = asyncio.create_task(link.run(), name=f"link {address}")
        try:
            while not running.done():
                left_s = self._others[address].named_at_s + IDLE_S - time.monotonic()
                if left_s <= 0.0:
                    return
                await asyncio.wait([running], timeout=left_s)
            running.result()  # it ends only by an error that nobody foresaw
        except Exception as error:
            log.error("link broke", node=address, error=repr(error), exc_info=error)
        finally:
            self._others.pop(address, None)
            self._past = NodeStanding(
                num_silences=self._past.num_silences + link.guard.breaker.num_opened,
                num_calls_late=self._past.num_calls_late + link.guard.num_late,
            )
            running.cancel()
            await ended(running)

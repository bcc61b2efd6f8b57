"""Frees what an attempt that broke off has left at nodes for a decode that will never read it.

Why the conductor: a decode that never heard of the request, or died, frees nothing, and the prefill
has done its part and forgotten it. Rules kept here: nobody waits for it, least of all the replay of
the request; each node is asked once, within `TIMEOUT_S`; at most `MAX_AT_ONCE` are asked at a time,
what comes beyond is left to the leases; `close` ends what is under way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import ended
from snowskin.engines.leftovers import Leftovers, leftovers_of
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from snowskin.engines.conductor.nodes import Nodes
    from snowskin.engines.messages import Prompt

TIMEOUT_S = 2.0
MAX_AT_ONCE = 256

log = get_logger(__name__)


class Sweeper:
    """Tells nodes, in the background, what will not be read."""

    def __init__(self, nodes: Nodes) -> None:
        """Nothing is under way."""
        self._nodes = nodes
        self._tasks: set[asyncio.Task[None]] = set()

    def sweep(
        self, addresses: Iterable[str], prompt: Prompt, *, block_size: int, attempt_id: str
    ) -> None:
        """Begins to free what the prefill of `prompt`, tried at these nodes, has left there."""
        left = leftovers_of(prompt, block_size=block_size, request_id=attempt_id)
        for address in filter(None, dict.fromkeys(addresses) if left else ()):
            if len(self._tasks) >= MAX_AT_ONCE:
                log.warning("leftovers are left to their leases", under_way=len(self._tasks))
                return
            work = self._sweep_one(address, prompt.namespace, left)
            task = asyncio.create_task(work, name=f"sweep:{attempt_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await ended(*tasks)

    async def _sweep_one(self, address: str, namespace: bytes, left: Leftovers) -> None:
        try:
            num_blocks = await self._nodes.discard(
                address,
                namespace=namespace,
                keys=left.keys,
                tail_id=left.tail_id,
                timeout_s=TIMEOUT_S,
            )
        except SnowskinError as error:
            log.debug("leftovers not freed", node=address, reason=error.reason, error=str(error))
        except Exception as error:
            log.error("freeing leftovers broke", node=address, error=repr(error), exc_info=error)
        else:
            if num_blocks:
                log.info("leftovers freed", node=address, num_blocks=num_blocks)

"""What a request has left at a node for its one reader, where that reader will not come.

Rules kept here: tails, and the blocks of a request without cache, are evicted by nobody: unread they
would fill the pool until their lease ends. So a call that is cancelled frees what lies there by
then: prefill after its last publish, decode after its last pull, whichever of the two is later; and
the conductor where no decode has heard of the request. A node that cannot be asked frees them by
itself, only later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.messages import CachePolicy
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from snowskin.engines.link import StoreLink
    from snowskin.engines.messages import Prompt
    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.kvstore.client.breaker import LookupBudget

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a prompt's prefill leaves for decode alone; `tail_id` is empty where there is no tail."""

    keys: KeyColumn
    tail_id: str

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.tail_id) or len(self.keys) > 0


def leftovers_of(prompt: Prompt, *, block_size: int, request_id: str) -> Leftovers:
    """What lies at a node unread when the prefill of `prompt` is done; `request_id` names its tail."""
    keys = prompt.block_keys[: None if prompt.cache_policy is CachePolicy.OFF else 0]
    has_tail = len(prompt.token_ids) % block_size > 0
    return Leftovers(keys, request_id if has_tail else "")


async def discard_leftovers(
    link: StoreLink,
    prompt: Prompt,
    *,
    block_size: int,
    budget: LookupBudget | None = None,
    request_id: str,
) -> None:
    """Frees the request's unread blocks and tail at the node of `link`; never raises an error.

    A node that does not answer costs what is left of `budget`, None: what one request may lose.
    """
    left = leftovers_of(prompt, block_size=block_size, request_id=request_id)
    if not left:
        return
    try:
        await link.discard(left.keys, tail_id=left.tail_id, budget=budget, request_id=request_id)
    except SnowskinError as error:
        log.debug("leftovers not freed", reason=error.reason, error=str(error))

"""What the span of a call to a node is called and tells, on either side of the door: counts only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.messages import Committed, Matched, Probed, Reserved

if TYPE_CHECKING:
    from snowskin.kvstore.messages import ReplyMessage, Request
    from snowskin.kvstore.tracing import Fact


def name_of_call(request: Request) -> str:
    """`store match`, `store reserve`, ..."""
    return f"store {type(request).__name__.removesuffix('Request').lower()}"


def facts_of_reply(reply: ReplyMessage | None) -> dict[str, Fact]:
    """Counts of an answer; nothing where there is nothing to count."""
    match reply:
        case Matched(num_blocks=num_blocks, wake_reason=reason):
            return {"num_blocks": num_blocks, "wake_reason": reason.name}
        case Reserved(runs=runs):
            return {"num_blocks": sum(run.num_blocks for run in runs)}
        case Committed(num_blocks_left=num_blocks_left):
            return {"num_blocks_left": num_blocks_left}
        case Probed(num_blocks=num_blocks):
            return {"num_blocks": num_blocks}
    return {}

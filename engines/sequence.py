"""One sequence while an instance works on it.

Rules kept here: KV of the first `num_computed` tokens is in memory; the tokens behind them are
known and still to compute; the newest token of a running sequence never has KV yet. The owner of
the compute loop advances `num_computed`, and nobody else does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.engines.model.llama import Span
from snowskin.kvstore.blocks import BlockHashChain, KeyColumn

if TYPE_CHECKING:
    from collections.abc import Sequence as Ordered

    from snowskin.engines.messages import Prompt
    from snowskin.engines.model.sampler import SamplingParams
    from snowskin.transport.errors import SnowskinError

STOP, LENGTH = "stop", "length"
OWN_KEY_WIDTH = 32  # SHA-256


class KeyChain:
    """Keys of a sequence's full blocks: the prompt's as they were given, then our own hashes."""

    def __init__(self, prompt: Prompt, block_size: int) -> None:
        """Begins behind the prompt; keys of another width than ours are not continued."""
        self._width = prompt.block_keys.width
        self._packed = bytearray(prompt.block_keys.packed)
        self._chain: BlockHashChain | None = None
        num_blocks = len(prompt.block_keys)
        parent = prompt.block_keys[num_blocks - 1] if num_blocks else None
        if self._width == OWN_KEY_WIDTH:
            self._chain = BlockHashChain(block_size, parent=parent)
            self.extend(prompt.token_ids[num_blocks * block_size :])

    def __len__(self) -> int:
        """Blocks that have a key."""
        return len(self._packed) // self._width

    def extend(self, token_ids: Ordered[int]) -> None:
        """Appends tokens; each block that they fill gets its key."""
        if self._chain is not None:
            for block_hash in self._chain.extend(token_ids):
                self._packed += block_hash

    def column(self, first: int, last: int) -> KeyColumn:
        """Keys of the blocks `first .. last - 1`."""
        return KeyColumn(
            packed=bytes(self._packed[first * self._width : last * self._width]), width=self._width
        )

    def parent_of(self, block_index: int) -> bytes:
        """Key of the block before; empty for the first one."""
        return bytes(self._packed[(block_index - 1) * self._width : block_index * self._width])


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of the answer, and why it is the last one (empty where it is not)."""

    token_id: int
    finish_reason: str


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens, where their KV lies, and how to go on.

    Attributes:
        token_ids: prompt and what was generated.
        block_ids: blocks of KV memory from position 0 on.
        num_prompt_tokens: how many of `token_ids` are the prompt.
        max_length: tokens at which the answer ends with "length".
        num_computed: tokens whose KV is in memory.
        outputs: where the compute loop puts drawn tokens, or the error that ended the sequence. Its
            bound is never met: a sequence puts at most its answer and one error.
    """

    request_id: str
    token_ids: list[int]
    block_ids: list[int]
    sampling: SamplingParams
    max_length: int
    num_computed: int = 0
    num_prompt_tokens: int = field(init=False)
    outputs: asyncio.Queue[Drawn | SnowskinError] = field(init=False)

    def __post_init__(self) -> None:
        """Takes the tokens so far for the prompt, and makes the queue of its answer."""
        self.num_prompt_tokens = len(self.token_ids)
        self.outputs = asyncio.Queue(max(1, self.max_length - len(self.token_ids)) + 1)

    @property
    def num_pending(self) -> int:
        """Known tokens without KV."""
        return len(self.token_ids) - self.num_computed

    def span(self, num_tokens: int) -> Span:
        """The next `num_tokens` pending tokens, as the model wants them."""
        return Span(
            token_ids=self.token_ids[self.num_computed : self.num_computed + num_tokens],
            start=self.num_computed,
            block_ids=self.block_ids,
        )

    def append(self, token_id: int) -> Drawn:
        """Takes a drawn token; says whether it is the last."""
        self.token_ids.append(token_id)
        reason = ""
        if token_id in self.sampling.stop_token_ids:
            reason = STOP
        elif len(self.token_ids) >= self.max_length:
            reason = LENGTH
        return Drawn(token_id, reason)

"""What an instance accepts, checked before anything is allocated.

Rules kept here: a request that passes `check` can be computed; what it may still lack is time and
room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.errors import BadPrompt, PromptTooLong
from snowskin.kvstore.errors import BadKeyColumn, BadRequest, BadSetting, NamespaceMismatch

if TYPE_CHECKING:
    from snowskin.engines.messages import Prompt

MAX_REQUEST_ID_LENGTH = 128  # a tail's name on the wire


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """One instance's shape and bounds.

    Attributes:
        namespace: of the blocks that it reads and writes.
        vocab_size: token ids are below it.
        block_size: tokens of a block.
        max_context_tokens: tokens of prompt and answer together.
        chunk_tokens: tokens that a prefill chunk computes; a multiple of `block_size`.
        max_running: sequences that hold KV memory at once.
        max_waiting: requests that wait for it.
        pull_timeout_s: how long the copy of one pull may take.
        publish_timeout_s: how long one publish may take, waiting for room included.
    """

    namespace: bytes
    vocab_size: int
    block_size: int
    max_context_tokens: int
    chunk_tokens: int = 512
    max_running: int = 32
    max_waiting: int = 64
    pull_timeout_s: float = 2.0
    publish_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuses bounds that cannot work.

        Raises:
            BadSetting: a number is out of its range.
        """
        if self.block_size < 1 or self.chunk_tokens < 1 or self.chunk_tokens % self.block_size:
            raise BadSetting(
                f"chunk_tokens is {self.chunk_tokens}, block_size is {self.block_size}",
                hint="make chunk_tokens a multiple of block_size",
            )
        for name in ("max_context_tokens", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="use at least 1")
        for name in ("pull_timeout_s", "publish_timeout_s"):
            if not getattr(self, name) > 0.0:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="give seconds above 0")

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens, the last one perhaps partly."""
        return -(-num_tokens // self.block_size)

    def max_new_tokens(self, num_prompt_tokens: int, wanted: int) -> int:
        """Tokens that the context leaves of those wanted; prefill and decode agree on it."""
        return min(wanted, self.max_context_tokens - num_prompt_tokens)

    def check(self, request_id: str, prompt: Prompt) -> None:
        """Refuses a prompt that this instance cannot compute.

        Raises:
            BadRequest: no usable request id.
            NamespaceMismatch: the keys are meant for another layout.
            BadPrompt: empty, or with a token outside the vocabulary.
            PromptTooLong: no token of answer fits behind it.
            BadKeyColumn: not one key for each full block.
        """
        if not 0 < len(request_id.encode()) <= MAX_REQUEST_ID_LENGTH:
            raise BadRequest(
                f"request_id has {len(request_id.encode())} bytes",
                hint=f"use 1 to {MAX_REQUEST_ID_LENGTH} bytes of UTF-8",
            )
        if prompt.namespace != self.namespace:
            raise NamespaceMismatch(
                f"prompt's namespace {prompt.namespace.hex()[:16]}, this instance's "
                f"{self.namespace.hex()[:16]}",
                hint="send it to an instance of the same model, dtype and block size",
            )
        num_tokens = len(prompt.token_ids)
        if num_tokens == 0:
            raise BadPrompt("the prompt is empty", hint="send at least one token")
        if num_tokens >= self.max_context_tokens:
            raise PromptTooLong(
                f"prompt of {num_tokens} tokens, the context holds {self.max_context_tokens} "
                "with the answer",
                hint="shorten the prompt",
            )
        lowest, highest = min(prompt.token_ids), max(prompt.token_ids)
        if lowest < 0 or highest >= self.vocab_size:
            raise BadPrompt(
                f"token {lowest if lowest < 0 else highest} is outside the vocabulary of "
                f"{self.vocab_size}",
                hint="use the tokenizer of this model",
            )
        if len(prompt.block_keys) != num_tokens // self.block_size:
            raise BadKeyColumn(
                f"{len(prompt.block_keys)} keys for {num_tokens // self.block_size} full blocks of "
                f"{num_tokens} tokens",
                hint=f"send one key for each {self.block_size} tokens",
            )

"""The model on its one compute thread.

Rules kept here: the event loop never computes; steps run one at a time, in the order of asking; a
step that has begun is waited for even by a cancelled caller, because it writes KV; tokens that pass
layer 0 are counted by the model and nowhere else. A block that has been granted to nobody is never
written.
"""

# ruff: noqa: N803, N806  (tensors carry their shapes: R spans, V vocabulary)

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from snowskin.engines.cancellation import outlast
from snowskin.engines.errors import LogitsNotFinite
from snowskin.engines.model.sampler import SampledToken, SamplingParams, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    import torch

    from snowskin.engines.model.kv_memory import KvMemory
    from snowskin.engines.model.llama import LlamaModel, Span


@dataclass(frozen=True, slots=True)
class Draw:
    """Sample the token at `position` from a span's last logits."""

    params: SamplingParams
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """What a step gave: for each span a token, an error of that span alone, or nothing."""

    tokens: tuple[SampledToken | LogitsNotFinite | None, ...]
    seconds: float


class ModelRunner:
    """Owns a model, its KV memory and the thread that computes; an async context manager."""

    def __init__(self, model: LlamaModel, memory: KvMemory) -> None:
        """Starts no thread before the first step."""
        self.memory = memory
        self.on_step: Callable[[float], None] | None = None  # is told each step's seconds
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snowskin-compute")
        self._num_uncounted = 0

    @property
    def num_tokens_computed(self) -> int:
        """Tokens that passed layer 0, warm-up apart."""
        return self._model.num_tokens_embedded - self._num_uncounted

    async def step(self, spans: Sequence[Span], draws: Sequence[Draw | None]) -> Step:
        """Computes one batch; `draws[i]` says whether and how to sample behind span i."""
        loop = asyncio.get_running_loop()
        step = await outlast(loop.run_in_executor(self._thread, self._step, spans, draws))
        if self.on_step is not None:
            self.on_step(step.seconds)
        return step

    async def warm_up(self, num_tokens: int) -> float:
        """Computes `num_tokens` made-up tokens twice, uncounted; seconds of the second time."""
        from snowskin.engines.model.llama import Span

        num_blocks = -(-num_tokens // self.memory.block_size)
        block_ids = self.memory.allocate(num_blocks)
        span = Span(token_ids=[0] * num_tokens, start=0, block_ids=block_ids)
        before = self._model.num_tokens_embedded
        try:
            await self.step([span], [None])
            seconds = (await self.step([span], [None])).seconds
        finally:
            self._num_uncounted += self._model.num_tokens_embedded - before
            self.memory.free(block_ids)
        return seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The thread is idle: every step was waited for by its caller.
        self._thread.shutdown(wait=True)

    def _step(self, spans: Sequence[Span], draws: Sequence[Draw | None]) -> Step:
        began_s = time.perf_counter()
        logits_RV = self._model.forward(spans, self.memory)
        tokens = tuple(
            None if draw is None else _draw(logits_RV[row], draw) for row, draw in enumerate(draws)
        )
        return Step(tokens, time.perf_counter() - began_s)


def _draw(logits_V: torch.Tensor, draw: Draw) -> SampledToken | LogitsNotFinite:
    try:
        return sample(logits_V, draw.params, draw.position)
    except LogitsNotFinite as error:
        return error  # the other sequences of the batch go on

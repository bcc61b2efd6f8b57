"""Continuous batching: which tokens the next step computes, and the loop that computes them.

Rules kept here (Orca, Yu et al. 2022, section 3.2; chunks beside decodes as in Sarathi-Serve,
Agrawal et al. 2024, section 4): every running sequence that waits for its next token is in every
step; what is left of the token budget goes to longer backlogs in the order of joining, at least one
token to the first of them; a sequence joins and leaves between any two steps; nothing that a step
still writes is given back (`leave`). One sequence's broken logits end that sequence alone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import outlast
from snowskin.engines.errors import InstanceDraining, LogitsNotFinite
from snowskin.engines.runner import Draw, Step
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Ordered

    from snowskin.engines.model.sampler import SampledToken
    from snowskin.engines.runner import ModelRunner
    from snowskin.engines.sequence import Sequence

log = get_logger(__name__)

Plan = list[tuple["Sequence", int]]


def plan_step(sequences: Ordered[Sequence], *, token_budget: int) -> Plan:
    """How many pending tokens of which sequence the next step computes."""
    plan = [(sequence, 1) for sequence in sequences if sequence.num_pending == 1]
    left = max(1, token_budget - len(plan))
    for sequence in sequences:
        if left and sequence.num_pending > 1:
            num_tokens = min(left, sequence.num_pending)
            plan.append((sequence, num_tokens))
            left -= num_tokens
    return plan


class Batch:
    """Sequences that generate together; `run` is a task that the instance owns.

    Attributes:
        num_failed_steps: steps that raised, each of which ended the sequences in it.
    """

    def __init__(
        self, runner: ModelRunner, *, token_budget: int, on_step: Callable[[Plan, Step], None]
    ) -> None:
        """`on_step` is told of every step that was computed."""
        self.num_failed_steps = 0
        self._runner = runner
        self._token_budget = token_budget
        self._on_step = on_step
        self._running: list[Sequence] = []
        self._stepping: frozenset[Sequence] = frozenset()
        self._joined = asyncio.Event()
        self._step_over = asyncio.Event()
        self._closed = False

    @property
    def num_running(self) -> int:
        """Sequences that generate."""
        return len(self._running)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that the running sequences still have to compute before they can generate."""
        return sum(sequence.num_pending - 1 for sequence in self._running)

    def join(self, sequence: Sequence) -> None:
        """Adds a sequence, from the next step on; its tokens come through `sequence.outputs`.

        Raises:
            InstanceDraining: the loop has ended.
        """
        if self._closed:
            raise _ended()
        assert sequence.num_pending >= 1, "the newest token of a running sequence has no KV"
        self._running.append(sequence)
        self._joined.set()

    async def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out; when this returns, or raises, no step touches its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        while sequence in self._stepping:
            await outlast(self._step_over.wait())

    async def run(self) -> None:
        """Computes step after step until cancelled; then every sequence ends with an error."""
        try:
            while True:
                while not self._running:
                    self._joined.clear()
                    await self._joined.wait()
                await self._step(plan_step(self._running, token_budget=self._token_budget))
        finally:
            self._closed = True
            self._fail(self._running, _ended())

    async def _step(self, plan: Plan) -> None:
        self._stepping = frozenset(sequence for sequence, _ in plan)
        self._step_over.clear()
        spans = [sequence.span(num_tokens) for sequence, num_tokens in plan]
        draws = [
            Draw(sequence.sampling, len(sequence.token_ids))
            if num_tokens == sequence.num_pending
            else None
            for sequence, num_tokens in plan
        ]
        try:
            step = await self._runner.step(spans, draws)
        except Exception as error:
            self.num_failed_steps += 1
            log.error("step failed", num_sequences=len(plan), error=repr(error), exc_info=error)
            self._fail([sequence for sequence, _ in plan], _typed(error))
        else:
            for (sequence, num_tokens), token in zip(plan, step.tokens, strict=True):
                sequence.num_computed += num_tokens
                if token is not None and sequence in self._running:
                    self._deliver(sequence, token)
            self._on_step(plan, step)
        finally:
            self._stepping = frozenset()
            self._step_over.set()

    def _deliver(self, sequence: Sequence, token: SampledToken | LogitsNotFinite) -> None:
        if isinstance(token, LogitsNotFinite):
            self._fail([sequence], token)
            return
        drawn = sequence.append(token.token_id)
        sequence.outputs.put_nowait(drawn)
        if drawn.finish_reason:
            self._running.remove(sequence)

    def _fail(self, sequences: Ordered[Sequence], error: SnowskinError) -> None:
        for sequence in list(sequences):
            if sequence in self._running:
                self._running.remove(sequence)
                sequence.outputs.put_nowait(error)


def _ended() -> InstanceDraining:
    return InstanceDraining(
        "the instance stopped before the answer was complete",
        hint="send the request to another instance",
        retry_after_s=1.0,
    )


def _typed(error: Exception) -> SnowskinError:
    if isinstance(error, SnowskinError):
        return error
    return SnowskinError(f"a step failed: {error!r}", hint="see this instance's log")

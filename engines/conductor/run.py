"""One request from prompt to last token, over as many instances as it takes.

How it works: decode is started first and waits, pulling what prefill publishes; prefill computes
and answers with the first token, which goes to the user at once, and the hand-off, which goes to
decode. Rules kept here:

- a prefill or decode that is lost before the hand-off is tried elsewhere while the other goes on,
  under the same id: decode asks for the tail by the id that it was started with;
- a decode that is lost after the hand-off is replayed: prompt and emitted tokens are the prompt of
  a new attempt with its own id. Sampling depends on seed and position only, so the text continues
  as it would have: no token is emitted twice, none is left out;
- only a lost instance (UNAVAILABLE, or a call whose end gRPC hides) or a full one
  (RESOURCE_EXHAUSTED) is tried elsewhere, each stage `max_retries` times; every other error is the
  request's;
- cancelling `work` cancels both calls and waits until they are over;
- an attempt that decode did not finish leaves nothing for it at the nodes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import ended
from snowskin.engines.conductor.errors import InstanceLost, RequestRefused, RequestTimedOut
from snowskin.engines.conductor.job import (
    Event,
    Finished,
    FirstToken,
    Job,
    JobReport,
    Sampling,
    Tokens,
)
from snowskin.engines.conductor.request import Stage
from snowskin.engines.conductor.state import Outcome
from snowskin.kvstore.telemetry import bind_request, get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.engines.conductor.engine_client import DecodeCall, EngineClients
    from snowskin.engines.conductor.leftovers import Sweeper
    from snowskin.engines.conductor.request import Request
    from snowskin.engines.conductor.scheduler import Placed, Prepared, Scheduler
    from snowskin.engines.messages import Handoff, PrefillResponse, Prompt
    from snowskin.kvstore.clock import Clock

MAX_QUEUED_EVENTS = 256  # a slow reader then slows its own decode stream down, nobody else's
STOP, LENGTH = "stop", "length"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """What one request may take.

    Attributes:
        request_timeout_s: from its start to its last token.
        max_retries: of each stage, besides the first try.
    """

    request_timeout_s: float = 300.0
    max_retries: int = 2


class _DecodeLost(Exception):
    """Decode broke after the hand-off: the attempt is over, and can be replayed."""

    def __init__(self, error: SnowskinError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """A prompt (with what was emitted so far) and what is still to be generated.

    `node` resolves to the node that prefill publishes to; `nodes` are all that one has published to.
    `handed_off` once decode has the hand-off, `is_read` once nothing is left for decode at the nodes.
    """

    id: str
    prepared: Prepared
    sampling: Sampling
    node: asyncio.Future[str] = field(default_factory=asyncio.Future)
    nodes: list[str] = field(default_factory=list)
    handed_off: bool = False
    is_read: bool = False


class Run:
    """One job under way.

    Attributes:
        id: the job's, made unique; names it to the instances.
        report: what it cost so far.
        outcome: how it ended, or how it will have ended if it is left now.
        error: why it was not finished.
        on_emit: is told how many tokens have come, as they come.
    """

    def __init__(
        self,
        job: Job,
        run_id: str,
        *,
        scheduler: Scheduler,
        engines: EngineClients,
        sweeper: Sweeper,
        clock: Clock,
        limits: RunLimits,
    ) -> None:
        """Not started: `work` is."""
        self.id = run_id
        self.job = job
        self.report = JobReport(num_prompt_tokens=len(job.token_ids))
        self.outcome = Outcome.CANCELLED
        self.error: SnowskinError | None = None
        self.on_emit: Callable[[int], None] | None = None
        self._scheduler = scheduler
        self._engines = engines
        self._sweeper = sweeper
        self._clock = clock
        self._limits = limits
        self._deadline_s = clock.now_s() + limits.request_timeout_s
        self._emitted: list[int] = []
        self._max_tokens = 0
        self._events: asyncio.Queue[Event | SnowskinError] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._read_to_end = False
        self._task: asyncio.Task[None] | None = None
        self._cut: SnowskinError | None = None

    # --- for who reads the answer

    def __aiter__(self) -> Run:
        """Events in order; the last is `Finished`, unless an error is raised."""
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            SnowskinError: why the job cannot be finished.
        """
        if self._read_to_end:
            raise StopAsyncIteration
        event = await self._events.get()
        self._read_to_end = isinstance(event, Finished | SnowskinError)
        if isinstance(event, SnowskinError):
            raise event
        return event

    def enough(self) -> None:
        """The reader has its answer (a stop string came): the rest is not wanted."""
        self.outcome = Outcome.FINISHED

    def cut(self, error: SnowskinError) -> None:
        """Ends the work now; whoever reads the answer gets `error`, if it was not over already."""
        self._cut = error
        if self._task is not None:
            self._task.cancel()

    # --- the work

    async def work(self) -> None:
        """Runs the job to its end and queues what comes of it; the owner of the job's errors."""
        self._task = asyncio.current_task()
        with bind_request(self.job.request_id):
            try:
                if self._cut is not None:
                    raise self._cut
                async with asyncio.timeout(self._limits.request_timeout_s):
                    finish_reason = await self._generate()
                self.outcome = Outcome.FINISHED
                await self._events.put(Finished(finish_reason))
            except TimeoutError:
                await self._fail(
                    RequestTimedOut(
                        f"not finished within {self._limits.request_timeout_s} s, "
                        f"{len(self._emitted)} tokens came",
                        hint="ask for fewer tokens, or raise the conductor's request_timeout_s",
                    )
                )
            except asyncio.CancelledError:
                if self._cut is None or self._task is None:
                    raise
                self._task.uncancel()
                await self._fail(self._cut)
            except SnowskinError as error:
                await self._fail(error)
            except Exception as error:
                log.error("request broke", error=repr(error), exc_info=error)
                await self._fail(SnowskinError(f"internal error: {type(error).__name__}"))
            finally:
                self._log_end()

    async def _generate(self) -> str:
        prepared = await self._prepare(self.id, self.job.max_tokens, is_new=True)
        await self._scheduler.admit(prepared.request)
        self._max_tokens = prepared.request.max_tokens
        attempt_id, num_attempts = self.id, 1
        while True:
            sampling = replace(self.job.sampling, max_tokens=prepared.request.max_tokens)
            try:
                return await self._attempt(
                    _Attempt(id=attempt_id, prepared=prepared, sampling=sampling)
                )
            except _DecodeLost as lost:
                finish_reason = self._reason_to_end()
                if finish_reason:  # only the last word was lost
                    return finish_reason
                self._count_retry(Stage.DECODE, lost.error)
            attempt_id = f"{self.id}.r{num_attempts}"
            num_attempts += 1
            prepared = await self._prepare(attempt_id, self._max_tokens - len(self._emitted))

    async def _prepare(
        self, attempt_id: str, max_tokens: int | None, *, is_new: bool = False
    ) -> Prepared:
        return await self._scheduler.prepare(
            self.id,
            [*self.job.token_ids, *self._emitted],
            max_tokens=max_tokens,
            default_max_tokens=self.job.default_max_tokens,
            is_new=is_new,
            use_cache=self.job.use_cache,
            # Of the attempt, so that blocks that a lost one left for its only reader are not hit.
            salt=f"{attempt_id} {self.job.salt}",
        )

    async def _attempt(self, attempt: _Attempt) -> str:
        prefill = asyncio.create_task(self._prefill(attempt))
        tasks: list[asyncio.Task[Handoff] | asyncio.Task[str]] = [prefill]
        try:
            if attempt.sampling.max_tokens == 1:  # nothing to decode, and nobody to pull for
                finish_reason = (await prefill).finish_reason or LENGTH
                attempt.is_read = True
                return finish_reason
            decode = asyncio.create_task(self._decode(attempt, prefill))
            tasks.append(decode)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if prefill.done() and (finish_reason := prefill.result().finish_reason):
                return finish_reason
            finish_reason = await decode
            attempt.is_read = True
            return finish_reason
        finally:
            for task in tasks:
                task.cancel()
            try:
                await ended(*tasks)
            finally:
                if not attempt.is_read:
                    self._sweep(attempt)

    def _sweep(self, attempt: _Attempt) -> None:
        prepared = attempt.prepared
        block_size = prepared.request.shape.block_size
        self._sweeper.sweep(
            attempt.nodes, prepared.prompt, block_size=block_size, attempt_id=attempt.id
        )

    # --- prefill

    async def _prefill(self, attempt: _Attempt) -> Handoff:
        request, excluded = attempt.prepared.request, frozenset[str]()
        while True:
            async with self._scheduler.placed(request, Stage.PREFILL, excluded) as placed:
                if not attempt.node.done():
                    attempt.node.set_result(placed.instance.node_address)
                attempt.nodes.append(placed.instance.node_address)
                self.report.prefill_instance_id = placed.instance.instance_id
                self.report.estimate = placed.placement.estimate
                try:
                    response = await self._engines.prefill(
                        placed.instance,
                        request_id=attempt.id,
                        log_id=self.job.request_id,
                        prompt=replace(
                            attempt.prepared.prompt,
                            node_addresses=placed.placement.node_addresses,
                        ),
                        sampling=attempt.sampling,
                        timeout_s=self._left_s(),
                    )
                except SnowskinError as error:
                    excluded = self._elsewhere(request, placed, error, excluded)
                    continue
            self._scheduler.on_prefilled(
                attempt.prepared, placed.placement, response.stats.num_cached_tokens
            )
            await self._on_prefilled(response)
            return response.handoff

    async def _on_prefilled(self, response: PrefillResponse) -> None:
        report, token_id = self.report, response.handoff.first_token_id
        report.prefill = response.stats
        if report.num_cached_tokens is None:
            report.num_cached_tokens = response.stats.num_cached_tokens
        if report.ttft_s is None:
            report.ttft_s = self._clock.now_s() - self.job.arrived_at_s
            await self._emit(FirstToken(token_id), (token_id,))
        else:
            await self._emit(Tokens((token_id,)), (token_id,))

    # --- decode

    async def _decode(self, attempt: _Attempt, prefill: asyncio.Task[Handoff]) -> str:
        request, excluded = attempt.prepared.request, frozenset[str]()
        writer = await attempt.node
        while True:
            async with self._scheduler.placed(request, Stage.DECODE, excluded) as placed:
                self.report.decode_instance_id = placed.instance.instance_id
                nodes = dict.fromkeys((writer, *placed.placement.node_addresses))
                prompt = replace(attempt.prepared.prompt, node_addresses=tuple(nodes))
                try:
                    async with self._engines.decode(
                        placed.instance, log_id=self.job.request_id, timeout_s=self._left_s()
                    ) as call:
                        return await self._converse(call, attempt, prompt, prefill)
                except SnowskinError as error:
                    if attempt.handed_off:
                        raise self._after_handoff(placed, error) from error
                    excluded = self._elsewhere(request, placed, error, excluded)

    async def _converse(
        self, call: DecodeCall, attempt: _Attempt, prompt: Prompt, prefill: asyncio.Task[Handoff]
    ) -> str:
        """Starts, waits for prefill, hands off, reads to the end; "" where prefill failed."""
        await call.start(attempt.id, prompt, attempt.sampling, self._left_s())
        reading = asyncio.create_task(call.read())
        try:
            await asyncio.wait({reading, prefill}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                output = reading.result()  # raises what ended the call
                raise InstanceLost(f"decode answered before its hand-off: {output}")
            if prefill.cancelled() or prefill.exception() is not None:
                return ""  # the attempt ends with prefill's error
            attempt.handed_off = True
            await call.hand_off(prefill.result())
            log.info("handed off", position=prefill.result().position)
            output = await reading
        finally:
            reading.cancel()
            await ended(reading)
        while True:
            if output.token_ids:
                await self._emit(Tokens(output.token_ids), output.token_ids)
            if output.finish_reason:
                self.report.decode = output.stats
                return output.finish_reason
            output = await call.read()

    def _after_handoff(self, placed: Placed, error: SnowskinError) -> Exception:
        """What becomes of an error that came while decode was generating."""
        if not _is_elsewhere(error):
            return error
        self._note_failure(placed, error)
        return _DecodeLost(error)

    # --- retries

    def _elsewhere(
        self, request: Request, placed: Placed, error: SnowskinError, excluded: frozenset[str]
    ) -> frozenset[str]:
        """Instances not to try again for this request; raises `error` where trying is over."""
        if not _is_elsewhere(error):
            raise error
        stage = placed.placement.stage
        self._note_failure(placed, error)
        if error.status == "RESOURCE_EXHAUSTED":  # it is well, only full
            excluded |= {placed.instance.instance_id}
            others = replace(request, excluded=excluded)
            if not self._scheduler.view().candidates(others, stage):
                raise error
        self._count_retry(stage, error)
        return excluded

    def _note_failure(self, placed: Placed, error: SnowskinError) -> None:
        instance = placed.instance
        log.warning(
            "instance failed",
            instance=instance.instance_id,
            stage=str(placed.placement.stage),
            reason=error.reason,
            error=str(error),
        )
        if error.status == "UNAVAILABLE":
            self._scheduler.state.on_failed(instance.instance_id, instance.epoch)

    def _count_retry(self, stage: Stage, error: SnowskinError) -> None:
        """Before a stage is tried again; raises `error` where that was often enough."""
        report = self.report
        is_prefill = stage is Stage.PREFILL
        num_retries = report.num_prefill_retries if is_prefill else report.num_decode_retries
        if num_retries >= self._limits.max_retries:
            raise error
        if is_prefill:
            report.num_prefill_retries += 1
        else:
            report.num_decode_retries += 1

    def _reason_to_end(self) -> str:
        """The finish reason that the emitted tokens give by themselves, or ""."""
        if self._emitted and self._emitted[-1] in self.job.sampling.stop_token_ids:
            return STOP
        return LENGTH if len(self._emitted) >= self._max_tokens else ""

    # --- small things

    def _left_s(self) -> float:
        return max(0.001, self._deadline_s - self._clock.now_s())

    async def _emit(self, event: Event, token_ids: tuple[int, ...]) -> None:
        # Recorded and queued without a pause between: a replay must know of every queued token.
        self._emitted.extend(token_ids)
        if self.on_emit is not None:
            self.on_emit(len(token_ids))
        self.report.num_generated_tokens = len(self._emitted)
        await self._events.put(event)

    async def _fail(self, error: SnowskinError) -> None:
        self.outcome = Outcome.REFUSED if isinstance(error, RequestRefused) else Outcome.FAILED
        self.error = error
        log.warning("request failed", reason=error.reason, error=str(error))
        await self._events.put(error)

    def _log_end(self) -> None:
        report = self.report
        log.info(
            "request ended",
            outcome=str(self.outcome),
            num_prompt_tokens=report.num_prompt_tokens,
            num_cached_tokens=report.num_cached_tokens,
            num_generated_tokens=report.num_generated_tokens,
            ttft_s=report.ttft_s and round(report.ttft_s, 4),
            prefill_instance=report.prefill_instance_id,
            decode_instance=report.decode_instance_id,
            num_retries=report.num_prefill_retries + report.num_decode_retries,
            **({"user": self.job.user} if self.job.user else {}),
        )


def _is_elsewhere(error: SnowskinError) -> bool:
    """Whether another instance may do what this one could not."""
    return error.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")

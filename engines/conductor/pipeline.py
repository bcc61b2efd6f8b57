"""The jobs that are under way: takes them in, counts them, waits for them when the process drains.

Rules kept here: whoever is one too many is told so before anything is done for it; a job is counted
from its arrival to its end, whatever the end is; no two jobs have the same internal id, here or at
another conductor, whatever their users called them; leaving the block of `run` ends the job and
everything that it held.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import ended
from snowskin.engines.conductor.admission import check_number
from snowskin.engines.conductor.errors import ConductorDraining, RequestRefused
from snowskin.engines.conductor.leftovers import Sweeper
from snowskin.engines.conductor.run import Run, RunLimits
from snowskin.kvstore.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from snowskin.engines.conductor.engine_client import EngineClients
    from snowskin.engines.conductor.job import Job
    from snowskin.engines.conductor.metrics import ConductorMetrics
    from snowskin.engines.conductor.scheduler import Scheduler
    from snowskin.kvstore.clock import Clock
    from snowskin.kvstore.tracing import Tracer

CUT_S = 1.0

log = get_logger(__name__)


class Pipeline:
    """Runs jobs."""

    def __init__(
        self,
        scheduler: Scheduler,
        engines: EngineClients,
        clock: Clock,
        limits: RunLimits | None = None,
        *,
        metrics: ConductorMetrics | None = None,
    ) -> None:
        """Places by `scheduler`, calls by `engines`."""
        self.scheduler = scheduler
        self.tracer: Tracer | None = None  # of requests that are traced
        self._metrics = metrics
        self._engines = engines
        self._clock = clock
        self._limits = limits or RunLimits()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._mark = secrets.token_hex(4)  # of this conductor's start
        self._num_runs = 0
        self._num_in_intake = 0
        self._runs: set[Run] = set()
        self._sweeper = Sweeper(scheduler.nodes)

    @contextmanager
    def intake(self) -> Iterator[None]:
        """The time in which a request is understood, before there is a job; it counts as in flight.

        Raises:
            RequestRefused: there are too many requests already.
            ConductorDraining: no new jobs are taken.
        """
        self._check_room()
        self._num_in_intake += 1
        try:
            yield
        finally:
            self._num_in_intake -= 1

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[Run]:
        """A running job; iterate over it for its events.

        Leaving the block early cancels the job: as finished where `Run.enough` was called, else as
        given up by the user.

        Raises:
            RequestRefused: there are too many requests already.
            ConductorDraining: no new jobs are taken.
        """
        self._check_room()
        state = self.scheduler.state
        run = Run(
            job,
            self._internal_id(job.request_id),
            scheduler=self.scheduler,
            engines=self._engines,
            sweeper=self._sweeper,
            clock=self._clock,
            limits=self._limits,
        )
        state.on_request_started(run.id)
        self._idle.clear()
        meter = self._metrics.request(self._clock, job.arrived_at_s) if self._metrics else None
        if meter is not None:
            run.on_emit = meter.emitted
        work = run.work() if self.tracer is None else self._traced(self.tracer, run)
        task = asyncio.create_task(work, name=f"run:{run.id}")
        self._runs.add(run)
        try:
            yield run
        finally:
            self._runs.discard(run)
            task.cancel()
            try:
                await ended(task)
            finally:  # also where the reader is cancelled just now: a job that is over is not counted
                state.on_request_ended(run.id, run.outcome)
                if meter is not None:
                    meter.ended(run.outcome, run.report, run.error)
                if not state.counts().num_running:
                    self._idle.set()

    async def _traced(self, tracer: Tracer, run: Run) -> None:
        job = run.job
        waited_s = self._clock.now_s() - job.arrived_at_s
        with tracer.beginning(
            "request", job.traceparent, job.tracestate, request_id=job.request_id, intake_s=waited_s
        ) as span:
            try:
                await run.work()
            finally:
                if span is not None:
                    span.annotate(
                        outcome=str(run.outcome),
                        num_prompt_tokens=run.report.num_prompt_tokens,
                        num_cached_tokens=run.report.num_cached_tokens or 0,
                        num_generated_tokens=run.report.num_generated_tokens,
                    )

    @property
    def is_draining(self) -> bool:
        """Whether new jobs are refused."""
        return self._draining

    async def drain(self, timeout_s: float) -> None:
        """Takes no more jobs; returns when the last has ended.

        After `timeout_s` seconds those that still run are ended with an error, and their readers
        get `CUT_S` to take it.
        """
        self._draining = True
        if await self._is_idle_within(timeout_s):
            return
        log.warning("not drained", num_running=len(self._runs))
        for run in list(self._runs):
            run.cut(
                ConductorDraining(
                    f"the conductor is shutting down, and the answer was not there in {timeout_s} s",
                    hint="ask again; raise drain_s where answers take longer",
                )
            )
        await self._is_idle_within(CUT_S)

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends what is done for jobs that are over; no job is under way any more."""
        await self._sweeper.close()

    def _check_room(self) -> None:
        if self._draining:
            raise ConductorDraining("the conductor is shutting down", hint="retry in a while")
        state = self.scheduler.state
        num_in_flight = state.num_running + self._num_in_intake
        refusal = check_number(num_in_flight, self.scheduler.policy.limits)
        if refusal is not None:
            state.on_request_turned_away()
            error = RequestRefused.because(refusal)
            if self._metrics is not None:
                self._metrics.refused(error)
            raise error

    def _internal_id(self, request_id: str) -> str:
        """The user's id, made unique: tails are named by it, and a reader must find its own.

        Users give one id to several requests: a retry, while what the first one left is freed, or
        side by side, here and at another conductor over the same nodes.
        """
        self._num_runs += 1
        return f"{request_id}.{self._mark}.{self._num_runs}"

"""One child that is kept alive: started, watched, started again, stopped.

Rules kept here: one owner, this class, starts and stops the child; a stop beats a restart that is under way. When to
start again is decided by `RestartHistory`. A child that is ready and answers no more is as good as dead, and is killed.
A restarted child gets the command that its last facts ask for, so that
it comes back under the addresses that others know. Every event is one log line with the child's name.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.kvstore.telemetry import get_logger
from snowskin.tools.cluster.child import Child, Forward, Ready, describe_exit
from snowskin.tools.cluster.errors import ChildFailed, ChildGivenUp
from snowskin.tools.cluster.restarts import GiveUp, RestartHistory, RestartLimits
from snowskin.tools.cluster.vital_signs import until_silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run, and how.

    Attributes:
        command: from the facts of the last run that became ready (None before the first) to the argument list.
        environment: added to the supervisor's own.
        start_timeout_s: seconds from start to the ready line.
        drain_s: seconds from SIGTERM to SIGKILL.
        restart: whether a death is followed by a start.
        hang_s: seconds without any answer at `/healthz` after which a ready child is killed; 0 is never.
    """

    name: str
    role: str
    command: Callable[[Ready | None], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    forward: Forward | None = None
    start_timeout_s: float = 120.0
    drain_s: float = 10.0
    restart: bool = True
    hang_s: float = 0.0
    limits: RestartLimits = field(default_factory=RestartLimits)


class Supervised:
    """A child process under supervision."""

    def __init__(
        self, spec: ChildSpec, *, on_failure: Callable[[Supervised, ChildGivenUp], None]
    ) -> None:
        """Nothing runs yet; `on_failure` is called once if the child stays dead."""
        self.spec = spec
        self.facts: Ready | None = None
        self.num_starts = 0
        self._on_failure = on_failure
        self._history = RestartHistory(spec.limits)
        self._child: Child | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._state = "new"
        self._changed = asyncio.Condition()

    @property
    def name(self) -> str:
        """The child's name in this cluster, also its instance id."""
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """Of the run under way, None while there is none."""
        return self._child.pid if self._child is not None and self._child.running else None

    @property
    def state(self) -> str:
        """One of new, starting, ready, waiting (for its restart), failed, stopped."""
        return self._state

    def _spawn(self) -> Child:
        spec = self.spec
        self.num_starts += 1
        self._state = "starting"
        try:
            self._child = Child(
                spec.name,
                spec.command(self.facts),
                environment={**os.environ, **spec.environment},
                log_path=spec.log_path,
                forward=spec.forward,
            )
        except OSError as error:
            raise ChildFailed(
                f"{spec.name} cannot be started: {error}",
                hint="the host may lack memory, processes or descriptors",
            ) from error
        log.info("child started", child=spec.name, pid=self._child.pid, start=self.num_starts)
        return self._child

    async def _became(self, state: str) -> None:
        async with self._changed:
            self._state = state
            self._changed.notify_all()

    async def start(self, *, num_tries: int = 1) -> Ready:
        """Starts the child for the first time; from then on it is watched.

        Args:
            num_tries: how often; more than once where a port that was free may have been taken meanwhile.

        Raises:
            ChildFailed: it did not become ready.
        """
        for try_index in range(num_tries):
            try:
                facts = await self._spawn().wait_ready(timeout_s=self.spec.start_timeout_s)
            except ChildFailed as error:
                if self.pid is not None or try_index + 1 == num_tries:
                    raise
                log.warning("child failed to start", child=self.name, error=error.message)
            else:
                await self._on_ready(facts)
                break
        self._watch_task = asyncio.create_task(self._watch(), name=f"watch {self.name}")
        assert self.facts is not None
        return self.facts

    async def _on_ready(self, facts: Ready) -> None:
        self.facts = facts
        log.info("child ready", child=self.name, pid=facts.pid, address=facts.address)
        await self._became("ready")

    async def _watch(self) -> None:
        while (child := self._child) is not None:
            status = await self._ended(child)
            now_s = asyncio.get_running_loop().time()
            log.warning("child died", child=self.name, pid=child.pid, why=describe_exit(status))
            decision = self._history.on_death(ready_at_s=child.ready_at_s, now_s=now_s)
            if isinstance(decision, GiveUp) or not self.spec.restart:
                await self._give_up(child, status)
                return
            await self._became("waiting")
            if decision.delay_s > 0:
                log.warning("child restarts later", child=self.name, delay_s=decision.delay_s)
                await asyncio.sleep(decision.delay_s)
            try:
                facts = await self._spawn().wait_ready(timeout_s=self.spec.start_timeout_s)
            except ChildFailed as error:
                log.warning("child failed to start", child=self.name, error=error.message)
                self.send(signal.SIGKILL)  # the next round counts the death and decides
            else:
                await self._on_ready(facts)

    async def _ended(self, child: Child) -> int:
        """The exit status of a child that has ended by itself, or because it answered no more."""
        address = self.facts.http_address if self.facts is not None else ""
        if not address or not self.spec.hang_s or child.ready_at_s is None:
            return await asyncio.shield(child.exited)
        silence = asyncio.create_task(until_silent(address, self.spec.hang_s))
        try:
            await asyncio.wait((child.exited, silence), return_when=asyncio.FIRST_COMPLETED)
            if child.running:
                silence.result()  # raises what broke it
                log.error("child hangs", child=self.name, pid=child.pid, silent_s=self.spec.hang_s)
                child.send(signal.SIGKILL)
            return await asyncio.shield(child.exited)
        finally:
            silence.cancel()
            await asyncio.wait((silence,))

    async def _give_up(self, child: Child, status: int) -> None:
        tail = "".join(f"\n    {line}" for line in child.tail())
        num_deaths = self._history.num_quick_deaths
        why = f"died {num_deaths} times in a row" if self.spec.restart else "died"
        error = ChildGivenUp(
            f"{self.name} {why}, the last time with {describe_exit(status)}{tail}",
            hint="its last lines say why; it is not started again",
        )
        log.error("child given up", child=self.name, num_quick_deaths=num_deaths)
        await self._became("failed")
        self._on_failure(self, error)

    def tail(self) -> list[str]:
        """The last lines of the child's output."""
        return self._child.tail() if self._child is not None else []

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the run under way, if there is one."""
        if self._child is not None:
            self._child.send(number)

    async def wait_ready(self, *, min_starts: int = 1, timeout_s: float) -> Ready:
        """Waits until the child is ready and has been started at least `min_starts` times.

        Raises:
            ChildFailed: it was given up, or is not ready in time.
        """

        def settled() -> bool:
            return self._state == "failed" or (
                self._state == "ready" and self.num_starts >= min_starts
            )

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError as error:
            raise ChildFailed(
                f"{self.name} is {self._state} after {timeout_s} s, started {self.num_starts} times"
            ) from error
        if self._state == "failed" or self.facts is None:
            raise ChildFailed(f"{self.name} was given up after {self.num_starts} starts")
        return self.facts

    async def wait_state(self, state: str) -> None:
        """Waits until `state` is reached; the caller brings the timeout."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._state == state)

    async def stop(self, *, hurry: asyncio.Future[None]) -> None:
        """Ends the child and its supervision; safe to call in any state and more than once."""
        if self._watch_task is not None:
            self._watch_task.cancel()
            await asyncio.wait((self._watch_task,))
            self._watch_task = None
        if self._child is not None:
            was_running = self._child.running
            status = await self._child.stop(drain_s=self.spec.drain_s, hurry=hurry)
            if was_running:
                log.info("child stopped", child=self.name, why=describe_exit(status))
        await self._became("stopped")

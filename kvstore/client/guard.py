"""What stands between requests and one node that may be dead, stopped or slow: `NodeGuard`.

Rules kept here: a look-up never takes longer than is expected of the node and what its request may lose; while the
breaker is open nobody asks, at no cost; a node that was late once is looked at in the background, by probes of its own,
until it answers in time, or is given up and answers again. A broken connection is not this file's: its owner mends it.
Time in which this process itself was held up is not held against the node.

How it works: answers that came before the loop looked are taken before any timer of the same turn, so a loop that was
busy makes no look-up late. What remains is a process that did not run at all: a timer that fires much too late says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.client.breaker import (
    Breaker,
    BreakerRules,
    BreakerState,
    LookupBudget,
    LookupTime,
)
from snowskin.kvstore.errors import DeadlineExceeded, NodeSilent
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.tracing import of_no_request
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

# How long a probe waits: a node that answers later than a look-up may, but within this, is slow and not gone.
PROBE_S = 0.1
OWN_LAG_S = 0.01

log = get_logger(__name__)


class Asking:
    """One call under way.

    Attributes:
        timeout_s: how long it may take to be answered, the wait inside the node included.
    """

    def __init__(self, guard: NodeGuard, budget: LookupBudget, waits_s: float) -> None:
        """Begins now."""
        self.expected_s = waits_s + guard.lookups.expected_s
        self.timeout_s = self.expected_s + budget.left_s
        self.began_at_s = time.monotonic()
        self.is_answered = False
        self._guard = guard
        self._budget = budget
        self._waits = waits_s > 0.0

    def answered(self) -> None:
        """The node has answered; what follows (a copy) is not its time. The end of the block says so too."""
        if not self.is_answered:
            seconds = self.ended()
            self.is_answered = True
            if not self._waits:
                self._guard.lookups.add(seconds)
            self._guard.on_answer()

    def abandon(self) -> None:
        """Nobody waits for the answer any more: that says nothing of the node."""
        self.is_answered = True

    def ended(self) -> float:
        """Takes what an unanswered call took too long from the budget; the seconds since it began."""
        seconds = time.monotonic() - self.began_at_s
        if not self.is_answered:
            self._budget.spend(seconds, expected_s=self.expected_s)
        return seconds


class NodeGuard:
    """Judges one node by its answers, and keeps requests from it while it gives none.

    Attributes:
        budget_s: what a request may lose to nodes beyond what they are expected to take.
        breaker: whether requests may ask it, and how often it failed.
        lookups: how long it takes to answer.
        num_late: calls that were given up.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], Awaitable[object]],
        *,
        budget_s: float,
        rules: BreakerRules | None = None,
    ) -> None:
        """`name` is for the log; `probe` asks the node something small, as long as it is let."""
        self.budget_s = budget_s
        self.breaker = Breaker(rules)
        self.lookups = LookupTime()
        self.num_late = 0
        self._name = name
        self._probe = probe
        self._checking: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def usable(self) -> bool:
        """Whether requests may ask the node."""
        return self.breaker.state is BreakerState.CLOSED

    def check(self) -> None:
        """Refuses a request while the node is left alone.

        Raises:
            NodeSilent: it is.
        """
        if not self.breaker.allows():
            raise NodeSilent(
                f"{self._name} did not answer in time and is left alone",
                hint="nothing to do: it is looked at in the background, and used once it answers",
            )

    @contextlib.contextmanager
    def asking(
        self, budget: LookupBudget | None = None, *, waits_s: float = 0.0
    ) -> Iterator[Asking]:
        """A block that makes one call and bounds it by `Asking.timeout_s`.

        Args:
            budget: of the request; what is lost beyond the expected time is taken from it. None: a whole one.
            waits_s: how long the node itself may let the call wait; that is never late. Infinite for a call
                that bounds itself.

        Raises:
            NodeSilent: the node is left alone; the block does not run.
        """
        self.check()
        asking = Asking(self, budget or LookupBudget(self.budget_s), waits_s)
        try:
            yield asking
        except DeadlineExceeded:
            # What came behind the answer has a time of its own, and is late by itself.
            timeout_s = None if asking.is_answered else asking.timeout_s
            asking.ended()
            self.on_late(asking.began_at_s, timeout_s)
            raise
        except SnowskinError as error:
            if error.status == "UNAVAILABLE":
                asking.ended()
            else:  # that is an answer too
                asking.answered()
            raise
        except BaseException:
            asking.ended()
            raise
        else:
            asking.answered()

    async def ask(self, budget: LookupBudget) -> None:
        """Asks whether the node answers, on behalf of a request.

        Raises:
            NodeSilent: it is left alone.
            DeadlineExceeded: it did not answer within what the request may lose.
        """
        with self.asking(budget) as asking:
            await self._answer(asking.timeout_s)

    def on_answer(self) -> None:
        """The node answered in time."""
        was_usable = self.usable
        self.breaker.on_answer(time.monotonic())
        if self.usable and not was_usable:
            log.info("node answers again", node=self._name)

    def forget(self) -> None:
        """There is another connection, or none: it begins without a past."""
        self.breaker.on_connected()

    async def close(self) -> None:
        """Ends looking at the node for good; what is late from now on is nobody's business."""
        self._closed = True
        checking, self._checking = self._checking, None
        if checking is not None:
            checking.cancel()
            await asyncio.wait([checking])

    def on_late(self, began_at_s: float, timeout_s: float | None = None) -> None:
        """A call was given up after `timeout_s` seconds; None where it had bounds of its own."""
        now_s = time.monotonic()
        self.num_late += 1
        if self._closed:
            return
        if timeout_s is not None:
            lag_s = now_s - began_at_s - timeout_s
            if lag_s > max(OWN_LAG_S, timeout_s):
                log.debug("held up, not counted", node=self._name, lag_s=round(lag_s, 4))
                return
        was_usable = self.usable
        self.breaker.on_failure(began_at_s=began_at_s, now_s=now_s)
        if was_usable and not self.usable:
            log.warning(
                "node left alone",
                node=self._name,
                num_late=self.num_late,
                num_opened=self.breaker.num_opened,
            )
        if self._checking is None and self.breaker.is_suspect:
            self._checking = asyncio.get_running_loop().create_task(
                self._check(), name=f"check {self._name}", context=of_no_request()
            )

    async def _answer(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._probe()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._name} did not answer within {timeout_s:.3f} s",
                hint="it is stopped or overloaded",
            ) from None

    async def _check(self) -> None:
        """Looks at a suspect node until it is none any more."""
        try:
            while self.breaker.is_suspect:
                await asyncio.sleep(max(0.0, self.breaker.probe_at_s - time.monotonic()))
                if self.breaker.is_suspect:
                    self.breaker.on_probe()
                    await self._look()
        finally:
            self._checking = None

    async def _look(self) -> None:
        began_at_s = time.monotonic()
        try:
            await self._answer(PROBE_S)
        except DeadlineExceeded:
            self.on_late(began_at_s, PROBE_S)
        except SnowskinError as error:
            log.debug("node not looked at", node=self._name, error=str(error))
        else:
            seconds = time.monotonic() - began_at_s
            if seconds <= self.lookups.expected_s + self.budget_s:
                self.on_answer()
        # Whatever else it was: no more is known than before, and the next look is later.
        if self.breaker.is_suspect and self.breaker.probe_at_s <= began_at_s:
            self.breaker.on_slow_probe(time.monotonic())

"""When to leave a node alone, and what asking it may cost a request: `Breaker`, `LookupTime`, `LookupBudget`.

Rules kept here: time comes in. One silence is one failure, however many calls it made late: a failure of a call that
began before the last failure was noticed is not counted again. `num_failures` failures in a row within `window_s` open
the breaker; an answer in time begins the count anew, so that a pause of the node (its garbage collector, a busy host)
does not. Open, it refuses every request and costs it nothing; only probes ask the node, after pauses that double, and
the first answer in time closes it. A probe is nobody's request.

    closed --num_failures in a row--> open --pause over--> half-open --in time--> closed
                                        ^---------------------late-------'

A look-up may take as long as most look-ups of this node took lately, plus what is left of its request's budget. Late
look-ups teach nothing: a node that became slow is judged by what it was.

Source: the circuit breaker of Nygard, "Release It!", 2007, chapter 5.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from snowskin.kvstore.value import value

# Before enough look-ups are known: a first one also pays for code that runs for the first time, on both sides.
FIRST_EXPECTED_S = 0.005
MIN_SAMPLES = 8
NUM_SAMPLES = 64
QUANTILE = 0.95
MAX_EXPECTED_S = 0.05


class BreakerState(StrEnum):
    """Whether requests may ask the node."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@value()
class BreakerRules:
    """When a breaker opens and how often an open one is tried.

    Attributes:
        num_failures: failures in a row that open it.
        window_s: how long a failure counts.
        min_pause_s: before the first probe of an open breaker; doubles with each that fails.
        max_pause_s: what the pause grows to.
        look_s: between two looks at a node that failed once and is not given up.
    """

    num_failures: int = 3
    window_s: float = 5.0
    min_pause_s: float = 0.1
    max_pause_s: float = 1.0
    look_s: float = 0.02


class Breaker:
    """The standing of one node with one client.

    Attributes:
        state: whether requests may ask the node.
        num_opened: how often it was given up.
        num_failures: failures counted, one a silence.
        num_refused: requests that did not ask it.
    """

    def __init__(self, rules: BreakerRules | None = None) -> None:
        """Closed, nothing known."""
        self.state = BreakerState.CLOSED
        self.num_opened = 0
        self.num_failures = 0
        self.num_refused = 0
        self._rules = rules or BreakerRules()
        self._recent: list[
            float
        ] = []  # when failures were noticed, none of them followed by an answer
        self._noticed_at_s = float("-inf")
        self._pause_s = self._rules.min_pause_s
        self._probe_at_s = 0.0
        self._closed_at_s = float("-inf")

    @property
    def is_suspect(self) -> bool:
        """Whether the node failed last: somebody should look at it who is no request."""
        return self.state is not BreakerState.CLOSED or bool(self._recent)

    @property
    def probe_at_s(self) -> float:
        """From when on a suspect node may be looked at."""
        return self._probe_at_s

    def allows(self) -> bool:
        """Whether a request may ask the node; counts those that may not."""
        is_closed = self.state is BreakerState.CLOSED
        self.num_refused += not is_closed
        return is_closed

    def on_probe(self) -> None:
        """The node is being looked at."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def on_answer(self, now_s: float) -> None:
        """It answered in time; what had been asked before it was given up says nothing of it now."""
        if self.state is BreakerState.OPEN:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._closed_at_s = now_s
        self.state = BreakerState.CLOSED
        self._recent.clear()

    def on_slow_probe(self, now_s: float) -> None:
        """A probe was answered, but not in time: no more is known than before."""
        if self.state is BreakerState.CLOSED:
            self._probe_at_s = now_s + self._rules.look_s
        else:
            self._open(now_s)

    def on_failure(self, *, began_at_s: float, now_s: float) -> None:
        """A call that began then was given up, or broke."""
        if self.state is BreakerState.OPEN or began_at_s < self._noticed_at_s:
            return
        self._noticed_at_s = now_s
        self.num_failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._open(now_s)
            return
        oldest_s = now_s - self._rules.window_s
        self._recent = [*(at_s for at_s in self._recent if at_s > oldest_s), now_s]
        self._probe_at_s = now_s
        if len(self._recent) >= self._rules.num_failures:
            if now_s - self._closed_at_s > self._rules.window_s:
                self._pause_s = self._rules.min_pause_s
            self.num_opened += 1
            self._open(now_s)

    def on_connected(self) -> None:
        """Another connection: it begins without a past."""
        self.state = BreakerState.CLOSED
        self._recent.clear()
        self._noticed_at_s = self._closed_at_s = float("-inf")

    def _open(self, now_s: float) -> None:
        self.state = BreakerState.OPEN
        self._recent.clear()
        self._probe_at_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._rules.max_pause_s)


class LookupTime:
    """How long look-ups of one node take."""

    def __init__(self) -> None:
        """None seen."""
        self._samples_s: deque[float] = deque(maxlen=NUM_SAMPLES)
        self._expected_s = FIRST_EXPECTED_S

    @property
    def expected_s(self) -> float:
        """What most of the last look-ups stayed below, in seconds, at most `MAX_EXPECTED_S`."""
        return self._expected_s

    def add(self, seconds: float) -> None:
        """A look-up was answered in time."""
        self._samples_s.append(seconds)
        # A sort of 64 numbers: 2 microseconds a look-up.
        ordered = sorted(self._samples_s)
        expected_s = min(MAX_EXPECTED_S, ordered[int(QUANTILE * (len(ordered) - 1))])
        if len(ordered) < MIN_SAMPLES:
            expected_s = max(FIRST_EXPECTED_S, expected_s)
        self._expected_s = expected_s


class LookupBudget:
    """What one request may still lose to nodes that do not answer, over all its look-ups."""

    def __init__(self, left_s: float) -> None:
        """`left_s` seconds beyond what look-ups are expected to take."""
        self.left_s = left_s

    def spend(self, elapsed_s: float, *, expected_s: float) -> None:
        """A look-up took `elapsed_s`; what is beyond the expected time is spent."""
        self.left_s = max(0.0, self.left_s - max(0.0, elapsed_s - expected_s))

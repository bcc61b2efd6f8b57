"""What an instance measures of itself, for the conductor's estimates.

Rules kept here: a rate is a moving average over work that was long enough to tell; it is 0 until
the first measurement; nothing decays while nothing is measured. What a warm-up measured, while
everything else on the host started too, holds only until the first real work.
"""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement: about the last ten count
MIN_TOKENS = 32  # fewer say more about fixed costs than about the rate
MIN_NBYTES = 64 << 10


class MovingAverage:
    """Exponentially weighted; the first measurement is taken whole."""

    def __init__(self) -> None:
        """Unknown: 0."""
        self.value = 0.0
        self._is_measured = False

    def assume(self, value: float) -> None:
        """What is taken for it until something is measured."""
        if not self._is_measured:
            self.value = value

    def add(self, measured: float) -> None:
        """Takes one more measurement."""
        if self._is_measured:
            self.value += WEIGHT * (measured - self.value)
        else:
            self.value, self._is_measured = measured, True


class Meter:
    """Prefill speed, pull speed and the time of a decode step."""

    def __init__(self) -> None:
        """All unknown."""
        self.prefill_tokens_per_s = MovingAverage()
        self.pull_bytes_per_s = MovingAverage()
        self.decode_step_s = MovingAverage()

    def warmed_up(self, *, num_tokens: int, prefill_s: float, decode_s: float = 0.0) -> None:
        """A warm-up computed `num_tokens` of one made-up prompt, and a step of one token, if any."""
        if num_tokens >= MIN_TOKENS and prefill_s > 0.0:
            self.prefill_tokens_per_s.assume(num_tokens / prefill_s)
        self.decode_step_s.assume(decode_s)

    def prefilled(self, *, num_tokens: int, seconds: float) -> None:
        """A step computed `num_tokens` of one prompt."""
        if num_tokens >= MIN_TOKENS and seconds > 0.0:
            self.prefill_tokens_per_s.add(num_tokens / seconds)

    def pulled(self, *, nbytes: int, seconds: float) -> None:
        """A pull moved `nbytes` without waiting for a writer."""
        if nbytes >= MIN_NBYTES and seconds > 0.0:
            self.pull_bytes_per_s.add(nbytes / seconds)

    def decoded(self, *, seconds: float) -> None:
        """A step computed one token of each of its sequences."""
        self.decode_step_s.add(seconds)

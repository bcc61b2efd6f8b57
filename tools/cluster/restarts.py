"""When a dead child is started again: at once, later, or never.

Rules kept here: pure, the caller brings the time. A child that lived for a while is started again at once. Deaths
soon after a start count in a row: the first two are forgiven at once, each further one waits twice as long as the
one before, up to a bound, and after `max_quick_deaths` the supervisor stops trying, because the next start would
fail in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLimits:
    """How patient a supervisor is.

    Attributes:
        quick_s: a death sooner than this after readiness counts as quick; one before readiness always does.
        num_immediate: quick deaths in a row that are restarted without a pause.
        first_delay_s: pause after the next one; doubles with each further one.
        max_delay_s: longest pause.
        max_quick_deaths: quick deaths in a row after which there is no further start.
    """

    quick_s: float = 5.0
    num_immediate: int = 2
    first_delay_s: float = 0.5
    max_delay_s: float = 5.0
    max_quick_deaths: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Start the child again after `delay_s` seconds."""

    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Leave the child dead; it died `num_quick_deaths` times in a row."""

    num_quick_deaths: int


class RestartHistory:
    """The deaths of one child, and what each of them calls for."""

    def __init__(self, limits: RestartLimits) -> None:
        """No deaths yet."""
        self._limits = limits
        self.num_quick_deaths = 0

    def on_death(self, *, ready_at_s: float | None, now_s: float) -> Restart | GiveUp:
        """Decides on one death.

        Args:
            ready_at_s: when this run became ready (monotonic), None if it never did.
            now_s: when it died, same clock.
        """
        limits = self._limits
        if ready_at_s is not None and now_s - ready_at_s >= limits.quick_s:
            self.num_quick_deaths = 0
            return Restart(delay_s=0.0)
        self.num_quick_deaths += 1
        if self.num_quick_deaths >= limits.max_quick_deaths:
            return GiveUp(num_quick_deaths=self.num_quick_deaths)
        num_delayed = self.num_quick_deaths - limits.num_immediate
        if num_delayed <= 0:
            return Restart(delay_s=0.0)
        return Restart(
            delay_s=min(limits.max_delay_s, limits.first_delay_s * 2 ** (num_delayed - 1))
        )

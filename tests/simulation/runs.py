"""Runs of seeds, one after the other or in several processes, and what came of them.

Rules kept here: a seed's run does not depend on which process runs it, nor after which other. A violation keeps what
is needed to see it again: the seed, the step, and how many steps of trouble the run was given.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.kernel import Kernel
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_SEEDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRule:
    """A violation, and where it happened."""

    seed: int
    step: int
    num_steps: int
    message: str


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """What many seeds came to."""

    num_seeds: int = 0
    num_steps: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    violations: list[BrokenRule] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)

    def add(self, other: RunSummary) -> None:
        """Both together."""
        self.num_seeds += other.num_seeds
        self.num_steps += other.num_steps
        self.seen += other.seen
        self.violations += other.violations
        self.digests |= other.digests


def run_seed(
    seed: int,
    num_steps: int,
    *,
    checks_books: bool = True,
    print_line: Callable[[str], None] | None = None,
) -> RunSummary:
    """One run; whatever breaks in it is a violation, also an error that nobody raised on purpose."""
    summary = RunSummary(num_seeds=1)
    kernel = Kernel(seed)
    kernel.print_line = print_line
    try:
        World(kernel, checks_books=checks_books).run(num_steps)
    except Exception as error:  # noqa: BLE001  also what breaks inside the product is a find
        message = str(error)
        if not isinstance(error, AssertionError):
            message = "".join(traceback.format_exception(error)[-3:])
        summary.violations.append(
            BrokenRule(
                seed=seed,
                step=kernel.num_steps,
                num_steps=min(num_steps, kernel.num_steps),
                message=message or traceback.format_exc(limit=-2),
            )
        )
    summary.num_steps = kernel.num_steps
    summary.seen = kernel.seen
    summary.digests[seed] = kernel.digest
    return summary


def trace_seed(seed: int, num_steps: int) -> str | None:
    """Prints every step of one run; the rule that it broke, if it did."""
    summary = run_seed(seed, num_steps, print_line=print)
    return summary.violations[0].message if summary.violations else None


def replay_command(violation: BrokenRule) -> str:
    """What shows this violation again, step by step, and no step more than it takes."""
    return (
        f"python -m tests.simulation --trace --from {violation.seed} --steps {violation.num_steps}"
    )


def run_seeds(
    first: int,
    num_seeds: int,
    num_steps: int,
    *,
    num_processes: int = 1,
    deadline_s: float | None = None,
    max_violations: int = 20,
) -> RunSummary:
    """Seeds `first`, `first + 1`, ...; ends early at `deadline_s` (time.monotonic) or after too many violations."""
    total = RunSummary()
    starts = range(first, first + num_seeds, CHUNK_SEEDS)
    chunks = [(start, min(CHUNK_SEEDS, first + num_seeds - start), num_steps) for start in starts]
    if num_processes == 1:
        parts = map(_run_chunk, chunks)
        for part in parts:
            total.add(part)
            if _is_enough(total, deadline_s, max_violations):
                break
        return total
    pool = multiprocessing.get_context("spawn").Pool(num_processes)
    try:
        for part in pool.imap(_run_chunk, chunks):
            total.add(part)
            if _is_enough(total, deadline_s, max_violations):
                break
    finally:
        pool.terminate()
        pool.join()
    return total


def _is_enough(total: RunSummary, deadline_s: float | None, max_violations: int) -> bool:
    is_late = deadline_s is not None and time.monotonic() > deadline_s
    return is_late or len(total.violations) >= max_violations


def _run_chunk(chunk: tuple[int, int, int]) -> RunSummary:
    first, num_seeds, num_steps = chunk
    total = RunSummary()
    for seed in range(first, first + num_seeds):
        total.add(run_seed(seed, num_steps))
    return total

"""`python -m tests.simulation`: many seeds, or one of them step by step.

    python -m tests.simulation --seeds 10000 --steps 200
    python -m tests.simulation --seeds 1 --from 4711 --steps 93 --trace

Exits 1 where a rule was broken, and says how to see it again.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runs import RunSummary, replay_command, run_seeds, trace_seed


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first (default: 0)")
    parser.add_argument("--steps", type=int, default=200, help="of trouble, each (default: 200)")
    parser.add_argument("--processes", type=int, default=1, help="at once (default: 1)")
    parser.add_argument("--trace", action="store_true", help="print every step (of one seed)")
    given = parser.parse_args(arguments)
    if given.trace:
        violation = trace_seed(given.first, given.steps)
        print(violation or "no rule was broken")
        return violation is not None
    began_at_s = time.monotonic()
    summary = run_seeds(given.first, given.seeds, given.steps, num_processes=given.processes)
    print_summary(summary, time.monotonic() - began_at_s)
    return bool(summary.violations)


def print_summary(summary: RunSummary, seconds: float) -> None:
    """What was seen, and what was broken."""
    for name, number in sorted(summary.seen.items()):
        print(f"{number:9d}  {name}")
    for violation in summary.violations:
        print(f"\nseed {violation.seed}, step {violation.step}: {violation.message}")
        print(f"    {replay_command(violation)}")
    print(
        f"\n{summary.num_seeds} seeds, {summary.num_steps} steps in {seconds:.1f} s: "
        f"{len(summary.violations)} violations"
    )


if __name__ == "__main__":
    sys.exit(main())

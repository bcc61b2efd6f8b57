"""Runs the test suites in order, each in its own pytest, and sums up their seconds and outcomes.

Rules kept here: cheap suites first; every suite runs, also after a failure; a folder without tests
is said and skipped; the last line counts everything; the exit status is 0 only if nothing failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("house", "unit", "property", "simulation", "contract", "integration", "fault", "e2e")
DEFAULT_MARKERS = "not soak and not gpu and not rdma"
NIGHTLY_MARKERS = "not gpu and not rdma"
NO_TESTS_COLLECTED = 5  # pytest's exit status
COUNTED = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "deselected")
CLOSING_LINE = re.compile(r"^=* ?(\d+ [a-z]+.*) in [\d.]+s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """How one suite ended.

    Attributes:
        exit_status: pytest's, or None where the suite has no tests.
        counts: outcomes of pytest's closing line.
        duration_s: wall seconds, collection included.
    """

    name: str
    exit_status: int | None
    counts: Counter[str] = field(default_factory=Counter)
    duration_s: float = 0.0

    @property
    def failed(self) -> bool:
        """True unless all that ran passed, or nothing was there to run."""
        return self.exit_status not in (0, None)


def suite_files(name: str, tests: Path) -> list[str]:
    """What pytest is given: a folder, or for `house` the files beside the folders; maybe none."""
    if name == "house":
        return [str(path) for path in sorted(tests.glob("test_*.py"))]
    return [str(tests / name)] if any((tests / name).rglob("test_*.py")) else []


def count_outcomes(line: str) -> Counter[str]:
    """The numbers of pytest's closing line, `3 passed, 1 error in 0.5s`; none of other lines."""
    closing = CLOSING_LINE.match(line)
    counts: Counter[str] = Counter()
    for number, word in re.findall(r"(\d+) ([a-z]+)", closing.group(1) if closing else ""):
        word = word.removesuffix("s") if word == "errors" else word
        if word in COUNTED:
            counts[word] += int(number)
    return counts


def run_suite(name: str, *, markers: str, tests: Path) -> SuiteResult:
    """Runs one suite, passes its output on and counts its outcomes."""
    files = suite_files(name, tests)
    if not files:
        print(f"\n--- {name}: no tests yet, skipped", flush=True)
        return SuiteResult(name=name, exit_status=None)
    print(f"\n--- {name}", flush=True)
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    command = [sys.executable, "-m", "pytest", "-m", markers, "--durations=3", *files]
    with subprocess.Popen(
        command, cwd=tests.parent, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            counts = count_outcomes(line) or counts
        status: int | None = process.wait()
    if status == NO_TESTS_COLLECTED:
        status = None  # all of its tests are deselected by the markers
    duration_s = time.monotonic() - began_s
    return SuiteResult(name=name, exit_status=status, counts=counts, duration_s=duration_s)


def summarise(results: list[SuiteResult]) -> list[str]:
    """A line per suite, then the line that counts all of them."""
    lines = []
    total: Counter[str] = Counter()
    for result in results:
        total += result.counts
        verdict = "no tests" if result.exit_status is None else "FAILED" if result.failed else "ok"
        outcome = ", ".join(f"{n} {word}" for word, n in result.counts.items())
        lines.append(f"{result.name:<12} {result.duration_s:7.1f} s  {verdict:<8} {outcome}")
    crashed = [r for r in results if r.failed and not (r.counts["failed"] or r.counts["error"])]
    num_failed = total["failed"] + total["error"] + len(crashed)
    duration_s = sum(result.duration_s for result in results)
    lines += [f"{r.name}: pytest ended with status {r.exit_status}" for r in crashed]
    closing = f"{total['passed']} passed, {num_failed} failed"
    if total["skipped"]:
        closing += f", {total['skipped']} skipped"
    return [*lines, f"{closing} in {duration_s:.1f} s"]


@click.command()
@click.argument("names", nargs=-1, metavar="[SUITE]...")
@click.option("--nightly", is_flag=True, help="Include the soak tests.")
@click.option(
    "--tests",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT / "tests",
    show_default="tests/ of this checkout",
    help="Folder that holds the suites.",
)
def main(names: tuple[str, ...], nightly: bool, tests: Path) -> None:
    """Run the test suites, all of them or those named, and print the seconds of each."""
    unknown = sorted(set(names) - set(ORDER))
    if unknown:
        raise click.UsageError(f"unknown suite {', '.join(unknown)}; known: {', '.join(ORDER)}")
    markers = NIGHTLY_MARKERS if nightly else DEFAULT_MARKERS
    chosen = [name for name in ORDER if not names or name in names]
    results = [run_suite(name, markers=markers, tests=tests.resolve()) for name in chosen]
    print("\n" + "\n".join(summarise(results)), flush=True)
    if not any(result.counts["passed"] for result in results):
        print("no test passed: nothing was tested", file=sys.stderr)
        raise SystemExit(1)
    raise SystemExit(any(result.failed for result in results))


if __name__ == "__main__":
    main()

"""The benchmarks there are, by name.

Rules kept here: a benchmark is one module with `QUESTION`, the sentence it answers, and
`run(options) -> Report`; it is imported only when it is run, so that `--help` costs nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from pathlib import Path

    from snowskin.tools.bench.report import Report

BENCHES = {
    "directory": "snowskin.tools.bench.directory",
    "reliability": "snowskin.tools.bench.reliability",
    "spine": "snowskin.tools.bench.spine",
    "transfer": "snowskin.tools.bench.transfer.bench",
}


class BenchUnknown(SnowskinError):
    """There is no benchmark of that name."""

    status = "NOT_FOUND"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What every benchmark is told.

    Attributes:
        runs: rounds of each case; the benchmark may take more of a very short one.
        smoke: only show that it works: smallest sizes, about a second; no number of it is a verdict.
        peers_python: Python of the environment that other systems are installed in; None: this one.
    """

    runs: int = 15
    smoke: bool = False
    peers_python: Path | None = None


class Bench(Protocol):
    """A benchmark's module. Law: `run` leaves no process, file or memory behind, also on an error."""

    QUESTION: str

    def run(self, options: BenchOptions) -> Report:
        """Measures, and reports with at least one row."""
        ...


def load(name: str) -> Bench:
    """The benchmark of that name.

    Raises:
        BenchUnknown: there is none; the hint lists those there are.
    """
    if name not in BENCHES:
        raise BenchUnknown(f"no benchmark {name!r}", hint=f"known: {', '.join(sorted(BENCHES))}")
    return cast("Bench", importlib.import_module(BENCHES[name]))

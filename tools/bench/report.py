"""One report for every benchmark: the same rows as a table, ratios first, and as JSON.

Rules kept here: a number stands beside what it is compared with, measured in the same run; cases of
one run alternate, so that a slow minute of the host hits all of them alike; value = median of the
rounds, spread = their interquartile range, in the row's unit; sizes stand in the row's name. The
file is `{bench, host, rows: [{name, value, unit, reference, reference_value, ratio, goal, holds,
runs, spread}], notes: [text]}`; ratio = value / reference_value, or the median of the rounds' own ratios; goal is text,
null is "none"; notes are what the numbers do not say by themselves, e.g. who was missing.
"""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from snowskin.tools.bench.host import HostFacts  # noqa: TC001  pydantic reads the annotation
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


OPERATORS = {"<=": operator.le, ">=": operator.ge}
MAX_REPORT_NBYTES = 16 << 20  # a result file of more is not one of ours


class ReportBroken(SnowskinError):
    """A file is not a benchmark report."""

    status = "INVALID_ARGUMENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a row must reach: `Goal(of="ratio", relation=">=", bound=0.85)`."""

    of: Literal["value", "ratio"]
    relation: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        """As the report shows it: `ratio >= 0.85`."""
        return f"{self.of} {self.relation} {self.bound:g}"

    def holds(self, *, value: float, ratio: float | None) -> bool:
        """Whether a row with these numbers reaches it; a missing ratio never does."""
        number = value if self.of == "value" else ratio
        return number is not None and bool(OPERATORS[self.relation](number, self.bound))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured thing.

    Attributes:
        name: what was measured, its size included: `pull 16 MiB, local door`.
        value: median over `runs`, in `unit`.
        reference: name of what it is compared with, from the same run; None without one.
        ratio: value / reference_value.
        holds: whether the goal is reached; None without a goal.
        spread: interquartile range over the runs, in `unit`.
    """

    name: str
    value: float
    unit: str
    reference: str | None = None
    reference_value: float | None = None
    ratio: float | None = None
    goal: str | None = None
    holds: bool | None = None
    runs: int
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows of one benchmark, and where they were measured."""

    bench: str
    host: HostFacts
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[Row, ...]:
        """Rows whose goal does not hold."""
        return tuple(row for row in self.rows if row.holds is False)

    def as_json(self) -> str:
        """The file's text.

        Raises:
            ValueError: a number is not finite: JSON has no word for it, and it is no measurement.
        """
        rows = [asdict(row) for row in self.rows]
        document = {
            "bench": self.bench,
            "host": self.host.as_json(),
            "rows": rows,
            "notes": self.notes,
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all.

        Raises:
            ReportBroken: the folder does not exist or cannot be written.
        """
        scratch = path.with_name(path.name + ".part")
        try:
            scratch.write_text(self.as_json())
            os.replace(scratch, path)
        except OSError as error:
            raise ReportBroken(
                f"cannot write {path}: {error.strerror}", hint="give a file in a folder that exists"
            ) from error


def spread_of(samples: Sequence[float]) -> float:
    """Interquartile range, in the samples' unit; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return upper - lower


def make_row(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    reference: tuple[str, Sequence[float]] | None = None,
    goal: Goal | None = None,
) -> Row:
    """The row of some samples in `unit`; `reference` is a name and its samples in the same unit."""
    value = statistics.median(samples)
    reference_value = statistics.median(reference[1]) if reference else None
    ratio = value / reference_value if reference_value else None
    return Row(
        name=name,
        value=value,
        unit=unit,
        reference=reference[0] if reference else None,
        reference_value=reference_value,
        ratio=ratio,
        goal=str(goal) if goal else None,
        holds=goal.holds(value=value, ratio=ratio) if goal else None,
        runs=len(samples),
        spread=spread_of(samples),
    )


def make_paired_row(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    reference: tuple[str, Sequence[float]],
    goal: Goal | None = None,
) -> Row:
    """As `make_row`, with samples and reference taken in the same rounds: ratio = median of the rounds' ratios.

    A slow minute of the host then stands on both sides of each ratio.
    """
    row = make_row(name, samples, unit, reference=reference)
    ratio = statistics.median(
        ours / theirs for ours, theirs in zip(samples, reference[1], strict=True)
    )
    holds = goal.holds(value=row.value, ratio=ratio) if goal else None
    return replace(row, ratio=ratio, goal=str(goal) if goal else None, holds=holds)


def measure(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup_rounds: int = 1,
    now_s: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case in each round, all cases in every round.

    The order turns by one each round, so that no case always runs in the wake of the same other.
    """
    names = list(cases)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-warmup_rounds, rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            case = cases[name]
            began_s = now_s()
            case()
            ended_s = now_s()
            if round_index >= 0:
                samples[name].append(ended_s - began_s)
    return samples


def show_number(number: float | None) -> str:
    """Three significant digits without an exponent: as much as a benchmark knows."""
    if number is None:
        return ""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"


def table_of(report: Report) -> Table:
    """The report as a table, ratios first."""
    facts = report.host
    table = Table(
        title=f"{report.bench}: {facts.num_cores} cores {facts.cpu_model}, Python {facts.python}",
        title_justify="left",
    )
    for column in (
        "ratio",
        "goal",
        "holds",
        "what",
        "value",
        "unit",
        "spread",
        "runs",
        "reference",
    ):
        is_text = column in ("goal", "holds", "what", "unit", "reference")
        table.add_column(column, justify="left" if is_text else "right")
    for row in report.rows:
        table.add_row(
            show_number(row.ratio),
            row.goal or "",
            {True: "yes", False: "[red]NO[/red]", None: ""}[row.holds],
            row.name,
            show_number(row.value),
            row.unit,
            show_number(row.spread),
            str(row.runs),
            f"{row.reference} {show_number(row.reference_value)}" if row.reference else "",
        )
    return table


def read_report(path: Path) -> Report:
    """The report of a file.

    Raises:
        ReportBroken: the file cannot be read, or is not a report.
    """
    try:
        if path.stat().st_size > MAX_REPORT_NBYTES:
            raise ReportBroken(f"{path} is larger than {MAX_REPORT_NBYTES} bytes")
        return TypeAdapter(Report).validate_json(path.read_bytes())
    except OSError as error:
        raise ReportBroken(f"{path}: {error.strerror}", hint="give a file of --json") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ReportBroken(
            f"{path} is not a benchmark report: {where}: {first['msg']}",
            hint="give a file of --json",
        ) from error


def compare(before: Report, after: Report) -> Table:
    """Two reports side by side, matched by row name; what only one has stands there alone."""
    table = Table(title=f"{before.bench} (A) and {after.bench} (B)", title_justify="left")
    for column in ("what", "ratio A", "ratio B", "value A", "value B", "B / A", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right")
    old = {row.name: row for row in before.rows}
    new = {row.name: row for row in after.rows}
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        same_unit = a is not None and b is not None and a.unit == b.unit and a.value != 0
        table.add_row(
            name,
            show_number(a.ratio if a else None),
            show_number(b.ratio if b else None),
            show_number(a.value if a else None),
            show_number(b.value if b else None),
            show_number(b.value / a.value) if a and b and same_unit else "",
            " / ".join(dict.fromkeys(row.unit for row in (a, b) if row)),
        )
    return table


def host_differences(before: HostFacts, after: HostFacts) -> list[str]:
    """What makes two results hard to compare, a line each; empty on the same host and versions."""
    old, new = before.as_json(), after.as_json()
    versions_old = cast("dict[str, str]", old.pop("versions"))
    versions_new = cast("dict[str, str]", new.pop("versions"))
    old |= {f"version of {name}": value for name, value in versions_old.items()}
    new |= {f"version of {name}": value for name, value in versions_new.items()}
    return [
        f"{name}: A {old.get(name, 'none')}, B {new.get(name, 'none')}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]

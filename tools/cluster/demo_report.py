"""The numbers of the demonstration: what each request cost, and what the cache saved.

Rules kept here: a number with the cache is shown beside the same turn's number without it, ratios first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Goal, Report, Row, make_row

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snowskin.tools.cluster.chat import Answer

TTFT_GOAL = Goal(of="ratio", relation="<=", bound=0.3)
NO_WRONG_TOKENS = Goal(of="value", relation="<=", bound=0.0)
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the conversation, with the cache and without."""

    number: int
    cached: Answer
    uncached: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What several engines and nodes made of one document, read by several users at once.

    Attributes:
        answers: of the readers, all with the cache.
        num_holding: nodes that held the whole document at the end.
        num_nodes: of the cluster.
    """

    answers: tuple[Answer, ...]
    num_holding: int
    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """KV that one request moved, both engines together.

    Attributes:
        pull_s: seconds spent pulling.
    """

    num_blocks_published: int
    num_blocks_pulled: int
    published_nbytes: int
    pulled_nbytes: int
    pull_s: float

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Traffic:
        """From the server's account; zero where it says nothing."""
        engines = [stats.get(role) or {} for role in ("prefill", "decode")]

        def total(name: str) -> Any:
            return sum(engine.get(name, 0) for engine in engines)

        return cls(
            num_blocks_published=total("num_blocks_published"),
            num_blocks_pulled=total("num_blocks_pulled"),
            published_nbytes=total("published_nbytes"),
            pulled_nbytes=total("pulled_nbytes"),
            pull_s=total("pull_s"),
        )


def requests_table(turns: Sequence[Turn], spread: Spread | None = None) -> Table:
    """A line a request."""
    table = Table(box=box.SIMPLE_HEAD, title="requests", title_justify="left", pad_edge=False)
    for column in ("turn", "cache"):
        table.add_column(column)
    for column in (
        "TTFT",
        "TBT p50",
        "prompt tokens",
        "in cache",
        "blocks published",
        "blocks pulled",
        "MiB published",
        "MiB pulled",
        "transfer",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for turn in turns:
        for cache, answer in (("on", turn.cached), ("off", turn.uncached)):
            table.add_row(str(turn.number), cache, *_cells(answer))
    for number, answer in enumerate(spread.answers if spread else (), 1):
        table.add_row(f"reader {number}", "on", *_cells(answer))
    return table


def _cells(answer: Answer) -> list[str]:
    traffic = Traffic.of(answer.stats)
    return [
        f"{answer.ttft_s:.3f} s",
        f"{1000 * answer.tbt_s:.1f} ms",
        f"{answer.num_prompt_tokens:,}",
        f"{answer.num_cached_tokens:,}",
        f"{traffic.num_blocks_published:,}",
        f"{traffic.num_blocks_pulled:,}",
        f"{traffic.published_nbytes / MIB:.1f}",
        f"{traffic.pulled_nbytes / MIB:.1f}",
        f"{1000 * traffic.pull_s:.1f} ms",
    ]


def make_report(
    turns: Sequence[Turn], *, num_wrong: int, num_rounding: int, spread: Spread | None = None
) -> Report:
    """The report in the shape of every benchmark: TTFT ratios, TBT, and the tokens."""
    rows: list[Row] = []
    for turn in turns:
        size = f"{turn.cached.num_prompt_tokens:,} prompt tokens"
        rows.append(
            make_row(
                f"TTFT of turn {turn.number}, {size}",
                [turn.cached.ttft_s],
                "s",
                reference=("cache off", [turn.uncached.ttft_s]),
                goal=TTFT_GOAL if turn.number > 1 else None,
            )
        )
    for turn in turns:
        gaps_s, reference_s = turn.cached.gaps_s, turn.uncached.gaps_s
        if gaps_s and reference_s:
            rows.append(
                make_row(
                    f"TBT of turn {turn.number}",
                    [1000 * gap_s for gap_s in gaps_s],
                    "ms",
                    reference=("cache off", [1000 * gap_s for gap_s in reference_s]),
                )
            )
    if spread is not None:
        rows += _spread_rows(turns, spread)
    rows.append(
        make_row(
            "tokens unlike the model in one piece",
            [float(num_wrong)],
            "tokens",
            goal=NO_WRONG_TOKENS,
        )
    )
    rows.append(make_row("tokens that differ by rounding", [float(num_rounding)], "tokens"))
    return Report(bench="demo", host=host_facts(), rows=tuple(rows))


def _spread_rows(turns: Sequence[Turn], spread: Spread) -> list[Row]:
    first = turns[0].uncached
    return [
        make_row(
            f"TTFT of reader {number} of {len(spread.answers)} at once, "
            f"{answer.num_prompt_tokens:,} prompt tokens",
            [answer.ttft_s],
            "s",
            reference=("turn 1 alone, cache off", [first.ttft_s]),
        )
        for number, answer in enumerate(spread.answers, 1)
    ] + [
        make_row(
            "nodes that hold the document",
            [float(spread.num_holding)],
            "nodes",
            goal=Goal(of="value", relation=">=", bound=float(spread.num_nodes)),
        )
    ]


def ratio_line(report: Report) -> str:
    """One line on the goal: held or missed, with the ratios."""
    goals = [row for row in report.rows if row.name.startswith("TTFT of turn") and row.goal]
    ratios = " and ".join(f"{row.ratio:.3f}" for row in goals if row.ratio is not None)
    held = all(row.holds for row in goals)
    return (
        f"TTFT with the cache / without it, later turns: {ratios} "
        f"(goal <= {TTFT_GOAL.bound:g}: {'held' if held else 'MISSED'})"
    )

"""What an idle data plane costs: open connections, nobody pulls; CPU of both processes as a share of one core."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from snowskin.tools.bench.report import Goal, Row, make_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.pair import Pair

GOAL_PERCENT = 0.1
IDLE_S, SMOKE_IDLE_S = 4.0, 0.1


def idle_rows(pairs: Sequence[Pair], *, rounds: int, smoke: bool) -> list[Row]:
    """All pairs at once, each after a pull: their connections are open. Asking for the CPU is in it."""
    idle_s = SMOKE_IDLE_S if smoke else IDLE_S
    percents: dict[str, list[float]] = {pair.name: [] for pair in pairs}
    for _ in range(rounds):
        before_s = {pair.name: pair.cpu_s() for pair in pairs}
        began_s = time.perf_counter()
        time.sleep(idle_s)
        for pair in pairs:
            used_s = pair.cpu_s() - before_s[pair.name]
            percents[pair.name].append(100 * used_s / (time.perf_counter() - began_s))
    goal = Goal(of="value", relation="<=", bound=GOAL_PERCENT)
    return [
        make_row(f"{name}: idle, both ends, connections open", samples, "% core", goal=goal)
        for name, samples in percents.items()
    ]

"""Pull against push under a small decode pool: how much memory lies reserved and idle, for how long."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

from snowskin.tools.bench.report import Goal, Row, make_paired_row
from snowskin.tools.bench.transfer.pair import OTHERS, Contestant
from snowskin.tools.bench.transfer.schedule import Load

if TYPE_CHECKING:
    from snowskin.tools.bench.transfer.pair import Pair

GOAL_RATIO = 0.5
TCP = Contestant(
    name="tcp holding",
    backend="ours",
    pair=OTHERS,
    options={"scheme": "tcp", "writable": True},
    is_free=True,
)
SMOKE_LOAD = Load(
    num_requests=6, request_nbytes=64 << 10, arrival_s=0.001, prefill_s=0.01, decode_s=0.005
)


def holding_rows(pair: Pair, load: Load, *, rounds: int) -> list[Row]:
    """Both ways in every round, over the same transport."""
    idle: dict[bool, list[float]] = {True: [], False: []}
    latency: dict[bool, list[float]] = {True: [], False: []}
    for round_index in range(rounds):
        for is_pull in (True, False) if round_index % 2 else (False, True):
            held = pair.hold(TCP.name, asdict(load), is_pull=is_pull)
            idle[is_pull].append(
                sum(landed - reserved for _, reserved, landed in held) * load.request_nbytes / 2**20
            )
            latency[is_pull].append(
                statistics.median(landed - arrived for arrived, _, landed in held) * 1e3
            )
    return [
        make_paired_row(
            f"pull: reserved and idle decode memory, {load.num_slots} slots, {load.num_requests} requests",
            idle[True],
            "MiB s",
            reference=("push", idle[False]),
            goal=Goal(of="ratio", relation="<=", bound=GOAL_RATIO),
        ),
        make_paired_row(
            "pull: from a request's arrival until its KV is in the decode pool, p50",
            latency[True],
            "ms",
            reference=("push", latency[False]),
        ),
    ]

"""What a data plane at full rate does to the control calls of the same process.

Rules kept here: the control service is a small asyncio echo in the owner's process, called from a third process; idle
and load alternate within a round; both ends and the caller may use both cores, as a node's processes may; the reader at
full rate yields to all others (nice 19), because it stands for another host, whose cores these are not. A plain thread
that serves sockets stands beside it: less than that costs, no data plane in the process can cost.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, cast

from snowskin.tools.bench.report import Goal, Row, make_paired_row
from snowskin.tools.bench.transfer.echo import EchoCaller
from snowskin.tools.bench.transfer.pair import OTHERS, Contestant
from snowskin.tools.bench.transfer.sizes import COPYING, LENT, TCP

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.tools.bench.transfer.end import Json
    from snowskin.tools.bench.transfer.pair import Pair
    from snowskin.tools.bench.transfer.shape import Shape

GOAL_RATIO = 3.0
LISTEN_S, SMOKE_LISTEN_S = 1.0, 0.1
SETTLE_S = 0.05

BESIDE = " beside control"
CONTESTANTS = (
    Contestant(
        name="tcp" + BESIDE,
        backend="ours",
        pair=OTHERS,
        options={"scheme": "tcp", "settings": LENT},
        is_free=True,
    ),
    Contestant(
        name=COPYING + BESIDE,
        backend="ours",
        pair=OTHERS,
        options={"scheme": "tcp"},
        is_free=True,
    ),
    Contestant(
        name="sockets" + BESIDE,
        backend="sockets",
        pair=OTHERS,
        options={"congestion": "reno"},
        is_free=True,
    ),
)


def control_rows(
    contestant: Contestant, pair: Pair, shape: Shape, *, rounds: int, smoke: bool
) -> list[Row]:
    """Median and 99th percentile of a control call under load, against idle, of one contestant."""
    listen_s = SMOKE_LISTEN_S if smoke else LISTEN_S
    if not pair.prepare(contestant.name, shape, checked=False):
        return []
    caller = EchoCaller(cast("int", pair.owner.ask({"do": "echo"})["port"]))
    idle: list[list[float]] = []
    loaded: list[list[float]] = []
    rates: list[float] = []
    order: Json = {
        "do": "load",
        "name": contestant.name,
        "shape": shape.name,
        "checked": False,
        "for_s": listen_s + 2 * SETTLE_S,
    }
    try:
        for _ in range(rounds):
            idle.append(calls_us(caller.call, listen_s))
            pair.reader.send(order)
            time.sleep(SETTLE_S)
            loaded.append(calls_us(caller.call, listen_s))
            served = pair.reader.answer()
            pulled_nbytes = cast("int", served["num_pulls"]) * shape.nbytes
            rates.append(pulled_nbytes / cast("float", served["seconds"]) / 1e9)
    finally:
        caller.close()
    name = contestant.name.removesuffix(BESIDE)
    return ratio_rows("control call", name, idle, loaded, rates, is_judged=name in TCP)


def ratio_rows(
    call: str,
    beside: str,
    idle: list[list[float]],
    loaded: list[list[float]],
    rates: list[float],
    *,
    is_judged: bool,
) -> list[Row]:
    """Percentiles of a call under load against idle, microseconds by round; only the 99th is judged.

    Args:
        call: what was called.
        beside: what was serving.
        idle: without load.
        loaded: with it.
        rates: at which it served, GB/s, by round.
        is_judged: whether the goal is this one's.
    """
    goal = Goal(of="ratio", relation="<=", bound=GOAL_RATIO)
    return [
        make_paired_row(
            f"{call} beside {beside} serving {statistics.median(rates):.1f} GB/s, {name}",
            [_share(sample, share) for sample in loaded],
            "us",
            reference=("idle", [_share(sample, share) for sample in idle]),
            goal=goal if is_judged and name == "p99" else None,
        )
        for name, share in (("p99", 0.99), ("p50", 0.5))
    ]


def calls_us(call: Callable[[], None], for_s: float) -> list[float]:
    """Microseconds of each call made within that time."""
    samples = []
    until_s = time.perf_counter() + for_s
    while (began_s := time.perf_counter()) < until_s:
        call()
        samples.append((time.perf_counter() - began_s) * 1e6)
    return samples


def _share(samples: list[float], share: float) -> float:
    return sorted(samples)[int(share * (len(samples) - 1))]

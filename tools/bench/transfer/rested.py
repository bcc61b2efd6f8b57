"""What one pull takes after a rest: when nobody has used connection, caches or cores for a while.

In the rounds of `sizes.py` pulls follow each other; an engine's may come a few in a second. Then both programs lie no
longer in the caches, a core has to be woken, and the kernel begins with a small window again (after 0.2 s of rest:
tcp_slow_start_after_idle). No goal is set here: how much more that costs a larger program is what it shows.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from snowskin.tools.bench.report import Row, make_paired_row
from snowskin.tools.bench.transfer import sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snowskin.tools.bench.transfer.pair import Contestant, Pair
    from snowskin.tools.bench.transfer.shape import Shape

REST_S, SMOKE_REST_S = 0.3, 0.01
PLAIN = (sizes.UNPACED, sizes.SENDFILE)


def rested_rows(
    contestants: Sequence[Contestant],
    pairs: Mapping[str, Pair],
    shapes: Sequence[Shape],
    *,
    rounds: int,
    smoke: bool,
) -> list[Row]:
    """Milliseconds of one pull of each shape, which was made ready before; the best plain socket beside ours."""
    rest_s = SMOKE_REST_S if smoke else REST_S
    pair_of = {each.name: pairs[each.pair] for each in contestants}
    rows = []
    for shape in shapes:
        taken_ms: dict[str, list[float]] = {name: [] for name in (*sizes.TCP, *PLAIN)}
        for _ in range(rounds):
            for name, samples in taken_ms.items():
                samples.append(1e3 * pair_of[name].pull_rested(name, shape, rest_s=rest_s))
        best = min(PLAIN, key=lambda name: statistics.median(taken_ms[name]))
        rows += [
            make_paired_row(
                f"{name}: pull {shape.name} after {rest_s:g} s of rest against {best}",
                taken_ms[name],
                "ms",
                reference=(best, taken_ms[best]),
            )
            for name in sizes.TCP
        ]
    return rows

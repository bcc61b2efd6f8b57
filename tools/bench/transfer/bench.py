"""How near to the memory and to the wire do our transports come, and how far ahead of other systems?

Parts, a file each: `sizes.py` (every size by every contestant), `calls.py` (layouts, and what a call costs),
`holding.py` (pull against push under a small decode pool), `idle.py` and `control.py` (what a data plane costs those
who do not use it). Every process of it sees the same two memories and the same two cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Report, Row
from snowskin.tools.bench.transfer import peers, sizes
from snowskin.tools.bench.transfer.pair import Memory, open_pairs
from snowskin.tools.bench.transfer.shape import (
    POOL_NBYTES,
    SHAPES,
    SMOKE_POOL_NBYTES,
    SMOKE_SHAPES,
)

if TYPE_CHECKING:
    from snowskin.tools.bench.registry import BenchOptions

QUESTION = "How near to memory and wire do transfers come, and how far ahead of other systems?"


def run(options: BenchOptions) -> Report:
    """Measures all parts in one run."""
    others, missing = ((), {}) if options.smoke else peers.runnable()
    folders = peers.package_folders(options.peers_python)
    contestants = (*sizes.LIMITS, *sizes.OURS, *others)
    rows: list[Row] = []
    with (
        Memory(SMOKE_POOL_NBYTES if options.smoke else POOL_NBYTES) as memory,
        open_pairs(contestants, memory, folders) as pairs,
    ):
        for pair in pairs.values():
            missing |= pair.missing
        for shape in SMOKE_SHAPES if options.smoke else SHAPES:
            measured = sizes.measure_shape(contestants, pairs, shape, options.runs)
            rows += sizes.rows_of(measured)
            if measured.is_small:
                rows.append(sizes.round_trip_row(pairs["limits"], options.runs))
    notes = tuple(peers.told(missing))
    return Report(bench="transfer", host=host_facts(), rows=tuple(rows), notes=notes)

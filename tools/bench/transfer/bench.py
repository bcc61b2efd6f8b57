"""How near to the memory and to the wire do our transports come, and how far ahead of other systems?

Parts, a file each: `sizes.py` (every size by every contestant), `calls.py` (layouts, and what a call costs),
`holding.py` (pull against push under a small decode pool), `rested.py` (one pull after a rest), `idle.py`, `control.py`
and `node_control.py` (what a data plane costs those who do not use it). Every process of it sees the same two memories
and the same two cores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Report, Row
from snowskin.tools.bench.transfer import (
    calls,
    control,
    holding,
    idle,
    node_control,
    peers,
    rested,
    schedule,
    sizes,
)
from snowskin.tools.bench.transfer.pair import Memory, open_pairs
from snowskin.tools.bench.transfer.shape import (
    MIB,
    POOL_NBYTES,
    SHAPES,
    SMOKE_POOL_NBYTES,
    SMOKE_SHAPES,
    contiguous,
)

if TYPE_CHECKING:
    from snowskin.tools.bench.registry import BenchOptions

QUESTION = "How near to memory and wire do transfers come, and how far ahead of other systems?"

OTHER_POOL_NBYTES = 32 * MIB
FEW_ROUNDS = 5  # of parts whose rounds are seconds long


def run(options: BenchOptions) -> Report:
    """Measures all parts in one run."""
    others, missing = ((), {}) if options.smoke else peers.runnable()
    folders = peers.package_folders(options.peers_python)
    beside = (sizes.TCP_FREE, *others) if others else ()
    ours = sizes.OURS
    if options.smoke:  # starting processes is most of a brief run: these share theirs
        ours = tuple(replace(each, pair="ours") for each in ours)
    contestants = (*sizes.LIMITS, *ours, *beside)
    rows: list[Row] = []
    with (
        Memory(SMOKE_POOL_NBYTES if options.smoke else POOL_NBYTES) as memory,
        open_pairs(contestants, memory, folders) as pairs,
    ):
        for pair in pairs.values():
            missing |= pair.missing
        shapes = SMOKE_SHAPES if options.smoke else SHAPES
        for shape in shapes:
            measured = sizes.measure_shape(contestants, pairs, shape, options.runs)
            rows += sizes.rows_of(measured)
            if measured.is_small:
                rows.append(sizes.round_trip_row(pairs["limits"], options.runs))
        rows += rested.rested_rows(
            contestants,
            pairs,
            [shape for shape in shapes if shape.nbytes in (MIB, 16 * MIB)],
            rounds=options.runs,
            smoke=options.smoke,
        )
        rows += idle.idle_rows(
            list(
                {each.pair: pairs[each.pair] for each in ours if each.name not in missing}.values()
            ),
            rounds=min(options.runs, FEW_ROUNDS),
            smoke=options.smoke,
        )
    more_rows, more_notes = _other_parts(options)
    rounds = min(options.runs, FEW_ROUNDS)
    more_rows += node_control.node_rows(rounds=rounds, smoke=options.smoke)
    return Report(
        bench="transfer",
        host=host_facts(),
        rows=(*rows, *more_rows),
        notes=(
            *peers.told(missing),
            f"the pool: {memory.pages}, as a node's",
            sizes.NOTE,
            *more_notes,
        ),
    )


def _other_parts(options: BenchOptions) -> tuple[list[Row], list[str]]:
    """What is measured with processes of its own: their pools are written to, or they are busy otherwise."""
    rounds, smoke = min(options.runs, FEW_ROUNDS), options.smoke
    geometry = calls.SMOKE_GEOMETRY if smoke else calls.Geometry()
    contestants = [holding.TCP, calls.TCP, *control.CONTESTANTS]
    if not smoke:
        contestants.append(calls.GLOO)
    with (
        Memory(SMOKE_POOL_NBYTES if smoke else OTHER_POOL_NBYTES) as memory,
        open_pairs(contestants, memory) as pairs,
    ):
        rows = calls.calls_rows(pairs, geometry, rounds=rounds, with_gloo=not smoke)
        late_rows, notes = calls.late_joiner(pairs, geometry)
        rows += late_rows
        for contestant in control.CONTESTANTS:
            rows += control.control_rows(
                contestant,
                pairs[contestant.pair],
                contiguous(MIB, repeat=1) if smoke else contiguous(16 * MIB, repeat=1),
                rounds=rounds,
                smoke=smoke,
            )
        load = holding.SMOKE_LOAD if smoke else schedule.Load()
        rows += holding.holding_rows(
            pairs[holding.TCP.pair], load, rounds=rounds
        )  # writes the pool
    return rows, notes

"""What the directory of blocks costs a conductor: memory a block, time to take blocks in, time to look a prompt up.

Rules kept here: keys are random, and every node holds all blocks, where a look-up costs most; a look-up is of 1,024
keys, which are 16,384 tokens in blocks of 16. Memory is what Python allocates for the view, its keys included.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from typing import TYPE_CHECKING

from snowskin.kvstore.blocks import HASH_NBYTES, KeyColumn
from snowskin.kvstore.directory.view import DirectoryView
from snowskin.kvstore.messages import BlockChange, Watched
from snowskin.tools.bench.host import host_facts
from snowskin.tools.bench.report import Report, Row, make_row, measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.registry import BenchOptions

QUESTION = "What does it cost a conductor to know which blocks are on which nodes?"

NAMESPACE = b"directory-bench".ljust(32, b"\0")
NUM_KEYS = 1_024
NUM_BLOCKS, SMOKE_NUM_BLOCKS = 256 * NUM_KEYS, 4 * NUM_KEYS
NODES = tuple(f"node-{index}:1" for index in range(8))
LOOKUPS_AT_ONCE = 16


def take_in(view: DirectoryView, address: str, columns: Sequence[KeyColumn]) -> None:
    """A whole snapshot of one node, a message a column."""
    view.take(address, Watched(node_epoch=1, sequence=0, snapshot_begins=True), 0.0)
    for sequence, column in enumerate(columns, 1):
        change = BlockChange(namespace=NAMESPACE, keys=column)
        view.take(address, Watched(node_epoch=1, sequence=sequence, changes=(change,)), 0.0)
    about = view.knowledge(address, 0.0)
    in_sync = Watched(
        node_epoch=1,
        sequence=len(columns),
        in_sync=True,
        num_blocks=about.num_blocks,
        digest=about.digest,
    )
    view.take(address, in_sync, 0.0)


def run(options: BenchOptions) -> Report:
    """Measures in this process alone."""
    num_blocks = SMOKE_NUM_BLOCKS if options.smoke else NUM_BLOCKS
    columns = [
        KeyColumn(packed=os.urandom(HASH_NBYTES * NUM_KEYS)) for _ in range(num_blocks // NUM_KEYS)
    ]
    rows = [*_memory_rows(columns), *_lookup_rows(columns, options)]
    return Report(bench="directory", host=host_facts(), rows=tuple(rows))


def _memory_rows(columns: Sequence[KeyColumn]) -> list[Row]:
    num_blocks = NUM_KEYS * len(columns)
    view = DirectoryView()
    rows = []
    tracemalloc.start()
    try:
        for count, address in enumerate(NODES, 1):
            take_in(view, address, columns)
            if count in (1, len(NODES)):
                nbytes, _ = tracemalloc.get_traced_memory()
                name = f"memory of a block that {count} of {len(NODES)} nodes hold"
                rows.append(make_row(name, [nbytes / num_blocks], "bytes"))
    finally:
        tracemalloc.stop()
    return rows


def _lookup_rows(columns: Sequence[KeyColumn], options: BenchOptions) -> list[Row]:
    num_blocks = NUM_KEYS * len(columns)
    view = DirectoryView()
    taken_s = []
    for address in NODES:
        began_s = time.perf_counter()
        take_in(view, address, columns)
        taken_s.append((time.perf_counter() - began_s) / num_blocks)
    unknown = [KeyColumn(packed=os.urandom(HASH_NBYTES * NUM_KEYS)) for _ in range(4)]

    def look_up(of: Sequence[KeyColumn]) -> None:
        for index in range(LOOKUPS_AT_ONCE):
            view.locate([NAMESPACE], of[index % len(of)], 0.0)

    samples = measure(
        {"known": lambda: look_up(columns), "unknown": lambda: look_up(unknown)},
        1 if options.smoke else options.runs,
    )
    rows = [make_row("take in a block", [1e6 * each for each in taken_s], "µs")]
    for name, seconds in samples.items():
        each_us = [1e6 * each / LOOKUPS_AT_ONCE for each in seconds]
        rows.append(
            make_row(f"look up {NUM_KEYS:,} {name} keys, {len(NODES)} nodes", each_us, "µs")
        )
    return rows

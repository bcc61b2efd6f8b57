"""What is pulled: sizes in one run, many scattered ranges, and how often within a round.

Rules kept here: a round of one contestant takes milliseconds, so that the host's bad moments hit all alike, and is long
enough that reading the clocks does not show; the benchmark's limit on memory is `POOL_NBYTES` twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from snowskin.transport.runs import Run

KIB, MIB = 1 << 10, 1 << 20
POOL_NBYTES = 256 * MIB
SMOKE_POOL_NBYTES = 4 * MIB
BLOCK_NBYTES = MIB
"""Checksums of checked pulls are of blocks of this size at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One pull.

    Attributes:
        name: as in the table, e.g. `16 MiB`.
        runs: from the pool into the landing memory.
        repeat: pulls of one contestant in one round.
    """

    name: str
    runs: tuple[Run, ...]
    repeat: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(run.nbytes for run in self.runs)

    @property
    def block_nbytes(self) -> int:
        """What one checksum of a checked pull is of."""
        return min(self.runs[0].nbytes, BLOCK_NBYTES)

    @property
    def is_scattered(self) -> bool:
        """Whether it is more than one run."""
        return len(self.runs) > 1


def show_size(nbytes: int) -> str:
    """`64 KiB`, `16 MiB`."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def contiguous(nbytes: int, *, repeat: int) -> Shape:
    """One run from the pool's start."""
    return Shape(name=show_size(nbytes), runs=(Run(0, 0, nbytes),), repeat=repeat)


def scattered(num_runs: int, nbytes: int, *, repeat: int) -> Shape:
    """Runs of which no two touch, on neither side."""
    runs = tuple(Run(2 * nbytes * index, 2 * nbytes * index, nbytes) for index in range(num_runs))
    return Shape(name=f"{num_runs:,} x {show_size(nbytes)}", runs=runs, repeat=repeat)


WORD = Shape(name="64 B", runs=(Run(0, 0, 64),), repeat=200)
"""Nothing to speak of: what remains is a round trip."""
SHAPES = (  # 20 to 50 ms a sample: for less, it is the scheduler that is measured
    contiguous(4 * KIB, repeat=500),
    contiguous(64 * KIB, repeat=300),
    contiguous(MIB, repeat=200),
    contiguous(16 * MIB, repeat=12),
    contiguous(256 * MIB, repeat=2),
    scattered(1000, 64 * KIB, repeat=3),
)
SMOKE_SHAPES = (
    contiguous(4 * KIB, repeat=5),
    contiguous(MIB, repeat=1),
    scattered(20, 64 * KIB, repeat=1),
)

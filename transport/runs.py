"""Batches of runs: checked whole before anything moves, joined where they touch, cut into pieces.

Rules kept here: order is kept, no byte is named twice or dropped, and an empty run is a mistake of
the caller. Pure, and shared by all transports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.errors import OutOfBounds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Run(NamedTuple):
    """One contiguous range of a batch. A tuple and not a dataclass: a batch has thousands."""

    remote_offset: int
    local_offset: int
    nbytes: int


def check_bounds(runs: Sequence[Run], *, remote_nbytes: int, local_nbytes: int) -> int:
    """Sum of all bytes; raises OutOfBounds where a run is empty or leaves one of its regions."""
    total_nbytes = 0
    for run in runs:
        remote_offset, local_offset, nbytes = run
        if (
            nbytes < 1
            or remote_offset < 0
            or local_offset < 0
            or remote_offset + nbytes > remote_nbytes
            or local_offset + nbytes > local_nbytes
        ):
            raise OutOfBounds(
                f"run {runs.index(run)} of {len(runs)}: {nbytes} bytes at {remote_offset} of {remote_nbytes} "
                f"remote and at {local_offset} of {local_nbytes} local; nothing was moved",
                hint="every run needs at least 1 byte, inside both regions",
            )
        total_nbytes += nbytes
    return total_nbytes


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same bytes in the same order, with runs that continue each other on both sides as one."""
    result: list[Run] = []
    first: Run | None = None  # of those that continue each other, `nbytes` in all
    nbytes = 0
    remote_end = local_end = -1
    for run in runs:
        remote_offset, local_offset, run_nbytes = run
        if remote_offset == remote_end and local_offset == local_end:
            nbytes += run_nbytes
        else:
            if first is not None:
                result.append(first if first[2] == nbytes else Run(first[0], first[1], nbytes))
            first, nbytes = run, run_nbytes
        remote_end, local_end = remote_offset + run_nbytes, local_offset + run_nbytes
    if first is not None:
        result.append(first if first[2] == nbytes else Run(first[0], first[1], nbytes))
    return result


def num_joined(runs: Sequence[Run]) -> int:
    """How many `joined` makes of them."""
    num = 0
    remote_end = local_end = -1
    for remote_offset, local_offset, nbytes in runs:
        num += remote_offset != remote_end or local_offset != local_end
        remote_end, local_end = remote_offset + nbytes, local_offset + nbytes
    return num


def pieces(runs: Sequence[Run], piece_nbytes: int) -> Iterable[Run]:
    """Each run cut into pieces of at most `piece_nbytes`, in order."""
    if len(runs) == 1 and runs[0][2] <= piece_nbytes:
        return runs  # the usual small transfer: nothing to cut
    return _cut(runs, piece_nbytes)


def _cut(runs: Sequence[Run], piece_nbytes: int) -> Iterator[Run]:
    for run in runs:
        remote_offset, local_offset, nbytes = run
        if nbytes <= piece_nbytes:
            yield run
            continue
        for start in range(0, nbytes, piece_nbytes):
            yield Run(
                remote_offset + start, local_offset + start, min(piece_nbytes, nbytes - start)
            )

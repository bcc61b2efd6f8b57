"""Pieces of transfers that are memory copies."""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np

from snowskin.transport.api import PIECE_NBYTES
from snowskin.transport.copying import LOOKED_AT_NBYTES
from snowskin.transport.loopback import LoopbackTransport
from snowskin.transport.runs import Run


def pieces_of(nbytes: int) -> list[tuple[int, int]]:
    landed: list[tuple[int, int]] = []
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    with closing(LoopbackTransport()) as transport:
        remote = transport.attach(transport.describe(transport.register(source)))
        transport.pull(
            remote,
            transport.register(target),
            [Run(0, 0, nbytes)],
            deadline_s=time.monotonic() + 10,
            landed=lambda offset, size: landed.append((offset, size)),
        )
    assert target.all()
    return landed


def test_what_is_one_piece_stays_one() -> None:
    assert pieces_of(PIECE_NBYTES) == [(0, PIECE_NBYTES)]


def test_what_is_longer_is_looked_at_while_it_lies_in_the_cache() -> None:
    nbytes = 2 * PIECE_NBYTES + 1
    starts = range(0, nbytes, LOOKED_AT_NBYTES)
    assert pieces_of(nbytes) == [(at, min(LOOKED_AT_NBYTES, nbytes - at)) for at in starts]

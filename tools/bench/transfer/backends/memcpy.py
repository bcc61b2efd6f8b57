"""The limit on one host: memcpy between two anonymous memories of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.api import PIECE_NBYTES
from snowskin.transport.runs import pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.backends.api import (
        Begin,
        Bytes,
        Offer,
        Options,
        Pull,
        SharedMemory,
    )
    from snowskin.transport.runs import Run

VIEW_NBYTES = 16 << 10  # up to here a memoryview copies faster than numpy


class MemcpyOwner:
    """Nobody is asked."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Has nothing to do."""
        self.offer: Offer = {}

    def close(self) -> None:
        """Has nothing to end."""


class MemcpyReader:
    """Copies within its own process, from private memory; lands where all others land."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Takes a private copy of the pool: one that no page of is shared with anybody."""
        self._source: Bytes = pool.bytes.copy()
        self._landing = landing.bytes

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """Copies run by run; with checks in the pieces in which `shm` does."""
        parts = list(pieces(runs, PIECE_NBYTES)) if begin else list(runs)
        small = [
            (self._landing.data[local : local + size], self._source.data[remote : remote + size])
            for remote, local, size in parts
            if size <= VIEW_NBYTES
        ]
        arrays = [
            (self._landing[local : local + size], self._source[remote : remote + size], local, size)
            for remote, local, size in parts
        ]

        def copy_small() -> None:
            for target, source in small:
                target[:] = source

        def copy() -> None:
            for target, source, _, _ in arrays:
                np.copyto(target, source)

        def copy_and_check() -> None:
            assert begin is not None
            landed = begin()
            for target, source, local, size in arrays:
                np.copyto(target, source)
                landed(local, size)

        if begin:
            return copy_and_check
        return copy_small if len(small) == len(arrays) else copy

    def close(self) -> None:
        """Forgets its copy."""


open_owner = MemcpyOwner
open_reader = MemcpyReader

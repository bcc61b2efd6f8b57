"""Mooncake's Transfer Engine over its TCP, two processes.

It listens on all interfaces, whatever address it is given: both processes live in a network namespace that has nothing
but a loopback device, which is the same path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from snowskin.tools.bench.transfer.backends.api import ContestantMissing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.backends.api import (
        Begin,
        Offer,
        Options,
        Pull,
        SharedMemory,
    )
    from snowskin.transport.runs import Run

HOST = "127.0.0.1"


def _engine(memory: SharedMemory) -> Any:
    try:
        engine_class = importlib.import_module("mooncake.engine").TransferEngine
    except ImportError as error:
        raise ContestantMissing(f"mooncake cannot be imported: {error}") from error
    engine = engine_class()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
        raise ContestantMissing("Mooncake's engine does not start")
    if engine.register_memory(memory.address, memory.bytes.nbytes) != 0:
        raise ContestantMissing("Mooncake's engine does not register the memory")
    return engine


class MooncakeOwner:
    """An engine with the pool registered."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Starts and registers."""
        self._pool = pool
        self._engine = _engine(pool)
        self.offer: Offer = {"port": self._engine.get_rpc_port(), "address": pool.address}

    def close(self) -> None:
        """Deregisters."""
        self._engine.unregister_memory(self._pool.address)


class MooncakeReader:
    """An engine that reads from the owner's."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Starts and registers the landing memory."""
        self._landing = landing
        self._engine = _engine(landing)
        self._owner = f"{HOST}:{offer['port']}"
        self._remote_address = int(offer["address"])

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """One synchronous read, or one batch of them."""
        if begin:
            raise ContestantMissing("pieces are not told as they land")
        engine, owner = self._engine, self._owner
        local = [self._landing.address + run.local_offset for run in runs]
        remote = [self._remote_address + run.remote_offset for run in runs]
        sizes = [run.nbytes for run in runs]

        def pull_one() -> None:
            status = engine.transfer_sync_read(owner, local[0], remote[0], sizes[0])
            if status:
                raise ConnectionError(f"Mooncake's read ended as {status}")

        def pull_all() -> None:
            status = engine.batch_transfer_sync_read(owner, local, remote, sizes)
            if status:
                raise ConnectionError(f"Mooncake's batch ended as {status}")

        return pull_one if len(runs) == 1 else pull_all

    def close(self) -> None:
        """Deregisters."""
        self._engine.unregister_memory(self._landing.address)


open_owner = MooncakeOwner
open_reader = MooncakeReader

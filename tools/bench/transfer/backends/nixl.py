"""NIXL's Python API over UCX's TCP, as shipped or with the settings that a test of ours found best.

The agents' metadata travels as the library says; a read of many ranges is one transfer of many descriptors, made once
and posted for each pull, and its end is polled for, which is the only way the API offers.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

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

MODULES = ("nixl._api", "nixl_cu12._api", "nixl_cu13._api")
PULL_TIMEOUT_S = 60.0


def _api() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ContestantMissing(f"none of {', '.join(MODULES)} can be imported")


class NixlOwner:
    """An agent with the pool registered."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Registers the pool as one range."""
        api = _api()
        self._agent = api.nixl_agent("owner", api.nixl_agent_config(backends=["UCX"]))
        self._memory = self._agent.register_memory(
            [(pool.address, pool.bytes.nbytes, 0, "pool")], "DRAM"
        )
        self.offer: Offer = {
            "metadata": self._agent.get_agent_metadata().hex(),
            "address": pool.address,
        }

    def close(self) -> None:
        """Deregisters."""
        self._agent.deregister_memory(self._memory)


class NixlReader:
    """An agent that reads from the owner's."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Registers the landing memory and takes the owner's metadata."""
        api = _api()
        self._agent = api.nixl_agent("reader", api.nixl_agent_config(backends=["UCX"]))
        self._memory = self._agent.register_memory(
            [(landing.address, landing.bytes.nbytes, 0, "landing")], "DRAM"
        )
        self._owner = self._agent.add_remote_agent(bytes.fromhex(str(offer["metadata"])))
        self._remote_address = int(offer["address"])
        self._local_address = landing.address
        self._handles: list[Any] = []

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """One transfer of all runs."""
        if begin:
            raise ContestantMissing("pieces are not told as they land")

        def descriptors(base: int, column: int) -> Any:
            table = np.array([(base + run[column], run[2], 0) for run in runs], np.uint64)
            return self._agent.get_xfer_descs(table, "DRAM")

        handle = self._agent.initialize_xfer(
            "READ",
            descriptors(self._local_address, 1),
            descriptors(self._remote_address, 0),
            self._owner,
        )
        self._handles.append(handle)
        transfer, check = self._agent.transfer, self._agent.check_xfer_state

        def pull() -> None:
            state = transfer(handle)
            give_up_at_s = time.monotonic() + PULL_TIMEOUT_S
            while state == "PROC":
                state = check(handle)
                if time.monotonic() > give_up_at_s:
                    state = "no end"
            if state != "DONE":
                raise ConnectionError(f"NIXL's transfer ended as {state}")

        return pull

    def close(self) -> None:
        """Releases the transfers, then the memory."""
        for handle in self._handles:
            self._agent.release_xfer_handle(handle)
        self._agent.remove_remote_agent(self._owner)
        self._agent.deregister_memory(self._memory)


open_owner = NixlOwner
open_reader = NixlReader

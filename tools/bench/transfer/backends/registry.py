"""From a backend's name to its file; imported only in the processes that run it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from snowskin.tools.bench.transfer.backends.api import (
        Offer,
        Options,
        OwnerEnd,
        ReaderEnd,
        SharedMemory,
    )

_HERE = "snowskin.tools.bench.transfer.backends"
BACKENDS = ("gloo", "memcpy", "mooncake", "nixl", "ours", "sockets", "ucx_gets")


class Backend(Protocol):
    """A file of this folder."""

    def open_owner(self, pool: SharedMemory, options: Options) -> OwnerEnd:
        """Serves the pool; raises ContestantMissing."""
        ...

    def open_reader(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> ReaderEnd:
        """Reads from that owner; raises ContestantMissing."""
        ...


def load(name: str) -> Backend:
    """The backend of that name; KeyError with the known ones where there is none."""
    if name not in BACKENDS:
        raise KeyError(f"no backend {name!r}; known: {', '.join(BACKENDS)}")
    return cast("Backend", importlib.import_module(f"{_HERE}.{name}"))

"""Our own transports, through the public `Transport` Protocol alone."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from snowskin.kvstore.node.data_plane import LENT_BY
from snowskin.tools.bench.transfer.backends.api import ContestantMissing
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.lending import Lending
from snowskin.transport.lending_probe import unit_nbytes, why_not_lend
from snowskin.transport.memory import Lendable, Memfd
from snowskin.transport.registry import open_transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.backends.api import (
        Begin,
        Offer,
        Options,
        Pull,
        SharedMemory,
    )
    from snowskin.transport.api import MemoryRegion, RemoteRegion, Transport
    from snowskin.transport.runs import Run

PULL_TIMEOUT_S = 60.0


def opened(options: Options) -> Transport:
    """The transport of option `scheme`, with the settings of option `settings` (JSON).

    Raises:
        ContestantMissing: it cannot be opened here.
    """
    settings = json.loads(str(options.get("settings", "{}")))
    try:
        return open_transport(str(options["scheme"]), **settings)
    except TransportUnavailable as error:
        raise ContestantMissing(str(error)) from error


class TransportOwner:
    """Grants the whole pool, and lends its pages where a node would."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Registers and describes; option `writable` lets the reader push, too."""
        writable = bool(options.get("writable", False))
        self._transport = opened(options)
        memory: object = Memfd(fd=pool.fd)
        self._lending: Lending | None = None
        unit = unit_nbytes()
        if options["scheme"] == LENT_BY and not why_not_lend(pool.fd, unit_nbytes=unit):
            self._lending = Lending(pool.fd, pool.bytes.nbytes, unit_nbytes=unit)
            memory = Lendable(memory=memory, lending=self._lending)
        self._region = self._transport.register(memory, writable=writable)
        descriptor = self._transport.describe(self._region, writable=writable)
        self.offer: Offer = {"descriptor": descriptor.to_bytes().hex()}

    def close(self) -> None:
        """Closes the transport, then the region, then its books of what was lent."""
        self._transport.close()
        self._region.close()
        if self._lending is not None:
            self._lending.close()


class TransportReader:
    """Attaches once, and pulls."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """The pool's memfd goes to the transports that map it; the others do not look at it."""
        self._transport = opened(options)
        self._local: MemoryRegion = self._transport.register(Memfd(fd=landing.fd))
        descriptor = RegionDescriptor.from_bytes(bytes.fromhex(str(offer["descriptor"])))
        self._remote: RemoteRegion = self._transport.attach(
            descriptor,
            fd=pool.fd if descriptor.scheme == "shm" else None,
            writable=bool(options.get("writable", False)),
            populate=True,
        )

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """One pull of all runs."""
        transport, remote, local, runs = self._transport, self._remote, self._local, list(runs)

        def pull() -> None:
            transport.pull(remote, local, runs, deadline_s=time.monotonic() + PULL_TIMEOUT_S)

        def pull_and_check() -> None:
            assert begin is not None
            transport.pull(
                remote,
                local,
                runs,
                deadline_s=time.monotonic() + PULL_TIMEOUT_S,
                landed=begin(),
            )

        return pull_and_check if begin else pull

    async def move(self, run: Run, *, is_pull: bool) -> None:
        """One run, either way, on the event loop."""
        deadline_s = time.monotonic() + PULL_TIMEOUT_S
        if is_pull:
            await self._transport.pull_async(
                self._remote, self._local, [run], deadline_s=deadline_s
            )
        else:
            await self._transport.push_async(
                self._local, self._remote, [run], deadline_s=deadline_s
            )

    def close(self) -> None:
        """Closes the transport, then the region."""
        self._transport.close()
        self._local.close()


open_owner = TransportOwner
open_reader = TransportReader

"""An owner and a reader over `tcp` with a relay between them, held at any stage of a transfer.

Rules kept here: a stage is a byte of the connection, found by doing the same transfer once without a fault, so it is
the same every time; the reader is in the test's process and the owner in its own, or the other way round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snowskin.transport.api import Run, TransferReport
from snowskin.transport.frames import HEAD_NBYTES, encode
from snowskin.transport.memory import Memfd
from snowskin.transport.registry import open_transport
from tests.support.raw_tcp import WELCOME, at, reachable
from tests.support.relay import DOWN, UP, Relay
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from snowskin.transport.api import RegionDescriptor
    from tests.support.transfer_child import TestMemory, TransferChild

WELCOME_NBYTES = len(encode(WELCOME))
NOTE = b"done"
PULL_STAGES = ("before the welcome", "after the request", "in the middle", "before the notice")
PUSH_STAGES = ("before the welcome", "after the request", "in the middle", "before the answer")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where the connection stands still: a direction and a byte."""

    direction: str
    at: int


class Reader:
    """A `tcp` transport in this process, with one landing region; `with` closes it."""

    def __init__(self, memory: TestMemory, **settings: Any) -> None:
        self.transport = open_transport("tcp", listen=(), **settings)
        self.memory = memory
        self.local = self.transport.register(Memfd(fd=memory.fd))

    def move(
        self,
        descriptor: RegionDescriptor,
        nbytes: int,
        *,
        is_push: bool = False,
        within_s: float = 5.0,
        note: bytes = b"",
        remote_offset: int = 0,
    ) -> TransferReport:
        """One transfer of one run, attached for it alone."""
        remote = self.transport.attach(descriptor, writable=is_push)
        runs = [Run(remote_offset, 0, nbytes)]
        deadline_s = time.monotonic() + within_s
        try:
            if is_push:
                return self.transport.push(
                    self.local, remote, runs, deadline_s=deadline_s, note=note
                )
            return self.transport.pull(remote, self.local, runs, deadline_s=deadline_s, note=note)
        finally:
            remote.close()

    def close(self) -> None:
        self.transport.close()
        self.local.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def through(relay: Relay, descriptor: RegionDescriptor) -> RegionDescriptor:
    """The grant as it is reached by the relay, which is aimed at its owner."""
    relay.command("aim", target=tuple(reachable(descriptor)))
    return at(descriptor, relay.address)


def stages(
    owner: TransferChild, landing: TestMemory, nbytes: int, *, is_push: bool
) -> dict[str, Stage]:
    """Where the stages of this transfer are, found by doing it once on a connection of its own."""
    descriptor = owner.describe(writable=is_push)
    num_served = owner.statistics()["num_served"]
    with Relay(reachable(descriptor)) as relay, Reader(landing) as reader:
        reader.move(through(relay, descriptor), nbytes, is_push=is_push, note=NOTE)
        # The reader is through before its last word is.
        eventually(lambda: owner.statistics()["num_served"] > num_served, 5.0, "served")
        up_nbytes = relay.passed[UP]
    owner.ask("revoke", descriptor=descriptor.to_bytes().hex())
    if is_push:
        return {
            "before the welcome": Stage(direction=DOWN, at=0),
            "after the request": Stage(direction=DOWN, at=WELCOME_NBYTES),
            "in the middle": Stage(direction=UP, at=up_nbytes - nbytes // 2),
            "before the answer": Stage(direction=DOWN, at=WELCOME_NBYTES + HEAD_NBYTES),
        }
    return {
        "before the welcome": Stage(direction=DOWN, at=0),
        "after the request": Stage(direction=DOWN, at=WELCOME_NBYTES),
        "in the middle": Stage(direction=DOWN, at=WELCOME_NBYTES + nbytes // 2),
        "before the notice": Stage(direction=UP, at=up_nbytes - HEAD_NBYTES - len(NOTE)),
    }

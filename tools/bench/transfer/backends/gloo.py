"""A collective-style peer: torch's gloo send and recv, every transfer known to both sides beforehand.

Sender and receiver form a group of a fixed size, and each `recv` has its `send`: the reader's list of ranges goes over
once, in `prepare`; a pull is a word that says which list, and the sends of all its ranges.
"""

from __future__ import annotations

import datetime
import socket
import threading
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
GROUP_TIMEOUT_S = 60.0
LATE_TIMEOUT_S = 2.0
OWNER, READER = 0, 1
STOP = -1


def _torch() -> Any:
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        raise ContestantMissing(f"torch cannot be imported: {error}") from error
    return torch


def _join(
    torch: Any, port: int, rank: int, *, size: int = 2, timeout_s: float = GROUP_TIMEOUT_S
) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    store = torch.distributed.TCPStore(
        HOST, port, size, is_master=rank == OWNER, timeout=timeout, wait_for_workers=False
    )
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )


def join_late(offer: Offer) -> str:
    """What a third process is told that wants to join the running group; empty if it could."""
    torch = _torch()
    try:
        _join(torch, int(offer["port"]), 2, size=3, timeout_s=LATE_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


class GlooOwner:
    """Rank 0: sends what it is told to, in a thread."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Waits for the reader in a thread of its own."""
        self._torch = _torch()
        self._tensor = self._torch.from_numpy(pool.bytes)
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self.offer: Offer = {"port": port}
        self._thread = threading.Thread(target=self._serve, name="gloo", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        torch = self._torch
        _join(torch, int(self.offer["port"]), OWNER)
        lists: list[Any] = []
        word = torch.zeros(2, dtype=torch.int64)
        while True:
            torch.distributed.recv(word, READER)
            index, num_ranges = word.tolist()
            if index == STOP:
                break
            if index == len(lists):
                table = torch.zeros((num_ranges, 2), dtype=torch.int64)
                torch.distributed.recv(table, READER)
                lists.append([self._tensor[start : start + size] for start, size in table.tolist()])
                continue
            for view in lists[index]:
                torch.distributed.send(view, READER)
        torch.distributed.destroy_process_group()

    def close(self) -> None:
        """The reader's last word ended the thread."""
        self._thread.join(GROUP_TIMEOUT_S)


class GlooReader:
    """Rank 1: says which list, and receives its ranges."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Joins the group."""
        self._torch = _torch()
        _join(self._torch, int(offer["port"]), READER)
        self._tensor = self._torch.from_numpy(landing.bytes)
        self._num_lists = 0

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """Tells the list; a call per range and side is what a pull is then."""
        if begin:
            raise ContestantMissing("not measured with checks")
        torch, index = self._torch, self._num_lists
        self._num_lists += 1
        self._say(index, len(runs))
        table = torch.tensor([(run.remote_offset, run.nbytes) for run in runs], dtype=torch.int64)
        torch.distributed.send(table, OWNER)
        views = [self._tensor[local : local + size] for _, local, size in runs]

        def pull() -> None:
            self._say(index, 0)
            for view in views:
                torch.distributed.recv(view, OWNER)

        return pull

    def _say(self, index: int, num_ranges: int) -> None:
        self._torch.distributed.send(
            self._torch.tensor([index, num_ranges], dtype=self._torch.int64), OWNER
        )

    def close(self) -> None:
        """Ends the group."""
        self._say(STOP, 0)
        self._torch.distributed.destroy_process_group()


open_owner = GlooOwner
open_reader = GlooReader

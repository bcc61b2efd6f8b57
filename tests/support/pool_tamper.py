"""Writing into a node's pool behind its back, by a descriptor of one's own.

What a fault would do to blocks that are committed: the node is asked by its local door where they lie, as any reader
is, and the bytes are changed through /proc in the memfd of its process.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.client.door_connection import DoorConnection
from snowskin.kvstore.client.transports import ClientTransports
from snowskin.kvstore.messages import Access, Matched, MatchRequest, ReleaseRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from snowskin.kvstore.blocks import KeyColumn

MEMFD = "/memfd:snowskin-dram"
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence's blocks lie in the pool, block by block, and which of them begin a segment."""

    offsets: tuple[int, ...]
    segment_starts: tuple[int, ...]

    def segment_of(self, block_index: int) -> range:
        """The blocks that lie side by side with this one."""
        start = max(each for each in self.segment_starts if each <= block_index)
        ends = [each for each in self.segment_starts if each > block_index]
        return range(start, ends[0] if ends else len(self.offsets))


async def find(door: str, namespace: bytes, keys: KeyColumn) -> Place:
    """Asks for all of `keys`, which must be there, and lets go of them at once."""
    connection = await DoorConnection.open(
        door.removeprefix("unix:"), "tamperer", Access.READ, ClientTransports(), timeout_s=TIMEOUT_S
    )
    try:
        matched = await connection.call(
            MatchRequest(namespaces=(namespace,), keys=keys),
            timeout_s=TIMEOUT_S,
            lease=None,
            request_id="",
        )
        assert isinstance(matched, Matched)
        assert matched.num_blocks == len(keys), f"{matched.num_blocks} of {len(keys)} blocks"
        assert matched.lease is not None
        release = ReleaseRequest(lease_ids=(matched.lease.id,))
        await connection.call(release, timeout_s=TIMEOUT_S, lease=matched.lease, request_id="")
    finally:
        await connection.close()
    offsets = []
    for run in matched.runs:
        size = run.extent.nbytes // run.num_blocks
        offsets += [run.extent.offset + index * size for index in range(run.num_blocks)]
    return Place(tuple(offsets), tuple(run.first_block_index for run in matched.runs))


class Pool:
    """A node's pool, read and written at byte offsets."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A copy."""
        return np.frombuffer(os.pread(self._descriptor, nbytes, offset), np.uint8)

    def write(self, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Changes what every process that mapped the pool sees."""
        assert os.pwrite(self._descriptor, data.tobytes(), offset) == data.nbytes


@contextmanager
def opened_pool(node_pid: int) -> Iterator[Pool]:
    """The pool of the node with this process id, by a new descriptor."""
    descriptor = _open_pool(f"/proc/{node_pid}/fd")
    try:
        yield Pool(descriptor)
    finally:
        os.close(descriptor)


def _open_pool(folder: str) -> int:
    """The node has several descriptors of its one pool, and closes one with each session that ends."""
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if not os.readlink(f"{folder}/{name}").startswith(MEMFD):
                continue
            descriptor = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CLOEXEC)
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(MEMFD):
                return descriptor
            os.close(descriptor)  # the number was given to another file in between
    raise AssertionError(f"{folder} shows no {MEMFD}")

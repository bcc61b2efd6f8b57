"""A store in this process with the client's signatures: blocks in a dict, faults on demand."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.engines.cancellation import outlast
from snowskin.kvstore.client.machine import AS_THE_CLIENT, Published, Pulled
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable, TailUnknown
from snowskin.kvstore.messages import Probed, WakeReason
from snowskin.transport.memory import MemoryRegion, region_of

if TYPE_CHECKING:
    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.transport.errors import SnowskinError

Key = tuple[bytes, bytes]

_EPOCHS = itertools.count(1)


@dataclass
class FakeStore:
    """One node's blocks, and what to do wrong.

    `faults[operation]` holds errors that the next calls of it raise, one each. Keys in `corrupt`
    are found broken by whoever pulls them, once. `gate` can be cleared to hold every call before it
    is answered, `copying` to hold every pull in its copy, which ends even where it is cancelled. The next pull
    of more than `breaks_after` blocks breaks off behind so many, and the node is dead.
    """

    blocks: dict[Key, bytes] = field(default_factory=dict)
    one_reader: set[Key] = field(default_factory=set)
    tails: dict[str, bytes] = field(default_factory=dict)
    corrupt: set[bytes] = field(default_factory=set)
    faults: dict[str, list[SnowskinError]] = field(default_factory=dict)
    calls: Counter = field(default_factory=Counter)
    alive: bool = True
    epoch: int = field(default_factory=_EPOCHS.__next__)
    num_writers_gone: int = 0
    num_publishing: int = 0
    max_publishing: int = 0
    num_offered: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    breaks_after: int | None = None
    copying: asyncio.Event = field(default_factory=asyncio.Event)
    num_copying: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    clients: list[FakeStoreClient] = field(default_factory=list)

    def __post_init__(self):
        self.gate.set()
        self.copying.set()

    async def connect(self) -> FakeStoreClient:
        self.check()
        client = FakeStoreClient(self)
        self.clients.append(client)
        return client

    def check(self) -> None:
        if not self.alive:
            raise NodeUnavailable("the fake node is down")

    async def crash(self) -> None:
        """Loses everything, as a killed node; `alive = True` brings the next epoch."""
        self.alive = False
        self.epoch = next(_EPOCHS)
        self.blocks.clear()
        self.tails.clear()
        await self.wake()

    async def wake(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def writer_gone(self) -> None:
        self.num_writers_gone += 1
        await self.wake()

    def held(self, namespace: bytes, keys: KeyColumn) -> int:
        """Gapless run from the first key."""
        for index, key in enumerate(keys):
            if (namespace, key) not in self.blocks:
                return index
        return len(keys)


class FakeStoreClient:
    """Same names and arguments as `StoreClient`."""

    def __init__(self, store: FakeStore) -> None:
        self.node_id = "fake"
        self.node_epoch = store.epoch
        self.store = store
        self.closed = False

    @property
    def connected(self) -> bool:
        return not self.closed and self.store.alive and self.node_epoch == self.store.epoch

    def register(self, buffer) -> MemoryRegion:
        return region_of(buffer)

    async def publish(
        self,
        *,
        namespace,
        keys,
        parent_key=b"",
        block_nbytes,
        local,
        local_offsets,
        one_reader=False,
        timeout_s=2.0,
        traffic=None,
        request_id="",
    ) -> Published:
        began_s = time.monotonic()
        self.store.num_publishing += 1
        self.store.max_publishing = max(self.store.max_publishing, self.store.num_publishing)
        try:
            await self._begin("publish")
            num_new = 0
            self.store.num_offered += len(keys)
            for key, offset in zip(keys, local_offsets, strict=True):
                if (namespace, key) not in self.store.blocks:
                    num_new += 1
                    self.store.blocks[namespace, key] = _read(local, offset, block_nbytes)
                    if one_reader:
                        self.store.one_reader.add((namespace, key))
            await self.store.wake()
        finally:
            self.store.num_publishing -= 1
        return Published(
            num_blocks=num_new,
            num_blocks_existing=len(keys) - num_new,
            nbytes=num_new * block_nbytes,
            seconds=time.monotonic() - began_s,
        )

    async def publish_tail(
        self, *, namespace, tail_id, local, local_offset, nbytes, timeout_s=0.0, request_id=""
    ) -> Published:
        await self._begin("publish_tail")
        self.store.tails[tail_id] = _read(local, local_offset, nbytes)
        return Published(num_blocks=1, num_blocks_existing=0, nbytes=nbytes, seconds=0.001)

    async def pull(
        self,
        *,
        namespace,
        keys,
        block_nbytes,
        local,
        local_offsets,
        wait_blocks=0,
        timeout_s=2.0,
        bounds=AS_THE_CLIENT,
        request_id="",
    ) -> Pulled:
        began_s = time.monotonic()
        await self._answer("pull", bounds, timeout_s)
        keys = keys[: len(local_offsets)]
        reason = await self._wait(namespace, keys, min(wait_blocks, len(keys)), timeout_s)
        num_found = self.store.held(namespace, keys)
        if num_found and bounds.on_found:
            bounds.on_found()
        bad = [i for i in range(num_found) if keys[i] in self.store.corrupt]
        good = bad[0] if bad else num_found
        landing = []
        for index in range(num_found):
            data = self.store.blocks[namespace, keys[index]]
            if index in bad:
                # What landed is wrong, and the node drops it from its index.
                data = bytes(len(data))
                self.store.corrupt.discard(keys[index])
                del self.store.blocks[namespace, keys[index]]
            landing.append((local_offsets[index], data))
            if (namespace, keys[index]) in self.store.one_reader:
                self.store.blocks.pop((namespace, keys[index]), None)
        if not self.store.copying.is_set():
            self.store.num_copying += 1
            try:
                await outlast(self.store.copying.wait())
            finally:
                self.store.num_copying -= 1
        broken_by = None
        if self.store.breaks_after is not None and good > self.store.breaks_after:
            num_found = good = self.store.breaks_after
            bad, broken_by = [], NodeUnavailable("the fake node died")
            await self.store.crash()
        for offset, data in landing[:num_found]:
            _write(local, offset, data)
        now_s = time.monotonic() - began_s
        return Pulled(
            num_blocks=good,
            nbytes=num_found * block_nbytes,
            num_extents=min(1, num_found),
            corrupt_blocks=tuple(bad),
            wake_reason=reason,
            seconds=now_s,
            first_byte_s=now_s if num_found else None,
            broken_by=broken_by,
        )

    async def discard(self, *, namespace, keys, tail_id="", request_id="") -> int:
        await self._begin("discard")
        left = [(namespace, key) for key in keys if (namespace, key) in self.store.one_reader]
        found = [self.store.blocks.pop(key, None) for key in left]
        found.append(self.store.tails.pop(tail_id, None))
        return sum(each is not None for each in found)

    async def pull_tail(
        self,
        *,
        namespace,
        tail_id,
        nbytes,
        local,
        local_offset,
        timeout_s=0.0,
        bounds=AS_THE_CLIENT,
        request_id="",
    ) -> Pulled:
        await self._answer("pull_tail", bounds, timeout_s)
        assert timeout_s == 0.0, "after the hand-off there is nothing to wait for"
        data = self.store.tails.pop(tail_id, None)
        if data is None:
            raise TailUnknown(f"no tail of {tail_id}")
        assert len(data) == nbytes
        _write(local, local_offset, data)
        return Pulled(
            num_blocks=1,
            nbytes=nbytes,
            num_extents=1,
            corrupt_blocks=(),
            wake_reason=WakeReason.SATISFIED,
            seconds=0.001,
            first_byte_s=0.001,
        )

    async def probe(self, *, namespaces, keys, request_id="") -> Probed:
        await self._begin("probe")
        return Probed(num_blocks=0, present_bitmap=b"", node_epoch=self.node_epoch)

    async def close(self) -> None:
        self.closed = True

    async def _answer(self, operation: str, bounds, timeout_s: float) -> None:
        """A look-up: in time, or DeadlineExceeded."""
        try:
            within_s = bounds.lookup_timeout_s
            async with asyncio.timeout(None if within_s is None else within_s + timeout_s):
                await self._begin(operation)
        except TimeoutError:
            raise DeadlineExceeded("the fake node is silent") from None

    async def _begin(self, operation: str) -> None:
        self.store.calls[operation] += 1
        await self.store.gate.wait()
        await asyncio.sleep(0)
        if not self.connected:
            raise NodeUnavailable("the fake node is down")
        waiting = self.store.faults.get(operation)
        if waiting:
            raise waiting.pop(0)

    async def _wait(self, namespace, keys, wait_blocks, timeout_s) -> WakeReason:
        num_gone = self.store.num_writers_gone
        try:
            async with asyncio.timeout(timeout_s), self.store.changed:
                while self.store.held(namespace, keys) < wait_blocks:
                    await self.store.changed.wait()
                    if not self.connected:
                        raise NodeUnavailable("the fake node went down")
                    if self.store.num_writers_gone > num_gone:
                        return WakeReason.WRITER_GONE
        except TimeoutError:
            return WakeReason.TIMEOUT
        return WakeReason.SATISFIED


def _read(local: MemoryRegion, offset: int, nbytes: int) -> bytes:
    return bytes(local.view[offset : offset + nbytes])


def _write(local: MemoryRegion, offset: int, data: bytes) -> None:
    local.view[offset : offset + len(data)] = data

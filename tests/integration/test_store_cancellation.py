"""Every await of the asyncio client, cancelled at each step of the loop: nothing stays leased, reserved or open."""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import threading
import weakref
from contextlib import asynccontextmanager

import numpy as np
import psutil
import pytest

from snowskin.kvstore.client import door_connection
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from tests.support.roles import running
from tests.support.store_drivers import WAYS, keys_of, namespace_of, noise
from tests.support.suspension import at_each_suspension

NAMESPACE = namespace_of(1)
# By gRPC a lease that was granted in the moment of a cancellation has nobody to give it back, and runs out. On the
# local door it is given back: there nothing may wait for a lease's end.
LEASES = {
    "door": {"read_lease_s": 60.0, "write_lease_s": 60.0, "grace_s": 60.0},
    "address": {"read_lease_s": 0.2, "write_lease_s": 0.2, "grace_s": 0.05},
}
SETTLE_S = 3.0
NBYTES = {"small": 1000, "large": 512 << 10}  # copied by the loop's thread, and by a worker


def steps():
    """0, 1, 2, ...; from 60 on in growing strides: then it is gRPC's own thread or a timer that is waited for."""
    for number in itertools.count():
        yield number if number < 60 else int(60 * 1.25 ** (number - 60))


async def cancelled_after(coroutine, num_steps):
    """Runs it for so many turns of the loop, then cancels it; whether it had ended by itself."""
    task = asyncio.create_task(coroutine)
    for _ in range(num_steps):
        await asyncio.sleep(0)
        if task.done():
            break
    ended = task.done()
    task.cancel()
    await asyncio.wait([task])
    if ended or not task.cancelled():
        task.result()
    return ended


async def until(is_so, what):
    """Lets the loop run until `is_so()` is."""
    deadline_s = asyncio.get_running_loop().time() + SETTLE_S
    while not await is_so():
        assert asyncio.get_running_loop().time() < deadline_s, f"not so within {SETTLE_S} s: {what}"
        await asyncio.sleep(0.001)


@asynccontextmanager
async def node_and_observer(way):
    async with (
        running(
            serve_node, NodeSettings, dram_nbytes=32 << 20, log_level="error", **LEASES[way]
        ) as role,
        await StoreClient.connect(role.facts["door"], client_name="observer") as client,
    ):
        yield role.facts[way], client


async def settles(observer):
    """Nothing is leased, reserved or waiting."""
    held = {}

    async def is_idle():
        stat = await observer.stat()
        (pool,) = stat.pools
        for name in ("read_leases", "write_leases", "waiting_matches", "waiting_reserves"):
            held[name] = getattr(stat, f"num_{name}")
        for name in ("reserved_nbytes", "quarantined_nbytes", "leased_nbytes"):
            held[name] = getattr(pool, name)
        return not any(held.values())

    await until(is_idle, held)


class Calls:
    """Each call of a client, with fresh blocks each time so that none is a repetition."""

    def __init__(self, client, observer, block_nbytes):
        self.client = client
        self.observer = observer
        self.block_nbytes = block_nbytes
        self.seeds = itertools.count(1)
        self.data = noise(1, 2 * block_nbytes)
        self.landing = np.zeros_like(self.data)
        self.there = {"namespace": NAMESPACE, "keys": keys_of(0, 2), "block_nbytes": block_nbytes}
        self.offsets = range(0, 2 * block_nbytes, block_nbytes)

    async def prepare(self):
        local = self.observer.register(self.data)
        await self.observer.publish(**self.there, local=local, local_offsets=self.offsets)

    async def publish(self):
        await self.client.publish(
            **self.there | {"keys": keys_of(next(self.seeds), 2)},
            local=self.client.register(self.data),
            local_offsets=self.offsets,
            one_reader=True,
        )

    async def publish_tail(self):
        await self.client.publish_tail(
            namespace=NAMESPACE,
            tail_id=f"tail-{next(self.seeds)}",
            local=self.client.register(self.data),
            local_offset=0,
            nbytes=self.block_nbytes,
        )

    async def pull(self):
        local = self.client.register(self.landing)
        pulled = await self.client.pull(**self.there, local=local, local_offsets=self.offsets)
        assert pulled.num_blocks == 2
        assert (self.landing == self.data).all()

    async def wait_in_vain(self):
        await self.client.pull(
            **self.there | {"keys": keys_of(next(self.seeds), 2)},
            local=self.client.register(self.landing),
            local_offsets=self.offsets,
            wait_blocks=1,
            timeout_s=0.1,  # far beyond what a cancelled one may stay in the node
        )

    async def pull_tail(self):
        name = f"tail-{next(self.seeds)}"
        tail = {"namespace": NAMESPACE, "tail_id": name, "nbytes": self.block_nbytes}
        local = self.observer.register(self.data)
        await self.observer.publish_tail(**tail, local=local, local_offset=0)
        local = self.client.register(self.landing)
        await self.client.pull_tail(**tail, local=local, local_offset=0)

    async def probe(self):
        await self.client.probe(namespaces=[NAMESPACE], keys=self.there["keys"])

    async def stat(self):
        await self.client.stat()

    async def discard(self):
        name = f"tail-{next(self.seeds)}"
        keys = keys_of(next(self.seeds), 2)
        local = self.observer.register(self.data)
        await self.observer.publish(
            **self.there | {"keys": keys}, local=local, local_offsets=self.offsets, one_reader=True
        )
        await self.observer.publish_tail(
            namespace=NAMESPACE, tail_id=name, local=local, local_offset=0, nbytes=self.block_nbytes
        )
        try:
            await self.client.discard(namespace=NAMESPACE, keys=keys, tail_id=name)
        finally:
            await asyncio.shield(
                self.observer.discard(namespace=NAMESPACE, keys=keys, tail_id=name)
            )


CALLS = [name for name in vars(Calls) if name != "prepare" and not name.startswith("_")]


@pytest.mark.parametrize("size", NBYTES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["publish", "publish_tail", "pull", "pull_tail", "wait_in_vain", "probe", "stat"]
)
async def test_a_cancelled_call_leaves_nothing(way, name, size):
    if size == "large" and name in ("wait_in_vain", "probe", "stat"):
        return  # these copy nothing
    async with node_and_observer(way) as (address, observer):
        # Reserving twice 512 KiB a time must not fill the pool: blocks for one reader are not evicted.
        async with await StoreClient.connect(address, client_name="cancelled") as client:
            calls = Calls(client, observer, NBYTES[size])
            await calls.prepare()
            await getattr(calls, name)()
            for num_steps in steps():
                if name in ("publish", "publish_tail") and num_steps % 8 == 7:
                    await settles(observer)
                ended = await cancelled_after(getattr(calls, name)(), num_steps)
                if way == "door":
                    await settles(observer)
                if ended:
                    break
            assert client.connected
            await calls.pull()
        await settles(observer)


@pytest.mark.parametrize("size", NBYTES)
@pytest.mark.parametrize("way", WAYS)
async def test_each_wait_of_each_call_cancelled_in_both_its_moments_leaves_nothing(way, size):
    """Fewer runs than by turns of the loop, and none of them by chance: also where the answer has just come."""
    async with (
        node_and_observer(way) as (address, observer),
        await StoreClient.connect(address, client_name="cancelled") as client,
    ):
        calls = Calls(client, observer, NBYTES[size])
        await calls.prepare()
        for name in CALLS:

            async def after(name=name):
                # What a cancelled publish had committed is for a reader that never comes: not this test's.
                if way == "door" or "publish" in name:
                    await settles(observer)

            await getattr(calls, name)()
            num_points = await at_each_suspension(getattr(calls, name), after)
            assert num_points >= 1, name
            assert client.connected
        await calls.pull()
        await settles(observer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["connect", "close"])
async def test_a_cancelled_connect_or_close_leaves_nothing_open(way, name):
    async with node_and_observer(way) as (address, observer):
        async with await StoreClient.connect(address, client_name="first") as client:
            await client.stat()
        gc.collect()
        num_sessions = (await observer.stat()).num_sessions
        num_fds = psutil.Process().num_fds()

        async def connect():
            async with await StoreClient.connect(address, client_name="cancelled"):
                pass

        async def is_as_before():
            stat = await observer.stat()
            is_so = stat.num_sessions == num_sessions and psutil.Process().num_fds() <= num_fds
            if not is_so:
                gc.collect()  # for the next look: it costs more than all the rest
            return is_so

        for num_steps in steps():
            if name == "connect":
                ended = await cancelled_after(connect(), num_steps)
            else:
                client = await StoreClient.connect(address, client_name="cancelled")
                ended = await cancelled_after(client.close(), num_steps)
                assert not client.connected or num_steps == 0
                await client.close()
                del client
            await until(is_as_before, f"{num_steps} steps: sessions and descriptors")
            if ended:
                break


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_reservation_makes_way_for_those_behind_it(way):
    """Nobody overtakes in the queue for room: a dead call at its head would stop it until its time is over."""
    async with (
        node_and_observer(way) as (address, observer),
        await StoreClient.connect(address, client_name="queue") as client,
    ):

        def publish(seed, num_blocks, timeout_s=0.0):
            return client.publish(
                namespace=NAMESPACE,
                keys=keys_of(seed, num_blocks),
                block_nbytes=1 << 20,
                local=client.register(np.zeros(num_blocks << 20, np.uint8)),
                local_offsets=range(0, num_blocks << 20, 1 << 20),
                one_reader=True,  # these are not evicted for others
                timeout_s=timeout_s,
            )

        async def num_waiting(count):
            async def is_so():
                return (await observer.stat()).num_waiting_reserves == count

            await until(is_so, f"{count} wait")

        await publish(1, 24)
        large = asyncio.create_task(publish(2, 16, timeout_s=30.0))
        await num_waiting(1)
        small = asyncio.create_task(publish(3, 4, timeout_s=30.0))
        await num_waiting(2)
        large.cancel()
        async with asyncio.timeout(SETTLE_S):
            assert (await small).num_blocks == 4
        await asyncio.wait([large])


async def test_a_cancelled_copy_is_cancelled_even_while_its_lease_is_being_renewed():
    """The copy lasts longer than a third of the lease: renewing must not swallow the cancellation."""
    async with node_and_observer("door") as (address, observer):
        async with await StoreClient.connect(
            address, client_name="cancelled", read_ttl_s=0.003
        ) as client:
            calls = Calls(client, observer, NBYTES["large"])
            await calls.prepare()
            for num_steps in range(0, 60, 2):
                task = asyncio.create_task(calls.pull())
                for _ in range(num_steps):
                    await asyncio.sleep(0)
                if not task.done():
                    task.cancel()
                    await asyncio.wait([task])
                    assert task.cancelled()
                else:
                    await asyncio.gather(task, return_exceptions=True)
        await settles(observer)


async def test_pools_are_unmapped_off_the_loop(monkeypatch):
    """Behind a dead node we are the last who map its pools: giving back 256 MiB of pages takes 0.1 s."""
    unmapped = queue.SimpleQueue()

    def noted(mappings):
        mapped = [weakref.ref(mapping) for mapping in mappings]
        real(mappings)
        unmapped.put((threading.current_thread(), [mapping() is None for mapping in mapped]))

    real = door_connection.unmap
    monkeypatch.setattr(door_connection, "unmap", noted)
    async with node_and_observer("door") as (address, _):
        client = await StoreClient.connect(address, client_name="goes")
        await client.close()
        thread, are_unmapped = await asyncio.to_thread(unmapped.get, timeout=10)
        assert thread is not threading.main_thread()
        assert are_unmapped == [True]
        thread.join(10)


@pytest.mark.parametrize("step", ["call", "move"])
async def test_a_flow_whose_channel_was_closed_before_a_step_of_it_has_lost_the_node(
    step, monkeypatch
):
    async with node_and_observer("address") as (address, observer):
        async with await StoreClient.connect(address, client_name="lost") as client:
            calls = Calls(client, observer, NBYTES["small"])
            await calls.prepare()
            connection = client._connection
            take = getattr(connection, step)

            async def take_too_late(*args, **options):
                await connection.close()
                await take(*args, **options)

            monkeypatch.setattr(connection, step, take_too_late)
            with pytest.raises(NodeUnavailable):
                await calls.pull()
        await settles(observer)

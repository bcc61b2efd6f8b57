"""Both clients under one face, so that one test holds for each: the asyncio one runs on a loop of its own."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.kvstore.client.store import StoreClient
from snowskin.kvstore.client.transports import ClientTransports

if TYPE_CHECKING:
    from collections.abc import Coroutine

DRIVERS = ("asyncio", "blocking")
WAYS = ("door", "address")
ALL_WAYS = (*WAYS, "slow")
SLOW = "slow:"  # before an address: bytes go by Read and Write


def address_by(facts, way):
    """Where a role that announced `facts` is reached by one of the ways."""
    return SLOW + facts["address"] if way == "slow" else facts[way]


def way_of(address):
    """The address, and what to connect with so that bytes go that way."""
    if not address.startswith(SLOW):
        return address, {}
    return address.removeprefix(SLOW), {"transports": ClientTransports("grpc")}


class LoopedClient:
    """`StoreClient` with calls that return when they are done, what they told included."""

    def __init__(self, runner: asyncio.Runner, client: StoreClient) -> None:
        self._runner = runner
        self._client = client

    def __getattr__(self, name):
        value = getattr(self._client, name)
        if not inspect.iscoroutinefunction(value):
            return value

        def call(**arguments):
            return self._runner.run(self._to_the_end(value(**arguments)))

        return call

    async def _to_the_end(self, coroutine: Coroutine[object, object, object]) -> object:
        try:
            return await coroutine
        finally:
            telling = getattr(self._client._connection, "_telling", None)
            if telling:
                await asyncio.wait(telling)


@contextmanager
def connected(driver, address, *, client_name="client", **arguments):
    """A client of either driver, closed at the end."""
    address, slow = way_of(address)
    arguments = {**slow, **arguments}
    if driver == "blocking":
        with BlockingStoreClient.connect(address, client_name=client_name, **arguments) as blocking:
            yield blocking
        return
    with asyncio.Runner() as runner:
        client = runner.run(StoreClient.connect(address, client_name=client_name, **arguments))
        try:
            yield LoopedClient(runner, client)
        finally:
            runner.run(client.close())


def keys_of(seed: int, num_keys: int, *, width: int = 32) -> KeyColumn:
    """Different seeds give different keys."""
    packed = np.random.default_rng(seed).bytes(num_keys * width)
    return KeyColumn(packed=packed, width=width)


def namespace_of(seed: int) -> bytes:
    """32 bytes that no other seed has."""
    return seed.to_bytes(32, "big")


def noise(seed: int, nbytes: int) -> np.ndarray:
    """Bytes that are no other seed's."""
    return np.random.default_rng([seed, 7]).integers(0, 256, nbytes, dtype=np.uint8)

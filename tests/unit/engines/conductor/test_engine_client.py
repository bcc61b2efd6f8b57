"""What a call to an instance that ended means."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from snowskin.engines.conductor.engine_client import DecodeCall
from snowskin.engines.conductor.errors import InstanceLost
from snowskin.engines.messages import Handoff
from snowskin.kvstore.errors import BadRequest
from snowskin.kvstore.rpc import ERROR_HEADER
from snowskin.kvstore.wire import error_to_detail
from snowskin.transport.errors import SnowskinError


class EndedCall:
    """A stream that is over, as grpc.aio shows it."""

    def __init__(self, status: grpc.StatusCode, *, said: SnowskinError | None = None) -> None:
        trailing = ((ERROR_HEADER, error_to_detail(said).SerializeToString()),) if said else ()
        self.error = grpc.aio.AioRpcError(
            status, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "over", None
        )

        self.written = asyncio.Event()

    async def write(self, message: object) -> None:
        self.written.set()
        raise self.error

    async def read(self) -> object:
        await self.written.wait()
        raise self.error


async def test_a_write_that_met_the_end_of_its_call_leaves_a_lost_instance():
    call = DecodeCall(EndedCall(grpc.StatusCode.INTERNAL), "decode-0")
    reading = asyncio.create_task(call.read())  # as the conductor does, before it hands off
    await asyncio.sleep(0)
    await call.hand_off(Handoff(first_token_id=1, position=1))
    for read in (reading, call.read()):
        with pytest.raises(InstanceLost, match="decode-0"):
            await read


async def test_internal_error_of_an_instance_that_took_all_writes_is_its_own():
    ended = EndedCall(grpc.StatusCode.INTERNAL)
    ended.written.set()
    call = DecodeCall(ended, "decode-0")
    with pytest.raises(SnowskinError, match="INTERNAL") as raised:
        await call.read()
    assert not isinstance(raised.value, InstanceLost)


async def test_what_an_instance_said_counts_whatever_became_of_the_write():
    said = BadRequest("too long")
    call = DecodeCall(EndedCall(grpc.StatusCode.INVALID_ARGUMENT, said=said), "decode-0")
    await call.hand_off(Handoff(first_token_id=1, position=1))
    with pytest.raises(BadRequest, match="too long"):
        await call.read()

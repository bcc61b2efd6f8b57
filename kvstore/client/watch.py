"""What one node tells of its blocks, as it happens: a Watch over gRPC.

Rules kept here: a stream has its own channel, which goes with it; a stream that ends, however it ends, is an error of
the one who reads it: NodeUnavailable, or what the node raised. Silence is the reader's to notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.rpc import open_channel, translating
from snowskin.kvstore.wire import watch_request_to, watched_from
from snowskin.v1 import store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from snowskin.kvstore.messages import Watched, WatchRequest


async def watch(address: str, request: WatchRequest) -> AsyncGenerator[Watched, None]:
    """The node's messages from where `request` stands, in order; close it to end the stream.

    Args:
        address: `host:port` of the node's gRPC.
        request: as `DirectoryView.request` makes it.

    Raises:
        NodeUnavailable: the node cannot be reached, or the stream ended.
        WatcherTooSlow: too little was read for too long.
        BadKeyColumn: the node told of something that is no key.
    """
    channel = open_channel(address)
    try:
        stream = store_pb2_grpc.StoreStub(channel).Watch(watch_request_to(request))
        with translating(f"node {address}"):
            async for message in stream:
                yield watched_from(message)
        raise NodeUnavailable(f"node {address} ended its stream of changes", hint="watch again")
    finally:
        await channel.close(None)

"""Answers that take long: work that ends with its client, and events sent as they come.

Rules kept here: a client that closes the connection, or reads nothing for `SEND_TIMEOUT_S`, is
gone; then the work is cancelled and awaited, in whatever phase it was. The status of a stream is
sent with its first event, so that an error before it is a plain error.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from starlette.responses import Response

from snowskin.engines.cancellation import ended
from snowskin.kvstore.telemetry import bind_request, get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from starlette.types import Message, Receive, Scope, Send

SEND_TIMEOUT_S = 30.0

_ResultT = TypeVar("_ResultT")

log = get_logger(__name__)


class ClientGone(Exception):
    """The client has closed the connection, or does not read."""


async def while_connected(receive: Receive, work: Coroutine[None, None, _ResultT]) -> _ResultT:
    """The result of `work`; cancels it, and waits for its end, when the client goes away.

    Raises:
        ClientGone: there is nobody to answer.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await ended(task, gone)


class EventStream(Response):
    """Server-sent events, from a source that is open only while they are sent."""

    def __init__(
        self,
        source: Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]],
        on_error: Callable[[SnowskinError], Response],
        request_id: str,
    ) -> None:
        """Opens nothing yet.

        Args:
            source: gives the events, one `bytes` each, at least one.
            on_error: the answer where it raises before its first event.
            request_id: for the header, and for every line that is logged while it is sent.
        """
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-request-id": request_id},
        )
        # Made for a whole body; a stream has no length.
        del self.headers["content-length"]
        self._source = source
        self._on_error = on_error
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client is gone."""
        with bind_request(self._request_id):  # the handler that bound it has returned long ago
            try:
                await while_connected(receive, self._run(scope, receive, send))
            except ClientGone:
                log.info("client gone")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with self._source() as events:
                async for data in events:
                    if not begun:
                        start = {"status": self.status_code, "headers": self.raw_headers}
                        await _sent(send, {"type": "http.response.start", **start})
                        begun = True
                    await _sent(send, _body(data, more=True))
        except SnowskinError as error:
            assert not begun, "a source that has begun ends by an event"
            await self._on_error(error)(scope, receive, send)
            return
        await _sent(send, _body(b"", more=False))


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _sent(send: Send, message: Message) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send(message)
    except (TimeoutError, OSError) as error:
        raise ClientGone from error


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Asking one gRPC service of one process: what the clients of kvctl share.

Rules kept here: every call has a deadline, and an error names who was asked; no message is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from snowskin.kvstore.rpc import open_channel, translating

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    import grpc.aio


class Asker:
    """Asks one process; an asynchronous context manager.

    Attributes:
        PEER: what is asked, for errors.
        STUB: of its service.
    """

    PEER: ClassVar[str]
    STUB: ClassVar[type[Any]]

    def __init__(
        self, address: str, *, timeout_s: float, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Connects lazily to `address`, `host:port`; every call gets `timeout_s` and `metadata`."""
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = metadata
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        """Opens the channel."""
        self._channel = open_channel(self.address)
        self._stub = self.STUB(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close(None)

    async def _ask(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        """One call of a method of the stub.

        Raises:
            NodeUnavailable, DeadlineExceeded: nobody answers.
        """
        with translating(f"{self.PEER} {self.address}"):
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)

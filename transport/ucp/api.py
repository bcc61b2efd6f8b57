"""What we ask of UCX, and nothing else: two bindings answer the same calls.

Rules kept here: all calls on a worker and on what belongs to it come from one thread; nothing here
blocks; every posted operation ends in exactly one call of its `done`, perhaps before the posting
call returns, else within `progress`; callbacks may post, but never call `progress`.

UCX emulates one-sided access in software over tcp and shared memory, and its tcp serves whatever
address its own wire names: who can speak to a worker's port can write into the process. So a
worker listens only where the hosts of one cluster are alone; see `docs/operations.md`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

MAX_PEER_BYTES = 64 * 1024
"""A worker address or a packed key longer than this is refused unread."""
MAX_HEADER_NBYTES = 256
SLICE_NBYTES = 7 << 29  # 3.5 GiB: one registration above 4 GiB reads at half the line rate

HARDWARE_TRANSPORTS = ("rc", "dc", "cuda_ipc", "gdr_copy")
"""Transports whose hardware, or driver, checks key, bounds and access of a one-sided access."""


class UcpFeature(enum.IntFlag):
    """What a context may be used for; without REMOTE_MEMORY nobody is served one-sided."""

    REMOTE_MEMORY = 1 << 1
    WAKEUP = 1 << 4
    MESSAGES = 1 << 6


class UcpMemoryType(enum.IntEnum):
    """Where memory lies, in UCX's numbers."""

    HOST = 0
    CUDA = 1
    CUDA_MANAGED = 2


class UcpFailure(Exception):
    """UCX refused or gave up; the transport above says it in its own words.

    Attributes:
        status: UCX's own name without its prefix, e.g. `CONNECTION_RESET`.
    """

    def __init__(self, status: str, what: str) -> None:
        """`what` was being done when UCX answered `status`."""
        super().__init__(f"{what}: {status}")
        self.status = status


Done = Callable[[UcpFailure | None], object]


class Span(NamedTuple):
    """Bytes of this process, by address; who names them keeps them alive."""

    address: int
    nbytes: int


Reply = Callable[[bytes, bytes], object]
"""`reply(header, payload)` answers one message, within the call that brought it; nobody is told how it ends.

Where many of them wait for peers that do not listen, it is dropped.
"""

Arrive = Callable[[bytes, Span, "Reply | None"], object]
"""`arrive(header, payload, reply)` per message; the payload's memory is valid only within the call.

`reply` is there where the sender asked for it: it needs no endpoint of this side, and so no address of the peer.
"""


class UcpRequest(Protocol):
    """A posted operation that has not ended yet."""

    def cancel(self) -> None:
        """Asks UCX to give it up; its `done` still comes, and maybe without a failure."""


class UcpMemory(Protocol):
    """Registered memory."""

    @property
    def span(self) -> Span:
        """What was registered."""

    def pack(self) -> bytes:
        """The key for peers, at most `MAX_PEER_BYTES`; secret where hardware checks it."""

    def unmap(self) -> None:
        """Deregisters; idempotent. UCX may keep the hardware's registration cached."""


class UcpKey(Protocol):
    """A peer's key, unpacked: one-sided access over its endpoint, where that may (see the module)."""

    def get(self, local: Span, remote_address: int, done: Done) -> UcpRequest | None:
        """Reads the peer's memory."""

    def put(self, local: Span, remote_address: int, done: Done) -> UcpRequest | None:
        """Writes the peer's memory; visible there after a later `flush` of the endpoint."""


class UcpEndpoint(Protocol):
    """The way to one peer's worker."""

    @property
    def failed(self) -> UcpFailure | None:
        """Why it cannot be used any more, or None."""

    def send(
        self, header: bytes, payload: Sequence[Span], done: Done, *, wants_reply: bool = False
    ) -> UcpRequest | None:
        """Sends one message, eagerly: it lands nowhere but in the receiver's `arrive`.

        Args:
            header: at most `MAX_HEADER_NBYTES`, copied.
            payload: host memory, gathered in this order; it is UCX's until `done`.
            done: told once, when the payload's memory may be reused.
            wants_reply: the receiver may answer without an endpoint of its own.
        """

    def flush(self, done: Done) -> UcpRequest | None:
        """Tells when all earlier operations are complete at the peer."""

    def unpack(self, packed: bytes) -> UcpKey:
        """Makes a peer's key usable, until this endpoint is closed.

        A damaged key can crash this process: never one that did not come authenticated.
        """

    def transports(self) -> tuple[str, ...]:
        """What is in use, e.g. `("tcp/eth0",)`; may be empty before the first message."""

    def close(self, done: Done) -> None:
        """Closes without asking the peer: by `done` all its operations have ended and touch nothing.

        Its keys go with it.
        """


class UcpWorker(Protocol):
    """One thread's side of the network."""

    @property
    def address(self) -> bytes:
        """What a peer needs for `connect`."""

    @property
    def event_fd(self) -> int:
        """Readable when `progress` has work, once `arm` said True; the worker's, who closes it."""

    def progress(self) -> bool:
        """Does what is ready, runs callbacks; whether there was anything."""

    def arm(self) -> bool:
        """Whether one may now wait on `event_fd`; False where `progress` has work at once."""

    def connect(self, address: bytes, on_failure: Callable[[UcpFailure], object]) -> UcpEndpoint:
        """A new endpoint with error handling on; `on_failure` is told once, within `progress`."""

    def close(self) -> None:
        """Ends everything of this worker at once; idempotent."""


class UcpContext(Protocol):
    """UCX opened once with its settings."""

    @property
    def binding(self) -> str:
        """Which binding this is: `ucx-py` or `ctypes`."""

    @property
    def version(self) -> str:
        """UCX's version."""

    def map(self, span: Span, kind: UcpMemoryType) -> UcpMemory:
        """Registers memory; the caller keeps it alive until `unmap`."""

    def open_worker(self, arrive: Arrive) -> UcpWorker:
        """A worker whose messages go to `arrive`, within `progress`."""

    def close(self) -> None:
        """Closes UCX, after all workers and memories; idempotent."""

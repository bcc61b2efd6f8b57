"""Registered memory: who owns it, what may land in it, and when it is really left alone.

Rules kept here: registering never copies; a region keeps its owner alive and never frees it; a
closed region lets nothing land, and `close` returns only when the last landing piece is done;
what an abandoned transfer may still write is quarantined until that transfer has ended.

A landing piece is bracketed by `begin_landing` and `end_landing`. Between them the region cannot
finish closing, so a piece must be short (≤ 1 MiB of memcpy) and must not wait for anybody.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from snowskin.transport.errors import (
    LandingQuarantined,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.mapping import map_memfd
from snowskin.transport.memory_kind import MemoryKind, cuda_memory, is_tensor, tensor_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from snowskin.transport.lending import Lending

Bytes = npt.NDArray[np.uint8]
LandingRange = tuple[int, int]  # offset, nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Memfd:
    """A memfd to register or attach; the descriptor stays the caller's, who closes it."""

    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lendable:
    """Memory to register whose pages may be handed to sockets; `lending` stays the caller's, who closes it."""

    memory: object
    lending: Lending


class LandingGate:
    """Counts pieces that are landing; once closed lets none begin, and waits for the last.

    `begin` and `end` take no lock, because every piece pays for them. `begin` first says that it is
    inside and then looks whether the gate is closed; `close` first closes and then looks who is
    inside: so one of the two sees the other.
    """

    __slots__ = ("_inside", "_left", "closed", "name")

    def __init__(self, name: str) -> None:
        """An open gate; `name` stands in the error of those who come too late."""
        self.name = name
        self.closed = False
        self._inside: list[None] = []  # appending and popping are atomic
        self._left = threading.Condition()

    def begin(self) -> None:
        """Enters, or raises TransportClosed."""
        self._inside.append(None)
        if self.closed:
            self.end()
            raise TransportClosed(f"{self.name} is closed")

    def end(self) -> None:
        """Leaves; wakes who is closing."""
        self._inside.pop()
        if self.closed:
            with self._left:
                self._left.notify_all()

    def close(self) -> bool:
        """Closes and waits until nobody is inside; False where it was closed before."""
        with self._left:
            first = not self.closed
            self.closed = True
            while self._inside:
                self._left.wait()
            return first


class Quarantine:
    """Ranges that abandoned transfers may still write, by transfer.

    Attributes:
        held: the ranges, by whatever names the transfer; asked for by every transfer.
    """

    __slots__ = ("__weakref__", "held")

    def __init__(self) -> None:
        """Nothing is held."""
        self.held: dict[object, tuple[LandingRange, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges held."""
        return sum(nbytes for ranges in list(self.held.values()) for _, nbytes in ranges)

    def add(self, key: object, ranges: Sequence[LandingRange]) -> None:
        """Keeps other transfers out of `ranges` until `lift(key)`."""
        self.held[key] = tuple(ranges)

    def lift(self, key: object) -> None:
        """Says that the transfer `key` can write nothing more. Idempotent."""
        self.held.pop(key, None)

    def clear(self) -> None:
        """Says that no transfer can write anything more."""
        self.held.clear()

    def check(self, ranges: Sequence[LandingRange]) -> None:
        """Raises LandingQuarantined where a range overlaps what may still be written."""
        for held in list(self.held.values()):
            for held_offset, held_nbytes in held:
                for offset, nbytes in ranges:
                    if offset < held_offset + held_nbytes and held_offset < offset + nbytes:
                        raise LandingQuarantined(
                            f"[{offset}, {offset + nbytes}) overlaps [{held_offset}, "
                            f"{held_offset + held_nbytes}) of an abandoned transfer",
                            hint="land elsewhere, or close the region to end the quarantine",
                            retry_after_s=0.01,
                        )


class MemoryRegion:
    """Local memory that transfers read from and land in; a context manager that closes.

    Attributes:
        nbytes: its size.
        owner: what was registered; kept alive until `close`.
        writable: whether bytes may land here.
        shared: whether a memfd backs it, so that peers on this host can map it.
        kind: who can reach it.
        lending: of its pages, at the same offsets; None where bytes must be copied, and once it is closed.
        device_index: the CUDA device that it lies on; None for host memory.
        address: where it begins, in this process or on its device.
        gate: what every piece that lands here passes.
        quarantined: what of it abandoned transfers may still write; empty once it is closed.
    """

    __slots__ = (
        "_buffer",
        "_view",
        "address",
        "device_index",
        "gate",
        "kind",
        "lending",
        "nbytes",
        "owner",
        "quarantined",
        "shared",
        "writable",
    )

    def __init__(
        self,
        buffer: Bytes,
        owner: object,
        *,
        writable: bool,
        shared: bool,
        kind: MemoryKind = MemoryKind.HOST,
    ) -> None:
        """Wraps `buffer`, which is host memory; `region_of` is the way in."""
        self._buffer: Bytes | None = buffer
        self._view: memoryview | None = buffer.data
        self.kind = kind
        self.lending: Lending | None = None
        self.device_index: int | None = None
        self.address = int(buffer.__array_interface__["data"][0])
        self.nbytes = int(buffer.nbytes)
        self.owner: object = owner
        self.writable = writable
        self.shared = shared
        self.gate = LandingGate(f"memory region of {self.nbytes} bytes")
        self.quarantined = Quarantine()

    @classmethod
    def on_device(
        cls, owner: object, *, address: int, nbytes: int, device_index: int, writable: bool
    ) -> Self:
        """A region of CUDA memory: it has no buffer, only an address."""
        region = cls(_nothing(), owner, writable=writable, shared=False, kind=MemoryKind.CUDA)
        region._buffer = region._view = None
        region.address, region.nbytes, region.device_index = address, nbytes, device_index
        region.gate.name = f"memory region of {nbytes} bytes on CUDA device {device_index}"
        return region

    @property
    def buffer(self) -> Bytes:
        """The memory as uint8, one dimension, sharing the owner's bytes.

        Raises:
            TransportUnavailable: it lies on a device, where this process cannot read it.
        """
        if self._buffer is None:
            raise self._unreachable()
        return self._buffer

    @property
    def view(self) -> memoryview:
        """The same bytes as a memoryview: cheaper than numpy for small slices; raises as `buffer`."""
        if self._view is None:
            raise self._unreachable()
        return self._view

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.gate.closed

    @property
    def quarantined_nbytes(self) -> int:
        """Bytes into which an abandoned transfer may still write."""
        return self.quarantined.nbytes

    def quarantine(self, key: object, ranges: Sequence[LandingRange]) -> None:
        """Keeps other transfers out of `ranges` until `lift_quarantine(key)`, or `close`."""
        if not self.closed:
            self.quarantined.add(key, ranges)

    def lift_quarantine(self, key: object) -> None:
        """Says that the transfer `key` can write nothing more."""
        self.quarantined.lift(key)

    def check_not_quarantined(self, ranges: Sequence[LandingRange]) -> None:
        """Raises LandingQuarantined where a range overlaps what may still be written."""
        self.quarantined.check(ranges)

    def begin_landing(self) -> None:
        """Opens the bracket of one piece; raises TransportClosed."""
        self.gate.begin()

    def end_landing(self) -> None:
        """Closes the bracket of one piece."""
        self.gate.end()

    def close(self) -> None:
        """Lets nothing land any more and forgets the owner; idempotent, waits ≤ one piece."""
        if self.gate.close():
            self.quarantined.clear()
            self.owner = self.lending = None
            if self._buffer is not None:
                self._view = memoryview(b"")
                self._buffer = _nothing()

    def _unreachable(self) -> TransportUnavailable:
        return TransportUnavailable(
            f"{self.nbytes} bytes on CUDA device {self.device_index} have no host address",
            hint="use a transport that reaches device memory, or stage them in host memory",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def region_of(memory: object, *, writable: bool = True) -> MemoryRegion:
    """Registers `memory` in place.

    Args:
        memory: a `Memfd` (mapped whole), a `Lendable`, a C-contiguous numpy array, a contiguous torch tensor on
            CPU or CUDA, any object with a contiguous buffer (mmap, bytearray, memoryview) or with
            `__cuda_array_interface__`.
        writable: whether bytes may land there; memory that is read-only stays so.

    Raises:
        TransportError: not contiguous, or empty. TransportUnavailable: neither host nor CUDA
            memory.
    """
    if isinstance(memory, Lendable):
        region = region_of(memory.memory, writable=writable)
        region.lending = memory.lending
        return region
    if isinstance(memory, Memfd):
        nbytes = os.fstat(memory.fd).st_size
        mapped = map_memfd(memory.fd, nbytes, writable=writable)
        return MemoryRegion(mapped.array(), mapped, writable=writable, shared=True)
    cuda = cuda_memory(memory)
    if cuda is not None:
        return MemoryRegion.on_device(
            memory,
            address=cuda.address,
            nbytes=cuda.nbytes,
            device_index=cuda.device_index,
            writable=writable and cuda.writable,
        )
    kind = tensor_kind(memory) if is_tensor(memory) else MemoryKind.HOST
    buffer = _flat(_tensor_bytes(memory) if is_tensor(memory) else memory)
    return MemoryRegion(
        buffer, memory, writable=writable and buffer.flags.writeable, shared=False, kind=kind
    )


def _tensor_bytes(tensor: object) -> Bytes:
    """The bytes of a contiguous torch CPU tensor, shared."""
    import torch

    assert isinstance(tensor, torch.Tensor), "tensor_kind looked"
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def _flat(memory: object) -> Bytes:
    """`memory` as one dimension of uint8, sharing its bytes."""
    try:
        view = memoryview(memory)  # type: ignore[arg-type]  # refused below where it is no buffer
    except (TypeError, ValueError, BufferError) as error:
        # numpy says ValueError for dtypes that have no buffer format (bfloat16 extensions)
        raise TransportError(
            f"{type(memory).__name__} has no buffer to register: {error}"
        ) from error
    if not view.c_contiguous:
        raise TransportError("the memory is not contiguous", hint="register its base array")
    if view.nbytes < 1:
        raise TransportError("memory of 0 bytes cannot be registered")
    return np.frombuffer(view, dtype=np.uint8)


def _nothing() -> Bytes:
    return np.empty(0, dtype=np.uint8)

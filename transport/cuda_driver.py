"""The CUDA driver, as far as moving bytes needs it: streams, copies, events, pinned host memory.

Rules kept here: this is the only module that calls libcuda; every status is looked at; each call runs in the primary
context of its device, which is the one that torch and the CUDA runtime use, and leaves the thread's current context as
it found it. Nothing is loaded before somebody asks.

Source: the CUDA driver API's reference. Tested against a stand-in library everywhere, and on a GPU by the tests marked
`gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportError, TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "libcuda.so.1"

_SUCCESS = 0
_NOT_READY = 600
_NON_BLOCKING_STREAM = 1  # does not wait for the default stream, and the default stream not for it
_EVENT_WITHOUT_TIMING = 2
_REGISTER_PORTABLE = 1  # pinned for every context of this process
_REGISTER_READ_ONLY = 8
_ALREADY_REGISTERED = 712

_SIGNATURES: dict[str, list[object]] = {
    "cuInit": [c_uint],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemcpyAsync": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}


class CudaDriver:
    """libcuda, loaded and initialised. Methods raise TransportError with the driver's own words."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Raises TransportUnavailable where there is no driver, no device, or the driver is too old."""
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            raise TransportUnavailable(
                f"no CUDA driver: {error}",
                hint="install NVIDIA's driver, or keep KV memory on the host",
            ) from error
        self._call("cuInit", 0)
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        self.num_devices = count.value
        self._contexts: dict[int, tuple[int, c_void_p]] = {}

    def create_stream(self, device_index: int) -> int:
        """A stream of its own, which runs beside all others; `destroy_stream` ends it."""
        stream = c_void_p()
        with self._on(device_index):
            self._call("cuStreamCreate", byref(stream), _NON_BLOCKING_STREAM)
        return stream.value or 0

    def destroy_stream(self, device_index: int, stream: int) -> None:
        """Frees the stream when its work is done; does not wait for it."""
        with self._on(device_index):
            self._call("cuStreamDestroy_v2", stream)

    def synchronize(self, device_index: int, stream: int) -> None:
        """Waits, without a deadline, until all that the stream was given is done."""
        with self._on(device_index):
            self._call("cuStreamSynchronize", stream)

    def create_event(self, device_index: int) -> int:
        """An event without timing; `destroy_event` ends it."""
        event = c_void_p()
        with self._on(device_index):
            self._call("cuEventCreate", byref(event), _EVENT_WITHOUT_TIMING)
        return event.value or 0

    def destroy_event(self, device_index: int, event: int) -> None:
        """Frees the event."""
        with self._on(device_index):
            self._call("cuEventDestroy_v2", event)

    def record(self, device_index: int, event: int, stream: int) -> None:
        """The event is done when all that `stream` was given so far is done; 0 is the default stream."""
        with self._on(device_index):
            self._call("cuEventRecord", event, stream)

    def wait_on_device(self, device_index: int, stream: int, event: int) -> None:
        """What `stream` is given from now on begins after the event; this thread does not wait."""
        with self._on(device_index):
            self._call("cuStreamWaitEvent", stream, event, 0)

    def is_done(self, device_index: int, event: int) -> bool:
        """Whether the event is done; raises where what it waits for failed."""
        with self._on(device_index):
            status = self._library.cuEventQuery(event)
            if status == _NOT_READY:
                return False
            self._check("cuEventQuery", status)
            return True

    def copy(self, device_index: int, target: int, source: int, nbytes: int, stream: int) -> None:
        """Begins a copy between any two addresses, host or device, on `stream`.

        Pageable host memory makes the driver stage, and then the call itself takes as long as the copy.
        """
        with self._on(device_index):
            self._call("cuMemcpyAsync", target, source, nbytes, stream)

    def pin(self, device_index: int, address: int, nbytes: int, *, writable: bool) -> bool:
        """Pins host memory, whose pages must be there; False where it was pinned before."""
        flags = _REGISTER_PORTABLE | (0 if writable else _REGISTER_READ_ONLY)
        with self._on(device_index):
            status = self._library.cuMemHostRegister_v2(address, nbytes, flags)
            if status == _ALREADY_REGISTERED:
                return False
            self._check("cuMemHostRegister", status)
        return True

    def unpin(self, device_index: int, address: int) -> None:
        """Ends what `pin` began at this address."""
        with self._on(device_index):
            self._call("cuMemHostUnregister", address)

    def close(self) -> None:
        """Gives the devices' contexts back; idempotent."""
        contexts, self._contexts = self._contexts, {}
        for device, _ in contexts.values():
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    @contextlib.contextmanager
    def _on(self, device_index: int) -> Iterator[None]:
        """A block in which the device's primary context is this thread's."""
        self._call("cuCtxPushCurrent_v2", self._context(device_index))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _context(self, device_index: int) -> c_void_p:
        known = self._contexts.get(device_index)
        if known is not None:
            return known[1]
        if not 0 <= device_index < self.num_devices:
            raise TransportUnavailable(
                f"there is no CUDA device {device_index}; this process sees {self.num_devices}",
                hint="look at CUDA_VISIBLE_DEVICES",
            )
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), device_index)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        # Two threads may come here at once: a context retained twice is released once too seldom, which costs nothing.
        return self._contexts.setdefault(device_index, (device.value, context))[1]

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status == _SUCCESS:
            return
        text = c_char_p()
        self._library.cuGetErrorString(status, byref(text))
        words = (text.value or b"unknown error").decode("ascii", "replace")
        raise TransportError(f"{name} failed: {words} (CUDA error {status})")


@functools.cache
def cuda_driver() -> CudaDriver:
    """This process's driver; raises TransportUnavailable anew each time where there is none."""
    return CudaDriver()

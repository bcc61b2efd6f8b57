"""Copies between host memory and a GPU, beside what the GPU computes.

Rules kept here: a copy runs on a stream of its own and waits, on the device, for the work that made its source
(`CudaCopier.after`); a piece is landed when its event is done, and not when it was begun; whoever waits looks at the
deadline; a copy that missed it may still write, so its ranges stay in quarantine until its event is done.

Host memory should be pinned (`PinnedPool`): pageable memory is staged by the driver, at a fraction of the rate, and
the copy then holds its caller. Pools are pinned once, at the start, in slices: one large call can fail.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from snowskin.transport.cuda_driver import cuda_driver
from snowskin.transport.errors import TransferTimedOut
from snowskin.transport.memory_kind import MemoryKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.cuda_driver import CudaDriver
    from snowskin.transport.memory import MemoryRegion

PIN_SLICE_NBYTES = 1 << 30
_SPIN_S = 50e-6  # a copy of 1 MiB takes about this long: cheaper to look again than to sleep
_LOOK_S = 100e-6
_LATE_LOOK_S = 0.01


class CudaCopier:
    """One device's copy stream; for any thread, one copy at a time."""

    def __init__(
        self,
        device_index: int,
        driver: CudaDriver | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises TransportUnavailable where the device is not."""
        self._device_index = device_index
        self._driver = driver or cuda_driver()
        self._now_s = now_s
        self._stream = self._driver.create_stream(device_index)
        self._lock = threading.Lock()
        self._closed = False

    def after(self, compute_stream: int) -> None:
        """Copies begun from now on wait, on the device, for all that `compute_stream` was given so far.

        Args:
            compute_stream: a stream's handle, e.g. `torch.cuda.current_stream().cuda_stream`.
        """
        event = self._driver.create_event(self._device_index)
        try:
            self._driver.record(self._device_index, event, compute_stream)
            self._driver.wait_on_device(self._device_index, self._stream, event)
        finally:
            # The driver keeps an event that is waited for until it is done.
            self._driver.destroy_event(self._device_index, event)

    def copy(
        self,
        target: MemoryRegion,
        target_offset: int,
        source: MemoryRegion,
        source_offset: int,
        nbytes: int,
        deadline_s: float,
    ) -> None:
        """Copies, inside both regions' brackets, and waits until the bytes are there.

        Raises:
            TransferTimedOut: the deadline passed. The brackets stay open, so that neither region can finish closing,
            and the target's range stays in quarantine, until the copy has ended.
        """
        device_index = self._device_index
        with contextlib.ExitStack() as held:
            for region in (target, source):
                region.begin_landing()
                held.callback(region.end_landing)
            event = self._driver.create_event(device_index)
            held.callback(self._driver.destroy_event, device_index, event)
            with self._lock:
                self._driver.copy(
                    device_index,
                    target.address + target_offset,
                    source.address + source_offset,
                    nbytes,
                    self._stream,
                )
                try:
                    self._driver.record(device_index, event, self._stream)
                except BaseException:
                    # Nothing will say when the copy is through: it is waited for before anybody else gets the range.
                    self._driver.synchronize(device_index, self._stream)
                    raise
            if not self._wait(event, deadline_s):
                key = object()
                target.quarantine(key, [(target_offset, nbytes)])
                held.callback(target.lift_quarantine, key)
                late = held.pop_all()
                threading.Thread(
                    target=self._end_when_done,
                    args=(event, late),
                    name="snowskin-cuda-late",
                    daemon=True,
                ).start()
                raise TransferTimedOut(
                    f"CUDA device {device_index} did not copy {nbytes} bytes in time"
                )

    def close(self) -> None:
        """Frees the stream; idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._driver.destroy_stream(self._device_index, self._stream)

    def _wait(self, event: int, deadline_s: float) -> bool:
        """Whether the event is done before the deadline."""
        spin_until_s = self._now_s() + _SPIN_S
        while not self._driver.is_done(self._device_index, event):
            now_s = self._now_s()
            if now_s >= deadline_s:
                return False
            if now_s >= spin_until_s:
                time.sleep(_LOOK_S)
        return True

    def _end_when_done(self, event: int, late: contextlib.ExitStack) -> None:
        with late:
            while not self._driver.is_done(self._device_index, event):
                time.sleep(_LATE_LOOK_S)


_copiers: dict[int, CudaCopier] = {}
_copiers_lock = threading.Lock()


def copier_of(device_index: int) -> CudaCopier:
    """This process's copier of a device."""
    with _copiers_lock:
        if device_index not in _copiers:
            _copiers[device_index] = CudaCopier(device_index)
        return _copiers[device_index]


def move_piece_by_gpu(
    target: MemoryRegion,
    target_offset: int,
    source: MemoryRegion,
    source_offset: int,
    nbytes: int,
    deadline_s: float,
) -> None:
    """Lands one piece where either side is a GPU's; as `copying.move_piece`."""
    gpu = target if target.kind is MemoryKind.CUDA else source
    assert gpu.device_index is not None, "a CUDA region has a device"
    copier_of(gpu.device_index).copy(
        target, target_offset, source, source_offset, nbytes, deadline_s
    )


class PinnedPool:
    """Host memory that a GPU reaches at full rate, pinned while this lives; a pool's whole mapping, say."""

    def __init__(
        self,
        region: MemoryRegion,
        device_index: int = 0,
        driver: CudaDriver | None = None,
        *,
        slice_nbytes: int = PIN_SLICE_NBYTES,
    ) -> None:
        """Pins all of it, slice by slice; takes 30 ms a GiB, so at the start and off the event loop.

        Raises:
            TransportError: the driver refused a slice; nothing stays pinned.
        """
        self._driver = driver or cuda_driver()
        self._device_index = device_index
        self._region = region
        self._pinned: list[int] = []
        try:
            for start in range(0, region.nbytes, slice_nbytes):
                nbytes = min(slice_nbytes, region.nbytes - start)
                address = region.address + start
                if self._driver.pin(device_index, address, nbytes, writable=region.writable):
                    self._pinned.append(address)
        except BaseException:
            self.close()
            raise

    @property
    def num_slices(self) -> int:
        """How many slices this pinned; what was pinned before by others does not count."""
        return len(self._pinned)

    def close(self) -> None:
        """Unpins; before the memory is unmapped. Idempotent."""
        pinned, self._pinned = self._pinned, []
        for address in pinned:
            self._driver.unpin(self._device_index, address)

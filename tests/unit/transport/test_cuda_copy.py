"""Copies to and from a GPU, against a stand-in for the driver; `gpu` tests do the same on a device."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from snowskin.kvstore.pool.arena import Arena
from snowskin.transport import cuda_copy
from snowskin.transport.cuda_copy import CudaCopier, PinnedPool
from snowskin.transport.cuda_driver import CudaDriver
from snowskin.transport.errors import (
    LandingQuarantined,
    TransferTimedOut,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.memory import Memfd, MemoryRegion, region_of
from snowskin.transport.runs import Run
from snowskin.transport.shm import ShmTransport
from tests.support import cuda_stand_in

if TYPE_CHECKING:
    from collections.abc import Iterator

NBYTES = 64 * 1024
FAR_S = 1e9


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return cuda_stand_in.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def stand_in(library: str) -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(library)
    yield loaded
    loaded.stand_in_hold(0)
    loaded.stand_in_fail_pin_at(-1)


@pytest.fixture
def driver(library: str, stand_in: ctypes.CDLL) -> Iterator[CudaDriver]:
    made = CudaDriver(library)
    yield made
    made.close()


@pytest.fixture
def copier(driver: CudaDriver) -> Iterator[CudaCopier]:
    made = CudaCopier(1, driver)
    yield made
    made.close()


def on_device(memory: np.ndarray) -> MemoryRegion:
    """The stand-in's device memory is host memory."""
    return MemoryRegion.on_device(
        memory, address=memory.ctypes.data, nbytes=memory.nbytes, device_index=1, writable=True
    )


def test_pieces_go_both_ways_between_host_and_device(copier: CudaCopier) -> None:
    host = np.random.default_rng(3).integers(0, 256, NBYTES, dtype=np.uint8)
    device, back = np.zeros(NBYTES, np.uint8), np.zeros(NBYTES, np.uint8)
    with on_device(device) as gpu, region_of(host) as pool, region_of(back) as landing:
        copier.copy(gpu, 100, pool, 7, 5000, FAR_S)
        copier.copy(landing, 9, gpu, 100, 5000, FAR_S)
    assert np.array_equal(back[9:5009], host[7:5007])
    assert not back[5009:].any()


def test_nothing_given_out_by_the_driver_is_left(driver: CudaDriver, stand_in: ctypes.CDLL) -> None:
    before = stand_in.stand_in_num_live()
    copier = CudaCopier(0, driver)
    memory = np.zeros(NBYTES, np.uint8)
    with on_device(memory) as gpu, region_of(bytes(NBYTES)) as pool:
        copier.after(0)
        copier.copy(gpu, 0, pool, 0, NBYTES, FAR_S)
    copier.close()
    copier.close()
    assert stand_in.stand_in_num_live() == before


def test_copy_waits_on_the_device_for_the_stream_that_computes(
    copier: CudaCopier, driver: CudaDriver, stand_in: ctypes.CDLL
) -> None:
    compute = driver.create_stream(1)
    copier.after(compute)
    assert stand_in.stand_in_num_waits() >= 1
    driver.destroy_stream(1, compute)


def test_late_copy_keeps_its_range_until_it_has_ended(
    copier: CudaCopier, stand_in: ctypes.CDLL
) -> None:
    memory = np.zeros(NBYTES, np.uint8)
    target, pool = region_of(memory), region_of(bytes(NBYTES))
    stand_in.stand_in_hold(1)
    with pytest.raises(TransferTimedOut, match="device 1"):
        copier.copy(target, 0, pool, 0, 4096, time.monotonic() + 0.01)
    assert target.quarantined_nbytes == 4096
    with pytest.raises(LandingQuarantined):
        target.check_not_quarantined([(4000, 10)])
    closed = threading.Event()

    def close() -> None:
        target.close()
        closed.set()

    closing = threading.Thread(target=close)
    closing.start()
    assert not closed.wait(0.05), "closed under a copy that may still write"
    stand_in.stand_in_hold(0)
    assert closed.wait(5)
    closing.join()
    pool.close()


def test_copy_whose_end_cannot_be_told_is_waited_for(
    copier: CudaCopier, stand_in: ctypes.CDLL
) -> None:
    before = stand_in.stand_in_num_synchronized()
    stand_in.stand_in_fail_record(1)
    with region_of(bytearray(NBYTES)) as target, region_of(bytes(NBYTES)) as pool:
        with pytest.raises(TransportError, match="cuEventRecord failed"):
            copier.copy(target, 0, pool, 0, 4096, FAR_S)
        assert stand_in.stand_in_num_synchronized() == before + 1
    stand_in.stand_in_fail_record(0)


def test_pool_is_pinned_in_slices_and_unpinned(driver: CudaDriver, stand_in: ctypes.CDLL) -> None:
    with region_of(bytearray(10_000)) as region:
        pinned = PinnedPool(region, driver=driver, slice_nbytes=4096)
        assert pinned.num_slices == stand_in.stand_in_num_pinned() == 3
        again = PinnedPool(region, driver=driver, slice_nbytes=4096)
        assert again.num_slices == 0, "pinned twice"
        again.close()
        pinned.close()
        pinned.close()
    assert stand_in.stand_in_num_pinned() == 0


def test_slice_that_cannot_be_pinned_unpins_the_others(
    driver: CudaDriver, stand_in: ctypes.CDLL
) -> None:
    stand_in.stand_in_fail_pin_at(2)
    with (
        region_of(bytearray(10_000)) as region,
        pytest.raises(TransportError, match="cuMemHostRegister failed: invalid argument"),
    ):
        PinnedPool(region, driver=driver, slice_nbytes=4096)
    assert stand_in.stand_in_num_pinned() == 0


def test_device_that_is_not_there_is_named(driver: CudaDriver) -> None:
    with pytest.raises(TransportUnavailable, match="no CUDA device 2; this process sees 2"):
        CudaCopier(2, driver)


def test_missing_driver_says_what_to_install() -> None:
    with pytest.raises(TransportUnavailable, match="NVIDIA's driver"):
        CudaDriver("libno-such-cuda.so.1")


def test_shm_moves_between_a_shared_pool_and_a_device(
    copier: CudaCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda_copy._copiers, 1, copier)
    owner, reader = ShmTransport(), ShmTransport()
    with Arena(NBYTES, name="pool", tenant="t") as arena:
        fd = arena.open_read_write()
        pool = owner.register(Memfd(fd=fd))
        remote = reader.attach(owner.describe(pool, writable=True), fd=fd, writable=True)
        made = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)
        landing = np.zeros(NBYTES, np.uint8)
        with on_device(made) as source, on_device(landing) as target:
            reader.push(source, remote, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
            assert np.array_equal(pool.buffer, made)
            runs = [Run(40_000, 10, 20_000), Run(0, 50_000, 100)]
            reader.pull(remote, target, runs, deadline_s=FAR_S)
        assert np.array_equal(landing[10:20_010], made[40_000:60_000])
        assert np.array_equal(landing[50_000:50_100], made[:100])
        assert not landing[20_010:50_000].any()
        reader.close()
        owner.close()
        pool.close()
        os.close(fd)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: copies not run on one")
def test_pool_and_tensor_exchange_bytes_beside_computation() -> None:
    """Device to pinned pool and back, behind a kernel on torch's stream that makes the bytes."""
    nbytes = 64 << 20
    owner, reader = ShmTransport(), ShmTransport()
    with Arena(nbytes, name="pool", tenant="t") as arena:
        fd = arena.open_read_write()
        pool = owner.register(Memfd(fd=fd))
        remote = reader.attach(owner.describe(pool, writable=True), fd=fd, writable=True)
        assert remote.memory is not None
        pinned = PinnedPool(remote.memory)
        made = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        landing = torch.zeros_like(made)
        source, target = reader.register(made), reader.register(landing)
        for turn in range(1, 4):
            made.copy_(torch.arange(nbytes, device="cuda", dtype=torch.int32) * turn % 251)
            cuda_copy.copier_of(0).after(torch.cuda.current_stream().cuda_stream)
            reader.push(source, remote, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 30)
            reader.pull(remote, target, [Run(0, 0, nbytes)], deadline_s=time.monotonic() + 30)
            assert torch.equal(landing, made)
        pinned.close()
        for region in (source, target):
            region.close()
        reader.close()
        owner.close()
        pool.close()
        os.close(fd)

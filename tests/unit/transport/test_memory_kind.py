"""CUDA memory is recognised by what it says of itself, and kept from transports that cannot reach it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from snowskin.transport import memory_kind
from snowskin.transport.api import Run
from snowskin.transport.errors import TransportClosed, TransportError, TransportUnavailable
from snowskin.transport.loopback import LoopbackTransport
from snowskin.transport.memory import MemoryRegion, region_of
from snowskin.transport.memory_kind import MemoryKind
from snowskin.transport.shm import ShmTransport

ADDRESS = 0x7F00_0000_0000


@dataclass
class OnDevice:
    """What an array of another CUDA library says of itself; nothing lies at the address."""

    shape: tuple[int, ...] = (4, 5)
    typestr: str = "<f2"
    data: tuple[int, bool] = (ADDRESS, False)
    strides: tuple[int, ...] | None = None
    more: dict[str, object] = field(default_factory=dict)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": self.shape,
            "typestr": self.typestr,
            "data": self.data,
            "strides": self.strides,
            "version": 3,
            **self.more,
        }


@pytest.fixture
def on_device_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kind, "device_of", {ADDRESS: 3}.__getitem__)


@pytest.mark.usefixtures("on_device_3")
@pytest.mark.parametrize("strides", [None, (10, 2)])
def test_cuda_array_is_registered_by_address(strides: tuple[int, ...] | None) -> None:
    array = OnDevice(strides=strides)
    with region_of(array) as region:
        assert (region.kind, region.device_index) == (MemoryKind.CUDA, 3)
        assert (region.address, region.nbytes, region.writable) == (ADDRESS, 40, True)
        assert (region.owner, region.shared) == (array, False)
        for read in (lambda: region.buffer, lambda: region.view):
            with pytest.raises(TransportUnavailable, match="40 bytes on CUDA device 3"):
                read()
        region.begin_landing()
        region.end_landing()
    with pytest.raises(TransportClosed, match="on CUDA device 3 is closed"):
        region.begin_landing()
    assert region.owner is None


@pytest.mark.usefixtures("on_device_3")
def test_cuda_array_that_is_read_only_stays_so() -> None:
    assert not region_of(OnDevice(data=(ADDRESS, True))).writable
    assert not region_of(OnDevice(), writable=False).writable


@pytest.mark.usefixtures("on_device_3")
@pytest.mark.parametrize(
    "array",
    [
        OnDevice(strides=(20, 4)),
        OnDevice(shape=(4, 0)),
        OnDevice(shape=(-2, -2)),
        OnDevice(data=(0, False)),
        OnDevice(typestr="no type"),
        OnDevice(more={"data": None}),
        OnDevice(more={"shape": 7}),
        OnDevice(more={"strides": ("a",)}),
    ],
    ids=["strided", "empty", "negative", "null", "typestr", "no data", "no shape", "bad strides"],
)
def test_cuda_array_that_describes_itself_wrongly_is_refused(array: OnDevice) -> None:
    with pytest.raises(TransportError):
        region_of(array)


def test_cuda_array_without_a_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kind, "_CUDA_DRIVER", "libcuda-that-is-nowhere.so")
    with pytest.raises(TransportUnavailable, match="libcuda-that-is-nowhere"):
        region_of(OnDevice())


@pytest.mark.usefixtures("on_device_3")
def test_transport_of_host_memory_refuses_cuda_memory() -> None:
    transport = LoopbackTransport()
    with pytest.raises(TransportUnavailable, match="loopback cannot reach cuda memory"):
        transport.register(OnDevice())
    elsewhere = region_of(OnDevice())
    with pytest.raises(TransportUnavailable, match="stage it in host memory"):
        transport.describe(elsewhere)
    transport.close()


@pytest.mark.usefixtures("on_device_3")
def test_shm_takes_cuda_memory_to_land_in_but_not_to_share() -> None:
    transport = ShmTransport()
    region = transport.register(OnDevice())
    with pytest.raises(TransportUnavailable, match="this process alone"):
        transport.describe(region)
    transport.close()


@pytest.mark.usefixtures("on_device_3")
def test_cuda_memory_registered_elsewhere_moves_nothing() -> None:
    transport = LoopbackTransport()
    owned = transport.register(np.arange(40, dtype=np.uint8))
    remote = transport.attach(transport.describe(owned, writable=True), writable=True)
    elsewhere: MemoryRegion = region_of(OnDevice())
    with pytest.raises(TransportUnavailable):
        transport.pull(remote, elsewhere, [Run(0, 0, 40)], deadline_s=1e12)
    with pytest.raises(TransportUnavailable):
        transport.push(elsewhere, remote, [Run(0, 0, 40)], deadline_s=1e12)
    assert transport.statistics().num_refused == 2
    assert owned.buffer[39] == 39
    transport.close()


def test_host_memory_says_where_it_is() -> None:
    array = np.zeros(8, dtype=np.uint8)
    for memory, address in (
        (array, array.ctypes.data),
        (tensor := torch.zeros(8), tensor.data_ptr()),
    ):
        region = region_of(memory)
        assert (region.kind, region.device_index) == (MemoryKind.HOST, None)
        assert region.address == address


def test_registering_does_not_import_torch() -> None:
    code = (
        "import sys, numpy; from snowskin.transport.memory import region_of;"
        "region_of(numpy.zeros(3)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_tensor_is_registered_by_address() -> None:
    tensor = torch.zeros((4, 5), device="cuda", dtype=torch.bfloat16)[1:]
    with region_of(tensor) as region:
        assert (region.kind, region.device_index) == (MemoryKind.CUDA, tensor.device.index)
        assert (region.address, region.nbytes) == (tensor.data_ptr(), 30)
    assert memory_kind.device_of(tensor.data_ptr()) == tensor.device.index
    pinned = torch.zeros(3).pin_memory()
    with region_of(pinned) as region:
        assert (region.kind, region.nbytes) == (MemoryKind.PINNED, 12)

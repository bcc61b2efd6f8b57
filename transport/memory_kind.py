"""What kind of memory an object is, and where a device keeps it; nothing is copied or touched.

Rules kept here: a torch tensor is asked by torch (which whoever made it has imported), everything
else by its `__cuda_array_interface__`; torch is never imported for something else; which device an
address belongs to is what the driver says, not a guess. Memory that is not contiguous, empty or on
another kind of device is refused.

Source: the CUDA Array Interface, version 3, as numba specifies it; `cuPointerGetAttribute` of the
CUDA driver API.
"""

from __future__ import annotations

import ctypes
import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from snowskin.transport.errors import TransportError, TransportUnavailable

if TYPE_CHECKING:
    import torch

_CUDA_DRIVER = "libcuda.so.1"
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


class MemoryKind(enum.Enum):
    """Who can reach memory: any process's code, the GPU too without staging, or the GPU alone."""

    HOST = "host"
    PINNED = "pinned"
    CUDA = "cuda"


HOST_KINDS = frozenset({MemoryKind.HOST, MemoryKind.PINNED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMemory:
    """Contiguous memory of one CUDA device.

    Attributes:
        address: on the device, in bytes.
        nbytes: its size, at least 1.
        device_index: which device of this process.
        writable: whether its owner lets others write.
    """

    address: int
    nbytes: int
    device_index: int
    writable: bool


def is_tensor(memory: object) -> bool:
    """Whether `memory` is torch's; imports nothing."""
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(memory).__mro__)


def tensor_kind(tensor: object) -> MemoryKind:
    """The kind of a contiguous torch tensor's memory.

    Raises:
        TransportUnavailable: it lies on another kind of device. TransportError: not contiguous.
    """
    checked = _checked_tensor(tensor)
    if checked.device.type == "cuda":
        return MemoryKind.CUDA
    # is_pinned asks the driver: where there is no GPU the answer is no, without asking.
    return MemoryKind.PINNED if checked.is_pinned() else MemoryKind.HOST


def cuda_memory(memory: object) -> CudaMemory | None:
    """Where a CUDA tensor, or any object with `__cuda_array_interface__`, lies; None for all else.

    Raises:
        TransportError: it is empty, not contiguous, or describes itself wrongly.
        TransportUnavailable: no CUDA driver is here to say which device it is.
    """
    if is_tensor(memory):
        return _tensor_memory(memory)
    interface = getattr(memory, "__cuda_array_interface__", None)
    return None if interface is None else _interface_memory(type(memory).__name__, interface)


def _checked_tensor(tensor: object) -> torch.Tensor:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.device.type not in ("cpu", "cuda"):
        raise TransportUnavailable(
            f"cannot register {type(tensor).__name__} on {getattr(tensor, 'device', 'no device')}",
            hint="host and CUDA memory can be moved; copy to a CPU tensor first",
        )
    if not tensor.is_contiguous():
        raise TransportError("the tensor is not contiguous", hint="register its base tensor")
    return tensor


def _tensor_memory(memory: object) -> CudaMemory | None:
    tensor = _checked_tensor(memory)
    if tensor.device.type != "cuda":
        return None
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes < 1:
        raise TransportError("memory of 0 bytes cannot be registered")
    # A tensor that is there has an index: "cuda" alone is only ever a wish.
    assert tensor.device.index is not None
    return CudaMemory(
        address=tensor.data_ptr(),
        nbytes=nbytes,
        device_index=tensor.device.index,
        writable=True,
    )


def _interface_memory(name: str, interface: object) -> CudaMemory:
    """Reads what any object may say of itself, and believes nothing without looking."""
    if not isinstance(interface, dict):
        raise TransportError(f"{name} has a __cuda_array_interface__ that is no dict")
    try:
        shape = tuple(int(size) for size in interface["shape"])
        item_nbytes = np.dtype(interface["typestr"]).itemsize
        address, read_only = interface["data"]
        strides = interface.get("strides")
        strides = None if strides is None else tuple(int(stride) for stride in strides)
        address = int(address)
    except (KeyError, TypeError, ValueError) as error:
        raise TransportError(
            f"{name} describes its CUDA memory wrongly: {type(error).__name__}: {error}",
            hint="__cuda_array_interface__ needs shape, typestr and data",
        ) from error
    nbytes = math.prod(shape) * item_nbytes
    if nbytes < 1 or min(shape, default=1) < 1 or address < 1:
        raise TransportError("memory of 0 bytes cannot be registered")
    if strides is not None and strides != _contiguous_strides(shape, item_nbytes):
        raise TransportError("the memory is not contiguous", hint="register its base array")
    return CudaMemory(
        address=address,
        nbytes=nbytes,
        device_index=device_of(address),
        writable=not read_only,
    )


def _contiguous_strides(shape: tuple[int, ...], item_nbytes: int) -> tuple[int, ...]:
    strides = [item_nbytes]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def device_of(address: int) -> int:
    """Index of the CUDA device that an address belongs to, as the driver says.

    Raises:
        TransportUnavailable: there is no driver, or it does not know the address.
    """
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
    except OSError as error:
        raise TransportUnavailable(
            f"CUDA memory cannot be registered: {_CUDA_DRIVER} is not here",
            hint="install NVIDIA's driver, or copy to host memory",
        ) from error
    index = ctypes.c_int(-1)
    status = driver.cuPointerGetAttribute(
        ctypes.byref(index), ctypes.c_int(_DEVICE_ORDINAL), ctypes.c_uint64(address)
    )
    if status:
        raise TransportUnavailable(
            f"the CUDA driver knows no device of address {address:#x} (error {status})",
            hint="the memory must be CUDA's, of this process, and not freed",
        )
    return index.value

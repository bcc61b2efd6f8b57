"""Can this process register memory with an RDMA device: opens it, registers one page, gives all back.

Rules kept here: nothing of it stays open; a device that another program's rights keep from us is
said with its error, and is no exception; libibverbs is loaded only when this is asked.

Source: libibverbs, `verbs.h`: ibv_get_device_list(3), ibv_open_device(3), ibv_alloc_pd(3),
ibv_reg_mr(3). Run against a stand-in library by its tests; never yet on an RDMA device.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

LIBRARY = "libibverbs.so.1"
MAX_DEVICES = 256
_LOCAL_WRITE = 1


def load_verbs() -> Any | None:
    """The library with its signatures, or None where it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
        for name, result, arguments in (
            ("ibv_get_device_list", ctypes.c_void_p, [ctypes.POINTER(ctypes.c_int)]),
            ("ibv_free_device_list", None, [ctypes.c_void_p]),
            ("ibv_get_device_name", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ibv_open_device", ctypes.c_void_p, [ctypes.c_void_p]),
            ("ibv_close_device", ctypes.c_int, [ctypes.c_void_p]),
            ("ibv_alloc_pd", ctypes.c_void_p, [ctypes.c_void_p]),
            ("ibv_dealloc_pd", ctypes.c_int, [ctypes.c_void_p]),
            (
                "ibv_reg_mr",
                ctypes.c_void_p,
                [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
            ),
            ("ibv_dereg_mr", ctypes.c_int, [ctypes.c_void_p]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


def registered_page(library: Any) -> dict[str, str]:
    """What registering one page did on each device, by its name: empty where it worked.

    Args:
        library: as `load_verbs` gave it.
    """
    num_devices = ctypes.c_int(0)
    devices = library.ibv_get_device_list(ctypes.byref(num_devices))
    if not devices:
        return {}
    results = {}
    page = mmap.mmap(-1, mmap.PAGESIZE)
    anchor = ctypes.c_char.from_buffer(page)
    try:
        pointers = ctypes.cast(devices, ctypes.POINTER(ctypes.c_void_p))
        for index in range(min(max(num_devices.value, 0), MAX_DEVICES)):
            name = (library.ibv_get_device_name(pointers[index]) or b"?").decode("ascii", "replace")
            results[name] = _register(library, pointers[index], ctypes.addressof(anchor))
    finally:
        library.ibv_free_device_list(devices)
        del anchor
        page.close()
    return results


def _register(library: Any, device: int | None, address: int) -> str:
    """Empty, or what failed."""
    context = library.ibv_open_device(device)
    if not context:
        return _failure("it cannot be opened")
    try:
        domain = library.ibv_alloc_pd(context)
        if not domain:
            return _failure("no protection domain")
        try:
            region = library.ibv_reg_mr(domain, address, mmap.PAGESIZE, _LOCAL_WRITE)
            if not region:
                return _failure("one page cannot be registered")
            library.ibv_dereg_mr(region)
            return ""
        finally:
            library.ibv_dealloc_pd(domain)
    finally:
        library.ibv_close_device(context)


def _failure(what: str) -> str:
    code = ctypes.get_errno()
    return f"{what} ({os.strerror(code)})" if code else what

"""The library libucp by ctypes: structures, constants and signatures, as `ucp/api/ucp.h` has them since 1.14.

Rules kept here: `ucs_status_t` is ONE byte in the ABI (a packed enum), so it is `c_int8` wherever
it stands; a status pointer is null (done), one of the last hundred addresses (failed) or a request.
Every structure begins with a mask of the fields that were set, so a newer library may know more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int,
    c_int8,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.ucp.api import UcpFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OK = 0
IN_PROGRESS = 1
ERR_BUSY = -15
ERR_CANCELED = -16
API_VERSION = (1, 14)  # the oldest that has all of this
SYSTEM_FOLDERS = (
    "/usr/local/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib",
    "/opt/ucx/lib",
    "/opt/hpcx/ucx/lib",
)

STATUS_NAMES = {
    -1: "NO_MESSAGE", -2: "NO_RESOURCE", -3: "IO_ERROR", -4: "NO_MEMORY", -5: "INVALID_PARAM",
    -6: "UNREACHABLE", -7: "INVALID_ADDR", -8: "NOT_IMPLEMENTED", -9: "MESSAGE_TRUNCATED",
    -10: "NO_PROGRESS", -11: "BUFFER_TOO_SMALL", -12: "NO_ELEM", -13: "SOME_CONNECTS_FAILED",
    -14: "NO_DEVICE", -15: "BUSY", -16: "CANCELED", -17: "SHMEM_SEGMENT", -18: "ALREADY_EXISTS",
    -19: "OUT_OF_RANGE", -20: "TIMED_OUT", -21: "EXCEEDS_LIMIT", -22: "UNSUPPORTED",
    -23: "REJECTED", -24: "NOT_CONNECTED", -25: "CONNECTION_RESET", -80: "ENDPOINT_TIMEOUT",
}  # fmt: skip
_LAST_STATUS = -100
_ADDRESS_END = 1 << (8 * ctypes.sizeof(c_void_p))

# fields of ucp_params_t, ucp_worker_params_t, ucp_ep_params_t
PARAM_FEATURES = 1 << 0
PARAM_MT_WORKERS_SHARED = 1 << 5
WORKER_PARAM_THREAD_MODE = 1 << 0
WORKER_ATTR_ADDRESS = 1 << 1
THREAD_MODE_SERIALIZED = 1
EP_PARAM_REMOTE_ADDRESS = 1 << 0
EP_PARAM_ERR_HANDLING_MODE = 1 << 1
EP_PARAM_ERR_HANDLER = 1 << 2
ERR_HANDLING_MODE_PEER = 1
EP_CLOSE_FLAG_FORCE = 1 << 0
EP_ATTR_TRANSPORTS = 1 << 3
MEM_MAP_ADDRESS = 1 << 0
MEM_MAP_LENGTH = 1 << 1
MEM_MAP_MEMORY_TYPE = 1 << 4
OP_CALLBACK = 1 << 1
OP_USER_DATA = 1 << 2
OP_DATATYPE = 1 << 3
AM_SEND_REPLY = 1 << 0
AM_RECV_REPLY_EP = 1 << 0
OP_FLAGS = 1 << 4
DATATYPE_CONTIG = 1 << 3  # of elements of one byte
DATATYPE_IOV = 2
AM_SEND_EAGER = 1 << 1
AM_HANDLER_ID = 1 << 0
AM_HANDLER_CB = 1 << 2
AM_RECV_RNDV = 1 << 17
_SIGACTION_NBYTES = 256  # more than any platform's
MESSAGE_ID = 1  # ucx-py takes 0 for its own

SendCallback = CFUNCTYPE(None, c_void_p, c_int8, c_void_p)
FailureCallback = CFUNCTYPE(None, c_void_p, c_void_p, c_int8)


class SockAddr(Structure):
    """`ucs_sock_addr_t`."""

    _fields_ = [("addr", c_void_p), ("addrlen", c_uint32)]


class Params(Structure):
    """`ucp_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
        ("node_local_id", c_size_t),
    ]


class WorkerParams(Structure):
    """`ucp_worker_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_uint64 * 16),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    ]


class WorkerAttr(Structure):
    """`ucp_worker_attr_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("address_flags", c_uint32),
        ("address", c_void_p),
        ("address_length", c_size_t),
        ("max_am_header", c_size_t),
        ("name", c_char * 32),
        ("max_debug_string", c_size_t),
    ]


class EpParams(Structure):
    """`ucp_ep_params_t`; the error handler's two pointers stand for its structure."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("err_mode", c_int),
        ("err_handler_cb", FailureCallback),
        ("err_handler_arg", c_void_p),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("sockaddr", SockAddr),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", SockAddr),
    ]


class TransportEntry(Structure):
    """`ucp_transport_entry_t`."""

    _fields_ = [("transport_name", c_char_p), ("device_name", c_char_p)]


class EpAttr(Structure):
    """`ucp_ep_attr_t`; a `sockaddr_storage` is 128 bytes, aligned as a long."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("name", c_char * 32),
        ("local_sockaddr", c_uint64 * 16),
        ("remote_sockaddr", c_uint64 * 16),
        ("entries", POINTER(TransportEntry)),
        ("num_entries", c_uint),
        ("entry_size", c_size_t),
        ("user_data", c_void_p),
    ]


class MemMapParams(Structure):
    """`ucp_mem_map_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint),
        ("prot", c_uint),
        ("memory_type", c_int),
        ("exported_memh_buffer", c_void_p),
    ]


class IoVector(Structure):
    """`ucp_dt_iov_t`."""

    _fields_ = [("buffer", c_void_p), ("length", c_size_t)]


class RequestParam(Structure):
    """`ucp_request_param_t`."""

    _fields_ = [
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
        ("remote_datatype", c_uint64),
        ("remote", c_void_p),
        ("remote_count", c_size_t),
    ]


class AmReceiveParam(Structure):
    """`ucp_am_recv_param_t`."""

    _fields_ = [("recv_attr", c_uint64), ("reply_ep", c_void_p)]


MessageCallback = CFUNCTYPE(
    c_int8, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(AmReceiveParam)
)


class AmHandlerParam(Structure):
    """`ucp_am_handler_param_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("id", c_uint),
        ("flags", c_uint32),
        ("cb", MessageCallback),
        ("arg", c_void_p),
    ]


_REQUEST = POINTER(RequestParam)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ucp_config_read": (c_int8, (c_char_p, c_char_p, POINTER(c_void_p))),
    "ucp_config_modify": (c_int8, (c_void_p, c_char_p, c_char_p)),
    "ucp_config_release": (None, (c_void_p,)),
    "ucp_get_version_string": (c_char_p, ()),
    "ucp_init_version": (c_int8, (c_uint, c_uint, POINTER(Params), c_void_p, POINTER(c_void_p))),
    "ucp_cleanup": (None, (c_void_p,)),
    "ucp_worker_create": (c_int8, (c_void_p, POINTER(WorkerParams), POINTER(c_void_p))),
    "ucp_worker_destroy": (None, (c_void_p,)),
    "ucp_worker_query": (c_int8, (c_void_p, POINTER(WorkerAttr))),
    "ucp_worker_release_address": (None, (c_void_p, c_void_p)),
    "ucp_worker_get_efd": (c_int8, (c_void_p, POINTER(c_int))),
    "ucp_worker_arm": (c_int8, (c_void_p,)),
    "ucp_worker_progress": (c_uint, (c_void_p,)),
    "ucp_worker_set_am_recv_handler": (c_int8, (c_void_p, POINTER(AmHandlerParam))),
    "ucp_ep_create": (c_int8, (c_void_p, POINTER(EpParams), POINTER(c_void_p))),
    "ucp_ep_close_nbx": (c_void_p, (c_void_p, _REQUEST)),
    "ucp_ep_flush_nbx": (c_void_p, (c_void_p, _REQUEST)),
    "ucp_ep_query": (c_int8, (c_void_p, POINTER(EpAttr))),
    "ucp_mem_map": (c_int8, (c_void_p, POINTER(MemMapParams), POINTER(c_void_p))),
    "ucp_mem_unmap": (c_int8, (c_void_p, c_void_p)),
    "ucp_rkey_pack": (c_int8, (c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t))),
    "ucp_rkey_buffer_release": (None, (c_void_p,)),
    "ucp_ep_rkey_unpack": (c_int8, (c_void_p, c_char_p, POINTER(c_void_p))),
    "ucp_rkey_destroy": (None, (c_void_p,)),
    "ucp_am_send_nbx": (
        c_void_p,
        (c_void_p, c_uint, c_char_p, c_size_t, c_void_p, c_size_t, _REQUEST),
    ),
    "ucp_get_nbx": (c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, _REQUEST)),
    "ucp_put_nbx": (c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, _REQUEST)),
    "ucp_request_cancel": (None, (c_void_p, c_void_p)),
    "ucp_request_free": (None, (c_void_p,)),
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library with its signatures: a system's UCX that knows RDMA, else the wheel's, else any of the system.

    UCX in wheels is built without RDMA, so where the operator installed one that has it, that one is meant.

    Raises:
        TransportUnavailable: none is here, or it is older than 1.14.
    """
    try:
        with _signals_kept():
            library = [ctypes.CDLL(name) for name in library_files()][-1]
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TransportUnavailable(
            f"UCX (libucp.so.0) cannot be used here: {error}",
            hint="pip install 'snowskin[ucx]', or install UCX 1.14 or newer on the system",
        ) from error
    version = library.ucp_get_version_string().decode("ascii", "replace")
    if tuple(map(int, version.split(".")[:2])) < API_VERSION:
        raise TransportUnavailable(
            f"this host's UCX is {version}",
            hint="UCX 1.14 or newer, or pip install 'snowskin[ucx]'",
        )
    if "UCX_LOG_LEVEL" not in os.environ and hasattr(library, "ucs_global_opts_set_value"):
        # What fails comes back as a failure; UCX would say it once more, on this process's standard output.
        library.ucs_global_opts_set_value(b"LOG_LEVEL", b"fatal")
    return library


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Loading UCX takes SIGHUP for its debugging; this process's handlers stay its own."""
    libc = ctypes.CDLL(None)
    kept = {number: ctypes.create_string_buffer(_SIGACTION_NBYTES) for number in range(1, 32)}
    for number, action in kept.items():
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            libc.sigaction(number, action, None)  # SIGKILL and SIGSTOP cannot be set, and were not


def library_files(folders: Sequence[str] | None = None) -> list[str]:
    """What to load, in this order; the last one is libucp.

    Args:
        folders: where a system's UCX may lie; by default the loader's usual ones and `LD_LIBRARY_PATH`.
    """
    if folders is None:
        named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        folders = [*filter(None, named), *SYSTEM_FOLDERS]
    for folder in map(Path, folders):
        if (folder / "libucp.so.0").exists() and (folder / "ucx" / "libuct_ib.so.0").exists():
            return [str(folder / "libucp.so.0")]
    wheel = importlib.util.find_spec("libucx")
    if wheel is None or wheel.origin is None:
        return ["libucp.so.0"]
    folder = Path(wheel.origin).parent / "lib"
    # Its libraries find each other only once they are loaded, lowest first. The wheel has each one twice, as
    # files of their own: `.so` is the one that other packages get from it, and the other would be a second UCX.
    return [str(folder / f"{name}.so") for name in ("libucs", "libuct", "libucp")]


def name_of(status: int) -> str:
    """UCX's word for a status."""
    return STATUS_NAMES.get(status, f"status {status}")


def check(status: int, what: str) -> None:
    """Raises UcpFailure unless `status` is OK."""
    if status != OK:
        raise UcpFailure(name_of(status), what)


def status_of(pointer: int | None) -> int:
    """What a status pointer says: OK, a failure, or IN_PROGRESS where it is a request."""
    if not pointer:
        return OK
    return pointer - _ADDRESS_END if pointer >= _ADDRESS_END + _LAST_STATUS else IN_PROGRESS

"""UCX by ctypes on libucp: complete, with nothing to compile.

Rules kept here: what UCX still reads or writes is kept alive in `_Pending` until it has ended; a
callback never lets an exception into C; freeing a request is the callback's last act. Calls release
the GIL (`CDLL`), so a long `progress` holds up nobody else.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
from ctypes import byref, c_int, c_size_t, c_void_p, string_at
from typing import TYPE_CHECKING

from snowskin.transport.ucp import abi
from snowskin.transport.ucp.api import (
    MAX_HEADER_NBYTES,
    MAX_PEER_BYTES,
    Arrive,
    Done,
    Span,
    UcpFailure,
    UcpFeature,
    UcpMemoryType,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_REPLIES = 64  # that nobody has taken yet: more are not sent
_LAST_TURNS = 1000

log = logging.getLogger(__name__)


class Pending:
    """The operations of one worker that have not ended, by the number that UCX hands back."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Nothing is pending."""
        self.library = library
        self._open: dict[int, tuple[Done, object, str]] = {}
        self._numbers = itertools.count(1)
        self._on_ended = abi.SendCallback(self._ended)
        self._callback = ctypes.cast(self._on_ended, c_void_p).value

    def __len__(self) -> int:
        return len(self._open)

    def post(
        self,
        call: Callable[[abi.RequestParam], int | None],
        done: Done,
        *,
        what: str,
        keep: object = None,
        flags: int = 0,
        datatype: int = abi.DATATYPE_CONTIG,
    ) -> Request | None:
        """Makes one non-blocking call and sees that `done` is told once; `keep` lives till then."""
        number = next(self._numbers)
        param = abi.RequestParam(
            op_attr_mask=abi.OP_CALLBACK | abi.OP_USER_DATA | (abi.OP_FLAGS if flags else 0),
            flags=flags,
            callback=self._callback,
            datatype=datatype,
            user_data=number,
        )
        if datatype != abi.DATATYPE_CONTIG:
            param.op_attr_mask |= abi.OP_DATATYPE
        self._open[number] = (done, keep, what)
        pointer = call(param)
        status = abi.status_of(pointer)
        if status == abi.IN_PROGRESS:
            return Request(self, number, pointer)
        self._end(number, status)
        return None

    def holds(self, number: int) -> bool:
        """Whether this operation has not ended."""
        return number in self._open

    def fail_all(self) -> None:
        """Ends what is left, after the worker is gone."""
        for number in list(self._open):
            self._end(number, abi.ERR_CANCELED)

    def _ended(self, request: int | None, status: int, number: int | None) -> None:
        self._end(number or 0, status)
        self.library.ucp_request_free(request)

    def _end(self, number: int, status: int) -> None:
        done, _, what = self._open.pop(number)
        failure = None if status == abi.OK else UcpFailure(abi.name_of(status), what)
        try:
            done(failure)
        except Exception:  # C cannot carry it on; whoever waits has a deadline
            log.exception("telling the end of %s failed", what)


class Request:
    """A posted operation that has not ended yet."""

    __slots__ = ("_number", "_pending", "_pointer")

    def __init__(self, pending: Pending, number: int, pointer: int | None) -> None:
        """`pointer` is UCX's request, its own once the operation has ended."""
        self._pending = pending
        self._number = number
        self._pointer = pointer

    def cancel_on(self, worker: int) -> None:
        """Asks UCX to give it up; without effect once it has ended."""
        if self._pending.holds(self._number):
            self._pending.library.ucp_request_cancel(worker, self._pointer)


class Messages:
    """Active messages of one worker, by its handle: what ucx-py's core lacks, so both use it."""

    def __init__(
        self,
        library: ctypes.CDLL,
        worker: int,
        arrive: Arrive,
        *,
        ids: Sequence[int] = (abi.MESSAGE_ID,),
    ) -> None:
        """Registers the handler for these message ids; what is sent has `abi.MESSAGE_ID`."""
        self.library = library
        self.worker = worker
        self.pending = Pending(library)
        self._arrive = arrive
        self._num_replies = 0
        self._on_message = abi.MessageCallback(self._message)
        for number in ids:
            param = abi.AmHandlerParam(
                field_mask=abi.AM_HANDLER_ID | abi.AM_HANDLER_CB, id=number, cb=self._on_message
            )
            status = library.ucp_worker_set_am_recv_handler(worker, byref(param))
            abi.check(status, "registering the message handler")

    def send(
        self,
        endpoint: int,
        header: bytes,
        payload: Sequence[Span],
        done: Done,
        *,
        wants_reply: bool = False,
        keep: object = None,
    ) -> Request | None:
        """Posts one message on an endpoint's handle."""
        if len(header) > MAX_HEADER_NBYTES:
            raise ValueError(f"header of {len(header)} bytes, at most {MAX_HEADER_NBYTES}")
        gathered: object = None
        if len(payload) > 1:
            gathered = (abi.IoVector * len(payload))(*(abi.IoVector(*span) for span in payload))
            address, count = ctypes.addressof(gathered), len(payload)
        else:
            address, count = payload[0] if payload else Span(0, 0)
        return self.pending.post(
            lambda param: self.library.ucp_am_send_nbx(
                endpoint, abi.MESSAGE_ID, header, len(header), address, count, byref(param)
            ),
            done,
            what="send",
            keep=(header, gathered, keep),
            flags=abi.AM_SEND_EAGER | (abi.AM_SEND_REPLY if wants_reply else 0),
            datatype=abi.DATATYPE_CONTIG if gathered is None else abi.DATATYPE_IOV,
        )

    def close_endpoint(self, endpoint: int, done: Done) -> None:
        """Closes an endpoint by force: its operations end, as cancelled, before `done` is told."""
        self.pending.post(
            lambda param: self.library.ucp_ep_close_nbx(endpoint, byref(param)),
            done,
            what="close",
            flags=abi.EP_CLOSE_FLAG_FORCE,
        )

    def transports(self, endpoint: int) -> tuple[str, ...]:
        """`transport/device` of each way in use, most important first; empty before UCX 1.13."""
        entries = (abi.TransportEntry * 64)()
        attr = abi.EpAttr(
            field_mask=abi.EP_ATTR_TRANSPORTS,
            entries=entries,
            num_entries=len(entries),
            entry_size=ctypes.sizeof(abi.TransportEntry),
        )
        abi.check(self.library.ucp_ep_query(endpoint, byref(attr)), "asking for the transports")
        found = entries[: attr.num_entries]
        names = (f"{_text(entry.transport_name)}/{_text(entry.device_name)}" for entry in found)
        return tuple(dict.fromkeys(names))

    def _message(
        self,
        _arg: int | None,
        header: int | None,
        header_nbytes: int,
        data: int | None,
        nbytes: int,
        param: ctypes._Pointer[abi.AmReceiveParam],
    ) -> int:
        try:
            is_eager = not param.contents.recv_attr & abi.AM_RECV_RNDV
            if header is not None and header_nbytes <= MAX_HEADER_NBYTES and is_eager:
                reply = None
                if param.contents.recv_attr & abi.AM_RECV_REPLY_EP and param.contents.reply_ep:
                    reply = functools.partial(self._reply, param.contents.reply_ep)
                self._arrive(string_at(header, header_nbytes), Span(data or 0, nbytes), reply)
            # Anything else no peer of ours sends: it is dropped, a rendezvous without fetching it.
        except Exception:  # C cannot carry it on; the message counts as dropped
            log.exception("a message of %d + %d bytes was dropped", header_nbytes, nbytes)
        return abi.OK

    def _reply(self, endpoint: int, header: bytes, payload: bytes) -> None:
        if self._num_replies >= MAX_REPLIES:  # somebody asks, and does not listen
            return
        self._num_replies += 1
        buffer = ctypes.create_string_buffer(payload, len(payload))
        span = Span(ctypes.addressof(buffer), len(payload))
        self.send(endpoint, header, (span,), self._replied, keep=buffer)

    def _replied(self, _failure: UcpFailure | None) -> None:
        self._num_replies -= 1


class CtypesEndpoint:
    """The way to one peer's worker."""

    def __init__(self, worker: CtypesWorker, on_failure: Callable[[UcpFailure], object]) -> None:
        """`CtypesWorker.connect` makes it."""
        self.failed: UcpFailure | None = None
        self.handle = 0
        self._worker = worker
        self._messages = worker.messages
        self._on_failure = on_failure
        self._keys: list[int] = []

    def fail(self, failure: UcpFailure) -> None:
        """UCX said that this endpoint is broken."""
        if self.failed is None:
            self.failed = failure
            self._on_failure(failure)

    def send(
        self, header: bytes, payload: Sequence[Span], done: Done, *, wants_reply: bool = False
    ) -> CtypesRequest | None:
        """Sends one message."""
        return self._worker.requested(
            self._messages.send(self.handle, header, payload, done, wants_reply=wants_reply)
        )

    def flush(self, done: Done) -> CtypesRequest | None:
        """Tells when all earlier operations are complete at the peer."""
        library = self._messages.library
        return self._worker.requested(
            self._messages.pending.post(
                lambda param: library.ucp_ep_flush_nbx(self.handle, byref(param)),
                done,
                what="flush",
            )
        )

    def unpack(self, packed: bytes) -> CtypesKey:
        """Makes a peer's key usable here."""
        if not 0 < len(packed) <= MAX_PEER_BYTES:
            raise ValueError(f"key of {len(packed)} bytes")
        library = self._messages.library
        handle = c_void_p()
        abi.check(library.ucp_ep_rkey_unpack(self.handle, packed, byref(handle)), "unpacking a key")
        self._keys.append(handle.value or 0)
        return CtypesKey(self._worker, self.handle, handle.value or 0)

    def transports(self) -> tuple[str, ...]:
        """What is in use."""
        return self._messages.transports(self.handle)

    def close(self, done: Done) -> None:
        """Closes by force."""
        self._worker.forget(self)

        def closed(failure: UcpFailure | None) -> None:
            self.destroy_keys()  # not before: operations under way use them
            done(failure)

        self._messages.close_endpoint(self.handle, closed)

    def destroy_keys(self) -> None:
        """Forgets all keys; idempotent."""
        keys, self._keys = self._keys, []
        for key in keys:
            self._messages.library.ucp_rkey_destroy(key)


class CtypesRequest:
    """A posted operation, and the worker that can cancel it."""

    __slots__ = ("_request", "_worker")

    def __init__(self, request: Request, worker: int) -> None:
        """`worker` is the handle."""
        self._request = request
        self._worker = worker

    def cancel(self) -> None:
        """Asks UCX to give it up."""
        self._request.cancel_on(self._worker)


class CtypesKey:
    """A peer's key, unpacked."""

    def __init__(self, worker: CtypesWorker, endpoint: int, handle: int) -> None:
        """`CtypesEndpoint.unpack` makes it."""
        self._worker = worker
        self._library = worker.messages.library
        self._endpoint = endpoint
        self._handle = handle

    def get(self, local: Span, remote_address: int, done: Done) -> CtypesRequest | None:
        """Reads the peer's memory."""
        return self._access(self._library.ucp_get_nbx, "get", local, remote_address, done)

    def put(self, local: Span, remote_address: int, done: Done) -> CtypesRequest | None:
        """Writes the peer's memory."""
        return self._access(self._library.ucp_put_nbx, "put", local, remote_address, done)

    def _access(
        self,
        call: Callable[..., int | None],
        what: str,
        local: Span,
        remote_address: int,
        done: Done,
    ) -> CtypesRequest | None:
        def post(param: abi.RequestParam) -> int | None:
            return call(self._endpoint, *local, remote_address, self._handle, byref(param))

        return self._worker.requested(self._worker.messages.pending.post(post, done, what=what))


class CtypesMemory:
    """Registered memory."""

    def __init__(self, library: ctypes.CDLL, context: int, span: Span, kind: UcpMemoryType) -> None:
        """Registers `span`."""
        self._library = library
        self._context = context
        self.span = span
        params = abi.MemMapParams(
            field_mask=abi.MEM_MAP_ADDRESS | abi.MEM_MAP_LENGTH | abi.MEM_MAP_MEMORY_TYPE,
            address=span.address,
            length=span.nbytes,
            memory_type=kind,
        )
        handle = c_void_p()
        status = library.ucp_mem_map(context, byref(params), byref(handle))
        abi.check(status, f"registering {span.nbytes} bytes of {kind.name} memory")
        self._handle = handle.value or 0

    def pack(self) -> bytes:
        """The key for peers."""
        buffer, nbytes = c_void_p(), c_size_t()
        status = self._library.ucp_rkey_pack(
            self._context, self._handle, byref(buffer), byref(nbytes)
        )
        abi.check(status, "packing a key")
        try:
            return string_at(buffer, nbytes.value)
        finally:
            self._library.ucp_rkey_buffer_release(buffer)

    def unmap(self) -> None:
        """Deregisters; idempotent."""
        handle, self._handle = self._handle, 0
        if handle:
            abi.check(self._library.ucp_mem_unmap(self._context, handle), "deregistering memory")


class CtypesWorker:
    """One thread's side of the network."""

    def __init__(self, library: ctypes.CDLL, context: int, arrive: Arrive) -> None:
        """Opens the worker with its event descriptor."""
        self._library = library
        self._endpoints: dict[int, CtypesEndpoint] = {}
        self._numbers = itertools.count(1)
        self._on_failure = abi.FailureCallback(self._failed)
        params = abi.WorkerParams(
            field_mask=abi.WORKER_PARAM_THREAD_MODE, thread_mode=abi.THREAD_MODE_SERIALIZED
        )
        handle, event_fd = c_void_p(), c_int(-1)
        status = library.ucp_worker_create(context, byref(params), byref(handle))
        abi.check(status, "opening a worker")
        self._handle = handle.value or 0
        try:
            abi.check(library.ucp_worker_get_efd(handle, byref(event_fd)), "asking for events")
            self.event_fd = event_fd.value
            self.address = self._own_address()
            self.messages = Messages(library, self._handle, arrive)
        except UcpFailure:
            library.ucp_worker_destroy(handle)
            raise

    def progress(self) -> bool:
        """Does what is ready."""
        return bool(self._library.ucp_worker_progress(self._handle))

    def arm(self) -> bool:
        """Whether one may wait now."""
        status = self._library.ucp_worker_arm(self._handle)
        if status == abi.ERR_BUSY:
            return False
        abi.check(status, "arming the worker")
        return True

    def connect(self, address: bytes, on_failure: Callable[[UcpFailure], object]) -> CtypesEndpoint:
        """A new endpoint with error handling on."""
        if not 0 < len(address) <= MAX_PEER_BYTES:
            raise ValueError(f"worker address of {len(address)} bytes")
        endpoint = CtypesEndpoint(self, on_failure)
        number = next(self._numbers)
        own = ctypes.create_string_buffer(address, len(address))
        params = abi.EpParams(
            field_mask=abi.EP_PARAM_REMOTE_ADDRESS
            | abi.EP_PARAM_ERR_HANDLING_MODE
            | abi.EP_PARAM_ERR_HANDLER,
            address=ctypes.cast(own, c_void_p),
            err_mode=abi.ERR_HANDLING_MODE_PEER,
            err_handler_cb=self._on_failure,
            err_handler_arg=number,
        )
        handle = c_void_p()
        status = self._library.ucp_ep_create(self._handle, byref(params), byref(handle))
        abi.check(status, "connecting to a worker")
        endpoint.handle = handle.value or 0
        self._endpoints[number] = endpoint
        return endpoint

    def forget(self, endpoint: CtypesEndpoint) -> None:
        """An endpoint that is being closed says nothing any more."""
        for number, known in list(self._endpoints.items()):
            if known is endpoint:
                del self._endpoints[number]

    def requested(self, request: Request | None) -> CtypesRequest | None:
        """A request that its holder can cancel."""
        return None if request is None else CtypesRequest(request, self._handle)

    def close(self) -> None:
        """Closes all endpoints by force, then the worker; idempotent."""
        handle, self._handle = self._handle, 0
        if not handle:
            return
        endpoints = list(self._endpoints.values())
        for endpoint in endpoints:
            endpoint.close(_ignore)
        for _ in range(_LAST_TURNS):  # a peer that goes on sending must not keep this side
            if not self._library.ucp_worker_progress(handle):
                break
        for endpoint in endpoints:
            endpoint.destroy_keys()
        self._library.ucp_worker_destroy(handle)
        self.messages.pending.fail_all()

    def _own_address(self) -> bytes:
        attr = abi.WorkerAttr(field_mask=abi.WORKER_ATTR_ADDRESS)
        status = self._library.ucp_worker_query(self._handle, byref(attr))
        abi.check(status, "asking for the worker's address")
        try:
            return string_at(attr.address, attr.address_length)
        finally:
            self._library.ucp_worker_release_address(self._handle, attr.address)

    def _failed(self, number: int | None, _handle: int | None, status: int) -> None:
        endpoint = self._endpoints.get(number or 0)
        if endpoint is None:
            return
        try:
            endpoint.fail(UcpFailure(abi.name_of(status), "endpoint"))
        except Exception:  # C cannot carry it on; later operations fail by themselves
            log.exception("telling a failed endpoint failed")


class CtypesContext:
    """UCX opened once with its settings."""

    binding = "ctypes"

    def __init__(self, config: Mapping[str, str], features: UcpFeature) -> None:
        """Opens UCX; an operator's own `UCX_*` wins over `config`."""
        self._library = library = abi.load()
        self.version = _text(library.ucp_get_version_string())
        settings, handle = c_void_p(), c_void_p()
        abi.check(library.ucp_config_read(None, None, byref(settings)), "reading UCX's settings")
        try:
            for name, value in own_settings(config).items():
                status = library.ucp_config_modify(settings, name.encode(), value.encode())
                abi.check(status, f"setting UCX_{name}={value}")
            params = abi.Params(
                field_mask=abi.PARAM_FEATURES | abi.PARAM_MT_WORKERS_SHARED,
                features=int(features),
                mt_workers_shared=1,  # memory is registered by other threads
            )
            status = library.ucp_init_version(
                *abi.API_VERSION, byref(params), settings, byref(handle)
            )
            abi.check(status, "opening UCX")
        finally:
            library.ucp_config_release(settings)
        self._handle = handle.value or 0

    def map(self, span: Span, kind: UcpMemoryType) -> CtypesMemory:
        """Registers memory."""
        return CtypesMemory(self._library, self._handle, span, kind)

    def open_worker(self, arrive: Arrive) -> CtypesWorker:
        """Opens a worker."""
        return CtypesWorker(self._library, self._handle, arrive)

    def close(self) -> None:
        """Closes UCX; idempotent."""
        handle, self._handle = self._handle, 0
        if handle:
            self._library.ucp_cleanup(handle)


def own_settings(config: Mapping[str, str]) -> dict[str, str]:
    """Those of `config` that the operator did not set by `UCX_*`."""
    return {name: value for name, value in config.items() if f"UCX_{name}" not in os.environ}


def _ignore(_failure: UcpFailure | None) -> None:
    """Whoever closes everything waits for nobody."""


def _text(value: bytes | None) -> str:
    return (value or b"").decode("ascii", errors="replace")

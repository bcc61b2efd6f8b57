"""UCX by ucx-py 0.45's core (`ucp._libs.ucx_api`), and by ctypes on its handles for what that lacks.

Rules kept here: importing ucx-py leaves this process's environment as it was (it writes `UCX_*` into
it); what ucx-py lacks (messages with a header, closing without asking the peer, which transports
are in use) is done on its handles, so both bindings speak the same wire; its own message id is
taken over, because its handler would keep whatever a peer sends.

ucx-py is discontinued; `python -m snowskin.tools.ucx_py` builds it from its source.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.ucp import abi
from snowskin.transport.ucp.api import (
    MAX_PEER_BYTES,
    Arrive,
    Done,
    Span,
    UcpFailure,
    UcpFeature,
    UcpMemoryType,
)
from snowskin.transport.ucp.ctypes_ucp import Messages, own_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

_UCX_PY_MESSAGE_ID = 0


@functools.cache
def load() -> tuple[ModuleType, ModuleType]:
    """ucx-py's core: `ucx_api` and `arr`.

    Raises:
        TransportUnavailable: it is not installed, does not load, or brings a second libucp.
    """
    abi.load()  # first: ucx-py's core then finds this libucp loaded, and takes it
    environment, wheel = dict(os.environ), sys.modules.get("libucx")
    sys.modules["libucx"] = None  # type: ignore[assignment]  # or `import ucp` loads the wheel's libraries as well
    try:
        from ucp._libs import arr, ucx_api
    except (ImportError, OSError, AttributeError) as error:
        raise TransportUnavailable(
            f"ucx-py cannot be used here: {error}",
            hint="python -m snowskin.tools.ucx_py builds it; the ctypes binding needs only "
            "pip install 'snowskin[ucx]'",
        ) from error
    finally:
        del sys.modules["libucx"]
        if wheel is not None:
            sys.modules["libucx"] = wheel
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    libraries = {line.split()[-1] for line in maps if "/libucp.so" in line}
    if len(libraries) > 1:  # handles of one mean nothing to the other
        raise TransportUnavailable(
            f"ucx-py was built for another UCX than the one here: {sorted(libraries)}",
            hint="build it again: python -m snowskin.tools.ucx_py",
        )
    return ucx_api, arr


class UcxPyRequest:
    """A posted operation of ucx-py's or of ours."""

    __slots__ = ("_cancel",)

    def __init__(self, cancel: Callable[[], object]) -> None:
        """`cancel` does nothing once the operation has ended."""
        self._cancel = cancel

    def cancel(self) -> None:
        """Asks UCX to give it up."""
        self._cancel()


class UcxPyKey:
    """A peer's key, unpacked."""

    def __init__(self, endpoint: UcxPyEndpoint, rkey: Any) -> None:
        """`rkey` is a `UCXRkey` of the endpoint."""
        self._endpoint = endpoint
        self._rkey = rkey

    def get(self, local: Span, remote_address: int, done: Done) -> UcxPyRequest | None:
        """Reads the peer's memory."""
        return self._access(load()[0].get_nb, "get", local, remote_address, done)

    def put(self, local: Span, remote_address: int, done: Done) -> UcxPyRequest | None:
        """Writes the peer's memory."""
        return self._access(load()[0].put_nb, "put", local, remote_address, done)

    def destroy(self) -> None:
        """Forgets it once nothing uses it: ucx-py flushes the endpoint first, which fails on a broken one."""
        ucx_api, _ = load()
        with contextlib.suppress(ucx_api.UCXError):
            self._rkey.close()

    def _access(
        self,
        function: Callable[..., Any],
        what: str,
        local: Span,
        remote_address: int,
        done: Done,
    ) -> UcxPyRequest | None:
        # only the address is used: UCX finds out by itself what memory it is
        array = load()[1].Array(_buffer_of(local, UcpMemoryType.HOST))
        return self._endpoint.post(
            what,
            lambda callback: function(array, local.nbytes, remote_address, self._rkey, callback),
            array,
            done,
        )


class UcxPyEndpoint:
    """The way to one peer's worker."""

    def __init__(self, worker: UcxPyWorker, endpoint: Any) -> None:
        """`UcxPyWorker.connect` makes it; `endpoint` is a `UCXEndpoint`."""
        self.failed: UcpFailure | None = None
        self._worker = worker
        self._endpoint = endpoint
        self._handle: int = endpoint.handle
        self._keys: list[UcxPyKey] = []
        self._closed = False

    def watch(self, on_failure: Callable[[UcpFailure], object]) -> None:
        """Tells a failure once; ucx-py calls back from UCX's error handler."""

        def failed() -> None:
            if self.failed is None and not self._closed:
                _, _, status = self._status().rpartition(": ")
                self.failed = UcpFailure(_name(status), "endpoint")
                self._worker.has_failures = True
                on_failure(self.failed)

        self._endpoint.set_close_callback(failed)

    def send(
        self, header: bytes, payload: Sequence[Span], done: Done, *, wants_reply: bool = False
    ) -> UcxPyRequest | None:
        """Sends one message."""
        request = self._worker.messages.send(
            self._handle, header, payload, done, wants_reply=wants_reply
        )
        if request is None:
            return None
        return UcxPyRequest(functools.partial(request.cancel_on, self._worker.messages.worker))

    def flush(self, done: Done) -> UcxPyRequest | None:
        """Tells when all earlier operations are complete at the peer."""
        return self.post("flush", self._endpoint.flush, None, done)

    def unpack(self, packed: bytes) -> UcxPyKey:
        """Makes a peer's key usable here."""
        if not 0 < len(packed) <= MAX_PEER_BYTES:
            raise ValueError(f"key of {len(packed)} bytes")
        ucx_api, _ = load()
        with _translated("unpacking a key"):
            rkey = self._endpoint.unpack_rkey(ucx_api.PackedRemoteKey.from_buffer(packed))
        key = UcxPyKey(self, rkey)
        self._keys.append(key)
        return key

    def transports(self) -> tuple[str, ...]:
        """What is in use."""
        return self._worker.messages.transports(self._handle)

    def close(self, done: Done) -> None:
        """Closes by force. ucx-py itself would wait for the peer, for ever for a stopped one."""
        self._closed = True
        self._worker.forget(self)
        keys, self._keys = self._keys, []
        for key in keys:
            key.destroy()
        # Its finalizer would flush and close the handle once more: it must not run.
        for finalizer in _finalizers_of(self._endpoint):
            finalizer.detach()
        endpoint = self._endpoint  # UCX's error handler points to it until it is closed

        def closed(failure: UcpFailure | None) -> None:
            nonlocal endpoint
            endpoint = None
            done(failure)

        self._worker.messages.close_endpoint(self._handle, closed)

    def post(
        self, what: str, post: Callable[[Callable[..., None]], Any], keep: object, done: Done
    ) -> UcxPyRequest | None:
        """Posts by ucx-py's convention: None where it is done at once, without a callback."""
        ucx_api, _ = load()

        def ended(_request: object, error: Exception | None, _keep: object = keep) -> None:
            done(None if error is None else _failure(error, what))

        try:
            request = post(ended)
        except ucx_api.UCXError as error:
            done(_failure(error, what))
            return None
        if request is None:
            done(None)
            return None
        worker = self._worker.worker

        def cancel() -> None:
            if not request.closed():
                worker.request_cancel(request)

        return UcxPyRequest(cancel)

    def _status(self) -> str:
        try:
            self._endpoint.raise_on_error()
        except Exception as error:  # noqa: BLE001 - it raises several kinds, all to be read
            return str(error)
        return "closed"


class UcxPyMemory:
    """Registered memory."""

    def __init__(self, context: Any, span: Span, kind: UcpMemoryType) -> None:
        """Registers `span`."""
        self.span = span
        with _translated(f"registering {span.nbytes} bytes of {kind.name} memory"):
            self._memory = context.map(_buffer_of(span, kind))

    def pack(self) -> bytes:
        """The key for peers."""
        with _translated("packing a key"):
            return bytes(self._memory.pack_rkey())

    def unmap(self) -> None:
        """Deregisters; idempotent."""
        with _translated("deregistering memory"):
            self._memory.close()


class UcxPyWorker:
    """One thread's side of the network."""

    def __init__(self, context: Any, arrive: Arrive) -> None:
        """Opens the worker with its event descriptor."""
        ucx_api, _ = load()
        with _translated("opening a worker"):
            self.worker = ucx_api.UCXWorker(context)
            address = self.worker.get_address()
            self.address = bytes(address)
            address.close()
        self.messages = Messages(
            abi.load(), self.worker.handle, arrive, ids=(_UCX_PY_MESSAGE_ID, abi.MESSAGE_ID)
        )
        self.event_fd: int = self.worker.init_blocking_progress_mode()
        self.has_failures = False
        self._endpoints: set[UcxPyEndpoint] = set()
        self._closed = False

    def progress(self) -> bool:
        """Does all that is ready, without the GIL."""
        self.worker.progress()
        if self.has_failures:
            self.has_failures = False
            self.worker.cancel_inflight_messages()
        return False

    def arm(self) -> bool:
        """Whether one may wait now."""
        with _translated("arming the worker"):
            return bool(self.worker.arm())

    def connect(self, address: bytes, on_failure: Callable[[UcpFailure], object]) -> UcxPyEndpoint:
        """A new endpoint with error handling on."""
        if not 0 < len(address) <= MAX_PEER_BYTES:
            raise ValueError(f"worker address of {len(address)} bytes")
        ucx_api, _ = load()
        with _translated("connecting to a worker"):
            made = ucx_api.UCXEndpoint.create_from_worker_address(
                self.worker, ucx_api.UCXAddress.from_buffer(address), True
            )
        endpoint = UcxPyEndpoint(self, made)
        endpoint.watch(on_failure)
        self._endpoints.add(endpoint)
        return endpoint

    def forget(self, endpoint: UcxPyEndpoint) -> None:
        """An endpoint that is being closed says nothing any more."""
        self._endpoints.discard(endpoint)

    def close(self) -> None:
        """Closes all endpoints by force, then the worker; idempotent."""
        if self._closed:
            return
        self._closed = True
        for endpoint in list(self._endpoints):
            endpoint.close(_ignore)
        self.worker.progress()
        os.close(self.event_fd)
        self.worker.close()
        self.messages.pending.fail_all()


class UcxPyContext:
    """UCX opened once with its settings."""

    binding = "ucx-py"

    def __init__(self, config: Mapping[str, str], features: UcpFeature) -> None:
        """Opens UCX; an operator's own `UCX_*` wins over `config`."""
        ucx_api, _ = load()
        words = {
            UcpFeature.REMOTE_MEMORY: ucx_api.Feature.RMA,
            UcpFeature.WAKEUP: ucx_api.Feature.WAKEUP,
            UcpFeature.MESSAGES: ucx_api.Feature.AM,
        }
        wanted = tuple(word for feature, word in words.items() if feature in features)
        self.version = ".".join(map(str, ucx_api.get_ucx_version()))
        with _translated("opening UCX"):
            self._context = ucx_api.UCXContext(own_settings(config), wanted)

    def map(self, span: Span, kind: UcpMemoryType) -> UcxPyMemory:
        """Registers memory."""
        return UcxPyMemory(self._context, span, kind)

    def open_worker(self, arrive: Arrive) -> UcxPyWorker:
        """Opens a worker."""
        return UcxPyWorker(self._context, arrive)

    def close(self) -> None:
        """Closes UCX; idempotent."""
        self._context.close()


class _DeviceArray:
    """Device memory as ucx-py takes it."""

    def __init__(self, span: Span) -> None:
        self.__cuda_array_interface__ = {
            "shape": (span.nbytes,),
            "typestr": "|u1",
            "data": (span.address, False),
            "version": 3,
        }


def _buffer_of(span: Span, kind: UcpMemoryType) -> Any:
    """An object by which ucx-py finds these bytes; it copies nothing."""
    if kind is UcpMemoryType.HOST:
        return (ctypes.c_uint8 * span.nbytes).from_address(span.address)
    return _DeviceArray(span)


def _finalizers_of(endpoint: object) -> list[weakref.finalize[Any, Any]]:
    """What the standard library will call for `endpoint`; ucx-py keeps its own reference private."""
    registry: dict[weakref.finalize[Any, Any], Any] = weakref.finalize._registry  # type: ignore[attr-defined]  # there is no public way
    return [finalizer for finalizer, about in list(registry.items()) if about.weakref() is endpoint]


@contextlib.contextmanager
def _translated(what: str) -> Any:
    """ucx-py's errors as ours."""
    ucx_api, _ = load()
    try:
        yield
    except ucx_api.UCXError as error:
        raise _failure(error, what) from error


def _failure(error: Exception, what: str) -> UcpFailure:
    """ucx-py says `<what>: UCX's sentence`; its cancellation says nothing."""
    if type(error).__name__ == "UCXCanceled":
        return UcpFailure("CANCELED", what)
    return UcpFailure(_name(str(error).rpartition(": ")[2]), what)


def _name(sentence: str) -> str:
    """UCX's sentence for a status, as one word: `Connection reset by remote peer`."""
    known = {
        "Connection reset by remote peer": "CONNECTION_RESET",
        "Endpoint timeout": "ENDPOINT_TIMEOUT",
        "Endpoint is not connected": "NOT_CONNECTED",
        "Destination is unreachable": "UNREACHABLE",
        "Request canceled": "CANCELED",
    }
    return known.get(sentence, sentence.upper().replace(" ", "_").replace("/", "_"))


def _ignore(_failure: UcpFailure | None) -> None:
    """Whoever closes everything waits for nobody."""

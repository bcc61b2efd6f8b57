"""What the transport asks of UCX, answered alike by both bindings, and by one of each."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.ucp import abi, binding
from snowskin.transport.ucp.api import (
    MAX_HEADER_NBYTES,
    MAX_PEER_BYTES,
    Reply,
    Span,
    UcpFailure,
    UcpFeature,
    UcpMemoryType,
)
from snowskin.transport.ucp.binding import open_context, why_unavailable
from snowskin.transport.ucp.ctypes_ucp import MAX_REPLIES, own_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 10.0
CONFIG = {"TCP_RX_SEG_SIZE": "1m", "NET_DEVICES": "lo", "TCP_PUT_ENABLE": "n"}
ALL = UcpFeature.WAKEUP | UcpFeature.MESSAGES | UcpFeature.REMOTE_MEMORY
NO_UCX = why_unavailable()
needs_ucx = pytest.mark.skipif(NO_UCX is not None, reason=f"NO UCX HERE: {NO_UCX}")
PAIRS = [("ctypes", "ctypes")]
if importlib.util.find_spec("ucp") is not None:
    PAIRS += [("ucx-py", "ucx-py"), ("ucx-py", "ctypes"), ("ctypes", "ucx-py")]


def span_of(array: np.ndarray) -> Span:
    return Span(array.ctypes.data, array.nbytes)


class Pair:
    """Two contexts with a worker each; `here` has an endpoint to `there`."""

    def __init__(self, bindings: tuple[str, str], features: UcpFeature = ALL) -> None:
        with ExitStack() as stack:
            contexts = []
            for name in bindings:
                contexts.append(open_context(CONFIG, features, binding=name))
                stack.callback(contexts[-1].close)
            self.context, self.far_context = contexts
            self.arrived: list[tuple[bytes, bytes]] = []
            self.failures: list[UcpFailure] = []
            self.answered: list[tuple[bytes, bytes]] = []
            self.here = self.context.open_worker(
                lambda header, payload, _reply: self.answered.append(
                    (header, ctypes.string_at(payload.address, payload.nbytes))
                )
            )
            stack.callback(self.here.close)
            self.there = self.far_context.open_worker(self._arrive)
            stack.callback(self.there.close)
            self.endpoint = self.here.connect(self.there.address, self.failures.append)
            self._stack = stack.pop_all()

    def _arrive(self, header: bytes, payload: Span, reply: Reply | None) -> None:
        self.arrived.append((header, ctypes.string_at(payload.address, payload.nbytes)))
        if reply is not None:
            reply(b"heard " + header, self.arrived[-1][1])

    def run(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end_s, "it never came"
            self.here.progress()
            self.there.progress()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


@needs_ucx
def test_message_brings_its_header_and_its_gathered_payload(pair: Pair) -> None:
    source = np.arange(100_000, dtype=np.uint32).view(np.uint8)
    ended: list[UcpFailure | None] = []
    pieces = [(0, 10), (100, 1), (200_000, 150_000)]
    spans = [Span(source.ctypes.data + offset, nbytes) for offset, nbytes in pieces]
    pair.endpoint.send(b"scattered", spans, ended.append)
    pair.endpoint.send(b"empty", (), ended.append)
    pair.run(lambda: len(pair.arrived) == 2 and len(ended) == 2)
    gathered = b"".join(source[offset : offset + nbytes].tobytes() for offset, nbytes in pieces)
    assert pair.arrived == [(b"scattered", gathered), (b"empty", b"")]
    assert ended == [None, None]
    assert pair.endpoint.transports() == ("tcp/lo",)


@needs_ucx
def test_message_can_be_answered_without_an_endpoint(pair: Pair) -> None:
    source = np.arange(100, dtype=np.uint8)
    pair.endpoint.send(b"hello", [span_of(source)], lambda _failure: None, wants_reply=True)
    pair.endpoint.send(b"no need", (), lambda _failure: None)
    pair.run(lambda: pair.answered and len(pair.arrived) == 2)
    assert pair.answered == [(b"heard hello", source.tobytes())]


@needs_ucx
def test_who_asks_and_does_not_listen_is_kept_few_answers(pair: Pair) -> None:
    source = np.zeros(4000, dtype=np.uint8)
    unsent = [0]

    def ask() -> None:
        def sent(_failure: UcpFailure | None) -> None:
            unsent[0] -= 1

        unsent[0] += 1
        pair.endpoint.send(b"hello", [span_of(source)], sent, wants_reply=True)

    ask()
    pair.run(lambda: pair.answered)
    most = 0
    for _ in range(10_000):
        if unsent[0] < 10:
            ask()
        pair.there.progress()
        most = max(most, len(pair.there.messages.pending))  # type: ignore[attr-defined]
    assert most == MAX_REPLIES
    assert len(pair.arrived) > len(pair.answered) + MAX_REPLIES
    pair.run(lambda: not (unsent[0] or len(pair.there.messages.pending)))  # type: ignore[attr-defined]
    pair.answered.clear()
    ask()
    pair.run(lambda: pair.answered)


@needs_ucx
def test_loading_ucx_leaves_this_process_its_signals() -> None:
    code = (
        "import signal; from snowskin.transport.ucp import abi; caught = lambda: [line for line "
        "in open('/proc/self/status') if line.startswith('SigCgt')]; before = caught(); "
        "abi.load(); assert caught() == before, (before, caught())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


@needs_ucx
def test_gets_and_puts_move_exactly_their_bytes(pair: Pair) -> None:
    remote = np.random.default_rng(3).integers(0, 256, 3 << 20, dtype=np.uint8)
    local = np.zeros(1 << 20, dtype=np.uint8)
    memory = pair.far_context.map(span_of(remote), UcpMemoryType.HOST)
    key = pair.endpoint.unpack(memory.pack())
    ended: list[UcpFailure | None] = []
    key.get(span_of(local), remote.ctypes.data + 777, ended.append)
    pair.run(lambda: ended)
    assert np.array_equal(local, remote[777 : 777 + local.nbytes])
    wanted = remote.copy()
    wanted[5:105] = local[:100]
    key.put(Span(local.ctypes.data, 100), remote.ctypes.data + 5, ended.append)
    pair.endpoint.flush(ended.append)
    pair.run(lambda: len(ended) == 3)
    assert ended == [None, None, None]
    assert np.array_equal(remote, wanted)
    memory.unmap()
    memory.unmap()


@needs_ucx
def test_closing_an_endpoint_ends_its_operations_without_the_peer(pair: Pair) -> None:
    """As with a stopped peer: only this side makes progress."""
    source = np.zeros(1 << 20, dtype=np.uint8)
    ended: list[UcpFailure | None] = []
    for _ in range(8):
        pair.endpoint.send(b"x", [span_of(source)], ended.append)
    closed: list[UcpFailure | None] = []
    pair.endpoint.close(closed.append)
    end_s = time.monotonic() + WAIT_S
    while not closed:
        assert time.monotonic() < end_s, "it waits for the peer"
        pair.here.progress()
    assert closed == [None]
    assert len(ended) == 8
    assert {failure.status for failure in ended if failure} <= {"CANCELED"}


@needs_ucx
def test_idle_worker_can_be_waited_for(pair: Pair) -> None:
    import select

    pair.endpoint.send(b"first", (), lambda _failure: None)
    pair.run(lambda: pair.arrived)
    end_s = time.monotonic() + WAIT_S
    while not pair.there.arm():
        assert time.monotonic() < end_s
        pair.there.progress()
    assert not select.select([pair.there.event_fd], [], [], 0)[0]
    pair.endpoint.send(b"second", (), lambda _failure: None)
    pair.here.progress()
    assert select.select([pair.there.event_fd], [], [], WAIT_S)[0]
    pair.run(lambda: len(pair.arrived) == 2)


@needs_ucx
def test_peer_that_closed_is_told_once_and_later_operations_fail(pair: Pair) -> None:
    pair.endpoint.send(b"first", (), lambda _failure: None)
    pair.run(lambda: pair.arrived)
    pair.there.close()
    end_s = time.monotonic() + WAIT_S
    while not pair.failures:
        assert time.monotonic() < end_s
        pair.here.progress()
    assert pair.endpoint.failed is pair.failures[0]
    assert pair.failures[0].status == "CONNECTION_RESET"
    ended: list[UcpFailure | None] = []
    pair.endpoint.send(b"late", (), ended.append)
    while not ended:
        assert time.monotonic() < end_s
        pair.here.progress()
    assert ended[0] is not None
    assert len(pair.failures) == 1


@needs_ucx
@pytest.mark.parametrize("nbytes", [0, MAX_PEER_BYTES + 1])
def test_bytes_of_a_peer_are_bounded_before_ucx_sees_them(pair: Pair, nbytes: int) -> None:
    with pytest.raises(ValueError, match="worker address of"):
        pair.here.connect(bytes(nbytes), pair.failures.append)
    with pytest.raises(ValueError, match="key of"):
        pair.endpoint.unpack(bytes(nbytes))
    with pytest.raises(ValueError, match="header of"):
        pair.endpoint.send(bytes(MAX_HEADER_NBYTES + 1), (), lambda _failure: None)


@needs_ucx
@pytest.mark.parametrize("name", sorted({name for pair in PAIRS for name in pair}))
def test_without_the_feature_nobody_is_served_one_sided(name: str) -> None:
    """A peer that brings the feature itself still gets nothing: this side has no software for it."""
    secret = np.full(4096, 0xAB, dtype=np.uint8)
    local = np.zeros(4096, dtype=np.uint8)
    safe = UcpFeature.WAKEUP | UcpFeature.MESSAGES
    with ExitStack() as stack:
        owner = open_context(CONFIG, safe, binding=name)
        stack.callback(owner.close)
        hostile = open_context(CONFIG, ALL, binding="ctypes")
        stack.callback(hostile.close)
        arrived: list[bytes] = []
        there = owner.open_worker(lambda header, _payload, _reply: arrived.append(header))
        stack.callback(there.close)
        here = hostile.open_worker(lambda _header, _payload, _reply: None)
        stack.callback(here.close)
        memory = hostile.map(span_of(secret), UcpMemoryType.HOST)  # as good a key as any over tcp
        stack.callback(memory.unmap)
        endpoint = here.connect(there.address, lambda _failure: None)
        key = endpoint.unpack(memory.pack())
        ended: list[UcpFailure | None] = []
        key.get(span_of(local), secret.ctypes.data, ended.append)
        endpoint.send(b"after it", (), lambda _failure: None)
        end_s = time.monotonic() + WAIT_S
        while not arrived:
            assert time.monotonic() < end_s
            here.progress()
            there.progress()
        for _ in range(1000):
            here.progress()
            there.progress()
        assert not local.any(), "memory was given to whoever asked"
        assert None not in ended


def test_operators_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TCP_RX_SEG_SIZE", "2m")
    assert own_settings({"TCP_RX_SEG_SIZE": "1m", "TCP_TX_SEG_SIZE": "64k"}) == {
        "TCP_TX_SEG_SIZE": "64k"
    }


@needs_ucx
def test_opening_ucx_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    for name in sorted({name for pair in PAIRS for name in pair}):
        open_context(CONFIG, ALL, binding=name).close()
    assert dict(os.environ) == before


@needs_ucx
def test_setting_that_ucx_refuses_is_named() -> None:
    with pytest.raises(UcpFailure, match="KEEPALIVE_INTERVAL=often"):
        open_context({"KEEPALIVE_INTERVAL": "often"}, ALL, binding="ctypes")


def test_unknown_binding_lists_the_known_ones() -> None:
    with pytest.raises(TransportUnavailable, match="ucx-py, ctypes, auto"):
        open_context({}, ALL, binding="telepathy")


def test_missing_ucx_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_name: str) -> None:
        raise OSError("libucp.so.0: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(ctypes, "CDLL", nothing)
    abi.load.cache_clear()
    try:
        with pytest.raises(TransportUnavailable, match=r"snowskin\[ucx\]"):
            open_context({}, ALL, binding="ctypes")
        assert "libucp.so.0" in str(why_unavailable())
    finally:
        abi.load.cache_clear()


def test_systems_ucx_that_knows_rdma_goes_before_the_wheel(tmp_path: Path) -> None:
    without, with_rdma = tmp_path / "without", tmp_path / "with"
    for folder in (without, with_rdma):
        (folder / "ucx").mkdir(parents=True)
        (folder / "libucp.so.0").touch()
    (with_rdma / "ucx" / "libuct_ib.so.0").touch()
    both = [str(without), str(with_rdma)]
    assert abi.library_files(both) == [str(with_rdma / "libucp.so.0")]
    assert "without" not in abi.library_files([str(without)])[-1]


@needs_ucx
def test_only_one_libucp_is_loaded() -> None:
    for name in sorted({name for pair in PAIRS for name in pair}):
        open_context(CONFIG, ALL, binding=name).close()
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "/libucp.so" in line}) == 1


def test_binding_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ucp") is not None:
        pytest.skip("ucx-py is here")
    with pytest.raises(TransportUnavailable, match=r"snowskin\.tools\.ucx_py"):
        open_context({}, ALL, binding="ucx-py")
    assert set(binding.BINDINGS) == {"ucx-py", "ctypes"}


@pytest.mark.parametrize(
    ("pointer", "status"),
    [(None, 0), (0, 0), (2**64 - 25, -25), (2**64 - 100, -100), (2**64 - 101, 1), (4096, 1)],
)
def test_status_pointers_are_done_failed_or_requests(pointer: int | None, status: int) -> None:
    assert abi.status_of(pointer) == status

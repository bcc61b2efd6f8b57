"""`ucx` over loopback, beside the contract suite: what it is asked by, how it is cut, and what it holds."""

from __future__ import annotations

import functools
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from snowskin.transport.api import Completion, Range, Run
from snowskin.transport.errors import (
    GrantRefused,
    OutOfBounds,
    PeerBusy,
    PeerLost,
    RegionReadOnly,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.memory import MemoryRegion
from snowskin.transport.ucp.api import UcpFailure
from snowskin.transport.ucp.binding import why_unavailable
from snowskin.transport.ucx import one_sided as ucx_one_sided
from snowskin.transport.ucx.one_sided import slices_of
from snowskin.transport.ucx.progress import ProgressThread
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import UcxTransport
from snowskin.transport.ucx.wire import Reach
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_UCX = why_unavailable()
needs_ucx = pytest.mark.skipif(NO_UCX is not None, reason=f"NO UCX HERE: {NO_UCX}")
HERE = UcxSettings(net_devices="lo", name="the-owner")
TRUSTED = replace(HERE, trusted_network=True)
NBYTES = 3 << 20
WAIT_S = 5.0


def soon() -> float:
    return time.monotonic() + WAIT_S


class Pair:
    """An owner and a reader, and memory on both sides."""

    def __init__(self, owner: UcxSettings = HERE, reader: UcxSettings | None = None) -> None:
        self.owner = UcxTransport(owner)
        self.reader = UcxTransport(reader or owner)
        self.source = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)
        self.target = np.zeros(NBYTES, dtype=np.uint8)
        self.owned = self.owner.register(self.source)
        self.local = self.reader.register(self.target)

    def attach(self, **how: Any) -> Any:
        writable = bool(how.get("writable"))
        return self.reader.attach(self.owner.describe(self.owned, **how), writable=writable)

    def close(self) -> None:
        self.reader.close()
        self.owner.close()
        self.local.close()
        self.owned.close()


@pytest.fixture
def made() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*settings: UcxSettings) -> Pair:
        pairs.append(Pair(*settings))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@needs_ucx
def test_what_moves_the_bytes_is_shown(made: Any) -> None:
    pair = made()
    pair.reader.pull(pair.attach(), pair.local, [Run(0, 0, 10)], deadline_s=soon())
    assert pair.reader.transports_in_use() == {"the-owner": ("tcp/lo",)}


@needs_ucx
@pytest.mark.parametrize("settings", [HERE, TRUSTED], ids=["messages", "one-sided"])
def test_more_ranges_than_one_ask_can_name_are_one_transfer(
    made: Any, settings: UcxSettings
) -> None:
    pair = made(settings)
    done: list[Completion] = []
    remote = pair.attach(writable=True, on_done=done.append)
    runs = [Run(300 * n, NBYTES - 200 * (n + 1), 100) for n in range(5_000)]
    report = pair.reader.pull(remote, pair.local, runs, deadline_s=soon(), note=b"pulled")
    assert (report.nbytes, report.num_runs) == (500_000, 5_000)
    for remote_offset, local_offset, nbytes in runs:
        wanted = pair.source[remote_offset : remote_offset + nbytes]
        assert np.array_equal(pair.target[local_offset : local_offset + nbytes], wanted)
    pair.target[:] = 7
    pair.reader.push(pair.local, remote, runs, deadline_s=soon(), note=b"pushed")
    assert all((pair.source[at : at + nbytes] == 7).all() for at, _, nbytes in runs)
    assert (pair.source[100:300] != 7).any()
    eventually(lambda: len(done) == 2, WAIT_S)
    assert [(each.note, each.nbytes) for each in done] == [
        (b"pulled", 500_000),
        (b"pushed", 500_000),
    ]


@needs_ucx
def test_one_sided_runs_are_cut_where_registrations_end(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(slices_of, slice_nbytes=1_000_000)
    monkeypatch.setattr(ucx_one_sided, "slices_of", small)
    pair = made(replace(TRUSTED, get_nbytes=300_000))
    remote = pair.attach(writable=True)
    assert [each.nbytes for each in remote.reach.slices] == [1_000_000] * 3 + [145_728]
    runs = [Run(999_999, 5, 2_000_003), Run(0, 2_500_000, 10)]
    pieces: list[tuple[int, int]] = []
    pair.reader.pull(
        remote,
        pair.local,
        runs,
        deadline_s=soon(),
        piece_nbytes=700_000,
        landed=lambda *piece: pieces.append(piece),
    )
    assert np.array_equal(
        pair.target[5 : 5 + 2_000_003], pair.source[999_999 : 999_999 + 2_000_003]
    )
    assert np.array_equal(pair.target[2_500_000:2_500_010], pair.source[:10])
    assert pieces == [(5, 700_000), (700_005, 700_000), (1_400_005, 600_003), (2_500_000, 10)]
    pair.target[:] = 9
    pair.reader.push(pair.local, remote, runs[:1], deadline_s=soon())
    assert (pair.source[999_999 : 999_999 + 2_000_003] == 9).all()


def test_slices_are_at_most_three_and_a_half_gib() -> None:
    spans = slices_of(4096, 10 << 30)
    assert [span.nbytes for span in spans] == [7 << 29, 7 << 29, 3 << 30]
    assert [span.address for span in spans] == [4096, 4096 + (7 << 29), 4096 + (7 << 30)]


@needs_ucx
def test_memory_of_closed_regions_is_deregistered(made: Any) -> None:
    pair = made(TRUSTED)
    first = pair.reader.register(bytearray(4096))
    assert len(pair.reader._registrations) == 2
    first.close()
    second = pair.reader.register(bytearray(4096))
    assert len(pair.reader._registrations) == 2
    second.close()


@needs_ucx
def test_memory_registered_elsewhere_cannot_be_described_one_sidedly(made: Any) -> None:
    pair = made(TRUSTED)
    with pytest.raises(TransportError, match="not registered by this transport"):
        pair.reader.describe(pair.owned)


@pytest.mark.gpu
@needs_ucx
@pytest.mark.parametrize("settings", [TRUSTED, replace(TRUSTED, tls="tcp,cuda_copy,cuda_ipc")])
def test_cuda_memory_moves_one_sidedly(made: Any, settings: UcxSettings) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("NO CUDA DEVICE HERE")
    pair = made(settings)
    device = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    landing = pair.reader.register(device)
    remote = pair.attach(writable=True)
    pair.reader.pull(remote, landing, [Run(0, 0, NBYTES)], deadline_s=soon())
    assert np.array_equal(device.cpu().numpy(), pair.source)
    device += 1
    torch.cuda.synchronize()
    pair.reader.push(landing, remote, [Run(0, 0, NBYTES)], deadline_s=soon())
    assert np.array_equal(device.cpu().numpy(), pair.source)
    owned = pair.owner.register(torch.full((4096,), 7, dtype=torch.uint8, device="cuda"))
    both = pair.reader.attach(pair.owner.describe(owned))
    pair.reader.pull(both, landing, [Run(0, 5, 4096)], deadline_s=soon())
    assert bool((device[5:4101] == 7).all())
    owned.close()
    landing.close()


@needs_ucx
def test_one_side_that_trusts_alone_goes_by_messages(made: Any) -> None:
    for settings in ((TRUSTED, HERE), (HERE, TRUSTED)):
        pair = made(*settings)
        pair.reader.pull(pair.attach(), pair.local, [Run(0, 0, NBYTES)], deadline_s=soon())
        assert np.array_equal(pair.target, pair.source)


@needs_ucx
def test_unchecked_ways_are_not_used_one_sidedly_by_a_reader_that_did_not_trust(made: Any) -> None:
    """Both sides say that only hardware is used; over tcp, that is found out before a byte moves."""
    mistaken = replace(HERE, tls="rc", more=(("TLS", "tcp"),))
    assert mistaken.offers_one_sided
    pair = made(mistaken)
    with pytest.raises(TransportUnavailable, match="tcp/lo: nothing would check keys"):
        pair.reader.pull(pair.attach(), pair.local, [Run(0, 0, 10)], deadline_s=soon())
    assert not pair.target.any()


@needs_ucx
def test_device_memory_is_refused_where_nothing_goes_one_sided(made: Any) -> None:
    device = MemoryRegion.on_device(
        object(), address=1 << 40, nbytes=100, device_index=0, writable=True
    )
    pair = made()
    with pytest.raises(TransportUnavailable, match="cannot reach cuda memory"):
        pair.reader.pull(pair.attach(), device, [Run(0, 0, 10)], deadline_s=soon())
    pair = made(HERE, TRUSTED)
    with pytest.raises(TransportUnavailable, match="the-owner offers no one-sided access"):
        pair.reader.pull(pair.attach(), device, [Run(0, 0, 10)], deadline_s=soon())
    device.close()


@needs_ucx
def test_only_what_was_granted_is_given(made: Any) -> None:
    for settings in (HERE, TRUSTED):
        pair = made(settings)
        remote = pair.attach(ranges=[Range(100, 50)])
        with pytest.raises(OutOfBounds, match="the-owner refused it"):
            pair.reader.pull(remote, pair.local, [Run(100, 0, 51)], deadline_s=soon())
        pair.reader.pull(remote, pair.local, [Run(110, 0, 40)], deadline_s=soon())
        assert dict(pair.owner.statistics().refused_by_reason) == {"OUT_OF_BOUNDS": 1}
        with pytest.raises(RegionReadOnly):
            pair.reader.attach(remote.descriptor, writable=True)


@needs_ucx
def test_another_epoch_is_refused_even_under_a_digest_of_its_own(made: Any) -> None:
    pair = made()
    descriptor = pair.owner.describe(pair.owned, epoch=5)
    reach = Reach.open(descriptor)
    older = replace(descriptor, epoch=4)
    remote = pair.reader.attach(replace(older, extra=reach.seal(older)))
    with pytest.raises(GrantRefused, match="the-owner"):
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    assert pair.owner.statistics().num_connections == 0
    known = pair.reader.attach(descriptor)
    pair.reader.pull(known, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    with pytest.raises(GrantRefused, match="the-owner"):
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())


@needs_ucx
def test_transport_can_be_its_own_peer() -> None:
    transport = UcxTransport(HERE)
    source, target = np.arange(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    owned, local = transport.register(source), transport.register(target)
    remote = transport.attach(transport.describe(owned, writable=True), writable=True)
    transport.pull(remote, local, [Run(0, 0, 100)], deadline_s=soon())
    assert np.array_equal(source, target)
    target[:] = 3
    transport.push(local, remote, [Run(0, 0, 100)], deadline_s=soon())
    assert (source == 3).all()
    transport.close()
    owned.close()
    local.close()


@needs_ucx
def test_grant_may_be_revoked_by_whoever_hears_that_it_was_used(made: Any) -> None:
    pair = made()
    done = threading.Event()

    def on_done(_completion: Completion) -> None:
        pair.owner.revoke(descriptor)
        done.set()

    descriptor = pair.owner.describe(pair.owned, on_done=on_done)
    remote = pair.reader.attach(descriptor)
    pair.reader.pull(remote, pair.local, [Run(0, 0, NBYTES)], deadline_s=soon(), note=b"x")
    assert done.wait(WAIT_S)
    with pytest.raises(GrantRefused):
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())


@needs_ucx
def test_peer_has_no_more_transfers_at_once_than_it_may(made: Any) -> None:
    pair = made(replace(HERE, max_transfers=1))
    remote = pair.attach()
    pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())

    def landed(_offset: int, _nbytes: int) -> None:
        with pytest.raises(PeerBusy, match="the-owner"):
            pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())

    runs = [Run(0, 0, NBYTES)]
    pair.reader.pull(
        remote, pair.local, runs, deadline_s=soon(), piece_nbytes=NBYTES // 2, landed=landed
    )


@needs_ucx
def test_owner_that_is_gone_is_named_and_nothing_is_left_of_it(made: Any) -> None:
    pair = made()
    remote = pair.attach()
    pair.owner.close()
    with pytest.raises(PeerLost, match="the-owner"):
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    assert pair.reader.statistics().num_connections == 0


@needs_ucx
def test_regions_of_one_lease_after_another_share_a_link(made: Any) -> None:
    pair = made()
    for _ in range(5):
        remote = pair.attach()
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())
        remote.close()
    assert pair.reader.statistics().num_connected == 1


@needs_ucx
def test_link_goes_soon_after_the_last_region_of_its_owner(made: Any) -> None:
    pair = made(replace(HERE, heartbeat_s=0.1, linger_s=0.1))
    first, second = pair.attach(), pair.attach()
    for remote in (first, second):
        pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    first.close()
    threading.Event().wait(0.3)
    pair.reader.pull(second, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    assert pair.reader.statistics().num_connected == 1
    second.close()
    eventually(lambda: pair.reader.statistics().num_connections == 0, WAIT_S)
    eventually(lambda: pair.owner.statistics().num_connections == 0, WAIT_S)


@needs_ucx
@pytest.mark.parametrize("settings", [HERE, TRUSTED], ids=["messages", "one-sided"])
def test_idle_peers_use_no_cpu(made: Any, settings: UcxSettings) -> None:
    pair = made(settings)
    pair.reader.pull(pair.attach(), pair.local, [Run(0, 0, NBYTES)], deadline_s=soon())
    began_s = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - began_s < 0.005


@needs_ucx
def test_nothing_of_ucx_is_in_the_environment() -> None:
    before = dict(os.environ)
    UcxTransport(HERE).close()
    assert dict(os.environ) == before


@needs_ucx
def test_settings_that_ucx_refuses_are_said() -> None:
    with pytest.raises(TransportUnavailable, match="UCX does not open"):
        UcxTransport(replace(HERE, more=(("KEEPALIVE_INTERVAL", "often"),)))


class FakeWorker:
    """Has nothing to do; the event descriptor never wakes."""

    def __init__(self) -> None:
        self.event_fd, self._far = os.pipe()
        self.num_turns = 0
        self.closed = False

    def progress(self) -> bool:
        self.num_turns += 1
        return False

    def arm(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.event_fd)
        os.close(self._far)
        self.closed = True


@pytest.fixture
def last() -> list[str]:
    """What the thread did at its end."""
    return []


@pytest.fixture
def thread(last: list[str]) -> Iterator[ProgressThread]:
    worker: Any = FakeWorker()
    made = ProgressThread(worker, worker, last=lambda: last.append("last"))
    made.context = FakeWorker()  # type: ignore[assignment]
    yield made
    made.stop()
    assert worker.closed


def test_progress_thread_does_work_in_order_and_returns_its_end(thread: ProgressThread) -> None:
    done: list[int] = []
    for number in range(100):
        assert thread.post(functools.partial(done.append, number))
    assert thread.run(lambda: len(done)) == 100
    assert done == list(range(100))
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)


def test_progress_thread_outlives_work_that_fails(
    thread: ProgressThread, caplog: pytest.LogCaptureFixture
) -> None:
    thread.post(lambda: 1 // 0)
    assert thread.run(lambda: 5) == 5
    assert "work failed" in caplog.text


def test_progress_thread_calls_at_the_time_and_not_what_was_cancelled(
    thread: ProgressThread,
) -> None:
    called: list[str] = []
    last = threading.Event()

    def begin() -> None:
        thread.later(0.02, last.set)
        thread.later(0.01, lambda: called.append("second"))
        thread.later(0.0, lambda: called.append("first"))
        thread.later(0.005, lambda: called.append("never")).cancel()

    thread.run(begin)
    assert last.wait(WAIT_S)
    assert called == ["first", "second"]


def test_progress_thread_takes_no_work_after_its_end(
    thread: ProgressThread, last: list[str]
) -> None:
    thread.post(lambda: last.append("before"))
    thread.stop()
    thread.stop()
    assert last == ["before", "last"]
    assert not thread.post(lambda: last.append("after"))
    with pytest.raises(TransportClosed):
        thread.run(lambda: None)
    assert last == ["before", "last"]


@needs_ucx
def test_where_ucx_fails_nobody_waits_for_it(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair = made()
    remote = pair.attach()
    pair.owner._owner.arrive = lambda *_: None  # it never answers

    def arm() -> bool:
        raise UcpFailure("IO_ERROR", "arming the worker")

    thread = pair.reader._thread
    failing = threading.Timer(0.1, thread.post, [lambda: setattr(thread.worker, "arm", arm)])
    began_s = time.monotonic()
    failing.start()
    for _ in range(2):
        with pytest.raises(TransportClosed):
            pair.reader.pull(remote, pair.local, [Run(0, 0, 10)], deadline_s=soon())
    with pytest.raises(TransportClosed, match="UCX failed"):
        pair.reader.describe(pair.local)
    assert time.monotonic() - began_s < HERE.connect_timeout_s / 2
    failing.join()
    assert "arming the worker" in caplog.text


def test_progress_thread_sleeps_while_there_is_nothing_to_do(thread: ProgressThread) -> None:
    thread.run(lambda: None)
    worker: Any = thread.worker
    before = worker.num_turns
    threading.Event().wait(0.05)
    assert worker.num_turns - before <= 3

"""Pairs of processes, started, ordered about and ended by the benchmark.

Rules kept here: no pair outlives the `with` block that started it; every order has a deadline; a pair of a peer that
polls while it is idle is stopped (SIGSTOP) while others are measured, or it would be measured with them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from snowskin.tools.bench.transfer.end import EndSpec, Json
from snowskin.transport.errors import SnowskinError
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping
from snowskin.transport.pages import collapse, page_use

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snowskin.tools.bench.transfer.backends.api import Offer, Options
    from snowskin.tools.bench.transfer.shape import Shape

ORDER_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
NUM_CORES = 2
OTHERS = "others"
"""The pair of all parts but the sizes: one of them at a time."""


class PairFailed(SnowskinError):
    """A process of a pair died, hung, or moved other bytes than it should."""

    status = "INTERNAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to move bytes.

    Attributes:
        name: as in the table.
        backend: a name in `backends/registry.py`.
        pair: contestants of the same name here share their two processes; only one is active at a time.
        environment: of both processes, beside ours.
        is_peer: another system, whose absence is told.
        own_network: it needs a network namespace of its own.
        congestion: TCP's congestion control there; empty: as on the host.
        is_free: each end may run on both cores; peers always may.
        is_chatty: what its libraries say on stderr is dropped.
    """

    name: str
    backend: str
    pair: str
    options: Options = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    is_peer: bool = False
    own_network: bool = False
    congestion: str = ""
    is_free: bool = False
    is_chatty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What some pulls took: seconds of one, and CPU seconds of both ends of one."""

    seconds: float
    cpu_s: float


def cores(*, is_owner: bool, is_free: bool) -> tuple[int, ...]:
    """Where an end runs: owners on one core and readers on the next, or both on both.

    Two ends on one core share its cache and wake each other for nothing, which no two hosts do. A peer with threads
    that poll gets both cores for both of its ends.
    """
    both = tuple(sorted(os.sched_getaffinity(0))[:NUM_CORES])
    return both if is_free else both[:1] if is_owner else both[-1:]


class EndProcess:
    """One process of a pair."""

    def __init__(
        self, spec: EndSpec, control: socket.socket, environment: dict[str, str], *, quiet: bool
    ) -> None:
        """Starts it; `quiet` for libraries that print about their own affairs."""
        self._control = control
        self._control.settimeout(ORDER_TIMEOUT_S)
        self._lines = control.makefile("r")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "snowskin.tools.bench.transfer.end", spec.to_json()],
            pass_fds=[spec.pool_fd, spec.landing_fd, spec.control_fd],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
        )

    def ask(self, order: Json) -> Json:
        """An order and its answer.

        Raises:
            PairFailed: it died, did not answer in time, or says that it could not.
        """
        self.send(order)
        return self.answer()

    def send(self, order: Json) -> None:
        """An order alone; `answer` belongs to it."""
        try:
            self._control.sendall(json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise PairFailed(f"an end of {order['do']!r} is gone: {error}") from error

    def answer(self) -> Json:
        """The answer to the order sent last."""
        try:
            line = self._lines.readline()
        except OSError as error:
            raise PairFailed(f"no answer within {ORDER_TIMEOUT_S:.0f} s") from error
        if not line:
            raise PairFailed(f"an end died, status {self.process.wait(END_TIMEOUT_S)}")
        answer = cast("Json", json.loads(line))
        if "error" in answer:
            raise PairFailed(str(answer["error"]), hint=str(answer.get("trace", "")))
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Stops it or lets it go on."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def hang_up(self) -> None:
        """Gives no more orders: it ends by itself; `close` waits for that."""
        self.signal(signal.SIGCONT)
        self._lines.close()
        self._control.close()

    def close(self) -> None:
        """Waits for its end; kills it where that does not come."""
        self.hang_up()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Pair:
    """An owner and a reader, with the contestants that they are."""

    def __init__(
        self,
        name: str,
        contestants: Sequence[Contestant],
        memory: Memory,
        paths: Sequence[str] = (),
    ) -> None:
        """Starts both processes; `open` connects them."""
        self.name = name
        self.missing: dict[str, str] = {}
        self.offers: dict[str, Offer] = {}
        self._contestants = list(contestants)
        self._first = contestants[0]
        self._memory = memory
        self._paths = tuple(paths)
        self.owner = self._start(is_owner=True, network_of=-1 if self._first.own_network else 0)
        self._reader: EndProcess | None = None
        if not self._first.own_network:
            self._reader = self._start(is_owner=False, network_of=0)

    @property
    def reader(self) -> EndProcess:
        """The process that pulls."""
        assert self._reader is not None, "a pair is opened before it is used"
        return self._reader

    def _start(self, *, is_owner: bool, network_of: int) -> EndProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            spec = EndSpec(
                is_owner=is_owner,
                backends={each.name: (each.backend, each.options) for each in self._contestants},
                pool_fd=self._memory.pool_fd,
                landing_fd=self._memory.landing_fd,
                control_fd=theirs.fileno(),
                cores=cores(is_owner=is_owner, is_free=self._first.is_peer or self._first.is_free),
                paths=self._paths,
                network_of=network_of,
                congestion=self._first.congestion,
            )
            return EndProcess(
                spec,
                ours,
                self._first.environment,
                quiet=self._first.is_peer or self._first.is_chatty,
            )

    def open(self) -> None:
        """Connects the two; who cannot run is in `missing` afterwards, with the reason."""
        try:
            owned = self.owner.ask({"do": "open"})
            if self._reader is None:
                self._reader = self._start(is_owner=False, network_of=self.owner.process.pid)
            self.offers = cast("dict[str, Offer]", owned["offers"])
            read = self.reader.ask({"do": "open", "offers": self.offers})
        except PairFailed as error:
            if not self._first.is_peer:
                raise
            self.missing = {each.name: error.message for each in self._contestants}
            return
        self.missing = cast(
            "dict[str, str]", {**cast("Json", owned["missing"]), **cast("Json", read["missing"])}
        )

    def prepare(self, name: str, shape: Shape, *, checked: bool) -> bool:
        """Makes a pull ready and verifies its bytes; False where this contestant has no such pull."""
        return "missing" not in self.reader.ask(_prepare_order(name, shape, checked=checked))

    def pull(self, name: str, shape: Shape, *, checked: bool) -> Taken:
        """A round's pulls of one contestant, after one that warms short ones up: others had the caches before."""
        order = _pull_order(name, shape, checked=checked)
        if shape.repeat > 1:
            self.reader.ask(order | {"repeat": 1})
        owner_before_s = cast("float", self.owner.ask({"do": "cpu"})["cpu_s"])
        taken = self.reader.ask(order | {"repeat": shape.repeat})
        owner_s = cast("float", self.owner.ask({"do": "cpu"})["cpu_s"]) - owner_before_s
        cpu_s = owner_s + cast("float", taken["cpu_s"])
        seconds = cast("float", taken["seconds"])
        return Taken(seconds=seconds / shape.repeat, cpu_s=cpu_s / shape.repeat)

    def pull_rested(self, name: str, shape: Shape, *, rest_s: float) -> float:
        """Seconds of one pull, after neither end had anything to do for `rest_s`."""
        time.sleep(rest_s)
        order = _pull_order(name, shape, checked=False)
        return cast("float", self.reader.ask(order | {"repeat": 1})["seconds"])

    def prepare_calls(
        self,
        name: str,
        shape: Shape,
        case: str,
        *,
        cost_us: int,
        is_one_by_one: bool,
        num_calls: int,
    ) -> None:
        """Makes a request ready, a call per run or one in all, each with a cost beside its bytes."""
        order: Json = {
            "do": "prepare case",
            "name": name,
            "case": case,
            "runs": shape.runs,
            "cost_s": cost_us / 1e6,
            "one_by_one": is_one_by_one,
            "num_calls": num_calls,
        }
        self.reader.ask(order)

    def pull_case(self, case: str) -> float:
        """Seconds of a request that was made ready."""
        return cast("float", self.reader.ask({"do": "pull case", "case": case})["seconds"])

    def hold(self, name: str, load: Json, *, is_pull: bool) -> list[tuple[float, float, float]]:
        """Arrived, reserved and landed of each request of a load, in seconds of one clock."""
        order: Json = {"do": "hold", "name": name, "load": load, "is_pull": is_pull}
        return cast("list[tuple[float, float, float]]", self.reader.ask(order)["held"])

    @contextlib.contextmanager
    def late_end(self) -> Iterator[EndProcess]:
        """A third process beside the two, which knows nothing yet."""
        late = self._start(is_owner=False, network_of=0)
        try:
            late.ask({"do": "cpu"})  # it has started
            yield late
        finally:
            late.close()

    def join_late(self, name: str, shape: Shape) -> float:
        """Milliseconds in which a third process attaches, pulls and verifies."""
        with self.late_end() as late:
            began_s = time.perf_counter()
            late.ask({"do": "open", "offers": self.offers})
            late.ask(_prepare_order(name, shape, checked=False))
            return (time.perf_counter() - began_s) * 1e3

    def refused_late(self, name: str) -> str:
        """What a third process is told that wants to join a group; empty if it may."""
        with self.late_end() as late:
            return str(late.ask({"do": "join late", "offer": self.offers[name]})["why"])

    def cpu_s(self) -> float:
        """CPU seconds of both ends so far."""
        return sum(
            cast("float", end.ask({"do": "cpu"})["cpu_s"]) for end in (self.owner, self.reader)
        )

    def suspend(self) -> None:
        """Lets a peer rest."""
        if self._first.is_peer:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a peer go on."""
        if self._first.is_peer:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for end in (self.owner, self._reader):
            if end is not None:
                end.signal(number)

    def hang_up(self) -> None:
        """Lets both processes end; `close` waits for that."""
        for end in (self._reader, self.owner):
            if end is not None:
                end.hang_up()

    def close(self) -> None:
        """Ends both processes, the reader first."""
        for end in (self._reader, self.owner):
            if end is not None:
                end.close()


def _pull_order(name: str, shape: Shape, *, checked: bool) -> Json:
    return {"do": "pull", "name": name, "shape": shape.name, "checked": checked}


def _prepare_order(name: str, shape: Shape, *, checked: bool) -> Json:
    return {
        "do": "prepare",
        "name": name,
        "shape": shape.name,
        "checked": checked,
        "runs": shape.runs,
        "block_nbytes": shape.block_nbytes,
    }


class Memory:
    """The pool, filled, and the landing memory, both memfds of all pairs; a context manager.

    Attributes:
        pages: what lies under the pool. Huge ones where the kernel joins them, as a node's; the landing memory, which
            is an engine's, keeps small ones.
    """

    def __init__(self, nbytes: int) -> None:
        """Fills the pool so that no two words of it are the same."""
        self.nbytes = nbytes
        self.pool_fd = self._memfd("pool", nbytes)
        self.landing_fd = self._memfd("landing", nbytes)
        words = np.arange(nbytes // 8, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
        os.pwrite(self.pool_fd, words.data, 0)
        self.pages = _joined_pages(self.pool_fd, nbytes)

    @staticmethod
    def _memfd(name: str, nbytes: int) -> int:
        fd = os.memfd_create(f"snowskin-bench-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd

    def close(self) -> None:
        """Gives both back."""
        os.close(self.pool_fd)
        os.close(self.landing_fd)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _joined_pages(fd: int, nbytes: int) -> str:
    """Has the kernel join the pages of a memfd, as `Arena` does; what lies under it then."""
    mapping = Mapping(fd, nbytes, writable=True)
    if whole_nbytes := nbytes // ALIGN_NBYTES * ALIGN_NBYTES:
        collapse(mapping.address, whole_nbytes)  # where it does not, that is seen
    return str(page_use(mapping.address) or "pages of which the kernel does not tell")


@contextlib.contextmanager
def open_pairs(
    contestants: Sequence[Contestant], memory: Memory, paths: Sequence[str] = ()
) -> Iterator[dict[str, Pair]]:
    """Pairs of these contestants by name of the pair, connected; all processes end with the block."""
    by_pair: dict[str, list[Contestant]] = {}
    for contestant in contestants:
        by_pair.setdefault(contestant.pair, []).append(contestant)
    with contextlib.ExitStack() as stack:
        pairs = {}
        for name, members in by_pair.items():
            pairs[name] = Pair(name, members, memory, paths if members[0].is_peer else ())
            stack.callback(pairs[name].close)
        for pair in pairs.values():
            pair.open()
            pair.suspend()
        yield pairs
        for pair in pairs.values():
            pair.hang_up()  # all at once; the stack waits for one after the other

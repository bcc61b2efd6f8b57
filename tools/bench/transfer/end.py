"""One process of a pair of the transfer benchmark: the owner of the bytes, or their reader.

Started as `python -m snowskin.tools.bench.transfer.end SPEC`; SPEC is `EndSpec` as JSON. Orders and answers are lines
of JSON on an inherited socket, because libraries of peers print what they like. The process ends with that socket, and
with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np

from snowskin.kvstore.checksum import RunningChecksums
from snowskin.tools.bench.transfer import schedule
from snowskin.tools.bench.transfer.backends import registry
from snowskin.tools.bench.transfer.backends.api import (
    Begin,
    ContestantMissing,
    Landed,
    Offer,
    Options,
    OwnerEnd,
    Pull,
    ReaderEnd,
    SharedMemory,
)
from snowskin.tools.bench.transfer.echo import EchoThread
from snowskin.tools.bench.transfer.namespace import enter_network_of, own_network
from snowskin.transport.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snowskin.tools.bench.transfer.backends.ours import TransportReader

_PR_SET_PDEATHSIG = 1
_DAMAGE = 0xA5

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndSpec:
    """What a process of a pair is told at its start.

    Attributes:
        is_owner: or the reader.
        backends: contestant's name to (backend, options).
        pool_fd, landing_fd: inherited memfds.
        control_fd: inherited socket for orders.
        cores: where it may run.
        paths: further folders with packages, those of peers.
        network_of: 0: the host's network; -1: a new one; else that of the process of this id.
        congestion: TCP's congestion control in the new network; empty: as on the host.
    """

    is_owner: bool
    backends: dict[str, tuple[str, Options]]
    pool_fd: int
    landing_fd: int
    control_fd: int
    cores: tuple[int, ...]
    paths: tuple[str, ...] = ()
    network_of: int = 0
    congestion: str = ""

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def cpu_s() -> float:
    """Seconds of CPU that this process has used, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def shared_memory(fd: int) -> SharedMemory:
    """Maps a memfd and faults all its pages in, for reading and writing."""
    mapped = mmap.mmap(fd, os.fstat(fd).st_size)
    view = np.frombuffer(mapped, np.uint8)
    pages = view[:: mmap.PAGESIZE]
    np.copyto(pages, pages.copy())  # writes what is there: both page tables are full now
    return SharedMemory(fd=fd, bytes=view)


class _Checks:
    """The checksums of a checked pull, of blocks, in pieces as they land."""

    def __init__(self, landing: SharedMemory, block_nbytes: int) -> None:
        self._landing = landing
        self._block_nbytes = block_nbytes
        self.last: RunningChecksums | None = None

    def begin(self) -> Landed:
        self.last = RunningChecksums(self._landing.bytes, self._block_nbytes)
        return self.last.landed


class End:
    """Carries out the orders of one process."""

    def __init__(self, spec: EndSpec) -> None:
        """Maps the memories; opens nothing yet."""
        self._spec = spec
        self._pool = shared_memory(spec.pool_fd)
        self._landing = shared_memory(spec.landing_fd)
        self._opened: dict[str, OwnerEnd | ReaderEnd] = {}
        self._pulls: dict[tuple[str, str, bool], Pull] = {}
        self._cases: dict[str, Pull] = {}
        self._echo: EchoThread | None = None

    def carry_out(self, order: Json) -> Json:
        """One order; its answer."""
        match order["do"]:
            case "open":
                return self._open(cast("dict[str, Offer]", order.get("offers", {})))
            case "prepare":
                return self._prepare(order)
            case "pull":
                return self._pull(order)
            case "prepare case":
                return self._prepare_case(order)
            case "pull case":
                return self._pull_case(str(order["case"]))
            case "hold":
                return self._hold(order)
            case "join late":
                return {"why": self._join_late(order)}
            case "load":
                with _of_another_host():
                    return self._load(order)
            case "echo":
                self._echo = self._echo or EchoThread()
                return {"port": self._echo.port}
            case "cpu":
                return {"cpu_s": cpu_s()}
        raise ValueError(f"no order {order['do']!r}")

    def _open(self, offers: dict[str, Offer]) -> Json:
        """Opens all contestants; those that cannot run here are told with their reason."""
        answer: dict[str, object] = {}
        missing: dict[str, str] = {}
        for name, (backend, options) in self._spec.backends.items():
            try:
                module = registry.load(backend)
                if self._spec.is_owner:
                    owner = module.open_owner(self._pool, options)
                    self._opened[name], answer[name] = owner, owner.offer
                elif name in offers:
                    self._opened[name] = module.open_reader(
                        offers[name], self._pool, self._landing, options
                    )
            except ContestantMissing as error:
                missing[name] = str(error)
        return {"offers": answer, "missing": missing}

    def _prepare(self, order: Json) -> Json:
        """Makes a pull ready, does it twice, and compares its bytes with the pool's, and its checksums."""
        name, shape, checked = _key(order)
        runs = _runs(order)
        block_nbytes = cast("int", order["block_nbytes"])
        checks = _Checks(self._landing, block_nbytes)
        begin: Begin | None = checks.begin if checked else None
        reader = cast("ReaderEnd", self._opened[name])
        try:
            pull = reader.prepare(runs, begin)
        except ContestantMissing as error:
            return {"missing": str(error)}
        for _, local, nbytes in runs:
            self._landing.bytes[local : local + nbytes] = _DAMAGE
        pull()
        self._compare(name, runs)
        if checks.last is not None:
            expected = RunningChecksums(self._pool.bytes, block_nbytes)
            for run in runs:
                expected.landed(run.remote_offset, run.nbytes)
            found = checks.last.records(b"", b"\0" * 32 * expected.num_passed, 32)
            wanted = expected.records(b"", b"\0" * 32 * expected.num_passed, 32)
            assert np.array_equal(found, wanted), f"{name}: checksums of other bytes"
        pull()
        self._pulls[name, shape, checked] = pull
        return {}

    def _compare(self, name: str, runs: Sequence[Run]) -> None:
        for remote, local, nbytes in runs:
            same = np.array_equal(
                self._landing.bytes[local : local + nbytes],
                self._pool.bytes[remote : remote + nbytes],
            )
            assert same, f"{name}: other bytes than the pool's at {local} + {nbytes}"

    def _pull(self, order: Json) -> Json:
        """Some pulls in a row; their seconds, and this process's CPU."""
        pull, repeat = self._pulls[_key(order)], cast("int", order["repeat"])
        cpu_before_s, began_s = cpu_s(), time.perf_counter()
        for _ in range(repeat):
            pull()
        return {"seconds": time.perf_counter() - began_s, "cpu_s": cpu_s() - cpu_before_s}

    def _load(self, order: Json) -> Json:
        """Pulls for so many seconds."""
        pull, num_pulls = self._pulls[_key(order)], 0
        began_s = time.perf_counter()
        until_s = began_s + cast("float", order["for_s"])
        while time.perf_counter() < until_s:
            pull()
            num_pulls += 1
        return {"num_pulls": num_pulls, "seconds": time.perf_counter() - began_s}

    def _prepare_case(self, order: Json) -> Json:
        """Makes a request ready whose calls cost something beside their bytes, and verifies its bytes."""
        name, runs = str(order["name"]), _runs(order)
        cost_s, reader = cast("float", order["cost_s"]), cast("ReaderEnd", self._opened[name])
        if order["one_by_one"]:
            pulls, wait_s = [reader.prepare([run], None) for run in runs], cost_s
        else:
            pulls, wait_s = [reader.prepare(runs, None)], cost_s * cast("int", order["num_calls"])

        def request() -> None:
            for pull in pulls:
                _compute_for(wait_s)
                pull()

        for _, local, nbytes in runs:
            self._landing.bytes[local : local + nbytes] = _DAMAGE
        request()
        self._compare(name, runs)
        self._cases[str(order["case"])] = request
        return {}

    def _pull_case(self, case: str) -> Json:
        began_s = time.perf_counter()
        self._cases[case]()
        return {"seconds": time.perf_counter() - began_s}

    def _hold(self, order: Json) -> Json:
        """Requests through a small decode pool, by pull or by push."""
        reader = cast("TransportReader", self._opened[str(order["name"])])
        load = schedule.Load(**cast("dict[str, Any]", order["load"]))
        is_pull, size = bool(order["is_pull"]), load.request_nbytes

        async def move(source: int, target: int) -> None:
            here, there = (target, source) if is_pull else (source, target)
            await reader.move(Run(there * size, here * size, size), is_pull=is_pull)

        held = asyncio.run(schedule.run(load, move, is_pull=is_pull))
        return {
            "held": [(each.arrived_at_s, each.reserved_at_s, each.landed_at_s) for each in held]
        }

    def _join_late(self, order: Json) -> str:
        from snowskin.tools.bench.transfer.backends import gloo

        return gloo.join_late(cast("Offer", order["offer"]))

    def close(self) -> None:
        """Closes what was opened."""
        self._pulls.clear()
        self._cases.clear()
        for opened in self._opened.values():
            opened.close()
        if self._echo:
            self._echo.close()


def _runs(order: Json) -> list[Run]:
    return [Run(*run) for run in cast("list[tuple[int, int, int]]", order["runs"])]


def _compute_for(seconds: float) -> None:
    """Holds the core, as a call does that is being made; a sleep would be as long as a timer likes."""
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass


def _key(order: Json) -> tuple[str, str, bool]:
    return str(order["name"]), str(order["shape"]), bool(order["checked"])


def _answer_all(end: End, lines: TextIO, answers: TextIO) -> None:
    for line in lines:
        try:
            answer = end.carry_out(json.loads(line))
        except Exception as error:  # noqa: BLE001  whoever measures raises it, with the trace of here
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@contextlib.contextmanager
def _of_another_host() -> Iterator[None]:
    """A block that leaves the cores to others: the reader at full rate would be on another host's."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # then it stays so, which only costs it
            os.setpriority(os.PRIO_PROCESS, 0, niceness)


def main(text: str) -> None:
    """Runs one end until its orders end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = EndSpec(**json.loads(text))
    os.sched_setaffinity(0, spec.cores)
    if spec.network_of == -1:
        own_network(spec.congestion)
    elif spec.network_of:
        enter_network_of(spec.network_of)
    sys.path.extend(spec.paths)
    end = End(spec)
    with (
        socket.socket(fileno=spec.control_fd) as control,
        control.makefile("r") as lines,
        control.makefile("w") as answers,
    ):
        _answer_all(end, lines, answers)
    end.close()


if __name__ == "__main__":
    main(sys.argv[1])

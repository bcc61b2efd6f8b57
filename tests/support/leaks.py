"""The leak guard: a test that leaves something running, open or mapped behind fails, by name.

Rules kept here: what is compared is this process before and after one test, so fixtures of a wider
scope are no leak; garbage is collected and time is given (`GRACE_S`) only once something looks
left behind, so a clean test costs about a millisecond; whatever is exempt has its reason here.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from asyncio import runners
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_S = 5.0  # for what ends by itself: joined threads, sockets that a library closes in its own
POLL_S = 0.02
FD_KINDS = ("socket:", "pipe:", "/memfd:")
SHM = Path("/dev/shm")
# Names in /dev/shm belong to the host, not to us: only those that we or our libraries would make.
SHM_NAMES = ("snowskin", "psm_", "sem.mp-", "torch_")
# Threads that a library keeps for the life of the process, and that no test can end.
LIBRARY_THREADS = (
    "tqdm_monitor",  # transformers' progress bars
    "_poll_wrapper",  # grpc.aio's poller: one for all channels and servers, ends with the last
)
# Children of multiprocessing that live as long as the process that used it.
LIBRARY_CHILDREN = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

_cancel_all_tasks = runners._cancel_all_tasks  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What this process holds at one moment; each thing has a name that a person can look for."""

    threads: frozenset[str]
    files: frozenset[str]
    mappings: Counter[str] = field(default_factory=Counter)
    shm: frozenset[str]
    children: frozenset[str]

    def new_since(self, before: Snapshot) -> list[str]:
        """Everything that is here now and was not before."""
        new_mappings = self.mappings - before.mappings
        return [
            *(f"thread {name}" for name in sorted(self.threads - before.threads)),
            *(f"descriptor {name}" for name in _grown(self.files, before.files)),
            *(f"mapping of {name} ({n})" for name, n in sorted(new_mappings.items())),
            *(f"name /dev/shm/{name}" for name in sorted(self.shm - before.shm)),
            *(f"process {name}" for name in sorted(self.children - before.children)),
        ]


def _grown(now: frozenset[str], before: frozenset[str]) -> list[str]:
    """New descriptors of the kinds that became more: a library may replace one of its own."""
    new = sorted(now - before)

    def num(names: frozenset[str], kind: str) -> int:
        return sum(name.startswith(kind) for name in names)

    grown = {kind for kind in FD_KINDS if num(now, kind) > num(before, kind)}
    return [name for name in new if name.startswith(tuple(grown))] if grown else []


def take_snapshot() -> Snapshot:
    """Looks at this process; about half a millisecond, most of it for /proc/self/maps."""
    return Snapshot(
        threads=frozenset(_threads()),
        files=frozenset(_files()),
        mappings=Counter(_mappings()),
        shm=frozenset(_shm_names()),
        children=frozenset(_children()),
    )


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        target = getattr(getattr(thread, "_target", None), "__name__", "")
        if not f"{thread.name} {target}".endswith(LIBRARY_THREADS) and (
            thread.name not in LIBRARY_THREADS
        ):
            yield f"{thread.name} (id {thread.ident})"


def _files() -> Iterator[str]:
    # multiprocessing's pipe to its tracker, which stays as long as the tracker
    tracker_fd = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    for fd in os.listdir("/proc/self/fd"):
        if fd == str(tracker_fd):
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor that lists the folder
            continue
        if target.startswith(FD_KINDS):
            yield f"{target} (fd {fd})"


def _mappings() -> Iterator[str]:
    maps = Path("/proc/self/maps").read_bytes()
    if b"/memfd:" in maps:
        for line in maps.splitlines():
            if b"/memfd:" in line:
                yield line[line.index(b"/memfd:") :].decode(errors="replace")


def _shm_names() -> Iterator[str]:
    if SHM.is_dir():
        yield from (name for name in os.listdir(SHM) if name.startswith(SHM_NAMES))


def _children() -> Iterator[str]:
    for thread in os.listdir("/proc/self/task"):
        try:
            pids = Path(f"/proc/self/task/{thread}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread ended meanwhile
            continue
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if not any(name in command for name in LIBRARY_CHILDREN):
                shown = command.replace(b"\0", b" ").decode(errors="replace").strip()
                yield f"{pid} {shown[:120] or '(ended, never waited for)'}"


@contextmanager
def tasks_left_to_their_loop() -> Iterator[list[str]]:
    """Collects the tasks that a loop still had when its runner closed it.

    A runner cancels them silently, whether it is asyncio.run or pytest's, so this is the one place
    where a task that nobody awaited can be seen.
    """
    found: list[str] = []
    outer = runners._cancel_all_tasks  # type: ignore[attr-defined]

    def note_and_cancel(loop: asyncio.AbstractEventLoop) -> None:
        # A call of gRPC's that was cancelled hears of its end a moment later, in a task of gRPC's own.
        if of_grpc := [task for task in asyncio.all_tasks(loop) if _is_of_grpc(task)]:
            loop.run_until_complete(asyncio.wait(of_grpc, timeout=GRACE_S))
        found.extend(f"task {task!r}" for task in asyncio.all_tasks(loop))
        _cancel_all_tasks(loop)  # the innermost guard alone reports

    runners._cancel_all_tasks = note_and_cancel  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        runners._cancel_all_tasks = outer  # type: ignore[attr-defined]


def _is_of_grpc(task: asyncio.Task[object]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").startswith("_AioCall.")


def settle(before: Snapshot, *, grace_s: float = GRACE_S) -> list[str]:
    """What is still new after garbage was collected and `grace_s` seconds went by."""
    left = take_snapshot().new_since(before)
    if not left:
        return []
    gc.collect()
    deadline_s = time.monotonic() + grace_s
    while left := take_snapshot().new_since(before):
        if time.monotonic() > deadline_s:
            return left
        time.sleep(POLL_S)  # the one sleep of the tests: there is no event for "all is gone"
    return []


@contextmanager
def leak_guard(*, grace_s: float = GRACE_S) -> Iterator[None]:
    """Fails with AssertionError if the block leaves something behind.

    Nothing is looked at where the block itself raised: its traceback keeps things alive.
    """
    before = take_snapshot()
    with tasks_left_to_their_loop() as tasks:
        yield
        left = [*tasks, *settle(before, grace_s=grace_s)]
    assert not left, "left behind: " + "; ".join(left)

"""A store node of its own process, for benchmarks that measure what clients of it see."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


class NodeNotReady(SnowskinError):
    """The node did not come up."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProcess:
    """Where a running node listens."""

    door: str
    address: str
    pid: int


@contextmanager
def store_process(*, dram_nbytes: int, like: StoreProcess | None = None) -> Iterator[StoreProcess]:
    """A node on loopback with a pool of `dram_nbytes`; gone when the block is left.

    With `like` it listens where that one listened, which is dead.
    """
    with tempfile.TemporaryDirectory(prefix="snowskin-") as folder:
        ready_fd, child_fd = os.pipe()
        command = [sys.executable, "-P", "-m", "snowskin.tools.cluster.main", "node"]
        flags = {
            "--door": like.door.removeprefix("unix:") if like else str(Path(folder) / "door"),
            "--port": like.address.rpartition(":")[2] if like else "0",
            "--dram-nbytes": str(dram_nbytes),
            "--ready-fd": str(child_fd),
            "--parent-pid": str(os.getpid()),
            "--log-level": "warning",
        }
        command += [part for flag in flags.items() for part in flag]
        try:
            process = subprocess.Popen(command, pass_fds=[child_fd])
        finally:
            os.close(child_fd)
        try:
            yield _wait_ready(ready_fd, process)
        finally:
            os.close(ready_fd)
            process.send_signal(signal.SIGCONT)  # where a benchmark has stopped it
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(ready_fd: int, process: subprocess.Popen[bytes]) -> StoreProcess:
    readable, _, _ = select.select([ready_fd], [], [], READY_TIMEOUT_S)
    line = os.read(ready_fd, 1 << 16) if readable else b""
    if not line:
        raise NodeNotReady(
            f"the store node was not ready after {READY_TIMEOUT_S:.0f} s (exit status {process.poll()})",
            hint="its own message stands above",
        )
    facts = json.loads(line)
    return StoreProcess(door=facts["door"], address=facts["address"], pid=process.pid)

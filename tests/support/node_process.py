"""A node in a process of its own: started with options, killed, stopped, started again on the same door.

Run as a module it *is* that process: `python -m tests.support.node_process '{"dram_nbytes": 1048576}'`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from snowskin.kvstore.client.blocking import BlockingStoreClient
from snowskin.kvstore.messages import Access, NodeStat
from snowskin.kvstore.node.daemon import NodeSettings, serve_node
from snowskin.kvstore.role import run_role
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
END_S = 10.0
# What a client can leave behind in a node; gRPC's pollers open events and pipes of their own when they like.
CLIENTS_FDS = ("socket:", "/memfd:")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What must be as it was once everybody is gone; descriptors may be fewer, never more."""

    free_nbytes: int
    reserved_nbytes: int
    quarantined_nbytes: int
    leased_nbytes: int
    num_read_leases: int
    num_write_leases: int
    num_waiting: int
    num_sessions: int
    num_fds: int


@dataclass
class NodeProcess:
    """One node; `with` ends it."""

    settings: dict
    process: subprocess.Popen | None = None
    facts: dict = field(default_factory=dict)

    def start(self) -> NodeProcess:
        """Returns when the node serves."""
        reader, writer = os.pipe()
        arguments = json.dumps({**self.settings, "ready_fd": writer, "parent_pid": os.getpid()})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.node_process", arguments],
                cwd=ROOT,
                pass_fds=[writer],
            )
        finally:
            os.close(writer)
        with os.fdopen(reader) as ready:
            line = ready.readline()  # the test's own timeout bounds it
        assert line, f"the node ended with status {self.process.wait(END_S)}"
        self.facts = json.loads(line)
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def door(self) -> str:
        return str(self.facts["door"])

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash: nothing is drained or removed."""
        self.process.kill()
        self.process.wait(END_S)

    def restart(self) -> None:
        """A new life behind the same door and port."""
        self.settings |= {
            "door": self.door.removeprefix("unix:"),
            "port": int(self.address.rpartition(":")[2]),
        }
        self.start()

    def end(self) -> int:
        """Asks for the end and returns the exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        return self.process.wait(END_S)

    def stat(self) -> NodeStat:
        """Asks by a session of its own, so that no other client is needed."""
        with BlockingStoreClient.connect(
            self.door, client_name="observer", access=Access.READ
        ) as client:
            return client.stat()

    def held(self) -> Held:
        """What the node holds now."""
        stat = self.stat()
        (pool,) = stat.pools
        return Held(
            free_nbytes=pool.free_nbytes,
            reserved_nbytes=pool.reserved_nbytes,
            quarantined_nbytes=pool.quarantined_nbytes,
            leased_nbytes=pool.leased_nbytes,
            num_read_leases=stat.num_read_leases,
            num_write_leases=stat.num_write_leases,
            num_waiting=stat.num_waiting_matches + stat.num_waiting_reserves,
            num_sessions=stat.num_sessions,
            num_fds=sum(target.startswith(CLIENTS_FDS) for target in self.files()),
        )

    def files(self) -> list[str]:
        """What the node's open descriptors stand for."""
        found = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(entry))
        return found

    def settles_at(self, before: Held, within_s: float = 10.0) -> None:
        """Fails unless the node comes to hold again what it held before.

        gRPC closes a channel's connection once nothing refers to its calls any more, and an error that a test
        caught refers to its call, in a circle.
        """
        gc.collect()
        seen = [before]

        def is_back() -> bool:
            now = self.held()
            seen.append(now)
            mine, old = vars(now) | {"num_fds": 0}, vars(before) | {"num_fds": 0}
            return mine == old and now.num_fds <= before.num_fds

        try:
            eventually(is_back, within_s)
        except AssertionError:
            raise AssertionError(f"the node holds {seen[-1]}, before it held {before}") from None

    def __enter__(self) -> NodeProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        # A killed node cannot remove its door; the folder of a private one is its own.
        path = Path(self.door.removeprefix("unix:"))
        path.unlink(missing_ok=True)
        if not self.settings.get("door"):
            with contextlib.suppress(OSError):
                path.parent.rmdir()


if __name__ == "__main__":
    sys.exit(run_role("node", NodeSettings(**json.loads(sys.argv[1])), serve_node))

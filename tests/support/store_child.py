"""A store client in a process of its own that stops itself in the middle of a copy: for who would kill or thaw it.

Run as a module it *is* that process: one publish or one pull, its outcome as a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from snowskin.kvstore.checksum import RunningChecksums
from snowskin.kvstore.client import machine
from snowskin.transport.errors import SnowskinError
from tests.support.store_drivers import connected, keys_of, namespace_of, noise

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the child does: blocks and bytes follow from the seed."""

    do: str  # publish or pull
    address: str
    driver: str = "blocking"
    seed: int
    num_blocks: int
    block_nbytes: int
    stop_after: int = 0  # pieces copied, then SIGSTOP; 0 does not stop
    verify: bool = True

    @property
    def keys(self):
        return keys_of(self.seed, self.num_blocks)

    @property
    def data(self):
        return noise(self.seed, self.num_blocks * self.block_nbytes)

    @property
    def call(self):
        """Arguments that publish and pull share."""
        nbytes = self.num_blocks * self.block_nbytes
        return {
            "namespace": namespace_of(self.block_nbytes),
            "keys": self.keys,
            "block_nbytes": self.block_nbytes,
            # A list: blocks that may lie anywhere move one by one, so each is a piece.
            "local_offsets": list(range(0, nbytes, self.block_nbytes)),
        }


class StoreChild:
    """The child, started; `with` ends it."""

    def __init__(self, task: Task) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.store_child", json.dumps(asdict(task))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_stopped(self) -> None:
        """Returns once it has stopped itself; the test's own timeout bounds it."""
        seen = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert seen.si_code == os.CLD_STOPPED, "it ended and did not stop"

    def thaw(self) -> dict:
        """Lets it go on; its outcome."""
        self.process.send_signal(signal.SIGCONT)
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        outcome: dict = json.loads(output)
        return outcome

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def __enter__(self) -> StoreChild:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        self.process.stdout.close()


class StoppingChecksums(RunningChecksums):
    """Stops the process once a number of pieces has passed."""

    stop_after = 0

    def landed(self, offset: int, nbytes: int) -> None:
        super().landed(offset, nbytes)
        StoppingChecksums.stop_after -= 1
        if StoppingChecksums.stop_after == 0:
            # To this very thread, which may be a worker: sent to the process, it might copy on for a while.
            signal.raise_signal(signal.SIGSTOP)


def stop_in_unverified_copies() -> None:
    """A pull that does not verify tells nobody of its pieces: ask for it, and stop there."""
    real = machine.Move

    def move(is_push, lease, runs, local, landed, *rest):
        landed = landed or StoppingChecksums(local.buffer, 1 << 60).landed
        return real(is_push, lease, runs, local, landed, *rest)

    setattr(machine, "Move", move)  # noqa: B010  a function in place of a class


def outcome_of(task: Task) -> dict:
    """Does it; says what came of it, and whether every block that is called good is the right one."""
    StoppingChecksums.stop_after = task.stop_after
    setattr(machine, "RunningChecksums", StoppingChecksums)  # noqa: B010  imported there, not exported
    if not task.verify:
        stop_in_unverified_copies()
    landing = task.data if task.do == "publish" else np.zeros_like(task.data)
    try:
        with connected(
            task.driver,
            task.address,
            client_name=f"child-{task.do}-{task.seed}",
            verify=task.verify,
        ) as client:
            result = getattr(client, task.do)(**task.call, local=client.register(landing))
    except SnowskinError as error:
        return {"error": error.reason}
    good_nbytes = result.num_blocks * task.block_nbytes
    return {
        "num_blocks": result.num_blocks,
        "corrupt_blocks": list(getattr(result, "corrupt_blocks", ())),
        "right": bool((landing[:good_nbytes] == task.data[:good_nbytes]).all()),
    }


if __name__ == "__main__":
    print(json.dumps(outcome_of(Task(**json.loads(sys.argv[1])))))

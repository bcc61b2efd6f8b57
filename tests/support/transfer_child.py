"""One side of a transfer in a process of its own, to be killed, stopped, cut off and looked into from outside.

Rules kept here: the memory is the test's (`TestMemory`), so it can be looked at after its process was killed; every
byte that was not granted is a canary, which no granted byte can be taken for; a child ends when its standard input
does, and so with the test; what it says is one line of JSON for each command, errors included.

Run as a module it *is* that process: a transport of any scheme, told what to do by lines of JSON (`COMMANDS`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snowskin.transport.api import RegionDescriptor, Run
from snowskin.transport.errors import SnowskinError
from snowskin.transport.memory import Memfd
from snowskin.transport.registry import open_transport
from snowskin.transport.shm import ShmTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 10.0
END_S = 5.0
PERIOD = 1_048_573
FIRST_CANARY = 0x80  # pattern bytes are below, canaries are not
PR_SET_PDEATHSIG = 1


class TestMemory:
    """A sealed memfd that the test maps: a seeded pattern where granted, canaries elsewhere; `with` frees it."""

    __test__ = False

    def __init__(
        self, nbytes: int, *, granted: Iterable[tuple[int, int]] = (), seed: int = 0
    ) -> None:
        self.nbytes = nbytes
        # Its length is a prime: what lands at a wrong place is wrong.
        self._plain = np.random.default_rng(seed).integers(0, FIRST_CANARY, PERIOD, dtype=np.uint8)
        self.granted = [tuple(each) for each in granted]
        self.fd = os.memfd_create("snowskin-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, nbytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, nbytes)
        self.array = np.frombuffer(self._map, dtype=np.uint8)
        self.fill()

    def fill(self) -> None:
        """Everything as in the beginning."""
        self.array[:] = self._canaries()
        for offset, nbytes in self.granted:
            self.array[offset : offset + nbytes] = self.pattern(offset, nbytes)

    def pattern(self, offset: int, nbytes: int) -> np.ndarray:
        """The bytes that are granted at `offset`, were all granted."""
        return np.resize(np.roll(self._plain, -offset), nbytes)

    @property
    def canaries_are_intact(self) -> bool:
        """Whether nobody wrote where nothing was granted."""
        found, wanted = self.array.copy(), self._canaries()
        for offset, nbytes in self.granted:
            found[offset : offset + nbytes] = wanted[offset : offset + nbytes] = 0
        return bool(np.array_equal(found, wanted))

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        return self.array[offset : offset + nbytes].tobytes()

    def _canaries(self) -> np.ndarray:
        return np.resize(self._plain | FIRST_CANARY, self.nbytes)

    def __enter__(self) -> TestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.array = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # a failed test's traceback may still hold a view
            self._map.close()
        os.close(self.fd)


def has_canaries(data: bytes) -> bool:
    """Whether any byte is one that was not granted."""
    return bool((np.frombuffer(data, np.uint8) >= FIRST_CANARY).any())


class TransferChild:
    """The child, started; `with` ends it."""

    def __init__(
        self,
        scheme: str,
        memory: TestMemory,
        *,
        command: Callable[..., list[str]] = lambda *arguments: list(arguments),
        lent: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        """`command` puts it into a host; `lent` are descriptors that it gets beside its own memory's."""
        task = {"scheme": scheme, "fd": memory.fd, "settings": settings}
        self._rest = b""
        self._num_asked = 0
        self.process = subprocess.Popen(
            command(sys.executable, "-m", "tests.support.transfer_child", json.dumps(task)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[memory.fd, *lent],
        )
        self.facts = self.answer()
        assert "error" not in self.facts, self.facts
        self.pid = self._inner_pid()

    def ask(self, do: str, *, patience_s: float = PATIENCE_S, **values: Any) -> dict[str, Any]:
        """Tells it to do something; its answer."""
        self.begin(do, **values)
        return self.answer(patience_s)

    def begin(self, do: str, **values: Any) -> None:
        """Tells it to do something; `answer` waits for what comes of it."""
        self._num_asked += 1
        line = json.dumps({"do": do, "number": self._num_asked, **values})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """What it says to what it was told last; AssertionError where it says nothing or has ended."""
        deadline_s = time.monotonic() + patience_s
        while True:
            answer: dict[str, Any] = json.loads(self._line(deadline_s))
            if answer.pop("number") == self._num_asked:  # else of a test that waited no longer
                return answer

    def _line(self, deadline_s: float) -> bytes:
        output = self.process.stdout
        assert output is not None
        while b"\n" not in self._rest:
            wait_s = max(deadline_s - time.monotonic(), 0)
            ready, _, _ = select.select([output], [], [], wait_s)
            assert ready, "no answer in time"
            data = os.read(output.fileno(), 1 << 20)
            assert data, f"it ended with status {self.process.wait(END_S)}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def describe(self, **values: Any) -> RegionDescriptor:
        """Grants; `ranges` as pairs."""
        answer = self.ask("describe", **values)
        assert "error" not in answer, answer
        return RegionDescriptor.from_bytes(bytes.fromhex(answer["descriptor"]))

    def attach(self, descriptor: RegionDescriptor, **values: Any) -> int:
        """The number of the region, for `pull` and `push`."""
        answer = self.ask("attach", descriptor=descriptor.to_bytes().hex(), **values)
        assert "error" not in answer, answer
        return int(answer["region"])

    def statistics(self) -> dict[str, Any]:
        """All of `TransportStatistics`; refusals by reason as a dictionary."""
        found = self.ask("statistics")
        found["refused_by_reason"] = dict(found["refused_by_reason"])
        return found

    def stop(self) -> None:
        """SIGSTOP, and returns once it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Returns once it stands, whoever stopped it; the test's own time-out bounds it."""
        while self._status("State").split()[0] != "T":
            time.sleep(0.001)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(END_S)

    def sockets(self) -> int:
        """How many sockets it has open, as the kernel says."""
        found = 0
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(entry).startswith("socket:")
        return found

    def threads(self) -> int:
        return int(self._status("Threads"))

    def resident_nbytes(self) -> int:
        return int(self._status("VmRSS").split()[0]) * 1024

    def mappings(self) -> int:
        """How many memfds are mapped."""
        return Path(f"/proc/{self.pid}/maps").read_text().count("/memfd:")

    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, name: str) -> str:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
        raise KeyError(name)

    def _inner_pid(self) -> int:
        """In our PID namespace; `unshare` in front of it forks."""
        pid = self.process.pid
        if int(self.facts["pid"]) == pid:
            return pid
        (inner,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(inner)

    def __enter__(self) -> TransferChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


class Side:
    """What the child has, and the commands that it knows: its public methods."""

    def __init__(self, scheme: str, fd: int, settings: dict[str, Any]) -> None:
        self._transport = open_transport(scheme, **settings)
        self._local = self._transport.register(Memfd(fd=fd))
        self._granted: dict[str, RegionDescriptor] = {}
        self._attached: dict[int, Any] = {}
        self._completions: list[dict[str, Any]] = []

    def describe(self, *, notify: bool = False, **values: Any) -> dict[str, Any]:
        if values.get("ranges") is not None:
            values["ranges"] = [tuple(each) for each in values["ranges"]]
        done = self._note if notify else None
        descriptor = self._transport.describe(self._local, on_done=done, **values)
        text = descriptor.to_bytes().hex()
        self._granted[text] = descriptor
        return {"descriptor": text}

    def renew(self, *, descriptor: str, expires_in_s: float) -> dict[str, Any]:
        self._transport.renew(self._granted[descriptor], expires_in_s=expires_in_s)
        return {}

    def pass_link(self, *, descriptor: str, over: int) -> dict[str, Any]:
        """Sends the peer's end of a grant's link over a socket that it was lent; `shm` alone has links."""
        assert isinstance(self._transport, ShmTransport)
        link_fd = self._transport.link(self._granted[descriptor])
        with socket.socket(fileno=os.dup(over)) as channel:
            socket.send_fds(channel, [b"L"], [link_fd])
        os.close(link_fd)
        return {}

    def revoke(self, *, descriptor: str) -> dict[str, Any]:
        self._transport.revoke(self._granted[descriptor])
        return {}

    def attach(self, *, descriptor: str, **values: Any) -> dict[str, Any]:
        parsed = RegionDescriptor.from_bytes(bytes.fromhex(descriptor))
        number = len(self._attached)
        self._attached[number] = self._transport.attach(parsed, **values)
        return {"region": number}

    def detach(self, *, region: int) -> dict[str, Any]:
        self._attached[region].close()
        return {}

    def pull(self, *, region: int, **values: Any) -> dict[str, Any]:
        return self._move(self._transport.pull, self._attached[region], self._local, **values)

    def push(self, *, region: int, **values: Any) -> dict[str, Any]:
        return self._move(self._transport.push, self._local, self._attached[region], **values)

    def statistics(self) -> dict[str, Any]:
        return asdict(self._transport.statistics())

    def completions(self) -> dict[str, Any]:
        return {"completions": self._completions}

    def close_region(self) -> dict[str, Any]:
        self._local.close()
        return {}

    def close(self) -> dict[str, Any]:
        self._transport.close()
        return {}

    def _move(
        self,
        move: Any,
        source: Any,
        target: Any,
        *,
        runs: Sequence[Sequence[int]],
        within_s: float,
        note: str = "",
        stop_after: int = 0,
        num_times: int = 1,
        **values: Any,
    ) -> dict[str, Any]:
        num_landed = 0

        def landed(_offset: int, _nbytes: int) -> None:
            nonlocal num_landed
            num_landed += 1
            if num_landed == stop_after:
                os.kill(os.getpid(), signal.SIGSTOP)

        if stop_after:
            values["landed"] = landed
        if note:
            values["note"] = note.encode()
        reports = [
            move(
                source,
                target,
                [Run(*run) for run in runs],
                deadline_s=time.monotonic() + within_s,
                **values,
            )
            for _ in range(num_times)
        ]
        return {
            "nbytes": sum(report.nbytes for report in reports),
            "seconds": [report.seconds for report in reports],
        }

    def _note(self, completion: Any) -> None:
        self._completions.append(
            {
                "nbytes": completion.nbytes,
                "is_push": completion.is_push,
                "note": completion.note.decode("latin-1"),
            }
        )


COMMANDS = [name for name in vars(Side) if not name.startswith("_")]


def main(task: dict[str, Any]) -> None:
    """Obeys until standard input ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    side = Side(task["scheme"], task["fd"], task["settings"])
    say({"pid": os.getpid(), "number": 0})
    for line in sys.stdin:
        values = json.loads(line)
        do, number = values.pop("do"), values.pop("number")
        assert do in COMMANDS, do
        began_s = time.monotonic()
        try:
            answer = getattr(side, do)(**values)
        except SnowskinError as error:
            answer = {"error": error.reason, "message": str(error)}
        say({**answer, "number": number, "took_s": time.monotonic() - began_s})
    side.close()


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

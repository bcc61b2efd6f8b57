"""One run of one child process, from its start to its exit status.

Rules kept here: never fork, always exec. Starting is one synchronous step, so that no cancellation can fall between
the start and the note of the pid. The exit is seen through a pidfd, so that no other process that later gets the same
pid is ever signalled. A child has its own process group: Ctrl-C in a terminal reaches the supervisor alone, which
stops the children in its order. Every descriptor that is opened here is closed when the run is over.

A child says that it serves by one JSON line on the pipe whose number it gets as `--ready-fd`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snowskin.tools.cluster.errors import ChildFailed, ChildRefused

MAX_READY_NBYTES = 64 << 10
NUM_TAIL_LINES = 20
MAX_LINE_NBYTES = 16 << 10
EXIT_REFUSED = 2  # as every role's process ends where its settings cannot work
_READ_NBYTES = 64 << 10

Forward = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a role says about itself when it serves; empty where it has no such thing.

    Attributes:
        address: `host:port` of its gRPC.
        http_address: `host:port` of its HTTP.
        door: `unix:PATH` of its local door.
    """

    role: str = ""
    id: str = ""
    address: str = ""
    http_address: str = ""
    door: str = ""
    pid: int = 0

    @classmethod
    def parse(cls, line: bytes) -> Ready:
        """Reads the line; facts of a newer role are skipped.

        Raises:
            ChildFailed: it is not a JSON object.
        """
        try:
            facts = json.loads(line)
        except ValueError as error:
            raise ChildFailed(f"the ready line is not JSON: {line[:100]!r}") from error
        if not isinstance(facts, dict):
            raise ChildFailed(f"the ready line is not a JSON object: {line[:100]!r}")
        known = {name: facts[name] for name in cls.__slots__ if name in facts}
        return cls(**known)


def describe_exit(status: int) -> str:
    """An exit status in words: `exit status 2`, `killed by SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class Child:
    """A started process; `exited` and `ready` are futures of the loop that started it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path | None,
        forward: Forward | None = None,
    ) -> None:
        """Starts the process.

        Args:
            name: for messages.
            command: argument list; `--ready-fd N` is appended.
            environment: the whole environment of the child.
            log_path: file to which its output is appended; used where `forward` is not given.
            forward: gets each line of its output instead.
        """
        self._loop = asyncio.get_running_loop()
        self.name = name
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self.ready: asyncio.Future[Ready | None] = self._loop.create_future()
        self.ready_at_s: float | None = None
        self._forward = forward
        self._log_path = log_path
        self._tail: deque[str] = deque(maxlen=NUM_TAIL_LINES)
        self._ready_line = b""
        self._partial_line = b""
        self._output_fd = -1
        self._start(command, environment)

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        opened: list[int] = []  # what only the child keeps
        ready_fd, child_ready_fd = os.pipe()
        opened.append(child_ready_fd)
        try:
            if self._forward is None:
                path = self._log_path or Path(os.devnull)
                output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            else:
                self._output_fd, output = os.pipe()
            opened.append(output)
            self._process = subprocess.Popen(
                [*command, "--ready-fd", str(child_ready_fd)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(child_ready_fd,),
                env=dict(environment),
                process_group=0,
            )
        except BaseException:
            os.close(ready_fd)
            if self._output_fd >= 0:
                os.close(self._output_fd)
            raise
        finally:
            for fd in opened:
                os.close(fd)
        self.pid = self._process.pid
        self._pid_fd = os.pidfd_open(self.pid)
        self._ready_fd = ready_fd
        os.set_blocking(ready_fd, False)
        self._loop.add_reader(ready_fd, self._on_ready_readable)
        self._loop.add_reader(self._pid_fd, self._on_exit)
        if self._output_fd >= 0:
            os.set_blocking(self._output_fd, False)
            self._loop.add_reader(self._output_fd, self._on_output)

    # --- what the loop brings

    def _on_ready_readable(self) -> None:
        try:
            data = os.read(self._ready_fd, MAX_READY_NBYTES)
        except BlockingIOError:
            return
        self._ready_line += data
        if data and b"\n" not in self._ready_line and len(self._ready_line) < MAX_READY_NBYTES:
            return
        self._close_ready()

    def _close_ready(self) -> None:
        if self._ready_fd < 0:
            return
        self._loop.remove_reader(self._ready_fd)
        os.close(self._ready_fd)
        self._ready_fd = -1
        if self.ready.done():
            return
        line, newline, _ = self._ready_line.partition(b"\n")
        try:
            facts = Ready.parse(line) if newline else None
        except ChildFailed as error:
            self._note(str(error))
            facts = None
        if facts is not None:
            self.ready_at_s = self._loop.time()
        self.ready.set_result(facts)

    def _on_output(self) -> None:
        self._read_output()

    def _read_output(self) -> bool:
        """Takes what the pipe holds; False where it is empty for now or ended."""
        try:
            data = os.read(self._output_fd, _READ_NBYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_output()
            return False
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if len(self._partial_line) > MAX_LINE_NBYTES:
            lines.append(self._partial_line)
            self._partial_line = b""
        for line in lines:
            self._note(line.decode(errors="replace"))
        return True

    def _close_output(self) -> None:
        if self._output_fd < 0:
            return
        self._loop.remove_reader(self._output_fd)
        os.close(self._output_fd)
        self._output_fd = -1
        if self._partial_line:
            self._note(self._partial_line.decode(errors="replace"))
            self._partial_line = b""

    def _note(self, line: str) -> None:
        self._tail.append(line)
        if self._forward is not None:
            self._forward(line)

    def _on_exit(self) -> None:
        status = self._process.poll()
        if status is None:
            return
        self._loop.remove_reader(self._pid_fd)
        os.close(self._pid_fd)
        if self._ready_fd >= 0:  # a last line may still be in the pipe
            self._on_ready_readable()
            self._close_ready()
        while self._output_fd >= 0 and self._read_output():
            pass
        self._close_output()  # even if somebody else still holds the other end
        self.exited.set_result(status)

    # --- what the supervisor asks

    @property
    def running(self) -> bool:
        """Whether the process has not been reaped."""
        return not self.exited.done()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens where the process is gone."""
        if self.running:
            try:
                signal.pidfd_send_signal(self._pid_fd, number)
            except ProcessLookupError:
                return

    def tail(self) -> list[str]:
        """The last lines of the output, at most `NUM_TAIL_LINES`."""
        if self._forward is not None or self._log_path is None:
            return list(self._tail)
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_NBYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        return [*lines, *self._tail][-NUM_TAIL_LINES:]

    async def wait_ready(self, *, timeout_s: float) -> Ready:
        """Waits for the ready line.

        Raises:
            ChildRefused: it exited because its settings cannot work.
            ChildFailed: it exited, closed the pipe without a line, or said nothing for `timeout_s`.
        """
        await asyncio.wait(
            (self.ready, self.exited), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self.ready.done() and (facts := self.ready.result()) is not None:
            return facts
        if self.ready.done() and self.running:  # the pipe's end comes just before the exit
            await asyncio.wait((self.exited,), timeout=1.0)
        if self.exited.done():
            what = f"ended before it was ready: {describe_exit(self.exited.result())}"
        elif self.ready.done():
            what = "closed its ready pipe without a word"
        else:
            what = f"said nothing for {timeout_s:.0f} s"
        tail = "".join(f"\n    {line}" for line in self.tail())
        refused = self.exited.done() and self.exited.result() == EXIT_REFUSED
        raise (ChildRefused if refused else ChildFailed)(f"{self.name} {what}{tail}")

    async def stop(self, *, drain_s: float, hurry: asyncio.Future[None]) -> int:
        """Ends the process: SIGTERM, and SIGKILL after `drain_s` or as soon as `hurry` is done.

        Returns:
            Its exit status, negative for a signal.
        """
        if self.running and not hurry.done():
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)  # a stopped process would take SIGTERM only when continued
            await asyncio.wait(
                (self.exited, hurry), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED
            )
        self.send(signal.SIGKILL)
        return await asyncio.shield(self.exited)

"""What every role's process does: start, say that it is ready, drain on a signal, end with a clear line.

Rules kept here: SIGTERM and the first Ctrl-C ask for a drain, the second ends the process at once. A role that was
started by a supervisor dies with it. An error that a user can act on is one line on stderr, never a traceback.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import uvloop

from snowskin.kvstore.config import LogLevel, check_bind, setting
from snowskin.kvstore.errors import BadRequest, BadSetting
from snowskin.kvstore.span_export import open_tracer
from snowskin.kvstore.telemetry import configure_logging, get_logger
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    from snowskin.kvstore.tracing import Tracer

MAX_PORT = 65_535
_PR_SET_PDEATHSIG = 1

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoleSettings:
    """Settings that every role has."""

    host: str = setting("127.0.0.1", help="Address to listen on.")
    port: int = setting(0, help="gRPC port; 0 takes a free one.")
    http_port: int = setting(0, help="HTTP port of /healthz and /metrics; 0 takes a free one.")
    insecure: bool = setting(False, help="Allow an address beyond loopback without credentials.")
    ready_fd: int = setting(-1, help="Write one JSON line here when serving; for supervisors.")
    parent_pid: int = setting(0, help="Stop when this process is gone; for supervisors.")
    log_level: LogLevel = setting("info", help="Least level that is logged.")
    log_json: bool = setting(False, help="Log JSON lines.")
    drain_s: float = setting(10.0, help="Seconds that running work gets after SIGTERM.")
    trace_endpoint: str = setting(
        "", help="Send spans to this collector, http://host:port, by OTLP over gRPC."
    )
    trace_file: str = setting("", help="Append spans to this file, one JSON object a line.")

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is opened.

        Raises:
            BadSetting: a value is out of its range.
            InsecureAddress: beyond loopback without `insecure`.
        """
        check_bind(self.host, insecure=self.insecure)
        for name in ("port", "http_port"):
            # Not left to the system: 70000 would be port 4464 to it.
            if not 0 <= getattr(self, name) <= MAX_PORT:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint=f"give 0 to {MAX_PORT}")
        if self.drain_s < 0:
            raise BadSetting(f"drain_s is {self.drain_s}", hint="give 0 seconds or more")


def tracer_of(
    settings: RoleSettings, *, role: str, instance_id: str, ratio: float = 1.0
) -> AbstractContextManager[Tracer | None]:
    """The tracer that the settings ask for, as `open_tracer`."""
    return open_tracer(
        role=role,
        instance_id=instance_id,
        endpoint=settings.trace_endpoint,
        file=settings.trace_file,
        ratio=ratio,
    )


_SettingsT = TypeVar("_SettingsT", bound=RoleSettings)


class Stop:
    """Set once, when the process is to drain and end."""

    def __init__(self) -> None:
        """Unset."""
        self._event = asyncio.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        """Asks for the end; the first reason is kept."""
        self.reason = self.reason or reason
        self._event.set()

    def is_set(self) -> bool:
        """Whether the end was asked for."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Returns once the end was asked for."""
        await self._event.wait()


def announce_ready(settings: RoleSettings, **facts: str | int) -> None:
    """Tells the supervisor (and the log) where this role listens; once, when it serves."""
    log.info("ready", **facts)
    if settings.ready_fd < 0:
        return
    line = json.dumps({**facts, "pid": os.getpid()}) + "\n"
    try:
        os.write(settings.ready_fd, line.encode())
        os.close(settings.ready_fd)
    except OSError as error:
        log.warning("supervisor not told", fd=settings.ready_fd, error=str(error))


def _die_with(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise BadSetting(f"parent_pid: prctl failed with errno {ctypes.get_errno()}")
    if os.getppid() != parent_pid:  # it died before we asked
        sys.exit(1)


def _handle_signals(stop: Stop) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(130)
        stop.set(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def run_role(
    role: str, settings: _SettingsT, serve: Callable[[_SettingsT, Stop], Awaitable[None]]
) -> int:
    """Runs `serve(settings, stop)` to its end.

    Returns:
        The exit status: 0 drained, 1 failed at run time, 2 settings that cannot work.
    """
    configure_logging(role, settings.log_level, json=settings.log_json)
    if settings.parent_pid:
        _die_with(settings.parent_pid)

    async def main() -> None:
        stop = Stop()
        _handle_signals(stop)
        await serve(settings, stop)
        log.info("stopped", reason=stop.reason or "done")

    # What importing made stays to the end: the collector need not walk it again, in the middle of a call.
    gc.freeze()
    try:
        uvloop.run(main())
    except SnowskinError as error:
        print(f"snowskin {role}: {error}", file=sys.stderr)  # noqa: T201  the one line for the user
        settings_wrong = isinstance(error, BadSetting | BadRequest) or error.status in (
            "FAILED_PRECONDITION",
            "NOT_FOUND",
            "INVALID_ARGUMENT",
        )
        return 2 if settings_wrong else 1
    return 0

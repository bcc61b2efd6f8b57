"""A compose file run without containers: the same commands with the same flags, as plain processes.

Rules kept here: what the file says is used, not what it ought to say: entry point and health check of the image come
from the Dockerfile, commands, environment, volumes and order from the compose file. Stand-ins: each service has a
loopback address of its own, so that its ports are those in the file; 0.0.0.0, its own 127.0.0.1 and the services' names
become that address; each volume is a folder, and paths below its mount point lie there; a path below no mount point
is an error, because the root is read-only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<how>[-+])(?P<other>[^}]*))?\}")
PROGRAMS = {
    "python": [sys.executable],
    "snowskin": [sys.executable, "-m", "snowskin.tools.cluster.main"],
}
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "COVERAGE_PROCESS_START", "TMPDIR")
HEALTH_LOOK_S = 0.1
HEALTH_TIMEOUT_S = 30.0


def interpolate(value: Any, environment: dict[str, str]) -> Any:
    """Compose's variables, in every text of a parsed file."""
    if isinstance(value, dict):
        return {key: interpolate(each, environment) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, environment) for each in value]

    def replace(found: re.Match[str]) -> str:
        given = environment.get(found["name"], "")
        if found["how"] == "+":
            return str(found["other"]) if given else ""
        return given or found["other"] or ""

    return VARIABLE.sub(replace, value) if isinstance(value, str) else value


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Word and arguments of each instruction, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    words = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), " ".join(rest[0].split()) if rest else "") for word, *rest in words]


def last(found: list[tuple[str, str]], word: str) -> str:
    """The arguments of the last instruction `word`."""
    return next(rest for each, rest in reversed(found) if each == word)


def seconds(text: str) -> float:
    """A duration such as `1m30s`."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    return sum(
        float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|s|m|h)", text)
    )


@dataclass(kw_only=True)
class Service:
    """One service as a process.

    Attributes:
        mounts: container path to folder.
    """

    name: str
    spec: dict[str, Any]
    address: str
    mounts: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def needs(self) -> dict[str, str]:
        """Which service must be in what condition before this one starts."""
        return {name: each["condition"] for name, each in self.spec.get("depends_on", {}).items()}


class ComposeRun:
    """The services of a compose file; `with` stops them in order."""

    def __init__(
        self,
        root: Path,
        place: Path,
        environment: dict[str, str],
        *,
        leave_out: tuple[str, ...] = (),
    ) -> None:
        """Reads the file; nothing runs yet.

        Args:
            root: where docker-compose.yml and Dockerfile lie.
            place: an empty folder for volumes and logs.
            environment: the variables that whoever calls `docker compose` has set.
            leave_out: services whose image is not ours.
        """
        text = (root / "docker-compose.yml").read_text()
        self.file = interpolate(yaml.safe_load(text), environment)
        self.image = instructions((root / "Dockerfile").read_text())
        self.place = place
        network = f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}"
        self.services = {
            name: Service(name=name, spec=spec, address=f"{network}.{number}")
            for number, (name, spec) in enumerate(self.file["services"].items(), 1)
            if name not in leave_out
        }
        for service in self.services.values():
            service.mounts = self._mounts(service)

    # --- what the file says, for a process

    def _mounts(self, service: Service) -> dict[str, Path]:
        found = {}
        for volume in service.spec.get("volumes", ()):
            source, target, *_ = volume.split(":")
            is_named = source in self.file["volumes"]
            found[target] = self.place / "volumes" / source if is_named else Path(source)
            found[target].mkdir(parents=True, exist_ok=True)
        for target in service.spec.get("tmpfs", ()):
            found[target] = self.place / "tmpfs" / service.name
            found[target].mkdir(parents=True, exist_ok=True)
        return found

    def _local(self, service: Service, word: str) -> str:
        """A word of a command, with names, addresses and paths as they are here."""
        for name, other in self.services.items():
            word = re.sub(rf"(?<![\w.-]){name}(?=:\d)", other.address, word)
        word = re.sub(r"(?<![\d.])(?:0\.0\.0\.0|127\.0\.0\.1)(?![\d.])", service.address, word)
        if "://" in word:
            return word
        path = re.search(r"/.*", word)
        if path is None:
            return word
        for target in sorted(service.mounts, key=len, reverse=True):
            if path[0] == target or path[0].startswith(f"{target}/"):
                return word[: path.start()] + str(service.mounts[target]) + path[0][len(target) :]
        raise AssertionError(
            f"{service.name}: {path[0]} lies on no volume, and the root is read-only"
        )

    def command(self, service: Service) -> list[str]:
        """Entry point and command."""
        entrypoint = service.spec.get("entrypoint") or json.loads(last(self.image, "ENTRYPOINT"))
        return self._words(service, [*entrypoint, *service.spec.get("command", ())])

    def health_check(self, service: Service) -> list[str]:
        """The command of the service's health check, the image's where it has none of its own."""
        own = service.spec.get("healthcheck", {}).get("test")
        words = own or json.loads(last(self.image, "HEALTHCHECK").partition("CMD ")[2])
        return self._words(service, words[1:] if words[0] == "CMD" else words)

    def _words(self, service: Service, words: list[str]) -> list[str]:
        program, *rest = words
        return [*PROGRAMS[program], *(self._local(service, word) for word in rest)]

    def environment(self, service: Service) -> dict[str, str]:
        """What the service sees: the little that a process needs here, and what the file gives it."""
        kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        given = service.spec.get("environment", {})
        return {**kept, **{name: self._local(service, str(each)) for name, each in given.items()}}

    # --- life

    def __enter__(self) -> ComposeRun:
        """Starts everything, each service when what it needs is in its condition."""
        try:
            waiting = dict(self.services)
            deadline_s = time.monotonic() + HEALTH_TIMEOUT_S
            while waiting:
                assert time.monotonic() < deadline_s, f"not started: {', '.join(waiting)}"
                started = [
                    service
                    for service in waiting.values()
                    if all(self._is(name, state) for name, state in service.needs.items())
                ]
                for service in started:
                    self._start(waiting.pop(service.name))
                if not started:
                    time.sleep(HEALTH_LOOK_S)  # other processes have no event for us
        except BaseException:
            self._kill()
            raise
        return self

    def wait_healthy(self) -> None:
        """Waits as `docker compose up --wait` does."""
        deadline_s = time.monotonic() + HEALTH_TIMEOUT_S
        for service in self.services.values():
            while not self._is(service.name, "service_healthy"):
                assert time.monotonic() < deadline_s, (
                    f"{service.name} is not healthy: {self.log(service)}"
                )
                time.sleep(HEALTH_LOOK_S)

    def _is(self, name: str, condition: str) -> bool:
        service = self.services[name]
        process = service.process
        if process is None:
            return False
        ended = process.poll()
        if condition == "service_completed_successfully" or service.spec.get("restart") == "no":
            assert ended in (None, 0), f"{name} ended with {ended}: {self.log(service)}"
            return ended == 0
        assert ended is None, f"{name} ended with {ended}: {self.log(service)}"
        if condition == "service_started":
            return True
        check = subprocess.run(
            self.health_check(service),
            env=self.environment(service),
            capture_output=True,
            check=False,
        )
        return check.returncode == 0

    def _start(self, service: Service) -> None:
        with (self.place / f"{service.name}.log").open("wb") as log:
            service.process = subprocess.Popen(
                self.command(service),
                cwd=self.place,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, service: Service) -> str:
        """The last of what it said."""
        return (self.place / f"{service.name}.log").read_text(errors="replace")[-2000:]

    def stop(self) -> dict[str, tuple[int, float]]:
        """Stops each service when none that needs it runs; exit status and seconds of each."""
        ended: dict[str, tuple[int, float]] = {}
        order = list(self.services.values())
        while order:
            free = [
                service
                for service in order
                if not any(service.name in other.needs for other in order if other is not service)
            ]
            began_s = time.monotonic()
            for service in free:
                number = signal.Signals[service.spec.get("stop_signal", "SIGTERM")]
                if service.process is not None and service.process.poll() is None:
                    service.process.send_signal(number)
            for service in free:
                order.remove(service)
                if service.process is not None:
                    grace_s = seconds(service.spec["stop_grace_period"])
                    status = service.process.wait(grace_s)
                    ended[service.name] = (status, time.monotonic() - began_s)
        return ended

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _kill(self) -> None:
        for service in self.services.values():
            if service.process is not None:
                if service.process.poll() is None:
                    service.process.kill()
                service.process.wait()

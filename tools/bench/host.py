"""The host that a number was measured on: what a reader needs before comparing it with another.

Rules kept here: facts are read, never guessed: what cannot be read is said as "unknown"; no host
name, user or path, because results are committed.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("snowskin", "torch", "numpy", "grpcio", "protobuf", "uvloop", "fastcrc")
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a result depends on.

    Attributes:
        num_cores: cores that this process may use, not those of the machine.
        versions: of the packages whose speed shows in our numbers, by name.
    """

    num_cores: int
    cpu_model: str
    memory_nbytes: int
    kernel: str
    python: str
    versions: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """The facts as they stand in a result file."""
        return asdict(self)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, "unknown" where the kernel does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return UNKNOWN
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine() or UNKNOWN


def package_versions() -> dict[str, str]:
    """Versions of `PACKAGES`; one that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def host_facts() -> HostFacts:
    """The facts of this host, now."""
    return HostFacts(
        num_cores=len(os.sched_getaffinity(0)),
        cpu_model=cpu_model(),
        memory_nbytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=package_versions(),
    )

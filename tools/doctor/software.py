"""Checks of what is installed: Python, torch and its build, the libraries whose build matters."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.kvstore.checksum import crc32c
from snowskin.tools.doctor.finding import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OLDEST_PYTHON = (3, 11)
CHECKED_NBYTES, NUM_CHECKS = 1 << 20, 9
CHECKED_CRC = 0x7D25B26D  # of the bytes 0 to 255 over and over
ENOUGH_CHECKED_PER_S = 4e9
LIBRARIES = ("grpcio", "protobuf", "uvloop", "numpy", "fastcrc", "cbor2", "tokenizers")


def python(
    version_info: tuple[int, ...] = tuple(sys.version_info[:3]),
    *,
    is_64_bit: bool = sys.maxsize > 1 << 32,
    is_debug: bool = hasattr(sys, "gettotalrefcount"),
) -> Finding:
    """The interpreter."""
    shown = ".".join(map(str, version_info))
    if version_info[:2] < OLDEST_PYTHON or not is_64_bit:
        return Finding(
            name="Python",
            verdict=Verdict.FAIL,
            found=f"{shown}, {'64' if is_64_bit else '32'} bit",
            meaning="Snowskin needs 3.11 and 64 bit",
            action="install a newer one, and make the environment anew with it",
        )
    return Finding(
        name="Python",
        verdict=Verdict.WARN if is_debug else Verdict.OK,
        found=shown + (", debug build" if is_debug else ""),
        meaning="a debug build is several times slower" if is_debug else "new enough",
        action="use a release build" if is_debug else "",
    )


def torch_build() -> str | None:
    """The text of torch's own version file, without importing torch (seconds); None without torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        return (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""


def torch(build: str | None, *, has_gpu: bool) -> Finding:
    """Torch, and whether it is the CPU build or the one with CUDA.

    Args:
        build: what `torch_build` says.
        has_gpu: whether this host has an NVIDIA GPU.
    """
    if build is None:
        return Finding(
            name="torch",
            verdict=Verdict.WARN,
            found="not installed",
            meaning="a node, the conductor and kvctl run without it; prefill and decode engines do not",
            action="pip install torch",
        )
    found = re.search(r"^__version__ = '([^']+)'", build, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", build, re.MULTILINE)
    shown = (found[1] if found else "of unknown version") + (
        f", CUDA {cuda[1]}" if cuda else ", CPU build"
    )
    if cuda and not has_gpu:
        return Finding(
            name="torch",
            verdict=Verdict.OK,
            found=shown,
            meaning="works; the CPU build does the same here and takes 3 GB less of disk",
        )
    return Finding(
        name="torch",
        verdict=Verdict.OK,
        found=shown,
        meaning="this version's engines compute on the CPU with it",
    )


def installed_versions() -> dict[str, str | None]:
    """Versions of `LIBRARIES`; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def try_stubs() -> str:
    """Imports the generated wire; "" or what is wrong, such as a protobuf older than they need."""
    try:
        importlib.import_module("snowskin.v1.store_pb2_grpc")
        importlib.import_module("uvloop")
    except Exception as error:  # noqa: BLE001  whatever an import raises is the finding
        return f"{type(error).__name__}: {error}"
    return ""


def libraries(
    versions: Mapping[str, str | None], attempt: Callable[[], str] = try_stubs
) -> Finding:
    """The libraries that every role imports, and whether the generated wire works with them."""
    missing = [name for name, found in versions.items() if found is None]
    trouble = f"not installed: {', '.join(missing)}" if missing else attempt()
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    return Finding(
        name="libraries",
        verdict=Verdict.FAIL if trouble else Verdict.OK,
        found=f"{trouble}; {shown}" if trouble else shown,
        meaning="no role starts" if trouble else "the generated wire imports with them",
        action="pip install -c constraints.txt -e . installs the tested versions"
        if trouble
        else "",
    )


def checksum_bytes_per_s() -> float:
    """How fast CRC-32C is taken here, of bytes that lie in the cache; 0 where it comes out wrong."""
    block = bytes(range(256)) * (CHECKED_NBYTES // 256)
    took_s = []
    for _ in range(NUM_CHECKS):
        began_s = time.perf_counter()
        if crc32c(block) != CHECKED_CRC:
            return 0.0
        took_s.append(time.perf_counter() - began_s)
    return CHECKED_NBYTES / min(took_s)


def checksums(bytes_per_s: float) -> Finding:
    """Every block is checked after it landed: rightly, and with the processor's own instructions."""
    if not bytes_per_s:
        return Finding(
            name="checksums",
            verdict=Verdict.FAIL,
            found="fastcrc's CRC-32C is wrong on this processor",
            meaning="all that comes from other hosts would count as damaged",
            action="install another version of fastcrc; report which processor this is",
        )
    is_fast = bytes_per_s >= ENOUGH_CHECKED_PER_S
    return Finding(
        name="checksums",
        verdict=Verdict.OK if is_fast else Verdict.WARN,
        found=f"fastcrc, {bytes_per_s / 1e9:.1f} GB/s",
        meaning="about as fast as memory: a pull is checked while it lies in the cache"
        if is_fast
        else "checking a pull takes longer than the pull",
        action=""
        if is_fast
        else "use a processor with SSE4.2 and PCLMULQDQ, or with ARM's CRC instructions",
    )

"""The private directory of a local cluster: door sockets and logs.

Rules kept here: mode 0700, a path short enough for Unix sockets, gone when the cluster is gone. A cluster that was
killed cannot remove its own, so the next one does: every owner holds a lock on its directory, and a directory whose
lock is free has no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from snowskin.kvstore.errors import BadSetting

PREFIX = "snowskin-up-"
MAX_SOCKET_PATH_NBYTES = 107  # sun_path is 108 with its closing zero
LONGEST_NAME = "node-9999.sock"
_LOCK = "owner.lock"


def _parents() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")  # where the desktop standard puts sockets
    return [Path(place) for place in (runtime, tempfile.gettempdir(), "/tmp") if place]  # noqa: S108  mkdtemp below


def _usable(parent: Path) -> bool:
    # mkdtemp appends eight characters
    longest = parent / f"{PREFIX}12345678" / LONGEST_NAME
    return (
        parent.is_absolute()
        and parent.is_dir()
        and os.access(parent, os.W_OK | os.X_OK)
        and len(os.fsencode(longest)) <= MAX_SOCKET_PATH_NBYTES
    )


def socket_directory() -> Path | None:
    """The first folder in which a private directory for sockets can be made; None where there is none."""
    return next((place for place in _parents() if _usable(place)), None)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the directory's lock, or None where somebody else holds it."""
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def sweep(parent: Path) -> int:
    """Removes directories of this user's clusters that died without doing so; returns how many."""
    num_removed = 0
    for path in parent.glob(f"{PREFIX}*"):
        # another user's, or gone meanwhile: not ours to touch
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            if not (path / _LOCK).exists():  # its owner is just making it
                continue
            fd = _locked(path)
            if fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)
                num_removed += 1
    return num_removed


class ClusterDirectory:
    """A fresh private directory; `close` removes it."""

    def __init__(self) -> None:
        """Makes it.

        Raises:
            BadSetting: no directory for temporary files is writable and short enough.
        """
        parent = socket_directory()
        if parent is None:
            raise BadSetting(
                f"no usable directory for sockets among {', '.join(map(str, _parents()))}",
                hint="set TMPDIR to a writable directory with a path under 70 bytes",
            )
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock_fd: int | None = _locked(self.path)

    def close(self) -> None:
        """Removes the directory and what is in it; idempotent."""
        if self._lock_fd is None:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None

"""A private folder that is gone when its owner is: sockets and logs of a process, or of a cluster.

Rules kept here: mode 0700; who was killed cannot remove its own, so the next one does: every owner
holds a lock on its folder, and a folder whose lock is free has no owner. Only folders of this user
are looked at; a folder without a lock is being made, unless it is older than `UNBORN_S`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

UNBORN_S = 3600.0
LOCK_NAME = "owner.lock"
MAX_TRIES = 10


class OwnedFolder:
    """A fresh private folder in `parent`; `close` removes it."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """Makes it, named `prefix` and eight characters, and sweeps what others of `prefix` left.

        Raises:
            OSError: `parent` cannot be written.
        """
        sweep(parent, prefix)
        for _ in range(MAX_TRIES):
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock_fd = _locked(self.path)
            if self._lock_fd is not None:
                return
        # Between the making of the lock and its taking a sweeper can take it; not time after time.
        raise OSError(f"no folder {prefix}* stays in {parent}: another process removes them")

    def close(self) -> None:
        """Removes the folder and what is in it; idempotent."""
        if self._lock_fd is None:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None


def sweep(parent: Path, prefix: str) -> int:
    """Removes this user's folders whose owners died without doing so; returns how many."""
    num_removed = 0
    for path in parent.glob(f"{prefix}*"):
        # another user's, or gone meanwhile: not ours to touch
        with contextlib.suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.getuid() or not path.is_dir() or path.is_symlink():
                continue
            is_old = time.time() - found.st_mtime > UNBORN_S
            if not (path / LOCK_NAME).exists() and not is_old:
                continue
            fd = _locked(path)
            if fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)
                num_removed += 1
    return num_removed


def _locked(path: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where another has it or removed it."""
    try:
        fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_still_there = os.path.samestat(os.fstat(fd), (path / LOCK_NAME).stat())
    except OSError:  # somebody holds it, or has swept the folder away
        is_still_there = False
    if is_still_there:
        return fd
    os.close(fd)
    return None

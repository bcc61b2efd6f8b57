"""The private directory of a local cluster: door sockets and logs.

Rules kept here: a path short enough for Unix sockets; otherwise as any folder with an owner: private, gone when the
cluster is gone, and swept by the next one where the cluster was killed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.owned_folder import OwnedFolder

PREFIX = "snowskin-up-"
MAX_SOCKET_PATH_NBYTES = 107  # sun_path is 108 with its closing zero
LONGEST_NAME = "node-9999.sock"


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


class ClusterDirectory(OwnedFolder):
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
        super().__init__(parent, PREFIX)

"""What a check found, and the host that it looks at.

Rules kept here: a check is a function from a `Host` (and numbers) to a `Finding`; it reads files below the host's root
only, so that a test can give it a folder of faked /proc texts. What a user should do stands in `action`; it is empty
where nothing need be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Verdict(StrEnum):
    """How a check ended: `FAIL` ends the doctor with exit status 1, the others do not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    ABSENT = "absent"  # optional, and not here


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's result.

    Attributes:
        name: of the check, stable.
        found: what is, with numbers.
        meaning: what that means for Snowskin.
        action: what to do; empty where nothing need be done.
    """

    name: str
    verdict: Verdict
    found: str
    meaning: str
    action: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where a check reads.

    Attributes:
        root: stands for `/`.
    """

    root: Path = Path("/")

    def path(self, name: str) -> Path:
        """The place of an absolute path on this host."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of a file without the white space around it; None where it cannot be read."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def number(self, name: str) -> int | None:
        """The whole number in a file; None where there is none."""
        try:
            return int(self.read(name) or "")
        except ValueError:
            return None

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing where it cannot be read."""
        try:
            return sorted(path.name for path in self.path(folder).iterdir())
        except OSError:
            return []


def table_of(text: str | None) -> dict[str, int]:
    """The numbers of a text like /proc/meminfo, by name, in bytes where it says kB."""
    found = {}
    for line in (text or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isascii() and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return found

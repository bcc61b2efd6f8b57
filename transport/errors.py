"""What fails, and what the caller can do about it.

Rules kept here: every error a user can meet is a `SnowskinError`; its class says what happened, its
message says the numbers, its hint says what to do next. `status` is the canonical RPC status name
(google.rpc.Code), so that any door can answer without a table of its own; `reason` is the stable
word that crosses the wire.
"""

from __future__ import annotations

import re
from typing import ClassVar


class SnowskinError(Exception):
    """Base of all errors that Snowskin raises on purpose.

    Attributes:
        status: canonical RPC status name, e.g. `RESOURCE_EXHAUSTED`.
        reason: stable upper-case word of this class, what crosses the wire.
        hint: one sentence, what to do next; may be empty.
        retry_after_s: seconds after which a retry can succeed, or None where a retry is useless.
    """

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init_subclass__(cls) -> None:
        """Derives `reason` from the class name: `LeaseExpired` becomes `LEASE_EXPIRED`."""
        super().__init_subclass__()
        if "reason" not in cls.__dict__:
            cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        """Keeps what happened (`message`) apart from what to do (`hint`)."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """The message and, behind it, the hint."""
        return f"{self.message}. {self.hint}" if self.hint else self.message


class TransportError(SnowskinError):
    """A transfer did not complete; the landing bytes must not be used."""

    status = "UNAVAILABLE"


class TransportClosed(TransportError):
    """The transport, or the region, was closed before or during the transfer."""


class TransferTimedOut(TransportError):
    """The transfer's deadline passed; what it may still write is in quarantine."""

    status = "DEADLINE_EXCEEDED"


class TransferCancelled(TransportError):
    """The caller cancelled the transfer."""

    status = "CANCELLED"


class OutOfBounds(TransportError):
    """A range does not lie inside its region; nothing was moved."""

    status = "OUT_OF_RANGE"


class BadDescriptor(TransportError):
    """A region descriptor is malformed, of another version, or of another transport."""

    status = "INVALID_ARGUMENT"


class TransportUnavailable(TransportError):
    """The transport asked for is unknown, or what it needs is not installed here."""

    status = "FAILED_PRECONDITION"


class RegionExpired(TransportError):
    """The grant on a remote region ran out; what was read under it at the end must not be used."""

    status = "FAILED_PRECONDITION"


class RegionReadOnly(TransportError):
    """Bytes were to land in a region that was registered or attached for reading only."""

    status = "FAILED_PRECONDITION"


class LandingQuarantined(TransportError):
    """An earlier, abandoned transfer may still write into this range."""


class PeerLost(TransportError):
    """The peer died, or the way to it was cut; the region must be attached anew."""


class GrantRefused(TransportError):
    """The owner knows no such grant: forged, taken back, or of another epoch or generation."""

    status = "PERMISSION_DENIED"


class BadFrame(TransportError):
    """A peer sent what the data plane's protocol does not allow; its connection is closed."""

    status = "INVALID_ARGUMENT"


class PeerBusy(TransportError):
    """The owner serves as many connections or requests as it may; nothing was moved."""

    status = "RESOURCE_EXHAUSTED"

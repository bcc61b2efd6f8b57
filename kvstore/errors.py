"""What the hub refuses and why, grouped by the moment it can happen.

Every class carries the RPC status that the ecosystem expects and a stable `reason`; `from_reason` turns what
crossed the wire back into the same type, so that a client catches what the node raised.
"""

from __future__ import annotations

from snowskin.transport.errors import SnowskinError

# --- at start: settings and memory


class BadSetting(SnowskinError):
    """A flag, environment variable or configuration key has a value that cannot work."""

    status = "INVALID_ARGUMENT"


class AddressInUse(SnowskinError):
    """A port or socket path is taken by another process."""

    status = "FAILED_PRECONDITION"


class InsecureAddress(SnowskinError):
    """A role was told to listen beyond loopback without `--insecure`."""

    status = "FAILED_PRECONDITION"


# --- on a request: what the caller sent is wrong


class BadRequest(SnowskinError):
    """A field is missing, out of range, or contradicts another."""

    status = "INVALID_ARGUMENT"


class BadKeyColumn(BadRequest):
    """A key column is not a whole number of keys, or its width is not 8 to 64 bytes."""


class NamespaceMismatch(BadRequest):
    """The namespace is not 32 bytes, or is used with another block size than before."""

    status = "FAILED_PRECONDITION"


class LimitExceeded(BadRequest):
    """A message, a key column or a count is larger than this door accepts."""

    status = "RESOURCE_EXHAUSTED"


class WireVersionMismatch(BadRequest):
    """Client and node speak different versions of the wire."""

    status = "FAILED_PRECONDITION"


# --- on a pool: no room


class PoolExhausted(SnowskinError):
    """The pool has no room, and waiting to the deadline did not make any."""

    status = "RESOURCE_EXHAUSTED"


class QuarantineShareExceeded(SnowskinError):
    """Too much of the pool is in quarantine, and writes of this client are among it: it gets no more room for now."""

    status = "RESOURCE_EXHAUSTED"


# --- on a lease or a session


class LeaseShareExceeded(SnowskinError):
    """The client, or all clients together, hold as much of the pool under lease as they may: nothing was leased."""

    status = "RESOURCE_EXHAUSTED"


class LeaseUnknown(SnowskinError):
    """The node does not know this lease: released before, or of an earlier epoch of the node."""

    status = "NOT_FOUND"


class LeaseExpired(SnowskinError):
    """The lease's time ran out: what was read under it must be verified, what was written is fenced."""

    status = "FAILED_PRECONDITION"


class CommitRefused(SnowskinError):
    """More blocks, or other blocks, were committed than the lease still covers."""

    status = "FAILED_PRECONDITION"


class TailUnknown(SnowskinError):
    """No tail of this request is committed here: taken already, freed, or never written."""

    status = "NOT_FOUND"


class WatcherTooSlow(SnowskinError):
    """A subscriber did not read what its node told it in time; it comes again, and goes on or begins anew."""

    status = "ABORTED"


class SessionEnded(SnowskinError):
    """The session ended while the call waited."""

    status = "CANCELLED"


# --- in the client


class ClientClosed(SnowskinError):
    """The client was closed before this call."""

    status = "FAILED_PRECONDITION"


class ClientForked(SnowskinError):
    """The process forked after the client connected; a connection cannot serve two processes."""

    status = "FAILED_PRECONDITION"


class WatchAstray(SnowskinError):
    """What a node tells of its blocks does not follow from what it told before."""

    status = "DATA_LOSS"


# --- on the way


class NodeUnavailable(SnowskinError):
    """The node cannot be reached, or the connection broke while a call was under way."""

    status = "UNAVAILABLE"


class NodeSilent(SnowskinError):
    """The node did not answer in time before, and is left alone until it does; this call did not go out."""

    status = "UNAVAILABLE"


class NodeDraining(SnowskinError):
    """The node is shutting down and takes no new leases."""

    status = "UNAVAILABLE"


class DeadlineExceeded(SnowskinError):
    """The call's deadline passed before the node answered."""

    status = "DEADLINE_EXCEEDED"


class ProtocolViolation(SnowskinError):
    """The peer sent a frame that the protocol forbids; the connection is closed."""

    status = "INVALID_ARGUMENT"


class ChecksumMismatch(SnowskinError):
    """Bytes under a key are not what was committed under it; the block was reported and must be recomputed."""

    status = "DATA_LOSS"


def _classes(root: type[SnowskinError]) -> dict[str, type[SnowskinError]]:
    found = {root.reason: root}
    for child in root.__subclasses__():
        found |= _classes(child)
    return found


def from_reason(
    reason: str, message: str, *, hint: str = "", retry_after_s: float | None = None
) -> SnowskinError:
    """The error that `reason` names; a reason of a newer peer becomes a plain `SnowskinError`."""
    kind = _classes(SnowskinError).get(reason, SnowskinError)
    return kind(message, hint=hint, retry_after_s=retry_after_s)

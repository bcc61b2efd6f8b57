"""What the conductor refuses and why, grouped by the moment it can happen.

Rules kept here: as in `snowskin.transport.errors`; besides, a fault of an HTTP request names the
parameter (`param`), and each error that OpenAI's clients know carries their word for it (`code`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from snowskin.engines.conductor.request import Refusal

# --- on an HTTP request: what the caller sent is wrong


class InvalidParameter(SnowskinError):
    """A parameter is missing, unknown, not supported, or out of its range."""

    status = "INVALID_ARGUMENT"

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_value", hint: str = ""
    ) -> None:
        """Keeps which parameter, and OpenAI's word for what is wrong with it."""
        super().__init__(message, hint=hint)
        self.param = param
        self.code = code


class ModelUnknown(SnowskinError):
    """The request names a model that this conductor does not serve."""

    status = "NOT_FOUND"


class BodyTooLarge(SnowskinError):
    """The body of an HTTP request is larger than accepted."""

    status = "OUT_OF_RANGE"


class BodyTimedOut(SnowskinError):
    """The body of an HTTP request did not come in time."""

    status = "DEADLINE_EXCEEDED"


# --- on an instance that registers


class ModelMismatch(SnowskinError):
    """An instance serves another model than this conductor."""

    status = "FAILED_PRECONDITION"


# --- on a request: not now


class RequestRefused(SnowskinError):
    """A limit is passed; `refusal` says which."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        retry_after_s: float | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        """The refusal is None only where the error has crossed the wire."""
        super().__init__(message, hint=hint, retry_after_s=retry_after_s)
        self.refusal = refusal

    @classmethod
    def because(cls, refusal: Refusal) -> RequestRefused:
        """The error that says what `refusal` says."""
        return cls(
            f"refused ({refusal.reason}): {refusal.message}",
            hint=refusal.hint,
            retry_after_s=refusal.retry_after_s,
            refusal=refusal,
        )


class NoInstanceReady(SnowskinError):
    """No instance of a role became ready while the request waited for one."""

    status = "UNAVAILABLE"


class ConductorDraining(SnowskinError):
    """The conductor is shutting down and takes no new requests."""

    status = "UNAVAILABLE"


# --- while it runs


class InstanceLost(SnowskinError):
    """An instance ended a call without an answer, or broke the protocol of it."""

    status = "UNAVAILABLE"


class RequestTimedOut(SnowskinError):
    """The request was not finished within the time that any request gets."""

    status = "DEADLINE_EXCEEDED"

"""Views: a range of a peer's memory read in place, without a copy, and confirmed after use.

Rules kept here: what is read through a view counts only once `confirm` has returned; a view keeps the
mapping, so closing the region or the transport under it crashes nobody, and only the confirmation
fails; nobody writes through a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from snowskin.transport.errors import TransportClosed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from snowskin.transport.memory import Bytes


class RegionView:
    """Some bytes of a peer's region, where they lie; a context manager that closes."""

    __slots__ = ("_array", "_confirm", "nbytes")

    def __init__(self, array: Bytes, confirm: Callable[[int], None]) -> None:
        """Use `view` of an attached region; `confirm` raises what makes these bytes worthless."""
        # By way of a memoryview: the flag of a numpy view alone could be taken back.
        self._array: Bytes | None = np.frombuffer(array.data.toreadonly(), dtype=np.uint8)
        self._confirm = confirm
        self.nbytes = int(array.nbytes)

    @property
    def array(self) -> Bytes:
        """The bytes as uint8, read-only; TransportClosed after `close`."""
        if self._array is None:
            raise TransportClosed("this view is closed")
        return self._array

    @property
    def memory(self) -> memoryview:
        """The same as a memoryview."""
        return self.array.data

    def confirm(self) -> None:
        """Says that what was read so far is what the peer granted.

        Raises:
            RegionExpired: the grant ran out. GrantRefused: it was taken back. PeerLost: the peer is
                gone. TransportClosed: the region, the transport or this view was closed. Whatever was
                made of the bytes must not be used then.
        """
        self._confirm(self.array.nbytes)

    def close(self) -> None:
        """Lets go of the bytes; arrays that others made of them stay readable. Idempotent."""
        self._array = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

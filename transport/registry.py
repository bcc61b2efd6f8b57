"""From a scheme to the transport that serves it, or what is missing.

Rules kept here: a name means one transport, never a silent stand-in for another; a transport that
cannot be opened here says what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.loopback import LoopbackTransport
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp.transport import open_tcp
from snowskin.transport.ucx.transport import open_ucx

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.api import Transport

TRANSPORTS: dict[str, Callable[..., Transport]] = {
    "loopback": LoopbackTransport,
    "shm": ShmTransport,
    "tcp": open_tcp,
    "ucx": open_ucx,
}


def open_transport(scheme: str, **settings: object) -> Transport:
    """A new transport of this scheme, by its own settings; the caller closes it.

    Raises:
        TransportUnavailable: the name is unknown, or what it needs is not installed here.
    """
    factory = TRANSPORTS.get(scheme)
    if factory is not None:
        return factory(**settings)
    raise TransportUnavailable(
        f"there is no transport {scheme!r}", hint=f"known are {', '.join(sorted(TRANSPORTS))}"
    )

"""From a scheme to the transport that serves it, or what is missing.

Rules kept here: a name means one transport, never a silent stand-in for another; what this build
does not have is said plainly, with what to use instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.loopback import LoopbackTransport
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp import open_tcp

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.api import Transport

TRANSPORTS: dict[str, Callable[..., Transport]] = {
    "loopback": LoopbackTransport,
    "shm": ShmTransport,
    "tcp": open_tcp,
}

NOT_IN_THIS_BUILD = {
    "ucx": "on one host use shm, between hosts tcp",
}


def open_transport(scheme: str, **settings: object) -> Transport:
    """A new transport of this scheme, by its own settings; the caller closes it.

    Raises:
        TransportUnavailable: the name is unknown, or known but not in this build.
    """
    factory = TRANSPORTS.get(scheme)
    if factory is not None:
        return factory(**settings)
    if scheme in NOT_IN_THIS_BUILD:
        raise TransportUnavailable(
            f"transport {scheme} is not in this build", hint=NOT_IN_THIS_BUILD[scheme]
        )
    raise TransportUnavailable(
        f"there is no transport {scheme!r}", hint=f"known are {', '.join(sorted(TRANSPORTS))}"
    )

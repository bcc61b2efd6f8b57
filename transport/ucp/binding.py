"""Which binding opens UCX: ucx-py where it is installed, else ctypes, or the one that was asked for.

Rules kept here: a binding asked for by name is used or its absence is an error; what is missing is
said with the extra to install; the choice is logged once by whoever opens.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.ucp import abi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from snowskin.transport.ucp.api import UcpContext, UcpFeature


def _open_ucx_py(config: Mapping[str, str], features: UcpFeature) -> UcpContext:
    from snowskin.transport.ucp.ucx_py import UcxPyContext

    return UcxPyContext(config, features)


def _open_ctypes(config: Mapping[str, str], features: UcpFeature) -> UcpContext:
    from snowskin.transport.ucp.ctypes_ucp import CtypesContext

    return CtypesContext(config, features)


BINDINGS: dict[str, Callable[[Mapping[str, str], UcpFeature], UcpContext]] = {
    "ucx-py": _open_ucx_py,
    "ctypes": _open_ctypes,
}
AUTO = "auto"


def open_context(
    config: Mapping[str, str], features: UcpFeature, *, binding: str = AUTO
) -> UcpContext:
    """Opens UCX by a binding.

    Args:
        config: UCX's settings without `UCX_`; an operator's own `UCX_*` wins.
        features: what it may be used for.
        binding: a name in `BINDINGS`, or `auto`: ucx-py where it is installed, else ctypes.

    Raises:
        TransportUnavailable: UCX, or the binding asked for, is not here. UcpFailure: UCX refused.
    """
    if binding == AUTO:
        binding = "ucx-py" if importlib.util.find_spec("ucp") is not None else "ctypes"
    if binding not in BINDINGS:
        raise TransportUnavailable(
            f"there is no UCX binding {binding!r}", hint=f"known are {', '.join(BINDINGS)}, {AUTO}"
        )
    return BINDINGS[binding](config, features)


def why_unavailable() -> str | None:
    """Why UCX cannot be used here, or None."""
    try:
        abi.load()
    except TransportUnavailable as error:
        return str(error)
    return None

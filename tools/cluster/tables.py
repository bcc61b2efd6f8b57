"""Which settings stand in which table of a settings file.

Rules kept here: a settings class is imported when it is asked for; none needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.tools.cluster import roles

if TYPE_CHECKING:
    from collections.abc import Callable


def _up() -> type[Any]:
    from snowskin.tools.cluster.up_settings import UpSettings

    return UpSettings


def _demo() -> type[Any]:
    from snowskin.tools.cluster.demo import DemoSettings

    return DemoSettings


def _kvctl() -> type[Any]:
    from snowskin.tools.kvctl.output import KvctlSettings

    return KvctlSettings


# Each gives the class: Any, because settings classes share no base.
SETTINGS: dict[str, Callable[[], type[Any]]] = {
    "node": roles.node_settings,
    "conductor": roles.conductor_settings,
    "prefill": roles.prefill_settings,
    "decode": roles.decode_settings,
    "up": _up,
    "demo": _demo,
    "kvctl": _kvctl,
}

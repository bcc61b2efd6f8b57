"""From a name in the settings to an eviction policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.eviction.lru import LruEviction

if TYPE_CHECKING:
    from collections.abc import Hashable

    from snowskin.kvstore.eviction.api import EvictionPolicy

    Key = TypeVar("Key", bound=Hashable)

EVICTION_POLICIES = {"lru": LruEviction}


def make_eviction(name: str) -> EvictionPolicy[Key]:
    """A new policy with nothing resident; BadSetting for an unknown name."""
    policy = EVICTION_POLICIES.get(name)
    if policy is None:
        known = ", ".join(sorted(EVICTION_POLICIES))
        raise BadSetting(f"there is no eviction policy {name!r}", hint=f"known are {known}")
    return policy()

"""Values that travel: frozen to the type checker, cheap to make at run time.

A frozen dataclass sets each field through `object.__setattr__`, which makes it two and a half times as slow to make
(0.7 against 0.28 µs for six fields); a pull makes some twenty of them. So what is made for every call is declared by
`value`: mypy refuses assignments to its fields, and nothing checks them again while the program runs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(*, kw_only: bool = True) -> Callable[[type[T]], type[T]]:
    """As `dataclass(frozen=True, slots=True, kw_only=...)`, but freezing is mypy's work alone."""

    def declare(cls: type[T]) -> type[T]:
        return dataclasses.dataclass(slots=True, kw_only=kw_only, unsafe_hash=True)(cls)

    return declare

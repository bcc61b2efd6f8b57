"""The rigs of the transport's contract suite, on every backend that is here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.transport_rigs import BACKENDS, HUGE_NBYTES, LARGE_NBYTES, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator


def each_backend(*, has_views: bool = False) -> list[object]:
    """Parameters of a test for every backend; those that cannot run here say loudly why."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                backend.why_not is not None, reason=f"NO {name.upper()} HERE: {backend.why_not}"
            ),
        )
        for name, backend in BACKENDS.items()
        if backend.has_views or not has_views
    ]


@pytest.fixture(params=each_backend())
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(scheme: str) -> Iterator[Rig]:
    made = Rig(scheme)
    yield made
    made.close()


@pytest.fixture
def large(scheme: str) -> Iterator[Rig]:
    made = Rig(scheme, LARGE_NBYTES)
    yield made
    made.close()


@pytest.fixture
def huge(scheme: str) -> Iterator[Rig]:
    """More than all buffers on the way hold."""
    made = Rig(scheme, HUGE_NBYTES)
    yield made
    made.close()


@pytest.fixture(params=each_backend(has_views=True))
def viewing(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A rig whose regions can be read in place."""
    made = Rig(request.param)
    yield made
    made.close()

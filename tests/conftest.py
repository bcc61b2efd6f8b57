"""What every test gets: the marker of its folder, a Hypothesis profile, and the leak guard."""

from __future__ import annotations

import os

# Before anything imports torch: OpenMP threads that spin make other processes' work many times
# slower. A process that sets its own value keeps it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests.support.leaks import leak_guard

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent
SUITES = ("house", "unit", "property", "simulation", "contract", "integration", "fault", "e2e")

SOAK = "soak"
SOAK_TIMEOUT_S = 3600  # of one property with its 10,000 examples, fifty times those of CI

# No deadline: on a shared machine the time of one example says nothing. The seed is printed.
for _name, _max_examples in {"dev": 50, "ci": 200, SOAK: 10_000}.items():
    settings.register_profile(
        _name,
        max_examples=_max_examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
settings.load_profile(PROFILE)


def _suite_of(item: pytest.Item) -> str:
    folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
    return folder if folder in SUITES else "house"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its suite, and runs the suites in order."""
    for item in items:
        item.add_marker(_suite_of(item))
        if PROFILE == SOAK and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT_S))
    items.sort(key=lambda item: SUITES.index(_suite_of(item)))


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up before, and so torn down after, every other fixture of the same test."""
    with leak_guard():
        yield

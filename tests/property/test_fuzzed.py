"""The coverage-guided fuzzer against every target, by night; `python -m tests.fuzz` is the same by hand."""

from __future__ import annotations

import importlib.util

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS
from tests.support.results import write_result

SECONDS = 60
LEAST_INPUTS = 1_000


@pytest.mark.soak
@pytest.mark.timeout(120 * (len(TARGETS) + 1))
def test_no_input_that_a_fuzzer_finds_breaks_anything():
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("NO FUZZER HERE, NOTHING FUZZED: pip install -e '.[fuzz]'")
    results = {target: fuzz(target, SECONDS) for target in sorted(TARGETS)}
    write_result("fuzz", **results)
    assert all(result["num_inputs"] > LEAST_INPUTS for result in results.values()), results

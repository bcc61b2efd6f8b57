"""Bounds of an instance: what cannot work is refused before a request is taken."""

from __future__ import annotations

import pytest

from snowskin.engines.limits import EngineLimits
from snowskin.kvstore.errors import BadSetting


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_tokens", 20),
        ("max_running", 0),
        ("max_waiting", 0),
        ("max_context_tokens", 0),
        ("pull_timeout_s", 0.0),
        ("pull_timeout_s", float("nan")),
        ("publish_timeout_s", -1.0),
    ],
)
def test_a_bound_that_cannot_work_is_refused_by_name(name, value):
    bounds = {"namespace": b"n" * 32, "vocab_size": 9, "block_size": 16, "max_context_tokens": 64}
    with pytest.raises(BadSetting, match=name):
        EngineLimits(**{**bounds, name: value})

"""What fault tests of a whole cluster share: a model, the same model in one piece, and a cluster."""

from __future__ import annotations

import pytest

from snowskin.engines.model.random_model import make_random_model
from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import FLAGS, SHORT_LEASES, UpProcess


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """Ten million parameters: a long prompt takes a second, a token 6 ms, a block 144 KiB."""
    return make_random_model(
        tmp_path_factory.mktemp("models") / "random",
        layers=6,
        hidden=384,
        heads=6,
        kv_heads=3,
        head_dim=64,
        intermediate=1152,
        max_position=4096,
    )


class RememberingMonolith:
    """The model in one piece, which is not asked twice about the same answer to the same prompt."""

    def __init__(self, model):
        from snowskin.tools.cluster.monolith import Monolith

        self._monolith = Monolith(model)
        self._agreements = {}

    def compare(self, prompt, token_ids, *, stopped):
        asked = (tuple(prompt), tuple(token_ids), stopped)
        if asked not in self._agreements:
            self._agreements[asked] = self._monolith.compare(prompt, token_ids, stopped=stopped)
        return self._agreements[asked]


@pytest.fixture(scope="package")
def monolith(model):
    """The reference for every answer."""
    return RememberingMonolith(model)


@pytest.fixture(scope="package")
def up(model, tmp_path_factory):
    """One cluster for all tests that leave it as they found it."""
    with UpProcess(model, tmp_path_factory.mktemp("up"), *FLAGS, settings=SHORT_LEASES) as process:
        yield process


@pytest.fixture(scope="package")
def seeds():
    """No two requests have a block in common."""
    return iter(range(1_000))


@pytest.fixture
async def before(up, seeds):
    """What `up` holds before a test touches it; every connection that will be is made."""
    await up.settled()
    await up.ask(prompt_tokens(300, next(seeds)), 4)
    held = await up.settled()
    assert held.unaccounted_nbytes == 0
    assert (held.num_leases, held.num_waiting, held.leased_nbytes) == (0, 0, 0)
    yield held
    up.resume_all()  # a test that failed may have left one frozen

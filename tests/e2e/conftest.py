"""What the end-to-end tests share: one model, the same model in one piece, and one cluster.

Starting a cluster costs seconds, so one of two prefill and two decode processes serves all of them, and another one on
two nodes those of several nodes; a test that kills something, or counts from nothing, starts its own. All run on the
loop of the session, which the clusters belong to.
"""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.support.completions import asking
from tests.support.e2e_cluster import exact_cluster
from tests.support.one_piece import OnePiece
from tests.support.sensitive_model import make_sensitive_model


@pytest.fixture(scope="session")
def sensitive_model(tmp_path_factory):
    return make_sensitive_model(tmp_path_factory.mktemp("models") / "sensitive")


@pytest.fixture(scope="session")
def one_piece(sensitive_model):
    return OnePiece(sensitive_model)


@pytest_asyncio.fixture(scope="session", loop_scope="session", autouse=True)
async def _session_loop():
    """The loop itself, before the leak guard of the first test that runs on it looks around."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(sensitive_model):
    async with exact_cluster(sensitive_model) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_nodes(sensitive_model):
    """Two nodes, and of each kind of engine one on each; bytes go by TCP, as if each were another host."""
    async with exact_cluster(sensitive_model, nodes=2, transport="tcp") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def asker(cluster):
    async with asking(cluster.http_address) as one:
        yield one

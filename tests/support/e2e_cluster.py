"""The cluster of the end-to-end tests: its shape, and the settings that every test of it knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.ports import pick_port
from snowskin.tools.cluster.up_settings import UpSettings

if TYPE_CHECKING:
    from typing import Any

BLOCK_SIZE = 16
CHUNK_TOKENS = 64  # small, so that chunk edges are many
# As many requests as a cluster of two and two takes without a refusal.
MAX_AT_ONCE = 40
UNVERIFIED_ENGINE = "tests.support.engine_unverified"
HOST = "127.0.0.1"
# What these tests count is right only where every look-up has its answer, on however busy a host.
PATIENT = {"SNOWSKIN_LOOKUP_BUDGET_S": "5.0", "SNOWSKIN_PROBE_BUDGET_S": "5.0"}
ROOT = Path(__file__).resolve().parents[2]


def exact_cluster(model: Path, **fields: Any) -> LocalCluster:
    """One node, a conductor, two prefill and two decode processes, but for `fields`."""
    engine_module = fields.pop("engine_module", None)
    settings = UpSettings(
        **{
            "model": str(model),
            "prefill": 2,
            "decode": 2,
            "block_size": BLOCK_SIZE,
            "chunk_tokens": CHUNK_TOKENS,
            "dram_nbytes": 512 << 20,
            "kv_memory_nbytes": 128 << 20,
            "threads": 1,
            "http_port": 0,
            "conductor_port": pick_port(HOST),
            "hang_s": 0.0,  # looks at children would stand open while the session's loop does
            **fields,
        }
    )
    if engine_module is None:
        return LocalCluster(settings, environment=PATIENT)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), **PATIENT}
    return LocalCluster(settings, engine_module=engine_module, environment=environment)

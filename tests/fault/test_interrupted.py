"""Ctrl-C of a cluster that is at work, also while it restarts what was killed: nothing of it is left.

Ctrl-C while a cluster starts, and while the demonstration runs, is tested beside them
(tests/integration/test_local_cluster.py, tests/e2e/test_demo.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.engine_bench import prompt_tokens
from tests.support.up_process import END_S, FLAGS, SHORT_LEASES, UpProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SEED = 4_711
# By day one that is interrupted twice and one that is interrupted once, with other victims; by night one more.
SEEDS = [SEED, SEED + 1, pytest.param(SEED + 2, marks=pytest.mark.soak)]
ROLES = ("node-0", "conductor", "prefill-0", "decode-0")


def session_of(pid: int) -> list[str]:
    """Every process of a session, orphans too: children keep it whatever their parent is."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == pid:
                found.append(" ".join(process.info["cmdline"] or ["?"]))
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("snowskin")}


@pytest.mark.parametrize("seed", SEEDS)
async def test_ctrl_c_of_a_working_cluster_leaves_nothing(model, tmp_path, seed):
    chance = random.Random(seed)
    victims = chance.sample(ROLES, chance.randint(1, 2))
    is_impatient = seed % 2 == 1
    before = shared_memory()
    with UpProcess(model, tmp_path, *FLAGS, settings=SHORT_LEASES) as up:
        async with contextlib.AsyncExitStack() as stack:
            for index in range(3):
                prompt = prompt_tokens(400 * (index + 1), seed * 10 + index)
                await stack.enter_async_context(up.asking(prompt, 500, use_cache=index < 2))
            await asyncio.sleep(chance.uniform(0.0, 1.5))
            for victim in victims:
                up.kill(victim)
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does
            if is_impatient:
                await asyncio.sleep(chance.uniform(0.0, 0.5))
                os.killpg(up.process.pid, signal.SIGINT)
            await asyncio.to_thread(up.process.communicate, timeout=END_S)
        what = f"seed {seed}, killed {victims}: {up.log_path.read_text()[-2000:]}"
        assert up.process.returncode == 0, what
        assert session_of(up.process.pid) == [], what
        assert list(up.runtime.iterdir()) == [], what
        assert shared_memory() <= before, what

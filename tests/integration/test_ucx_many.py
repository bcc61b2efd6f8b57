"""Many transfers of `ucx` at once, some cancelled and some out of time: right bytes, nothing stuck, nothing left.

UCX lets messages overtake each other, but only under load: no smaller test has seen that.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest

from snowskin.transport.api import Run, TransferControl
from snowskin.transport.errors import (
    LandingQuarantined,
    PeerLost,
    TransferCancelled,
    TransferTimedOut,
)
from snowskin.transport.ucp.binding import why_unavailable
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import UcxTransport

NO_UCX = why_unavailable()
pytestmark = pytest.mark.skipif(NO_UCX is not None, reason=f"NO UCX HERE: {NO_UCX}")

NBYTES = 8 << 20
LANDING_NBYTES = 3 << 20
NUM_THREADS = 6
FAR_S = 20.0


def some_runs(randoms: random.Random) -> list[Run]:
    runs, start = [], 0
    for _ in range(randoms.randint(1, 40)):
        nbytes = randoms.randint(1, randoms.choice([100, 5000, 300_000]))
        if start + nbytes > LANDING_NBYTES:
            break
        runs.append(Run(randoms.randrange(NBYTES - nbytes), start, nbytes))
        start += nbytes
    return runs


class Stage:
    """One owner, two readers, and what came of all transfers."""

    def __init__(self, *, one_sided: bool) -> None:
        settings = UcxSettings(net_devices="lo", trusted_network=one_sided)
        self.owner = UcxTransport(settings)
        self.readers = [UcxTransport(settings) for _ in range(2)]
        self.source = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
        self.owned = self.owner.register(self.source)
        self.ends: Counter[str] = Counter()
        self.lock = threading.Lock()

    def pull_at_random(self, seed: int, until_s: float) -> None:
        randoms, reader = random.Random(seed), self.readers[seed % 2]
        target = np.zeros(LANDING_NBYTES, dtype=np.uint8)
        with reader.register(target) as local:
            remote = reader.attach(self.owner.describe(self.owned))
            while time.monotonic() < until_s:
                runs, control = some_runs(randoms), TransferControl()
                hurry_s, what = randoms.random() * 0.003, randoms.random()
                canceller = threading.Timer(hurry_s if what < 0.2 else 0, control.cancel)
                if what < 0.2:
                    canceller.start()
                try:
                    reader.pull(
                        remote,
                        local,
                        runs,
                        deadline_s=time.monotonic() + (hurry_s if 0.2 < what < 0.35 else FAR_S),
                        landed=(lambda _offset, _nbytes: None) if what > 0.7 else None,
                        control=control,
                    )
                    for offset, start, nbytes in runs:
                        wanted = self.source[offset : offset + nbytes]
                        assert np.array_equal(target[start : start + nbytes], wanted)
                    end = "whole"
                except (TransferCancelled, TransferTimedOut, LandingQuarantined) as error:
                    end = error.reason
                except PeerLost as error:
                    end = f"lost: {error}"
                if what < 0.2:
                    canceller.cancel()
                    canceller.join()
                with self.lock:
                    self.ends[end] += 1
            remote.close()

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.owner.close()
        self.owned.close()


@pytest.mark.parametrize("one_sided", [False, True], ids=["messages", "one-sided"])
@pytest.mark.parametrize(
    "seconds", [1.5, pytest.param(30.0, marks=[pytest.mark.soak, pytest.mark.timeout(120)])]
)
def test_many_transfers_at_once_move_the_right_bytes_or_say_why_not(
    one_sided: bool, seconds: float
) -> None:
    stage = Stage(one_sided=one_sided)
    until_s = time.monotonic() + seconds
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            stage.pull_at_random(seed, until_s)
        except BaseException as error:  # noqa: BLE001  raised by the test below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + FAR_S)
    print(dict(stage.ends))
    assert not any(thread.is_alive() for thread in threads), "a transfer never ends"
    began_s = time.monotonic()
    stage.owner.grants.close()
    assert time.monotonic() - began_s < 1.0, "memory is still in the hands of UCX"
    statistics = stage.owner.statistics()
    stage.close()
    assert not errors, errors
    assert stage.ends["whole"] > seconds
    assert statistics.refused_by_reason == ()
    lost = [end for end in stage.ends if end.startswith("lost: ")]
    # UCX lets go of a one-sided access only with its endpoint, and with that of all that went over it
    assert all(one_sided and "was given up in the middle" in end for end in lost), lost

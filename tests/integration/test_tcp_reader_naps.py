"""When a `tcp` reader may nap: while much is on its way, and nobody looks at the pieces."""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np
import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.runs import Run
from snowskin.transport.tcp.connection import Connection
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport

MIB = 1 << 20
ONE, TWO = [Run(0, 0, 4 * MIB)], [Run(0, 0, MIB), Run(2 * MIB, MIB, 2 * MIB)]


@pytest.mark.parametrize("runs", [ONE, TWO], ids=["one run", "two runs"])
@pytest.mark.parametrize("is_looked_at", [False, True], ids=["unseen", "looked at"])
def test_a_reader_whose_pieces_are_looked_at_is_late_already_and_does_not_nap(
    monkeypatch, runs, is_looked_at
):
    behind = []
    receive_whole = Connection.receive_whole

    def noted(connection, view, more_nbytes=0):
        behind.append(more_nbytes)
        return receive_whole(connection, view, more_nbytes)

    monkeypatch.setattr(Connection, "receive_whole", noted)
    source, target = np.ones(4 * MIB, np.uint8), np.zeros(4 * MIB, np.uint8)
    settings = TcpSettings(listen=(Address("127.0.0.1", 0),))
    with closing(TcpTransport(settings)) as owner, closing(TcpTransport()) as reader:
        remote = reader.attach(owner.describe(owner.register(source)))
        reader.pull(
            remote,
            reader.register(target),
            runs,
            deadline_s=time.monotonic() + 10,
            landed=(lambda _offset, _nbytes: None) if is_looked_at else None,
        )
    assert len(behind) >= 2
    assert any(nbytes > 0 for nbytes in behind) is not is_looked_at

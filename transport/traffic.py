"""How urgent a transfer is: a word by itself, for those who decide and move nothing."""

from __future__ import annotations

import enum


class TrafficClass(enum.IntEnum):
    """How urgent a transfer is; lower goes first where a transport queues."""

    DECODE_CRITICAL = 0
    PREFETCH = 1
    REPLICATION = 2

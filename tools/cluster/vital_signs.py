"""Whether a child that runs still lives: it answers `/healthz`, with whatever status.

Rules kept here: only silence counts, never what the answer says (a role that is not healthy knows why, and comes back
by itself); only silence at every one of `NUM_LOOKS` looks in a row counts, each with its full time, so that neither a
busy host nor a supervisor that was stopped itself makes a hang of a slow answer.
"""

from __future__ import annotations

import asyncio

NUM_LOOKS = 5
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def until_silent(http_address: str, hang_s: float) -> None:
    """Returns when nobody has answered at `host:port` for `hang_s` seconds; else never."""
    look_s = hang_s / NUM_LOOKS
    loop = asyncio.get_running_loop()
    num_silent = 0
    while num_silent < NUM_LOOKS:
        next_look_s = loop.time() + look_s
        num_silent = 0 if await _answers(http_address, timeout_s=look_s) else num_silent + 1
        await asyncio.sleep(next_look_s - loop.time())


async def _answers(http_address: str, *, timeout_s: float) -> bool:
    host, _, port = http_address.rpartition(":")
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(_REQUEST)
            return (await reader.read(5)).startswith(b"HTTP/")
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()

"""Asks a role's `/healthz` and ends with status 0 or 1: a container's health check without curl.

    python -m snowskin.tools.healthy http://127.0.0.1:8080/healthz

Rules kept here: the standard library only, because it runs every few seconds; what was answered goes to stdout, where
`docker inspect` shows it; it never waits longer than `TIMEOUT_S`.
"""

from __future__ import annotations

import http.client
import sys
from urllib.parse import urlsplit

TIMEOUT_S = 2.5
MAX_ANSWER_NBYTES = 4096


def ask(url: str, *, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Whether `url` answers 200, and what it says."""
    parts = urlsplit(url)
    try:
        if parts.scheme != "http" or not parts.hostname:
            return False, f"{url} is not http://HOST:PORT/PATH"
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        try:
            connection.request("GET", f"{parts.path or '/'}?{parts.query}".rstrip("?"))
            answer = connection.getresponse()
            text = answer.read(MAX_ANSWER_NBYTES).decode(errors="replace")
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return False, f"{url}: {type(error).__name__} {error}"
    return answer.status == 200, f"{answer.status} {text}"


def main(arguments: list[str]) -> int:
    """Exit status: 0 healthy, 1 not, 2 usage."""
    if len(arguments) != 1:
        print("usage: python -m snowskin.tools.healthy URL", file=sys.stderr)
        return 2
    healthy, said = ask(arguments[0])
    print(said)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

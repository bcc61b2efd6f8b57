"""Where a long test leaves its numbers: a small file per test, and only in a nightly run.

Rules kept here: nothing is written unless the environment names a folder (`make test-nightly` does), so that an
ordinary run leaves the tree as it was. No date, host name or path: results are committed, and git knows when.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from snowskin.tools.bench.host import host_facts

VARIABLE = "NIGHTLY_RESULTS"
ROOT = Path(__file__).resolve().parent.parent.parent


def write_result(name: str, **numbers: object) -> Path | None:
    """Writes `numbers`, and what host they were measured on, to `NAME.json`; None in an ordinary run.

    Args:
        name: of the file, without its ending; one for each test.
        numbers: what came out; anything that JSON knows.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    path = ROOT / folder / f"{name}.json"  # an absolute folder stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"test": name, **numbers, "host": host_facts().as_json()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path

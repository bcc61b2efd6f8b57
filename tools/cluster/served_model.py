"""Sees to it that a model directory can be served: the user's as it is, or the small random model, made once.

    python -m snowskin.tools.cluster.served_model DIR

The compose file runs it before the engines, so that a try-out needs no model.

Rules kept here: a directory that holds anything is not written to.
"""

from __future__ import annotations

import sys
from pathlib import Path

from snowskin.transport.errors import SnowskinError


def see_to(directory: Path) -> str:
    """Makes the random model where nothing lies; says what is served.

    Raises:
        BadSetting: the directory holds files, and no config.json among them.
    """
    if (directory / "config.json").is_file():
        return f"serving the model in {directory}"
    from snowskin.engines.model.random_model import make_random_model

    make_random_model(directory)
    return (
        f"no model was given: made a random one, 152 MB, in {directory}; its answers mean nothing"
    )


def main(arguments: list[str]) -> int:
    """Exit status: 0 there is a model, 1 there is none and none can be made, 2 usage."""
    if len(arguments) != 1:
        print("usage: python -m snowskin.tools.cluster.served_model DIR", file=sys.stderr)
        return 2
    try:
        print(see_to(Path(arguments[0])), flush=True)
    except (SnowskinError, OSError) as error:
        hint = "set MODEL_DIR to a model's directory, readable by the container's user"
        print(f"no model in {arguments[0]}: {error}. {hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

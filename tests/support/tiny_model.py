"""A random model that computes in no time, and where one wrong KV block still matters little: for plumbing only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.model.random_model import make_random_model

if TYPE_CHECKING:
    from pathlib import Path


def make_tiny_model(directory: Path) -> Path:
    """Two layers, a hundred thousand parameters, 4,096 positions."""
    return make_random_model(
        directory,
        layers=2,
        hidden=64,
        heads=2,
        kv_heads=1,
        head_dim=32,
        intermediate=128,
        max_position=4096,
    )

"""A small random model in which one wrong KV block changes the text: for tests with teeth.

Its shape is the first one that `engines/model/random_model.py` measures: behind up to 500 tokens of text, a block
that is zeroed, another's, late by a row, or has K and V of a layer exchanged changed 99 to 100 texts of 100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.model.random_model import make_random_model

if TYPE_CHECKING:
    import random
    from pathlib import Path

NUM_LAYERS = 4
NUM_KV_HEADS = 4
HEAD_DIM = 32
ITEM_NBYTES = 4  # float32

_TEXT = (
    "the a of and to in that it was with for on as at by not from but which or have had his her "
    "one all out who what when there would could into then them some time very your now over man "
    "river stone house light garden winter silver window letter engine memory prefix block tail "
    "lease node hand water paper morning station copper answer question tiny distant seven third"
)
_WORDS = _TEXT.split()


def make_sensitive_model(directory: Path) -> Path:
    """Four layers of 256, about 3.5 M parameters, 4,096 positions."""
    return make_random_model(
        directory,
        layers=NUM_LAYERS,
        hidden=256,
        heads=8,
        kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate=768,
        max_position=4096,
    )


def block_nbytes(block_size: int) -> int:
    """Bytes of one block, computed here and not asked of the product."""
    return NUM_LAYERS * 2 * NUM_KV_HEADS * block_size * HEAD_DIM * ITEM_NBYTES


def words(chance: random.Random, num_tokens: int) -> list[int]:
    """Text of exactly so many tokens; a token is a byte."""
    text = ""
    while len(text) < num_tokens:
        text += chance.choice(_WORDS) + chance.choice(("", "", ",", ".")) + " "
    return list(text[:num_tokens].encode())

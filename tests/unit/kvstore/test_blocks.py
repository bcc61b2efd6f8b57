"""Block hashes equal vLLM's; key columns refuse what is no column."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from snowskin.kvstore.blocks import NONE_HASH, BlockHashChain, KeyColumn, block_hashes, none_hash
from snowskin.kvstore.errors import BadKeyColumn, BadRequest

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "vllm_sha256_cbor.json").read_text(encoding="utf-8")
)
CASES = VECTORS["cases"]


def vector_arguments(case: dict[str, Any]) -> dict[str, Any]:
    """A vector's extra keys in our words: the salt apart, the others as tuples."""
    every = [tuple(key) for key in case["extra_keys_all"] or []]
    first = [tuple(key) for key in case["extra_keys_first"] or []]
    salts = [key[1] for key in first if key[0] == "cache_salt"]
    assert len(first) == len(salts) <= 1, "a vector with extra keys that this test cannot say"
    return {"extra_keys": every, "cache_salt": salts[0] if salts else None}


def test_first_parent_is_vllms() -> None:
    assert NONE_HASH.hex() == VECTORS["none_hash"]
    assert none_hash("42") != NONE_HASH


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_hashes_equal_vllms(case: dict[str, Any]) -> None:
    hashes = block_hashes(case["tokens"], case["block_size"], **vector_arguments(case))
    assert [each.hex() for each in hashes] == case["hashes"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_growing_chain_gives_the_same_hashes_token_by_token(case: dict[str, Any]) -> None:
    chain = BlockHashChain(case["block_size"], **vector_arguments(case))
    hashes = [each.hex() for token in case["tokens"] for each in chain.extend([token])]
    assert hashes == case["hashes"]
    assert chain.num_pending == len(case["tokens"]) % case["block_size"]


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    salt=st.one_of(st.none(), st.text(max_size=4)),
)
def test_chain_does_not_depend_on_how_tokens_arrive(
    tokens: list[int], cuts: list[int], salt: str | None
) -> None:
    chain = BlockHashChain(7, cache_salt=salt)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    arrived = []
    for start, end in itertools.pairwise(edges):
        arrived += chain.extend(tokens[start:end])
    assert arrived == block_hashes(tokens, 7, cache_salt=salt)


def test_chain_continues_behind_a_parent() -> None:
    tokens = list(range(64))
    hashes = block_hashes(tokens, 16, cache_salt="a")
    assert block_hashes(tokens[32:], 16, parent=hashes[1]) == hashes[2:]
    # The salt is the first block's; behind a parent it is in the parent already.
    assert block_hashes(tokens[32:], 16, parent=hashes[1], cache_salt="a") == hashes[2:]


def test_salt_changes_every_block_and_numpy_tokens_change_none() -> None:
    tokens = list(range(48))
    plain = block_hashes(tokens, 16)
    assert not set(plain) & set(block_hashes(tokens, 16, cache_salt="tenant"))
    assert block_hashes(np.array(tokens, dtype=np.int32), 16) == plain


def test_what_is_no_token_is_refused() -> None:
    with pytest.raises(BadRequest, match="negative"):
        block_hashes([1, -5], 2)
    with pytest.raises(TypeError):
        block_hashes([1.5], 1)  # type: ignore[list-item]
    with pytest.raises(BadRequest, match="0 tokens"):
        block_hashes([1], 0)


@given(st.lists(st.binary(min_size=9, max_size=9), max_size=20))
def test_column_behaves_as_the_list_of_its_keys(keys: list[bytes]) -> None:
    column = KeyColumn.of(keys, width=9)
    assert len(column) == len(keys)
    assert list(column) == keys
    assert [column[position] for position in range(-len(keys), len(keys))] == keys + keys
    assert list(column[1:4]) == keys[1:4]
    assert list(column[-2:]) == keys[-2:]
    with pytest.raises(IndexError):
        column[len(keys)]


@pytest.mark.parametrize(("nbytes", "width"), [(70, 7), (65, 65), (33, 32), (0, 0), (8, -8)])
def test_what_is_no_column_is_refused(nbytes: int, width: int) -> None:
    with pytest.raises(BadKeyColumn):
        KeyColumn(packed=bytes(nbytes), width=width)


def test_keys_of_different_width_make_no_column() -> None:
    with pytest.raises(BadKeyColumn, match="key 1 has 9 bytes"):
        KeyColumn.of([bytes(8), bytes(9)], width=8)
    with pytest.raises(ValueError, match="step"):
        KeyColumn(packed=bytes(64), width=8)[::2]

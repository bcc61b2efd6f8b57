"""Blocks of an instance: contiguous bytes, long runs, nothing lost, nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.errors import KvMemoryExhausted
from snowskin.engines.model.config import ModelConfig
from snowskin.engines.model.kv_memory import KvMemory

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_position=128,
)


def test_a_block_is_one_contiguous_range_of_layer_kv_head_token_dim():
    memory = KvMemory(CONFIG, 4, 16)
    memory.kv_BLKHTD[2, 1, 1, 0, 5] = torch.arange(8.0)
    begin = 2 * memory.block_nbytes + ((((1 * 2 + 1) * 2 + 0) * 16 + 5) * 8) * 4
    found = memory.host_view()[begin : begin + 32].view(np.float32)
    assert found.tolist() == list(range(8))
    assert memory.block_nbytes == 3 * 2 * 2 * 16 * 8 * 4
    assert memory.nbytes == len(memory.host_view()) == 4 * memory.block_nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_through_the_host_view_is_in_the_tensor(dtype):
    memory = KvMemory(CONFIG, 2, 4, dtype=dtype)
    memory.host_view()[memory.block_nbytes :] = 1
    assert memory.kv_BLKHTD[0].count_nonzero() == 0
    assert memory.kv_BLKHTD[1].count_nonzero() == memory.kv_BLKHTD[1].numel()


def test_memory_on_a_device_has_no_host_view():
    with pytest.raises(ValueError, match="no host view"):
        KvMemory(CONFIG, 1, 4, device="meta").host_view()


def test_a_zeroed_block_carries_nobodys_bytes():
    memory = KvMemory(CONFIG, 3, 4)
    memory.kv_BLKHTD.fill_(7.0)
    memory.zero(1)
    assert memory.kv_BLKHTD[1].count_nonzero() == 0
    assert (memory.kv_BLKHTD[[0, 2]] == 7.0).all()


def test_the_shortest_hole_that_fits_is_taken():
    memory = KvMemory(CONFIG, 10, 4)
    blocks = memory.allocate(10)
    memory.free(blocks[0:4])
    memory.free(blocks[6:8])
    assert memory.allocate(2) == [6, 7]
    assert memory.allocate(3) == [0, 1, 2]


def test_without_a_hole_that_fits_the_longest_ones_are_joined_in_few_runs():
    memory = KvMemory(CONFIG, 10, 4)
    blocks = memory.allocate(10)
    memory.free([*blocks[0:2], *blocks[3:4], *blocks[5:9]])
    assert memory.largest_free_run == 4
    assert memory.allocate(6) == [5, 6, 7, 8, 0, 1]


def test_a_growing_sequence_takes_the_block_behind_its_last_one():
    memory = KvMemory(CONFIG, 10, 4)
    blocks = memory.allocate(10)
    memory.free([*blocks[0:2], *blocks[4:10]])
    assert memory.allocate(2, after=3) == [4, 5]
    assert memory.allocate(1, after=2) == [0]


def test_exhaustion_says_the_numbers_and_takes_nothing():
    memory = KvMemory(CONFIG, 4, 4)
    memory.allocate(3)
    with pytest.raises(KvMemoryExhausted, match="2 KV blocks wanted, 1 of 4 free"):
        memory.allocate(2)
    assert memory.num_free == 1


@pytest.mark.parametrize("blocks", [[0, 0], [3], [-1], [4]])
def test_giving_back_what_is_not_held_is_refused_whole(blocks):
    memory = KvMemory(CONFIG, 4, 4)
    memory.allocate(3)
    with pytest.raises(ValueError, match="blocks"):
        memory.free([1, *blocks])
    assert memory.num_free == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 30)), max_size=60))
def test_no_block_is_lost_or_held_twice(steps):
    memory = KvMemory(CONFIG, 24, 1)
    held: list[list[int]] = []
    for num_blocks, give_back, choice in steps:
        if give_back and held:
            memory.free(held.pop(choice % len(held)))
        elif num_blocks <= memory.num_free:
            held.append(memory.allocate(num_blocks, after=choice if choice < 24 else None))
        memory.check()
        everything = [block for blocks in held for block in blocks]
        assert len(set(everything)) == len(everything) == 24 - memory.num_free
    for blocks in held:
        memory.free(blocks)
    assert memory.largest_free_run == 24

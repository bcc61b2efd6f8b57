"""Checksums: tied to namespace and key, the same however the bytes are cut."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from snowskin.kvstore import checksum as product
from snowskin.kvstore.checksum import (
    CHECKSUM_NBYTES,
    RunningChecksums,
    checksum,
    fold,
    fold_column,
)

NAMESPACE = bytes(range(32))


def crc_of_byte(byte: int) -> int:
    """Bit by bit, from RFC 3720's polynomial."""
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


BYTES = [crc_of_byte(byte) for byte in range(256)]


def crc32c(data: bytes, crc: int = 0) -> int:
    """An oracle that shares no code with the product."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ BYTES[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def test_crc_is_castagnolis():
    # RFC 3720, B.4: 32 bytes of zeros, and the bytes 0 to 31.
    assert checksum(b"", b"", bytes(32)) == (0x8A9136AA).to_bytes(4, "little")
    assert checksum(b"", b"", bytes(range(32))) == (0x46DD794E).to_bytes(4, "little")


@given(st.binary(max_size=80), st.binary(min_size=1, max_size=64), st.binary(max_size=200))
def test_record_is_crc_of_the_bytes_and_folds_of_the_names(namespace, key, data):
    folds = 0
    for text in (namespace, key):
        padded = text + bytes(-len(text) % 4)
        for start in range(0, len(padded), 4):
            folds ^= int.from_bytes(padded[start : start + 4], "little")
    assert checksum(namespace, key, data) == (crc32c(data) ^ folds).to_bytes(4, "little")


@pytest.mark.parametrize("nbytes", [255, 256, 257, 4103, 16383, 16385, 262151])
def test_crc_is_right_whichever_instructions_take_it(nbytes):
    """The library chooses its code by processor, size and alignment; records are compared across hosts."""
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + 64, dtype=np.uint8)
    for start in (0, 1, 7, 63):
        part = data[start : start + nbytes]
        expected = crc32c(part.tobytes())
        assert product.crc32c(part) == expected
        cut = nbytes // 3
        assert product.crc32c(part[cut:], product.crc32c(part[:cut])) == expected


@given(st.integers(8, 64), st.integers(0, 9), st.randoms(use_true_random=False))
def test_fold_of_a_column_is_the_fold_of_each_key(width, num_keys, random):
    keys = [random.randbytes(width) for _ in range(num_keys)]
    assert fold_column(b"".join(keys), width).tolist() == [fold(key) for key in keys]


def test_right_bytes_under_a_wrong_name_are_refused():
    data = b"bytes of a block"
    right = checksum(NAMESPACE, b"key-of-a", data)
    assert checksum(NAMESPACE, b"key-of-b", data) != right
    assert checksum(NAMESPACE[::-1], b"key-of-a", data) == right  # a fold is no hash: words' order
    assert checksum(b"other" + NAMESPACE[5:], b"key-of-a", data) != right


@given(
    block_nbytes=st.integers(1, 40),
    num_blocks=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 240), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_records_do_not_depend_on_how_the_bytes_are_cut(block_nbytes, num_blocks, cuts, seed):
    random = np.random.default_rng(seed)
    total = block_nbytes * num_blocks
    buffer = random.integers(0, 256, total, np.uint8)
    keys = random.bytes(8 * num_blocks)
    sums = RunningChecksums(buffer, block_nbytes)
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    for start, end in itertools.pairwise(edges):
        sums.landed(start, end - start)
    expected = b"".join(
        checksum(
            NAMESPACE,
            keys[8 * i : 8 * i + 8],
            buffer[i * block_nbytes : (i + 1) * block_nbytes].tobytes(),
        )
        for i in range(num_blocks)
    )
    assert sums.records(NAMESPACE, keys, 8).tobytes() == expected
    assert sums.mismatches(NAMESPACE, keys, 8, expected) == []


def test_blocks_may_lie_anywhere_in_the_buffer():
    buffer = np.arange(64, dtype=np.uint8)
    sums = RunningChecksums(buffer, 8)
    sums.landed(32, 8)
    sums.landed(0, 8)
    first, second = bytes(range(32, 40)), bytes(range(8))
    expected = checksum(b"", b"k" * 8, first) + checksum(b"", b"l" * 8, second)
    assert sums.records(b"", b"k" * 8 + b"l" * 8, 8).tobytes() == expected


def passed(num_blocks: int) -> tuple[RunningChecksums, bytes, bytes]:
    """(sums of so many blocks of 16 bytes, their keys, their records)."""
    buffer = np.arange(num_blocks * 16, dtype=np.uint8)
    keys = b"".join(b"key%05d" % i for i in range(num_blocks))
    sums = RunningChecksums(buffer, 16)
    sums.landed(0, buffer.nbytes)
    return sums, keys, sums.records(NAMESPACE, keys, 8).tobytes()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_wrong_block_is_found_by_its_index(index):
    sums, keys, records = passed(4)
    at = index * CHECKSUM_NBYTES
    spoiled = records[:at] + bytes([records[at] ^ 1]) + records[at + 1 :]
    assert sums.mismatches(NAMESPACE, keys, 8, spoiled) == [index]


def test_exchanged_blocks_are_both_wrong():
    sums, keys, records = passed(3)
    swapped = keys[8:16] + keys[:8] + keys[16:]
    assert sums.mismatches(NAMESPACE, swapped, 8, records) == [0, 1]


def test_block_that_did_not_pass_whole_is_wrong():
    buffer = np.zeros(48, np.uint8)
    sums = RunningChecksums(buffer, 16)
    sums.landed(0, 40)
    keys = b"k" * 24
    records = checksum(NAMESPACE, b"k" * 8, bytes(16)) * 3
    assert sums.mismatches(NAMESPACE, keys, 8, records) == [2]
    assert RunningChecksums(buffer, 16).mismatches(NAMESPACE, keys, 8, records) == [0, 1, 2]


def test_block_without_a_record_is_wrong():
    sums, keys, records = passed(3)
    assert sums.mismatches(NAMESPACE, keys, 8, records[:8]) == [2]

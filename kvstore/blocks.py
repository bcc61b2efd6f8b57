"""Blocks of tokens and their names: the hash chain, and columns of keys.

Rules kept here: a block's hash is SHA-256 over the canonical CBOR (RFC 8949, 4.2.1) of the array
[parent hash, [token ids], extra keys or null], so equal hashes mean equal prefixes; only full blocks
have a hash; a tenant's salt enters the first block as ["cache_salt", salt] and so changes all.

This is what vLLM calls `sha256_cbor`: for the same tokens, block size, extra keys, salt and seed of
the first parent the hashes are equal byte for byte (`tests/vectors/vllm_sha256_cbor.json`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from operator import index
from typing import TYPE_CHECKING, NewType, overload

import cbor2

from snowskin.kvstore.errors import BadKeyColumn, BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BlockHash = NewType("BlockHash", bytes)
ExtraKey = str | int | bytes | None | tuple["ExtraKey", ...]

HASH_NBYTES = 32
MIN_KEY_NBYTES = 8
MAX_KEY_NBYTES = 64


def none_hash(seed: str = "vllm-none-hash") -> BlockHash:
    """What stands for the parent of a first block; vLLM takes PYTHONHASHSEED as seed if it is set."""
    return BlockHash(sha256(cbor2.dumps(seed, canonical=True)).digest())


NONE_HASH = none_hash()


def block_hashes(
    token_ids: Iterable[int],
    block_size: int,
    *,
    parent: bytes | None = None,
    extra_keys: Sequence[ExtraKey] = (),
    cache_salt: str | None = None,
) -> list[BlockHash]:
    """Hashes of the full blocks of `token_ids`; what is left over has none.

    Args:
        token_ids: not negative (BadRequest); numpy integers are welcome.
        block_size: tokens in a block, at least 1 (BadRequest).
        parent: hash of the block before; None for a prompt's start.
        extra_keys: enter every block, e.g. `("lora", name, path)`.
        cache_salt: enters the first block of a prompt, behind the extra keys.
    """
    chain = BlockHashChain(block_size, parent=parent, extra_keys=extra_keys, cache_salt=cache_salt)
    return chain.extend(token_ids)


class BlockHashChain:
    """The hash chain of one growing sequence: tokens go in, full blocks' hashes come out."""

    __slots__ = ("_block_size", "_extra_keys", "_first_extra_keys", "_parent", "_pending")

    def __init__(
        self,
        block_size: int,
        *,
        parent: bytes | None = None,
        extra_keys: Sequence[ExtraKey] = (),
        cache_salt: str | None = None,
    ) -> None:
        """Begins behind `parent`, or, where that is None, at a prompt's start."""
        if block_size < 1:
            raise BadRequest(f"a block of {block_size} tokens", hint="use at least 1, usually 16")
        self._block_size = block_size
        self._parent = NONE_HASH if parent is None else parent
        self._extra_keys = tuple(extra_keys) or None
        self._first_extra_keys: tuple[ExtraKey, ...] | None = None
        if cache_salt is not None and parent is None:
            self._first_extra_keys = (*extra_keys, ("cache_salt", cache_salt))
        self._pending: list[int] = []

    @property
    def num_pending(self) -> int:
        """Tokens behind the last full block."""
        return len(self._pending)

    def extend(self, token_ids: Iterable[int]) -> list[BlockHash]:
        """Appends tokens; returns the hashes of the blocks that they filled, often none."""
        new = [index(token_id) for token_id in token_ids]
        if new and min(new) < 0:
            raise BadRequest(f"token id {min(new)} is negative")
        tokens = self._pending + new
        hashes: list[BlockHash] = []
        size, parent, extra_keys = self._block_size, self._parent, self._extra_keys
        num_full = len(tokens) - len(tokens) % size
        for start in range(0, num_full, size):
            keys = extra_keys
            if self._first_extra_keys is not None:
                keys, self._first_extra_keys = self._first_extra_keys, None
            block = (parent, tokens[start : start + size], keys)
            parent = sha256(cbor2.dumps(block, canonical=True)).digest()
            hashes.append(BlockHash(parent))
        self._parent = parent
        self._pending = tokens[num_full:]
        return hashes


def digest_number(name: bytes) -> int:
    """What a namespace or a key counts in the digest of a Watch: its first eight bytes, little-endian."""
    return int.from_bytes(name[:8], "little")


def digest_part(namespace_number: int, key: bytes) -> int:
    """What one block brings into the digest of a Watch, which is the XOR over all blocks.

    A sum, so that a key that several shards have leaves a trace in the XOR also where their number is even.
    """
    return (namespace_number + digest_number(key)) & 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyColumn:
    """Keys of consecutive blocks, in prefix order, in one `bytes`.

    A key is opaque: our own block hashes are 32 bytes wide, another engine's may be 8 to 64.
    An empty column is false, as an empty list is.

    Raises:
        BadKeyColumn: the width is out of range, or `packed` is not a whole number of keys.
    """

    packed: bytes = field(repr=False)
    width: int = HASH_NBYTES

    def __post_init__(self) -> None:
        if not MIN_KEY_NBYTES <= self.width <= MAX_KEY_NBYTES:
            raise BadKeyColumn(
                f"keys of {self.width} bytes",
                hint=f"a key has {MIN_KEY_NBYTES} to {MAX_KEY_NBYTES} bytes",
            )
        if len(self.packed) % self.width:
            raise BadKeyColumn(
                f"{len(self.packed)} bytes are no whole number of keys of {self.width} bytes",
                hint="pack one key behind the other, all of one width",
            )

    @classmethod
    def of(cls, keys: Iterable[bytes], *, width: int = HASH_NBYTES) -> KeyColumn:
        """Packs `keys`; BadKeyColumn where one has another width."""
        column = list(keys)
        for position, key in enumerate(column):
            if len(key) != width:
                raise BadKeyColumn(f"key {position} has {len(key)} bytes, not {width}")
        return cls(packed=b"".join(column), width=width)

    def __len__(self) -> int:
        return len(self.packed) // self.width

    @overload
    def __getitem__(self, at: int) -> bytes: ...

    @overload
    def __getitem__(self, at: slice) -> KeyColumn: ...

    def __getitem__(self, at: int | slice) -> bytes | KeyColumn:
        """One key, or the column of consecutive ones (a slice without step)."""
        width = self.width
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"a key column cannot be sliced by step {step}")
            return KeyColumn(packed=self.packed[start * width : stop * width], width=width)
        position = range(len(self))[at]  # counts from the end too, and raises IndexError
        return self.packed[position * width : (position + 1) * width]

    def __iter__(self) -> Iterator[bytes]:
        width, packed = self.width, self.packed
        return (packed[start : start + width] for start in range(0, len(packed), width))

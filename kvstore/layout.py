"""Layouts: what makes bytes mean something, and the namespace that this gives.

Rules kept here: two layouts have one namespace only if their bytes mean the same; a layout says
which rectangle of the model it holds (layers by KV heads), never a rank number, so that readers with
another tensor-parallel size can name what they need; blocks are block-major, one block contiguous:

    gqa   [layer][K, V][head][token][dim]      order BLKHTD
    mla   [layer][token][dim]                  order BLTD: one latent row a token, no heads, no pair

Namespace = SHA-256 over the canonical CBOR (RFC 8949, 4.2.1) of [domain tag, field, field, ...], all
fields in the order below, so that no two layouts can run together into one encoding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Literal

import cbor2

from snowskin.kvstore.errors import BadSetting

Attention = Literal["gqa", "mla"]
ByteOrder = Literal["little", "big"]

NAMESPACE_NBYTES = 32
DTYPE_NBYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}

_DOMAIN_TAG = "snowskin.layout.v1"
_ORDERS = {"gqa": "BLKHTD", "mla": "BLTD"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the KV bytes of a block are to be read, and what of the model they are.

    Attributes:
        model: the model's name; two models with one name differ by `weights_revision`.
        weights_revision: fingerprint of the weights, lower-case hex.
        dtype: of one element, a key of `DTYPE_NBYTES`.
        byte_order: of elements longer than one byte.
        block_size: tokens in a block.
        first_layer: first model layer held here.
        num_layers: layers held here.
        first_kv_head: first KV head held here; 0 for MLA.
        num_kv_heads: KV heads held here; 1 for MLA.
        head_dim: elements of one head's row; for MLA of the latent row.
        attention: `gqa` (K and V per head; MHA and MQA too) or `mla`.
        codec: how the bytes are coded; `raw` is as they lie in memory.
        order: of the axes; follows from `attention`.
    """

    model: str
    weights_revision: str
    dtype: str
    byte_order: ByteOrder = "little"
    block_size: int
    first_layer: int = 0
    num_layers: int
    first_kv_head: int = 0
    num_kv_heads: int
    head_dim: int
    attention: Attention = "gqa"
    codec: str = "raw"
    order: str = "BLKHTD"

    def __post_init__(self) -> None:
        if not self.model or not self.weights_revision:
            raise BadSetting("a layout names its model and the revision of its weights")
        if self.weights_revision.strip("0123456789abcdef"):
            raise BadSetting(f"weights revision {self.weights_revision!r} is not lower-case hex")
        if self.dtype not in DTYPE_NBYTES:
            known = ", ".join(DTYPE_NBYTES)
            raise BadSetting(f"unknown dtype {self.dtype!r}", hint=f"known are {known}")
        if self.byte_order not in ("little", "big") or self.codec != "raw":
            raise BadSetting(
                f"byte order {self.byte_order!r} with codec {self.codec!r}",
                hint="this build reads little and big, codec raw",
            )
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="use at least 1")
        for name in ("first_layer", "first_kv_head"):
            if getattr(self, name) < 0:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint="count from 0")
        if _ORDERS.get(self.attention) != self.order:
            raise BadSetting(
                f"attention {self.attention!r} with order {self.order!r}",
                hint="gqa lies in BLKHTD, mla in BLTD",
            )
        if self.attention == "mla" and (self.first_kv_head, self.num_kv_heads) != (0, 1):
            raise BadSetting("mla has one latent row a token", hint="use KV head 0, 1 in number")

    @property
    def item_nbytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_NBYTES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's row of one head."""
        return self.head_dim * self.item_nbytes

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block: [L, 2, H, T, D], or for MLA [L, T, D]."""
        if self.attention == "mla":
            return (self.num_layers, self.block_size, self.head_dim)
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next, per axis of `block_shape`."""
        strides = []
        step = self.item_nbytes
        for size in reversed(self.block_shape):
            strides.append(step)
            step *= size
        return tuple(reversed(strides))

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer of one block."""
        return self.block_strides[0]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self.num_layers * self.layer_nbytes

    @property
    def encoding(self) -> bytes:
        """Canonical CBOR of the domain tag and all fields, in the order of the class."""
        values = [getattr(self, each.name) for each in fields(self)]
        return cbor2.dumps([_DOMAIN_TAG, *values], canonical=True)

    @property
    def namespace(self) -> bytes:
        """32 bytes that name this layout on the wire and in every key."""
        return sha256(self.encoding).digest()

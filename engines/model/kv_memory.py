"""An instance's own KV memory: one block-major tensor, and which of its blocks are free.

Rules kept here: all bytes of one block are contiguous, `[layer][K/V][head][token][dim]`, so that a
run of blocks is one transfer; runs are kept as long as possible (best fit, neighbours joined),
because a contiguous run is one pull; a block is free or held, never both (`check`).

A tail (the last, partial block of a prompt) travels as its WHOLE block: the first t tokens of a
block are not contiguous in this layout. Whoever fills a block partly therefore zeroes it first
(`zero`), or bytes of the block's former owner would travel along.

Legend of shapes: B blocks, L layers, K the pair (K, V), H KV heads, T tokens of a block, D head
size.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from snowskin.engines.errors import KvMemoryExhausted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.engines.model.config import ModelConfig


class KvMemory:
    """KV blocks of one instance, allocated by index.

    Attributes:
        kv_BLKHTD: the one tensor; K is stored after rotation.
        block_size: tokens of a block.
        block_nbytes: bytes of one block over all layers.
        nbytes: bytes of the whole memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Takes zeroed memory for `num_blocks` blocks; host pages come at first touch."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.kv_BLKHTD = torch.zeros(
            (
                num_blocks,
                config.num_layers,
                2,
                config.num_kv_heads,
                block_size,
                config.head_dim,
            ),
            dtype=dtype,
            device=device,
        )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_nbytes = config.kv_block_nbytes(block_size=block_size, itemsize=dtype.itemsize)
        self.nbytes = self.block_nbytes * num_blocks
        # Free runs as (first block, length), sorted, never touching each other.
        self._runs: list[tuple[int, int]] = [(0, num_blocks)]
        self._is_free = np.ones(num_blocks, dtype=np.bool_)

    @property
    def dtype(self) -> torch.dtype:
        """Type of one element."""
        return self.kv_BLKHTD.dtype

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return int(self._is_free.sum())

    @property
    def largest_free_run(self) -> int:
        """Blocks of the longest contiguous free run."""
        return max((length for _, length in self._runs), default=0)

    def host_view(self) -> npt.NDArray[np.uint8]:
        """All bytes, flat, writable, shared with the tensor; block b is at `b * block_nbytes`.

        Raises:
            ValueError: the memory is not in host RAM.
        """
        if self.kv_BLKHTD.device.type != "cpu":
            raise ValueError(f"KV memory is on {self.kv_BLKHTD.device}, it has no host view")
        # Through a uint8 view: numpy has no bfloat16.
        return self.kv_BLKHTD.view(-1).view(torch.uint8).numpy()

    def allocate(self, num_blocks: int, *, after: int | None = None) -> list[int]:
        """Takes `num_blocks` blocks, in as few runs as the free space allows.

        Args:
            num_blocks: how many; 0 is an empty list.
            after: a block that the first one should follow directly, so that a growing sequence
                stays one run.

        Returns:
            Block indices in the order in which the sequence should use them.

        Raises:
            KvMemoryExhausted: fewer are free; nothing is taken.
        """
        if num_blocks < 0:
            raise ValueError(f"{num_blocks} blocks wanted")
        if num_blocks > self.num_free:
            raise KvMemoryExhausted(
                f"{num_blocks} KV blocks wanted, {self.num_free} of {self.num_blocks} free",
                hint="retry when a running sequence ends, or give the instance more KV memory",
                retry_after_s=1.0,
            )
        taken: list[int] = []
        if after is not None and num_blocks:
            position = bisect_left(self._runs, (after + 1, 0))
            if position < len(self._runs) and self._runs[position][0] == after + 1:
                self._take(position, num_blocks, taken)
        while len(taken) < num_blocks:
            self._take(self._best_run(num_blocks - len(taken)), num_blocks - len(taken), taken)
        return taken

    def free(self, block_ids: Sequence[int]) -> None:
        """Gives blocks back; their bytes stay until the next owner overwrites or zeroes them.

        Raises:
            ValueError: a block is free already, named twice, or not of this memory; nothing is
                given back.
        """
        blocks = sorted(block_ids)
        if len(set(blocks)) != len(blocks) or (
            blocks and not 0 <= blocks[0] <= blocks[-1] < self.num_blocks
        ):
            raise ValueError(f"blocks {blocks} repeat, or lie outside 0..{self.num_blocks - 1}")
        if self._is_free[blocks].any():
            raise ValueError(f"of blocks {blocks} some are free already")
        self._is_free[blocks] = True
        for block in blocks:
            self._give(block)

    def zero(self, block: int) -> None:
        """Overwrites one block with zeros, so that its unused tokens carry nobody's bytes."""
        self.kv_BLKHTD[block].zero_()

    def check(self) -> None:
        """Asserts that the runs are sorted, apart, and agree with the free map."""
        seen = np.zeros(self.num_blocks, dtype=np.bool_)
        end_before = -1
        for first, length in self._runs:
            assert length > 0, self._runs
            assert first > end_before, f"runs touch or overlap: {self._runs}"
            seen[first : first + length] = True
            end_before = first + length
        assert (seen == self._is_free).all(), "free runs and free map differ"

    def _best_run(self, num_blocks: int) -> int:
        """Position of the shortest run that holds `num_blocks`, or else of the longest one."""
        fitting = [
            (length, at) for at, (_, length) in enumerate(self._runs) if length >= num_blocks
        ]
        if fitting:
            return min(fitting)[1]
        return max(range(len(self._runs)), key=lambda at: self._runs[at][1])

    def _take(self, position: int, num_blocks: int, taken: list[int]) -> None:
        first, length = self._runs[position]
        count = min(length, num_blocks)
        self._runs[position : position + 1] = (
            [(first + count, length - count)] if count < length else []
        )
        self._is_free[first : first + count] = False
        taken.extend(range(first, first + count))

    def _give(self, block: int) -> None:
        first, length = block, 1
        position = bisect_left(self._runs, (block, 0))
        if position < len(self._runs) and self._runs[position][0] == block + 1:
            length += self._runs.pop(position)[1]
        if position and sum(self._runs[position - 1]) == block:
            before = self._runs.pop(position - 1)
            first, length, position = before[0], length + before[1], position - 1
        self._runs.insert(position, (first, length))

"""The decoder: one forward step over a batch of spans, KV cache in block-major memory.

Rules kept here: a span is the next tokens of one sequence, whose earlier K and V are already in
memory; the step writes K (rotated) and V of the new tokens, then attends to everything up to them;
only blocks that a span names are touched. Prefill chunks (many tokens) and decode steps (one token)
are spans alike, in any mix.

How it works: all tokens of all spans run packed through the matrix products; attention runs span by
span. A layer's K and V of one sequence are copied out of the block-major memory into a workspace
`[K/V][head][token][dim]`, and attended to there. Measured at 4,096 tokens of context, 12 layers x 4
KV heads x 64, one thread, a step's attention: 9-10 ms, of which the copy is 6 ms however scattered
the blocks are; without the copy, block by block through strided batched products, 15-23 ms.

Legend of shapes: T packed tokens, C hidden size, O rows of q, k and v together, H heads, N KV
heads, D head size, S context tokens, R spans, V vocabulary; `kv_BLKHTD` as in `kv_memory`.
"""

# ruff: noqa: N803, N806, N815  (tensors carry their shapes, see the legend)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from snowskin.engines.errors import BadPrompt, ModelUnsupported, PromptTooLong
from snowskin.engines.model.config import ModelConfig
from snowskin.engines.model.layers import (
    attend_many,
    attend_one,
    rms_norm,
    rope_frequencies,
    rope_table,
    rotate,
    swiglu,
)
from snowskin.engines.model.weights import LayerWeights, ModelWeights, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from snowskin.engines.model.kv_memory import KvMemory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The next tokens of one sequence.

    Attributes:
        token_ids: the new tokens, at least one.
        start: position of the first of them = tokens whose K and V are in memory already.
        block_ids: the sequence's blocks from position 0, enough for `start + len(token_ids)`
            tokens.
    """

    token_ids: Sequence[int] | npt.NDArray[np.int32]
    start: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one span's tokens lie: in the packed batch, and its context in memory."""

    first: int
    last: int
    start: int
    context: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """All that the layers share in one step."""

    places: tuple[_Place, ...]
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    blocks_T: torch.Tensor
    offsets_T: torch.Tensor


class LlamaModel:
    """A Llama-family decoder that keeps K and V in a `KvMemory`.

    Attributes:
        config: shape of the model.
        num_tokens_embedded: tokens that passed layer 0 since the model was made; work is accounted
            by it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Keeps `weights`, which must be of `dtype` and on `device` already."""
        if dtype not in DTYPES.values():
            raise ModelUnsupported(
                f"dtype {dtype} is not supported", hint=f"use {', '.join(DTYPES)}"
            )
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_tokens_embedded = 0
        self._weights = weights
        self._frequencies = rope_frequencies(config).to(self.device)
        self._workspace = torch.empty(0, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], memory: KvMemory) -> torch.Tensor:
        """Computes the spans and writes their K and V.

        Returns:
            float32 logits [R, V], of the LAST token of each span.

        Raises:
            BadPrompt: a span is empty, names a token outside the vocabulary, or too few or foreign
                blocks.
            PromptTooLong: a span reaches beyond `config.max_position`.
        """
        if not spans:
            return torch.empty((0, self.config.vocab_size), device=self.device)
        batch = self._packed(spans, memory)
        self.num_tokens_embedded += batch.tokens_T.shape[0]
        hidden_TC = self._weights.embedding_VC[batch.tokens_T]
        cos, sin = rope_table(batch.positions_T, self._frequencies, self.dtype)
        for index, layer in enumerate(self._weights.layers):
            normed_TC = rms_norm(hidden_TC, layer.attention_norm_C, self.config.rms_norm_eps)
            qkv_TO = functional.linear(normed_TC, layer.qkv_OC, layer.qkv_bias_O)
            q_THD, k_TND, v_TND = self._heads(qkv_TO, layer, cos, sin)
            kv_BKHTD = memory.kv_BLKHTD[:, index]
            kv_BKHTD[batch.blocks_T, :, :, batch.offsets_T] = torch.stack((k_TND, v_TND), dim=1)
            if index == len(self._weights.layers) - 1:
                # Only the last token of each span leaves the last layer: the rest of its work has
                # no reader.
                return self._finish(hidden_TC, q_THD, kv_BKHTD, batch.places, layer)
            mixed_TO = self._attend(q_THD, kv_BKHTD, batch.places)
            hidden_TC = self._after_attention(hidden_TC, mixed_TO, layer)
        raise AssertionError("a model has at least one layer")

    def _finish(
        self,
        hidden_TC: torch.Tensor,
        q_THD: torch.Tensor,
        kv_BKHTD: torch.Tensor,
        places: Sequence[_Place],
        layer: LayerWeights,
    ) -> torch.Tensor:
        last_R = torch.tensor([place.last - 1 for place in places], device=self.device)
        ends = tuple(
            _Place(row, row + 1, place.context - 1, place.context, place.blocks)
            for row, place in enumerate(places)
        )
        mixed_RO = self._attend(q_THD[last_R], kv_BKHTD, ends)
        hidden_RC = self._after_attention(hidden_TC[last_R], mixed_RO, layer)
        normed_RC = rms_norm(hidden_RC, self._weights.norm_C, self.config.rms_norm_eps)
        return functional.linear(normed_RC, self._weights.head_VC).float()

    def _heads(
        self, qkv_TO: torch.Tensor, layer: LayerWeights, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits q, k, v by head, normalises (Qwen3) and rotates q and k."""
        config = self.config
        heads = qkv_TO.view(qkv_TO.shape[0], -1, config.head_dim)
        q_THD, k_TND, v_TND = torch.split(
            heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_THD = rms_norm(q_THD, layer.q_norm_D, config.rms_norm_eps)
            k_TND = rms_norm(k_TND, layer.k_norm_D, config.rms_norm_eps)
        return rotate(q_THD, cos, sin), rotate(k_TND, cos, sin), v_TND

    def _after_attention(
        self, hidden_TC: torch.Tensor, mixed_TO: torch.Tensor, layer: LayerWeights
    ) -> torch.Tensor:
        hidden_TC = hidden_TC + functional.linear(mixed_TO, layer.o_CO, layer.o_bias_C)
        normed_TC = rms_norm(hidden_TC, layer.mlp_norm_C, self.config.rms_norm_eps)
        return hidden_TC + functional.linear(
            swiglu(functional.linear(normed_TC, layer.gate_up_IC)), layer.down_CI
        )

    def _attend(
        self, q_THD: torch.Tensor, kv_BKHTD: torch.Tensor, places: Sequence[_Place]
    ) -> torch.Tensor:
        """Attention of every span over its own context: [T, H * D]."""
        mixed_THD = torch.empty_like(q_THD)
        for place in places:
            k_NSD, v_NSD = self._gather(kv_BKHTD, place)
            if place.last - place.first == 1:
                mixed_THD[place.first] = attend_one(q_THD[place.first], k_NSD, v_NSD)
            else:
                mixed_THD[place.first : place.last] = attend_many(
                    q_THD[place.first : place.last], k_NSD, v_NSD, place.start
                )
        return mixed_THD.flatten(1)

    def _gather(self, kv_BKHTD: torch.Tensor, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a span's context, [N, S, D] each; valid until the next call."""
        _, _, num_kv_heads, block_size, head_dim = kv_BKHTD.shape
        num_blocks = len(place.blocks)
        wanted = 2 * num_kv_heads * num_blocks * block_size * head_dim
        if self._workspace.numel() < wanted:
            # A quarter more than needed, so that a growing context does not allocate at every step.
            self._workspace = torch.empty(wanted * 5 // 4, dtype=self.dtype, device=self.device)
        space = self._workspace[:wanted].view(2, num_kv_heads, num_blocks, block_size, head_dim)
        # one copy: attention wants each head's tokens contiguous, memory has them block by block
        torch.index_select(kv_BKHTD.permute(1, 2, 0, 3, 4), 2, place.blocks, out=space)
        k_NSD, v_NSD = space.view(2, num_kv_heads, num_blocks * block_size, head_dim).unbind()
        return k_NSD[:, : place.context], v_NSD[:, : place.context]

    def _packed(self, spans: Sequence[Span], memory: KvMemory) -> _Batch:
        """Checks the spans and lays their tokens side by side."""
        tokens, positions, blocks = [], [], []
        places: list[_Place] = []
        first = 0
        for span in spans:
            ids = np.asarray(span.token_ids, dtype=np.int64)
            table = np.asarray(span.block_ids, dtype=np.int64)
            context = span.start + len(ids)
            self._check_span(span, ids, table, memory)
            table = table[: -(-context // memory.block_size)]
            where = np.arange(span.start, context)
            tokens.append(ids)
            positions.append(where)
            blocks.append(table[where // memory.block_size])
            last = first + len(ids)
            held = torch.from_numpy(table).to(self.device)
            places.append(_Place(first, last, span.start, context, held))
            first = last
        positions_T = torch.from_numpy(np.concatenate(positions)).to(self.device)
        return _Batch(
            places=tuple(places),
            tokens_T=torch.from_numpy(np.concatenate(tokens)).to(self.device),
            positions_T=positions_T,
            blocks_T=torch.from_numpy(np.concatenate(blocks)).to(self.device),
            offsets_T=positions_T % memory.block_size,
        )

    def _check_span(
        self,
        span: Span,
        ids: npt.NDArray[np.int64],
        table: npt.NDArray[np.int64],
        memory: KvMemory,
    ) -> None:
        context = span.start + len(ids)
        if not len(ids) or span.start < 0:
            raise BadPrompt(
                f"a span of {len(ids)} tokens at position {span.start}",
                hint="a span holds at least one token, at position 0 or later",
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise BadPrompt(
                f"token {ids.min() if ids.min() < 0 else ids.max()} is outside the vocabulary of "
                f"{self.config.vocab_size}",
                hint="use the tokenizer of this model",
            )
        if context > self.config.max_position:
            raise PromptTooLong(
                f"position {context - 1} of {self.config.max_position} that the model knows",
                hint="shorten the prompt, or ask for fewer tokens",
            )
        if len(table) * memory.block_size < context:
            raise BadPrompt(
                f"{len(table)} blocks of {memory.block_size} tokens for {context} tokens",
                hint="allocate the sequence's blocks before the step",
            )
        if len(table) and not (table.min() >= 0 and table.max() < memory.num_blocks):
            raise BadPrompt(
                f"blocks {table.min()}..{table.max()}, memory has {memory.num_blocks}",
                hint="name blocks of the memory that the step runs on",
            )


def load_model(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    before_each: Callable[[], None] = lambda: None,
) -> LlamaModel:
    """Loads the Hugging Face model in `directory`; `before_each` tensor may raise, and so end it.

    Raises:
        ModelMissing: the directory, or a file that it needs, is not there.
        ModelCorrupt: configuration and weights contradict each other.
        ModelUnsupported: the model needs what this decoder does not compute.
    """
    config = ModelConfig.from_directory(directory)
    weights = load_weights(directory, config, dtype, device, before_each=before_each)
    return LlamaModel(config, weights, dtype, device)

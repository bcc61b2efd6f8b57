"""The decoder's arithmetic as free functions: normalisation, rotary positions, attention.

Rules kept here: no state and no blocks; statistics of RMSNorm and rotary tables are computed in
float32 as the reference implementations do, whatever the type of the rest; a query sees its own
position and all before it, which every mask here says in one way: key index <= start + query index.

Legend of shapes: T tokens of this step, S tokens of the context, H heads, N KV heads, G heads of
one KV head (H = N * G), D head size, C hidden size.
"""

# ruff: noqa: N803, N806  (tensors carry their shapes, see the legend)

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from snowskin.engines.model.config import ModelConfig, RopeScaling

# Queries attended at once where a mask is needed: bounds the mask, and skips most of the keys that
# a tile cannot see.
QUERY_TILE = 512


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich 2019), statistics in float32."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [D / 2] (Su et al. 2021)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return frequencies
    return _stretched(frequencies, config.rope_scaling)


def rope_table(
    positions_T: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, D] of every position, the two halves of a head alike."""
    angles = positions_T.float()[:, None] * frequencies[None, :]
    both = torch.cat((angles, angles), dim=-1)[:, None, :]
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary positions; dimension i pairs with i + D / 2, as in Hugging Face weights."""
    half = x_THD.shape[-1] // 2
    turned = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos + turned * sin


def attend_one(q_HD: torch.Tensor, k_NSD: torch.Tensor, v_NSD: torch.Tensor) -> torch.Tensor:
    """One query over its whole context: [H, D].

    The G heads of a KV head go in as G queries of it: no mask, and K is read once, not G times.
    """
    num_kv_heads = k_NSD.shape[0]
    q_NGD = q_HD.view(num_kv_heads, -1, q_HD.shape[-1])
    return functional.scaled_dot_product_attention(q_NGD[None], k_NSD[None], v_NSD[None])[
        0
    ].reshape(q_HD.shape)


def attend_many(
    q_THD: torch.Tensor, k_NSD: torch.Tensor, v_NSD: torch.Tensor, start: int
) -> torch.Tensor:
    """T queries at positions start.. over the context [0, start + T): [T, H, D]."""
    num_tokens, num_heads = q_THD.shape[:2]
    gqa = num_heads != k_NSD.shape[0]
    q_HTD = q_THD.transpose(0, 1)
    if start == 0:
        out = functional.scaled_dot_product_attention(
            q_HTD[None], k_NSD[None], v_NSD[None], is_causal=True, enable_gqa=gqa
        )
        return out[0].transpose(0, 1)
    tiles = []
    for first in range(0, num_tokens, QUERY_TILE):
        last = min(first + QUERY_TILE, num_tokens)
        seen = start + last
        mask_TS = torch.ones((last - first, seen), dtype=torch.bool, device=q_THD.device).tril(
            start + first
        )
        out = functional.scaled_dot_product_attention(
            q_HTD[None, :, first:last],
            k_NSD[None, :, :seen],
            v_NSD[None, :, :seen],
            attn_mask=mask_TS,
            enable_gqa=gqa,
        )
        tiles.append(out[0].transpose(0, 1))
    return torch.cat(tiles) if len(tiles) > 1 else tiles[0]


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both halves of the last dimension (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, a linear blend between."""
    waves = 2 * math.pi / frequencies
    slow = frequencies / scaling.factor
    turns = scaling.original_max_position / waves
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * slow + blend * frequencies
    is_long = turns < scaling.low_freq_factor
    is_short = turns > scaling.high_freq_factor
    return torch.where(is_long, slow, torch.where(is_short, frequencies, blended))

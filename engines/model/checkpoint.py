"""What a Hugging Face checkpoint of a decoder consists of: file names, tensor names, shapes.

Rules kept here: no torch, so that a process that only writes or checks a model starts fast; the
list is complete, so that a loader can refuse both what is missing and what is too much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snowskin.engines.model.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds, by its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, q_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if config.qkv_bias:
            of_layer |= {
                "self_attn.q_proj.bias": (q_size,),
                "self_attn.k_proj.bias": (kv_size,),
                "self_attn.v_proj.bias": (kv_size,),
            }
        if config.o_bias:
            of_layer["self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            of_layer |= {
                "self_attn.q_norm.weight": (config.head_dim,),
                "self_attn.k_norm.weight": (config.head_dim,),
            }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes

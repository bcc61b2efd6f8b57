"""What of `config.json` is read, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from snowskin.engines.errors import ModelCorrupt, ModelMissing, ModelUnsupported
from snowskin.engines.model.config import Json, ModelConfig, RopeScaling

LLAMA: dict[str, Json] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
    "torch_dtype": "bfloat16",
}
SCALING: dict[str, Json] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_follow_hugging_face():
    config = ModelConfig.from_json(LLAMA)
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (32, 10000.0, None)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (False, False, False)
    assert (config.eos_token_ids, config.stored_dtype) == ((7,), "bfloat16")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"attention_bias": True}, (True, True, False)),
        ({"model_type": "qwen2"}, (True, False, False)),
        ({"model_type": "qwen3"}, (False, False, True)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, True)),
    ],
)
def test_families_differ_in_plain_fields(changes, fields):
    config = ModelConfig.from_json({**LLAMA, **changes})
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == fields


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALING},
        {"rope_theta": 5e5, "rope_scaling": {**SCALING, "rope_type": None, "type": "llama3"}},
        {"rope_parameters": {**SCALING, "rope_theta": 5e5}},
        {"rope_parameters": {**SCALING, "rope_theta": 5e5}, "rope_scaling": None},
    ],
)
def test_both_spellings_of_rotary_settings_mean_the_same(spelling):
    config = ModelConfig.from_json({**LLAMA, **spelling})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("absent", [(), ("num_key_value_heads",), ("head_dim",), ("rms_norm_eps",)])
@pytest.mark.parametrize("null", [False, True])
def test_a_key_that_is_not_there_means_what_it_means_to_transformers(family, absent, null):
    transformers = pytest.importorskip("transformers")
    raw: dict[str, Json] = {
        **LLAMA,
        "model_type": family,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 16,
        "head_dim": 48,
        "rms_norm_eps": 1e-5,
    }
    for key in absent:
        del raw[key]
        if null and (family, key) not in {("qwen3", "head_dim"), (family, "rms_norm_eps")}:
            raw[key] = None  # of the others transformers makes nothing
    config = ModelConfig.from_json(raw)
    reference = transformers.AutoConfig.for_model(**raw)
    head_dim = getattr(reference, "head_dim", None) or 4096 // 64
    assert (config.num_kv_heads, config.head_dim) == (reference.num_key_value_heads, head_dim)
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rope_theta == reference.rope_parameters["rope_theta"]


def test_a_sliding_window_that_is_not_used_is_no_obstacle():
    for window in (4096, None):
        changes: dict[str, Json] = {
            "model_type": "qwen2",
            "use_sliding_window": False,
            "sliding_window": window,
            "max_window_layers": 1,
            "layer_types": ["full_attention"] * 3,
        }
        assert ModelConfig.from_json({**LLAMA, **changes}).num_layers == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [8, 8]}}, "mrope_section"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"head_dim": 33}, "head_dim"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(ModelUnsupported, match=named):
        ModelConfig.from_json({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"num_attention_heads": 0, "num_key_value_heads": 1}, "num_heads"),
    ],
)
def test_contradictory_sizes_are_refused(changes, named):
    with pytest.raises(ModelCorrupt, match=named):
        ModelConfig.from_json({**LLAMA, **changes})


def test_end_tokens_of_both_files_count_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": [7, 8]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (7, 8, 9)


def test_a_missing_directory_or_file_says_what_is_needed(tmp_path):
    with pytest.raises(ModelMissing, match="no model directory"):
        ModelConfig.from_directory(tmp_path / "nowhere")
    with pytest.raises(ModelMissing, match=r"holds no config\.json"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_a_typed_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelCorrupt):
        ModelConfig.from_directory(tmp_path)


def test_what_is_no_file_is_a_typed_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelCorrupt, match="cannot be read: Is a directory"):
        ModelConfig.from_directory(tmp_path)


def test_block_bytes_are_layers_times_k_and_v_times_heads():
    config = ModelConfig.from_json(LLAMA)
    assert config.kv_block_nbytes(block_size=16, itemsize=4) == 3 * 2 * 2 * 16 * 32 * 4

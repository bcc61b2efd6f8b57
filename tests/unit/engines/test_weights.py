"""Loading a checkpoint: files, shards, and what is wrong with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from snowskin.engines.errors import ModelCorrupt, ModelMissing
from snowskin.engines.model.config import ModelConfig
from snowskin.engines.model.random_model import make_random_model
from snowskin.engines.model.weights import fingerprint, load_weights

if TYPE_CHECKING:
    from pathlib import Path

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_random_model(
        tmp_path / "m", layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64
    )


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def load(directory: Path):
    return load_weights(directory, ModelConfig.from_directory(directory))


def shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_q_k_v_and_gate_up_are_fused_in_this_order(directory):
    tensors = load_file(directory / "model.safetensors")
    layer = load(directory).layers[1]
    prefix = "model.layers.1."
    assert torch.equal(
        layer.qkv_OC,
        torch.cat([tensors[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]),
    )
    assert torch.equal(
        layer.gate_up_IC,
        torch.cat([tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]),
    )


def test_shards_load_as_one_file_does(directory):
    whole = load(directory)
    shard(directory)
    parts = load(directory)
    assert torch.equal(whole.head_VC, parts.head_VC)
    assert torch.equal(whole.layers[0].down_CI, parts.layers[0].down_CI)


def test_a_missing_shard_is_named(directory):
    shard(directory)
    (directory / "b.safetensors").unlink()
    with pytest.raises(ModelMissing, match=r"b\.safetensors"):
        load(directory)


def test_an_index_that_points_outside_is_refused(directory):
    index = {"weight_map": {"lm_head.weight": "../m/model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelCorrupt, match="outside"):
        load(directory)


def test_a_directory_without_weights_says_what_is_needed(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelMissing, match="safetensors"):
        load(directory)


def test_a_missing_tensor_is_named(directory):
    rewrite(directory, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelCorrupt, match=UP):
        load(directory)


def test_an_unexpected_tensor_is_named(directory):
    rewrite(directory, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(ModelCorrupt, match="stray"):
        load(directory)


def test_old_rotary_tables_are_no_unexpected_tensors(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(8)}))
    load(directory)


def test_a_wrong_shape_is_named_with_both(directory):
    rewrite(directory, lambda tensors: tensors.update({UP: torch.zeros(64, 31)}))
    with pytest.raises(ModelCorrupt, match=r"\[64, 31\], config.json says \[64, 32\]"):
        load(directory)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_a_typed_error(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelCorrupt, match="no safetensors"):
        load(directory)


def test_a_truncated_file_is_a_typed_error(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelCorrupt, match="no safetensors"):
        load(directory)


def test_tied_embeddings_are_one_tensor(directory):
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load(directory)
    assert weights.head_VC is weights.embedding_VC


def test_the_fingerprint_covers_every_byte_of_config_and_weights(directory):
    seen = {fingerprint(directory)}
    for name in ("config.json", "model.safetensors"):
        path = directory / name
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        # config.json's last letter but one is its brace: put it back, or it is no JSON.
        if name == "config.json":
            path.write_bytes(path.read_bytes()[:-2] + b" }\n")
        seen.add(fingerprint(directory))
    assert len(seen) == 3
    assert all(len(digest) == 32 for digest in seen)


def test_the_fingerprint_is_the_same_for_a_copy(directory, tmp_path):
    copy = make_random_model(
        tmp_path / "copy", layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64
    )
    assert fingerprint(copy) == fingerprint(directory)


def test_loading_and_naming_end_at_once_where_they_are_not_wanted_any_more(directory):
    class Unwanted(Exception):
        pass

    steps = iter([None, None])

    def before_each():
        if next(steps, Unwanted) is Unwanted:
            raise Unwanted

    with pytest.raises(Unwanted):
        load_weights(directory, ModelConfig.from_directory(directory), before_each=before_each)
    with pytest.raises(Unwanted):
        fingerprint(directory, before_each=before_each)

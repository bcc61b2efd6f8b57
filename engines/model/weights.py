"""A decoder's weights: from safetensors files into fused matrices.

Rules kept here: what the files hold must be exactly what `config.json` promises, by name and by
shape, and this is checked before a byte is loaded; q, k, v become one matrix and gate, up another,
so that a layer is four matrix products; nothing is unpickled, ever.

Legend of shapes: V vocabulary, C hidden size, O rows of q, k and v together, I intermediate size, D
head size.
"""

# ruff: noqa: N806, N815  (tensors carry their shapes, see the legend)

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from snowskin.engines.errors import ModelCorrupt, ModelMissing
from snowskin.engines.model.checkpoint import INDEX_FILE, SINGLE_FILE, expected_shapes
from snowskin.engines.model.config import ModelConfig, read_json

Loader = Callable[[str], torch.Tensor]


def _go_on() -> None:
    """Loading is always wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], as `torch.nn.functional.linear` takes them."""

    attention_norm_C: torch.Tensor
    qkv_OC: torch.Tensor
    qkv_bias_O: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    o_CO: torch.Tensor
    o_bias_C: torch.Tensor | None
    mlp_norm_C: torch.Tensor
    gate_up_IC: torch.Tensor
    down_CI: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All of a decoder; `head_VC` is `embedding_VC` where the two are tied."""

    embedding_VC: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_C: torch.Tensor
    head_VC: torch.Tensor


def load_weights(
    directory: Path | str,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    before_each: Callable[[], None] = _go_on,
) -> ModelWeights:
    """Loads a checkpoint, one file or shards with an index, as `dtype` on `device`.

    `before_each` is called before each tensor; what it raises ends the load.

    Raises:
        ModelMissing: no directory, no safetensors file in it, or a shard that the index names is
            not there.
        ModelCorrupt: a file is no safetensors file; a tensor is missing, unexpected, or of another
            shape.
    """
    directory = Path(directory)
    files = weight_files(directory)
    file_of = _tensor_files(files)
    _check_tensors(file_of, files, expected_shapes(config), tied=config.tie_word_embeddings)

    def load(name: str) -> torch.Tensor:
        before_each()
        with _opened(file_of[name]) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.to(device=device, dtype=dtype)

    embedding_VC = load("model.embed_tokens.weight")
    return ModelWeights(
        embedding_VC=embedding_VC,
        layers=tuple(_load_layer(load, config, layer) for layer in range(config.num_layers)),
        norm_C=load("model.norm.weight"),
        head_VC=embedding_VC if config.tie_word_embeddings else load("lm_head.weight"),
    )


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted by name.

    Raises:
        ModelMissing: none is there, or one that the index names is not.
        ModelCorrupt: the index cannot be read, or names a file outside the directory.
    """
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelCorrupt(
                f"{directory / INDEX_FILE} has no weight_map", hint=f"copy {INDEX_FILE} anew"
            )
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = [SINGLE_FILE]
    if any(Path(name).name != name for name in names):
        raise ModelCorrupt(
            f"{directory / INDEX_FILE} names a file outside the model directory: {names}",
            hint="do not load this model: its index is not of an ordinary checkpoint",
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelMissing(
            f"{directory} holds no {', '.join(missing)}",
            hint="copy the model's safetensors files there; other formats are not read",
        )
    return [directory / name for name in names]


def fingerprint(directory: Path | str, *, before_each: Callable[[], None] = _go_on) -> bytes:
    """SHA-256 over `config.json` and the whole contents of the weight files: 32 bytes.

    Files enter in sorted order, each as name and contents, both prefixed by their length (8 bytes,
    little-endian). `before_each` is called before each piece of 4 MiB; what it raises ends it.

    Raises:
        ModelMissing: a file is not there.
    """
    directory = Path(directory)
    read_json(directory, "config.json")
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *weight_files(directory)]):
        name = path.name.encode()
        digest.update(len(name).to_bytes(8, "little") + name)
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                before_each()
                digest.update(piece)
    return digest.digest()


def _load_layer(load: Loader, config: ModelConfig, layer: int) -> LayerWeights:
    def of(name: str) -> torch.Tensor:
        return load(f"model.layers.{layer}.{name}")

    def fused(template: str, *parts: str) -> torch.Tensor:
        return torch.cat([of(template.format(part)) for part in parts])

    return LayerWeights(
        attention_norm_C=of("input_layernorm.weight"),
        qkv_OC=fused("self_attn.{}_proj.weight", "q", "k", "v"),
        qkv_bias_O=fused("self_attn.{}_proj.bias", "q", "k", "v") if config.qkv_bias else None,
        q_norm_D=of("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm_D=of("self_attn.k_norm.weight") if config.qk_norm else None,
        o_CO=of("self_attn.o_proj.weight"),
        o_bias_C=of("self_attn.o_proj.bias") if config.o_bias else None,
        mlp_norm_C=of("post_attention_layernorm.weight"),
        gate_up_IC=fused("mlp.{}_proj.weight", "gate", "up"),
        down_CI=of("mlp.down_proj.weight"),
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelCorrupt(
            f"{path} is no safetensors file: {error}", hint="copy the file anew"
        ) from error


def _tensor_files(files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor, from the files' own headers: an index can lie."""
    file_of: dict[str, Path] = {}
    for path in files:
        with _opened(path) as tensors:
            file_of |= dict.fromkeys(tensors.keys(), path)
    return file_of


def _check_tensors(
    file_of: Mapping[str, Path],
    files: list[Path],
    expected: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
) -> None:
    where = files[0].parent
    missing = sorted(expected.keys() - file_of.keys())
    if missing:
        raise ModelCorrupt(
            f"{where}: {len(missing)} tensors are missing, first {', '.join(missing[:3])}",
            hint="copy all shards of the checkpoint; config.json must be of the same model",
        )
    # Old checkpoints carry rotary tables; tied ones may carry the head twice. Both are computed or
    # shared here.
    known = expected.keys() | ({"lm_head.weight"} if tied else set())
    unexpected = sorted(
        name for name in file_of.keys() - known if not name.endswith("rotary_emb.inv_freq")
    )
    if unexpected:
        raise ModelCorrupt(
            f"{where}: {len(unexpected)} tensors are unexpected, first {', '.join(unexpected[:3])}",
            hint="config.json does not describe these weights: take both from the same model",
        )
    for path in files:
        with _opened(path) as tensors:
            for name in tensors.keys() & expected.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise ModelCorrupt(
                        f"{path}: {name} is {list(shape)}, config.json says {list(expected[name])}",
                        hint="take config.json and weights from the same model",
                    )

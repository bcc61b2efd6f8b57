"""The shape of a decoder, read from a Hugging Face `config.json`.

Rules kept here: a key that would change the result and that this decoder does not compute is
refused by name, never ignored; a key that is not there means what it means to `transformers`; the
families differ only in plain fields (`qkv_bias`, `o_bias`,
`qk_norm`), so that the layers know no family. Both spellings of rotary settings are read:
`rope_theta` with `rope_scaling` (transformers before 5) and `rope_parameters` (from 5 on).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from snowskin.engines.errors import ModelCorrupt, ModelMissing, ModelUnsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

FAMILIES = ("llama", "qwen2", "qwen3")

# What a key that is not there means, where that follows from no other key.
_FAMILY_DEFAULTS: dict[str, dict[str, Json]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# All that a rotary setting may say; whatever else it says would change the result.
_ROPE_KEYS = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
    | {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
)

# Keys that change the result: the decoder computes only the values named here.
_ONLY_VALUES: dict[str, tuple[Json, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of low rotary frequencies; fields as in `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the layers need to know of a model; sizes count elements, never bytes."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses sizes that no decoder can have.

        Raises:
            ModelCorrupt: a size is not positive, or the sizes contradict each other.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ModelCorrupt(
                    f"config.json: {name} is {getattr(self, name)}, must be at least 1",
                    hint="copy the model's config.json anew",
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelCorrupt(
                f"config.json: {self.num_heads} heads, no multiple of {self.num_kv_heads} KV heads",
                hint="check num_attention_heads and num_key_value_heads",
            )
        if self.head_dim % 2:
            raise ModelUnsupported(
                f"config.json: head_dim {self.head_dim} is odd",
                hint="rotary positions need an even one",
            )

    @classmethod
    def from_directory(cls, directory: Path | str) -> ModelConfig:
        """Reads `config.json`, and of `generation_config.json`, if there, the end tokens.

        Raises:
            ModelMissing: no such directory, or no `config.json` in it.
            ModelCorrupt: a file is not JSON, or misses a key.
            ModelUnsupported: the model needs what this decoder does not compute; the message names
                the key.
        """
        directory = Path(directory)
        raw = read_json(directory, "config.json")
        generation: Mapping[str, Json] = {}
        if (directory / "generation_config.json").is_file():
            generation = read_json(directory, "generation_config.json")
        return cls.from_json(raw, generation)

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Json], generation: Mapping[str, Json] | None = None
    ) -> ModelConfig:
        """The same from parsed JSON; `generation` names more end-of-sequence tokens."""
        family = str(raw.get("model_type"))
        if family not in FAMILIES:
            raise ModelUnsupported(
                f"config.json: model_type {family!r} is not supported",
                hint=f"supported families: {', '.join(FAMILIES)}",
            )
        raw = {**_FAMILY_DEFAULTS[family], **raw}
        _refuse_foreign_values(raw)
        num_heads = _int(raw, "num_attention_heads")
        hidden_size = _int(raw, "hidden_size")
        rope_theta, rope_scaling = _rope(raw)
        attention_bias = bool(raw.get("attention_bias", False))
        end_tokens = dict.fromkeys(
            (*_token_ids(raw, "eos_token_id"), *_token_ids(generation or {}, "eos_token_id"))
        )
        return cls(
            family=family,
            vocab_size=_int(raw, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_int(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_int(raw, "num_key_value_heads", default=num_heads),
            head_dim=_int(raw, "head_dim", default=hidden_size // max(num_heads, 1)),
            intermediate_size=_int(raw, "intermediate_size"),
            max_position=_int(raw, "max_position_embeddings"),
            rms_norm_eps=_float(raw, "rms_norm_eps", default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            # Qwen2 has a bias on q, k, v without a key for it, and never one on o.
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family != "qwen2" and attention_bias,
            qk_norm=family == "qwen3",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(end_tokens),
            stored_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )

    def kv_block_nbytes(self, *, block_size: int, itemsize: int) -> int:
        """Bytes of one block over all layers: `[layer][K/V][head][token][dim]`."""
        return self.num_layers * 2 * self.num_kv_heads * block_size * self.head_dim * itemsize


def read_json(directory: Path, name: str) -> Mapping[str, Json]:
    """The JSON object in `directory / name`.

    Raises:
        ModelMissing: no such directory or file.
        ModelCorrupt: not a JSON object, or not to be read.
    """
    path = directory / name
    if not directory.is_dir():
        raise ModelMissing(
            f"no model directory at {directory}",
            hint="name a Hugging Face model directory: config.json, *.safetensors, tokenizer.json",
        )
    try:
        parsed = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelMissing(
            f"{directory} holds no {name}", hint=f"copy {name} of the same model into the directory"
        ) from None
    except OSError as error:
        raise ModelCorrupt(
            f"{path} cannot be read: {error.strerror}", hint=f"make {name} a file that we may read"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelCorrupt(f"{path} is not JSON: {error}", hint=f"copy {name} anew") from error
    if not isinstance(parsed, dict):
        raise ModelCorrupt(f"{path} holds no JSON object", hint=f"copy {name} anew")
    return cast("dict[str, Json]", parsed)


def _refuse_foreign_values(raw: Mapping[str, Json]) -> None:
    for key, known in _ONLY_VALUES.items():
        if key in raw and raw[key] not in known:
            raise ModelUnsupported(
                f"config.json: {key} = {raw[key]!r} is not supported",
                hint=f"this decoder computes {key} in {list(known)}",
            )
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise ModelUnsupported(
            "config.json: layer_types holds other than full_attention",
            hint="this decoder attends to the whole context in every layer",
        )


def _rope(raw: Mapping[str, Json]) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from either spelling."""
    parameters = raw.get("rope_parameters")
    scaling = parameters if isinstance(parameters, dict) else raw.get("rope_scaling")
    if not isinstance(scaling, dict):
        return _float(raw, "rope_theta", default=10000.0), None
    theta_from = scaling if "rope_theta" in scaling else raw
    theta = _float(theta_from, "rope_theta", default=10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if _float(scaling, "partial_rotary_factor", default=1.0) != 1.0:
        raise ModelUnsupported(
            "config.json: partial_rotary_factor is not 1, which is not supported",
            hint="this decoder rotates whole heads",
        )
    if kind not in ("default", "llama3"):
        raise ModelUnsupported(
            f"config.json: rope_type = {kind!r} is not supported", hint="supported: default, llama3"
        )
    foreign = sorted(scaling.keys() - _ROPE_KEYS)
    if foreign:  # one setting for each kind of layer, or a rule of another model
        raise ModelUnsupported(
            f"config.json: {', '.join(foreign)} among the rotary settings is not supported",
            hint=f"this decoder knows {', '.join(sorted(_ROPE_KEYS))}",
        )
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=_float(scaling, "factor"),
        low_freq_factor=_float(scaling, "low_freq_factor"),
        high_freq_factor=_float(scaling, "high_freq_factor"),
        original_max_position=_int(
            scaling,
            "original_max_position_embeddings",
            default=_int(raw, "max_position_embeddings"),
        ),
    )


def _token_ids(raw: Mapping[str, Json], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if isinstance(token, int))


def _int(raw: Mapping[str, Json], key: str, *, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelCorrupt(
            f"config.json: {key} is {value!r}, must be an integer", hint="copy config.json anew"
        )
    return value


def _float(raw: Mapping[str, Json], key: str, *, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelCorrupt(
            f"config.json: {key} is {value!r}, must be a number", hint="copy config.json anew"
        )
    return float(value)

"""A random decoder on disk, in the same format as a real one, for demos and tests with teeth.

Rules kept here: the same parameters make the same bytes, in one step (a directory is whole or not
there); one wrong KV block changes the greedy text; every generated text is made of tokens that its
own text turns back into, so that the next turn of a conversation begins with exactly the tokens of
this one.

How the second holds: hidden matrices have std `HIDDEN_GAIN / sqrt(fan-in)`, so that attention
scores have std `HIDDEN_GAIN ** 2` and a query looks at few tokens of its own choice (flatter
attention averages the context away: the text becomes one repeated letter); what attention adds in
layer l grows with sqrt(l + 1), as the sum that it is added to does, so that the last layers count;
logits have std `LOGIT_STD`, so that rounding (about 1e-4) does not matter. Texts that changed, 64
tokens behind a context of real text, one wrong block of 16 tokens:

    model, context           zeroed   another's   late by a row   K, V of a layer   of the last layer
    4 x 256, 8/4 heads of 32
      130 tokens            100/100     100/100         100/100           100/100             100/100
      500 tokens            100/100     100/100         100/100           100/100              99/100
      2,000 tokens           99/100     100/100          76/100            90/100              80/100
    4 x 256, 4/2 of 64, 500 100/100     100/100          99/100           100/100              97/100
    the defaults, 500         60/60       60/60           60/60             60/60               60/60

A whole segment read late by a row changed every text. More heads see more; two blocks exchanged
change nothing, because K is stored after rotation. `tests/unit/engines/test_random_model.py` keeps
a small form of this measurement.

How the third holds: a token is a byte, there are no merges, and only printable ASCII without `<`
has a row in the head that is not zero: no special token is generated or spelled out.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from snowskin.engines.model.checkpoint import SINGLE_FILE, expected_shapes
from snowskin.engines.model.config import FAMILIES, Json, ModelConfig
from snowskin.kvstore.errors import BadSetting

STAMP_FILE = "random_model.json"
# Part of the stamp: raise it when the same parameters would make other bytes.
_FORMAT = 2

HIDDEN_GAIN = 1.9
LOGIT_STD = 16.0

NUM_BYTE_TOKENS = 256
ROLES = ("system", "user", "assistant")
END_TOKEN = "</s>"  # noqa: S105  (no password: the end of a message)
SPECIAL_TOKENS = (*(f"<|{role}|>" for role in ROLES), END_TOKEN)
VOCAB_SIZE = 64 * math.ceil((NUM_BYTE_TOKENS + len(SPECIAL_TOKENS)) / 64)
END_TOKEN_ID = NUM_BYTE_TOKENS + SPECIAL_TOKENS.index(END_TOKEN)
GENERATED_TOKENS = tuple(byte for byte in range(32, 127) if byte != ord("<"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is not system, user or assistant') }}"
    "{% endif %}"
    "{% if message['content'] is not string %}"
    "{{ raise_exception('content must be text') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What decides every byte of the model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_position: int
    seed: int
    architecture: str


def make_random_model(
    directory: Path | str,
    *,
    layers: int = 12,
    hidden: int = 512,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    intermediate: int = 1536,
    max_position: int = 16384,
    seed: int = 0,
    architecture: str = "llama",
) -> Path:
    """Writes a random model into `directory`, or returns at once where the same one lies already.

    The defaults give 38 M parameters, 152 MB in float32.

    Args:
        directory: made, or replaced if it holds a random model of other parameters.
        layers: decoder layers.
        hidden: hidden size.
        heads: query heads.
        kv_heads: KV heads, a divisor of `heads`.
        head_dim: size of a head, even.
        intermediate: inner size of the MLP.
        max_position: longest sequence, prompt and answer together.
        seed: of the weights.
        architecture: `llama`, `qwen2` or `qwen3`.

    Returns:
        The directory.

    Raises:
        BadSetting: the directory holds something else, which is not touched; or `architecture` is
            unknown.
        ModelCorrupt: the sizes contradict each other.
    """
    directory = Path(directory)
    if architecture not in FAMILIES:
        raise BadSetting(
            f"architecture {architecture!r} is unknown", hint=f"use one of {', '.join(FAMILIES)}"
        )
    recipe = _Recipe(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        max_position=max_position,
        seed=seed,
        architecture=architecture,
    )
    if _stamp_in(directory) == _stamp(recipe):
        return directory
    if directory.exists() and _stamp_in(directory) is None and any(directory.iterdir()):
        raise BadSetting(
            f"{directory} holds files that no random model consists of",
            hint="name a new directory: this one is not overwritten",
        )
    config = ModelConfig.from_json(_config_json(recipe))
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write(made, recipe, config)
        _put_in_place(made, directory, recipe)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return directory


def _write(directory: Path, recipe: _Recipe, config: ModelConfig) -> None:
    save_file(_tensors(recipe, config), directory / SINGLE_FILE, metadata={"format": "pt"})
    _tokenizer().save(str(directory / "tokenizer.json"))
    files: dict[str, dict[str, Json]] = {
        "config.json": _config_json(recipe),
        "generation_config.json": {"eos_token_id": END_TOKEN_ID, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_TOKEN,
            "model_max_length": recipe.max_position,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        STAMP_FILE: _stamp(recipe),
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    directory.chmod(0o755)  # mkdtemp's 0700 would hide the model from other users


def _put_in_place(made: Path, directory: Path, recipe: _Recipe) -> None:
    """Renames the finished model to its name; of two makers at once, the first one's stays."""
    if _stamp_in(directory) not in (None, _stamp(recipe)):
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        directory.rename(old)  # onto an empty directory: allowed, and atomic
        shutil.rmtree(old)
    try:
        made.rename(directory)
    except OSError:
        if _stamp_in(directory) != _stamp(recipe):
            raise


def _tensors(recipe: _Recipe, config: ModelConfig) -> dict[str, np.ndarray[tuple[int, ...]]]:
    """Every tensor that the checkpoint holds, float32, drawn in a fixed order."""
    random = np.random.Generator(np.random.Philox(recipe.seed))

    def normal(shape: tuple[int, ...], std: float) -> np.ndarray[tuple[int, ...]]:
        values: np.ndarray[tuple[int, ...]] = random.standard_normal(shape, dtype=np.float32)
        return values * np.float32(std)

    tensors = {}
    for name, shape in sorted(expected_shapes(config).items()):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Normalised heads lose the gain of their projection; this gives it back.
            tensors[name] = np.full(shape, HIDDEN_GAIN, dtype=np.float32)
        elif name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, dtype=np.float32)
        elif name == "model.embed_tokens.weight" or name.endswith(".bias"):
            tensors[name] = normal(shape, 1.0)
        elif name == "lm_head.weight":
            head = normal(shape, LOGIT_STD / math.sqrt(shape[-1]))
            silent = np.setdiff1d(np.arange(shape[0]), GENERATED_TOKENS)
            head[silent] = 0.0
            tensors[name] = head
        else:
            std = HIDDEN_GAIN / math.sqrt(shape[-1])
            if name.endswith("o_proj.weight"):
                layer = int(name.split(".")[2])
                std *= math.sqrt(layer + 1)
            tensors[name] = normal(shape, std)
    return tensors


def _config_json(recipe: _Recipe) -> dict[str, Json]:
    architectures: list[Json] = [f"{recipe.architecture.capitalize()}ForCausalLM"]
    return {
        "architectures": architectures,
        "model_type": recipe.architecture,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": recipe.intermediate,
        "max_position_embeddings": recipe.max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN_ID,
        "torch_dtype": "float32",
    }


def _tokenizer() -> FastTokenizer:
    """One token per byte, its id the byte; the special tokens behind them."""
    letters = _byte_letters()
    tokenizer = FastTokenizer(
        models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, the others for the letters from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _stamp(recipe: _Recipe) -> dict[str, Json]:
    return {"format": _FORMAT, **asdict(recipe)}


def _stamp_in(directory: Path) -> dict[str, Json] | None:
    """The stamp of the random model that lies there, or None."""
    try:
        stamp = json.loads((directory / STAMP_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None

"""The decoder against `transformers` over configurations drawn by chance, every weight and bias of them at random.

What is compared: the logits of every position that is computed as a last one (a whole prompt, chunks with any edges,
a batch of decode steps), and the tokens of greedy decoding. Tolerances: in float32 no logit further away than
`TOLERANCE` of the logits' spread; in bfloat16 no further, in the mean, from the float32 logits than `transformers`
itself is in bfloat16, with a margin of a half.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import LlamaModel, Span, load_model

transformers = pytest.importorskip("transformers")

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
NUM_SEEDS = 12
MAX_POSITION = 256
VOCAB_SIZE = 97
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; `heads` are query and KV heads."""

    family: str
    heads: tuple[int, int]
    head_dim: int | None
    hidden: int
    layers: int
    tied: bool
    bias: bool
    rope: int
    seed: int

    def config(self) -> Any:
        fields: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden + 24,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "max_position_embeddings": MAX_POSITION,
            "rope_parameters": ROPES[self.rope],
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "eos_token_id": None,
            "bos_token_id": None,
        }
        if self.family != "qwen2":
            fields["attention_bias"] = self.bias
        if self.head_dim is not None:
            fields["head_dim"] = self.head_dim
        return transformers.AutoConfig.for_model(self.family, **fields)


def drawn(seed: int) -> Case:
    """Any family, any grouping of heads, head sizes that are and are not hidden / heads."""
    chance = random.Random(seed)
    num_kv_heads = chance.choice([1, 2, 3])
    num_heads = num_kv_heads * chance.choice([1, 2, 4])
    head_dim = chance.choice([16, 24, 40])
    family = chance.choice(["qwen2", "qwen3", "qwen3", "llama"])
    is_free = family == "qwen3" or chance.random() < 0.5
    return Case(
        family=family,
        heads=(num_heads, num_kv_heads),
        head_dim=head_dim if is_free else None,
        hidden=chance.choice([48, 80, 96]) if is_free else num_heads * head_dim,
        layers=chance.choice([1, 2, 3]),
        tied=chance.random() < 0.5,
        bias=chance.random() < 0.5,
        rope=chance.randrange(len(ROPES)),
        seed=seed,
    )


FIXED = [
    Case("qwen2", (4, 2), None, 64, 2, tied=True, bias=True, rope=1, seed=101),
    Case("qwen2", (6, 1), 24, 80, 2, tied=False, bias=True, rope=2, seed=102),
    Case("qwen3", (4, 2), 32, 48, 2, tied=True, bias=False, rope=1, seed=103),
    Case("qwen3", (4, 4), 16, 96, 3, tied=False, bias=True, rope=2, seed=104),
    Case("llama", (4, 1), None, 64, 2, tied=True, bias=True, rope=2, seed=105),
]


class Pair:
    """One checkpoint, written by `transformers` and loaded by both."""

    def __init__(self, case: Case, directory: Path) -> None:
        torch.manual_seed(case.seed)
        self.reference = transformers.AutoModelForCausalLM.from_config(
            case.config(), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for name, values in self.reference.named_parameters():
                if name.endswith("norm.weight"):
                    values.copy_(1.0 + 0.3 * torch.randn_like(values))
                elif name.endswith("bias"):
                    values.copy_(0.5 * torch.randn_like(values))
                else:
                    values.copy_(torch.randn_like(values) * 1.5 / values.shape[-1] ** 0.5)
        self.reference.save_pretrained(directory)
        self.directory = directory
        self.chance = random.Random(case.seed)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[position, vocabulary]"""
        found: torch.Tensor = self.reference(torch.tensor([token_ids])).logits[0].float()
        return found

    def prompt(self, length: int) -> list[int]:
        return [self.chance.randrange(VOCAB_SIZE) for _ in range(length)]

    def memory(self, model: LlamaModel, num_sequences: int) -> tuple[KvMemory, list[list[int]]]:
        """A memory of any block size, full of others' bytes, and scattered blocks for sequences."""
        block_size = self.chance.choice([1, 3, 8, 16])
        num_blocks = -(-MAX_POSITION // block_size)
        memory = KvMemory(model.config, num_sequences * num_blocks, block_size, dtype=model.dtype)
        everywhere = memory.allocate(memory.num_free)
        self.chance.shuffle(everywhere)
        memory.kv_BLKHTD.normal_(std=30.0)
        return memory, [everywhere[at::num_sequences] for at in range(num_sequences)]


@pytest.fixture(
    scope="module",
    params=[*FIXED, *map(drawn, range(NUM_SEEDS))],
    ids=lambda case: f"{case.family}-{case.seed}",
)
def pair(request, tmp_path_factory):
    print(request.param)
    return Pair(request.param, tmp_path_factory.mktemp("model"))


def assert_equal(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((logits - expected).abs().max()) <= TOLERANCE * float(expected.std())


def test_a_prompt_in_chunks_with_any_edges_has_the_logits_of_the_whole(pair):
    model = load_model(pair.directory)
    memory, (table,) = pair.memory(model, 1)
    prompt = pair.prompt(120)
    expected = pair.logits(prompt)
    assert float(expected.std(dim=0).mean()) > 0.1, "a model whose logits differ by position"
    start = 0
    while start < len(prompt):
        end = min(len(prompt), start + pair.chance.choice([1, 2, 7, 16, 40]))
        logits = model.forward(
            [Span(token_ids=prompt[start:end], start=start, block_ids=table)], memory
        )
        assert_equal(logits[0], expected[end - 1])
        start = end


def test_a_batch_of_decode_steps_has_the_references_logits_and_greedy_tokens(pair):
    model = load_model(pair.directory)
    texts = [pair.prompt(length) for length in (1, 23, 64)]
    memory, tables = pair.memory(model, len(texts))
    spans = [
        Span(token_ids=text, start=0, block_ids=table)
        for text, table in zip(texts, tables, strict=True)
    ]
    for _ in range(12):
        rows = model.forward(spans, memory)
        spans = []
        for row, text, table in zip(rows, texts, tables, strict=True):
            expected = pair.logits(text)[-1]
            assert_equal(row, expected)
            # Where two logits are as near as rounding, either token would be right.
            best, second = expected.topk(2).values.tolist()
            assert best - second > TOLERANCE * float(expected.std()), "draw other weights"
            assert int(row.argmax()) == int(expected.argmax())
            text.append(int(expected.argmax()))
            spans.append(Span(token_ids=text[-1:], start=len(text) - 1, block_ids=table))


def test_bfloat16_is_as_near_to_float32_as_the_references_is(pair):
    prompt = pair.prompt(60)
    exact = pair.logits(prompt)
    model = load_model(pair.directory, dtype=torch.bfloat16)
    memory, (table,) = pair.memory(model, 1)
    ours = torch.cat(
        [
            model.forward([Span(token_ids=[token], start=at, block_ids=table)], memory)
            for at, token in enumerate(prompt)
        ]
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        pair.directory, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt])).logits[0].float()
    assert float((ours - exact).abs().mean()) <= 1.5 * float((theirs - exact).abs().mean())

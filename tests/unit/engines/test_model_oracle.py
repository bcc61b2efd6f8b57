"""The decoder against `transformers`, an independent implementation, on models of every family."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import LlamaModel, Span, load_model
from snowskin.engines.model.random_model import GENERATED_TOKENS, make_random_model

transformers = pytest.importorskip("transformers")

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_SIZE = 8
FAMILIES = [
    pytest.param(("llama", 2), id="llama-gqa"),
    pytest.param(("llama", 4), id="llama-mha"),
    pytest.param(("qwen2", 2), id="qwen2"),
    pytest.param(("qwen3", 1), id="qwen3"),
]


def make_model(
    directory: Path, *, kv_heads: int = 2, architecture: str = "llama", seed: int = 3
) -> Path:
    return make_random_model(
        directory,
        layers=3,
        hidden=128,
        heads=4,
        kv_heads=kv_heads,
        head_dim=32,
        intermediate=256,
        max_position=512,
        seed=seed,
        architecture=architecture,
    )


class Oracle:
    """One model directory, loaded by both."""

    def __init__(self, directory: Path):
        self.model = load_model(directory)
        self.reference = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def reference_logits(self, token_ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.reference(torch.tensor([token_ids])).logits[0]
        return logits

    def reference_greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        out = self.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.choice(GENERATED_TOKENS, length).tolist() for length in lengths]


def scattered(memory: KvMemory, *lengths: int, seed: int = 5) -> list[list[int]]:
    """Blocks for sequences of these lengths, torn all over the memory."""
    everywhere = memory.allocate(memory.num_free)
    np.random.default_rng(seed).shuffle(everywhere)
    tables, at = [], 0
    for length in lengths:
        num_blocks = -(-length // memory.block_size)
        tables.append(everywhere[at : at + num_blocks])
        at += num_blocks
    # Bytes of others lie all around: nothing outside a sequence's own tokens may count.
    memory.kv_BLKHTD.normal_(std=30.0)
    return tables


def greedy(
    model: LlamaModel, memory: KvMemory, tables: list[list[int]], prompts: list[list[int]], num: int
) -> list[list[int]]:
    """Batched greedy decoding of several sequences at once."""
    spans = [
        Span(token_ids=prompt, start=0, block_ids=table)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(num):
        tokens = model.forward(spans, memory).argmax(-1).tolist()
        spans = [
            Span(token_ids=[token], start=span.start + len(span.token_ids), block_ids=table)
            for token, span, table in zip(tokens, spans, tables, strict=True)
        ]
        for row, token in zip(out, tokens, strict=True):
            row.append(token)
    return out


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected[..., GENERATED_TOKENS].std())
    assert float((logits - expected).abs().max()) <= 1e-3 * scale


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    family, kv_heads = request.param
    directory = tmp_path_factory.mktemp("model") / "m"
    make_model(directory, kv_heads=kv_heads, architecture=family)
    return Oracle(directory)


def test_logits_of_a_whole_prompt_equal_the_references(oracle):
    [prompt] = prompts(1, 101)
    memory = KvMemory(oracle.model.config, 40, BLOCK_SIZE)
    [table] = scattered(memory, len(prompt))
    logits = oracle.model.forward([Span(token_ids=prompt, start=0, block_ids=table)], memory)
    assert_close(logits[0], oracle.reference_logits(prompt)[-1])


def test_chunks_with_odd_boundaries_change_nothing(oracle):
    [prompt] = prompts(2, 101)
    expected = oracle.reference_logits(prompt)
    memory = KvMemory(oracle.model.config, 40, BLOCK_SIZE)
    [table] = scattered(memory, len(prompt))
    edges = [0, 1, 8, 9, 31, 32, 33, 80, 101]
    for first, last in itertools.pairwise(edges):
        span = Span(token_ids=prompt[first:last], start=first, block_ids=table)
        logits = oracle.model.forward([span], memory)
        assert_close(logits[0], expected[last - 1])


def test_a_chunk_longer_than_one_query_tile_equals_the_reference(oracle, monkeypatch):
    monkeypatch.setattr("snowskin.engines.model.layers.QUERY_TILE", 16)
    [prompt] = prompts(3, 90)
    memory = KvMemory(oracle.model.config, 40, BLOCK_SIZE)
    [table] = scattered(memory, len(prompt))
    oracle.model.forward([Span(token_ids=prompt[:7], start=0, block_ids=table)], memory)
    logits = oracle.model.forward([Span(token_ids=prompt[7:], start=7, block_ids=table)], memory)
    assert_close(logits[0], oracle.reference_logits(prompt)[-1])


def test_a_batch_mixing_prefill_chunks_and_decode_steps_equals_each_alone(oracle):
    texts = prompts(4, 50, 17, 64, 1)
    memory = KvMemory(oracle.model.config, 60, BLOCK_SIZE)
    tables = scattered(memory, *map(len, texts))
    starts = [30, 16, 0, 0]
    for text, table, start in zip(texts, tables, starts, strict=True):
        if start:
            oracle.model.forward([Span(token_ids=text[:start], start=0, block_ids=table)], memory)
    logits = oracle.model.forward(
        [
            Span(token_ids=np.array(text[start:], dtype=np.int32), start=start, block_ids=table)
            for text, table, start in zip(texts, tables, starts, strict=True)
        ],
        memory,
    )
    for row, text in zip(logits, texts, strict=True):
        assert_close(row, oracle.reference_logits(text)[-1])


def test_greedy_tokens_of_a_batch_equal_the_references(oracle):
    texts = prompts(5, 40, 8, 23)
    memory = KvMemory(oracle.model.config, 60, BLOCK_SIZE)
    tables = scattered(memory, *(len(text) + 24 for text in texts))
    out = greedy(oracle.model, memory, tables, texts, 24)
    assert out == [oracle.reference_greedy(text, 24) for text in texts]


def test_stretched_rotary_frequencies_equal_the_references(tmp_path):
    directory = make_model(tmp_path / "m")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path.write_text(json.dumps(config))
    oracle = Oracle(directory)
    [prompt] = prompts(6, 200)
    memory = KvMemory(oracle.model.config, 30, BLOCK_SIZE)
    table = memory.allocate(25)
    logits = oracle.model.forward([Span(token_ids=prompt, start=0, block_ids=table)], memory)
    assert_close(logits[0], oracle.reference_logits(prompt)[-1])


def test_a_directory_written_by_the_reference_is_loaded(tmp_path):
    """transformers 5 writes `rope_parameters`, ties embeddings, and may shard."""
    config = transformers.Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    reference = transformers.Qwen2ForCausalLM(config).eval()
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(tmp_path)
    prompt = list(range(3, 90))
    memory = KvMemory(model.config, 8, 16)
    logits = model.forward([Span(token_ids=prompt, start=0, block_ids=memory.allocate(6))], memory)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    assert float((logits[0] - expected).abs().max()) <= 1e-3 * float(expected.std())


def test_bfloat16_stays_near_float32(tmp_path):
    directory = make_model(tmp_path / "m")
    [prompt] = prompts(7, 60)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(directory, dtype=dtype)
        memory = KvMemory(model.config, 10, BLOCK_SIZE, dtype=dtype)
        table = memory.allocate(8)
        logits[dtype] = model.forward([Span(token_ids=prompt, start=0, block_ids=table)], memory)[
            0, list(GENERATED_TOKENS)
        ]
    # A model this chaotic keeps the direction of its logits, not their last digits.
    both = torch.stack(list(logits.values()))
    assert float(torch.corrcoef(both)[0, 1]) > 0.97
    assert logits[torch.bfloat16].dtype == torch.float32

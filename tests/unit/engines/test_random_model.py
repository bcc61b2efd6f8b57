"""The random model: repeatable, whole or not there, and changed by one wrong KV block."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from snowskin.engines.errors import BadPrompt, ModelCorrupt, PromptTooLong
from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import LlamaModel, Span, load_model
from snowskin.engines.model.random_model import GENERATED_TOKENS, make_random_model
from snowskin.engines.model.tokenizer import Tokenizer
from snowskin.engines.model.weights import fingerprint
from snowskin.kvstore.errors import BadSetting

BLOCK_SIZE = 16
CONTEXT = 304
NUM_BLOCKS = CONTEXT // BLOCK_SIZE
NUM_GENERATED = 64
NUM_PROMPTS = 20


def make_small(directory: Path, *, seed: int = 0) -> Path:
    return make_random_model(
        directory,
        layers=2,
        hidden=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        intermediate=64,
        max_position=64,
        seed=seed,
    )


# --- the directory


def test_the_same_parameters_make_the_same_bytes(tmp_path):
    first, second = make_small(tmp_path / "a"), make_small(tmp_path / "b")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(make_small(tmp_path / "c", seed=1)) != fingerprint(first)


def test_a_model_that_is_there_already_is_left_as_it_is(tmp_path):
    directory = make_small(tmp_path / "m")
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    make_small(directory)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_model_of_other_parameters_is_replaced_and_nothing_stays_behind(tmp_path):
    directory = make_small(tmp_path / "m")
    before = fingerprint(directory)
    make_small(directory, seed=1)
    assert fingerprint(directory) != before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_directory_of_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadSetting, match="holds files"):
        make_small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failure_leaves_no_directory(tmp_path, monkeypatch):
    def full_disk(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("snowskin.engines.model.random_model.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        make_small(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_leave_one_whole_model(tmp_path):
    makers = [threading.Thread(target=make_small, args=(tmp_path / "m",)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    load_model(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_senseless_parameters_are_refused(tmp_path):
    with pytest.raises(BadSetting, match="mamba"):
        make_random_model(tmp_path / "m", architecture="mamba")
    with pytest.raises(ModelCorrupt, match="KV heads"):
        make_random_model(tmp_path / "m", heads=4, kv_heads=3)
    assert list(tmp_path.iterdir()) == []


# --- what the decoder refuses


@pytest.mark.parametrize(
    ("tokens", "start", "block_ids", "error"),
    [
        ([], 0, [0], BadPrompt),
        ([1], -1, [0], BadPrompt),
        ([320], 0, [0], BadPrompt),
        ([-1], 0, [0], BadPrompt),
        ([1] * 17, 0, [0], BadPrompt),
        ([1], 0, [2], BadPrompt),
        ([1], 0, [-1], BadPrompt),
        ([1], 64, [0, 1, 0, 1, 0], PromptTooLong),
    ],
)
def test_a_bad_span_is_refused_before_anything_is_computed(
    tmp_path, tokens, start, block_ids, error
):
    model = load_model(make_small(tmp_path / "m"))
    memory = KvMemory(model.config, 2, 16)
    good = Span(token_ids=[1], start=0, block_ids=[1])
    with pytest.raises(error):
        model.forward([good, Span(token_ids=tokens, start=start, block_ids=block_ids)], memory)
    assert model.num_tokens_embedded == 0
    assert memory.kv_BLKHTD.count_nonzero() == 0


def test_tokens_that_pass_the_first_layer_are_counted(tmp_path):
    model = load_model(make_small(tmp_path / "m"))
    memory = KvMemory(model.config, 4, 16)
    model.forward([Span(token_ids=[1] * 20, start=0, block_ids=[0, 1])], memory)
    model.forward(
        [
            Span(token_ids=[1], start=20, block_ids=[0, 1]),
            Span(token_ids=[1] * 3, start=0, block_ids=[2]),
        ],
        memory,
    )
    assert model.num_tokens_embedded == 24
    assert model.forward([], memory).shape == (0, model.config.vocab_size)


# --- one wrong block changes the text


class Conversations:
    """Prompts of real text in memory, and the greedy text behind each."""

    def __init__(self, model: LlamaModel, tokenizer: Tokenizer):
        text = tokenizer.encode(Path(__file__).read_text())
        self.random = np.random.default_rng(1)
        self.model = model
        length = -(-(CONTEXT + NUM_GENERATED) // BLOCK_SIZE)
        self.memory = KvMemory(model.config, NUM_PROMPTS * length, BLOCK_SIZE)
        self.tables = [self.memory.allocate(length) for _ in range(NUM_PROMPTS)]
        starts = self.random.integers(0, len(text) - CONTEXT, NUM_PROMPTS)
        spans = [
            Span(token_ids=text[start : start + CONTEXT], start=0, block_ids=table)
            for start, table in zip(starts, self.tables, strict=True)
        ]
        self.first_tokens = model.forward(spans, self.memory).argmax(-1).tolist()
        self.saved = self.memory.kv_BLKHTD.clone()

    def greedy(self) -> np.ndarray:
        tokens = self.first_tokens
        texts = [tokens]
        for position in range(CONTEXT, CONTEXT + NUM_GENERATED - 1):
            spans = [
                Span(token_ids=[token], start=position, block_ids=table)
                for token, table in zip(tokens, self.tables, strict=True)
            ]
            tokens = self.model.forward(spans, self.memory).argmax(-1).tolist()
            texts.append(tokens)
        return np.array(texts).T

    def spoilt(self, kind: str) -> np.ndarray:
        """The texts with one block of each conversation's context made wrong."""
        kv, saved = self.memory.kv_BLKHTD, self.saved
        kv.copy_(saved)
        block_nbytes = self.memory.block_nbytes
        row_nbytes = self.model.config.head_dim * kv.element_size()
        clean = saved.view(-1).view(torch.uint8).numpy()
        for at, table in enumerate(self.tables):
            index, layer = self.random.integers((NUM_BLOCKS, self.model.config.num_layers))
            block = table[index]
            if kind == "zeroed":
                self.memory.zero(block)
            elif kind == "another conversation's":
                kv[block] = saved[self.tables[at - 1][index]]
            elif kind == "late by one row":
                begin = block * block_nbytes
                self.memory.host_view()[begin : begin + block_nbytes - row_nbytes] = clean[
                    begin + row_nbytes : begin + block_nbytes
                ]
            elif kind == "K and V of a layer exchanged":
                kv[block, layer] = saved[block, layer].flip(0)
            else:
                other = table[(index + 5) % NUM_BLOCKS]
                kv[block], kv[other] = saved[other], saved[block]
        return self.greedy()


@pytest.fixture(scope="module")
def tokenizer_and_conversations(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Conversations]:
    directory = make_random_model(
        tmp_path_factory.mktemp("model") / "m",
        layers=4,
        hidden=256,
        heads=8,
        kv_heads=4,
        head_dim=32,
        intermediate=768,
    )
    tokenizer = Tokenizer(directory)
    return tokenizer, Conversations(load_model(directory), tokenizer)


@pytest.fixture(scope="module")
def conversations(
    tokenizer_and_conversations: tuple[Tokenizer, Conversations],
) -> Conversations:
    return tokenizer_and_conversations[1]


@pytest.fixture(scope="module")
def texts(conversations: Conversations) -> np.ndarray:
    return conversations.greedy()


def test_generated_tokens_turn_into_text_that_turns_into_them(tokenizer_and_conversations, texts):
    tokenizer, _ = tokenizer_and_conversations
    for row in texts.tolist():
        assert set(row) <= set(GENERATED_TOKENS)
        assert tokenizer.encode(tokenizer.decode(row)) == row


def test_texts_are_neither_loops_nor_alike(texts):
    assert np.median([len(set(row)) for row in texts.tolist()]) > 20
    assert len({tuple(row) for row in texts.tolist()}) == NUM_PROMPTS


@pytest.mark.parametrize(
    "kind",
    ["zeroed", "another conversation's", "late by one row", "K and V of a layer exchanged"],
)
def test_one_wrong_block_changes_the_text(conversations, texts, kind):
    changed = (conversations.spoilt(kind) != texts).any(axis=1)
    assert changed.mean() >= 0.95, f"{kind}: {changed.sum()} of {NUM_PROMPTS} changed"


def test_two_blocks_exchanged_change_nothing_since_k_is_stored_rotated(conversations, texts):
    assert (conversations.spoilt("exchanged") == texts).all()

"""What the demonstration works on: a model, a document, and the questions about it.

Rules kept here: a random model is made once and found again; the document is real text of this repository.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from snowskin.kvstore.errors import BadSetting

QUESTIONS = (
    "What is this document about?",
    "Which part of it matters most to an operator?",
    "And what would you read next?",
)
# Of users who read the same document at the same time, where a cluster has several engines of a kind.
READERS_QUESTIONS = (
    "Who should read this first?",
    "What does this document leave open?",
    "Which term here needs a definition?",
    "What would you ask its author?",
)
PASSAGE_LENGTH = 200
RANDOM_MODEL = "demo-model-llama-l12-h512-s0"
# In the order of preference; the first ones that together are long enough.
DOCUMENTS = ("docs/architecture.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
MAX_PROMPT_FILE_NBYTES = 8 << 20
_CHECKOUT = Path(__file__).resolve().parents[2]

Message = Mapping[str, str]


def model_directory(checkout: Path = _CHECKOUT) -> Path:
    """Where the random model lies: in the checkout's own cache, or in the user's."""
    if (checkout / "pyproject.toml").is_file() and os.access(checkout, os.W_OK):
        return checkout / ".cache" / RANDOM_MODEL
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "snowskin" / RANDOM_MODEL


def make_model(say: Callable[[str], None]) -> Path:
    """The random model, made if it is not there or not the same; imports torch.

    Args:
        say: gets a sentence about what is made, before it is.
    """
    from snowskin.engines.model.random_model import make_random_model

    directory = model_directory()
    if not (directory / "config.json").is_file():
        say(f"making a random model, 38 M parameters, 152 MB, once: {directory}")
    return make_random_model(directory)


def read_document(prompt_file: Path | None, checkout: Path = _CHECKOUT) -> str:
    """The text that the conversation is about.

    Raises:
        BadSetting: the file cannot be read as text, or no document is at hand.
    """
    if prompt_file is not None:
        try:
            if prompt_file.stat().st_size > MAX_PROMPT_FILE_NBYTES:
                raise BadSetting(f"{prompt_file} is larger than {MAX_PROMPT_FILE_NBYTES} bytes")
            text = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(f"{prompt_file}: {error}", hint="give a UTF-8 text file") from error
        if not text.strip():
            raise BadSetting(f"{prompt_file} is empty", hint="give a file with text")
        return text
    paths = [checkout / name for name in DOCUMENTS]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    if not texts:
        raise BadSetting("no document at hand", hint="give one with --prompt-file FILE")
    return "\n\n".join(texts)


def first_message(document: str) -> Message:
    """The user's first message: the document and the first question."""
    return {"role": "user", "content": f"{document}\n\n{QUESTIONS[0]}"}


def readers_message(document: str, number: int) -> Message:
    """What reader `number`, from 0, asks about the document, and about a passage of it.

    The passage is new work for prefill: without any, one engine would be done before a second could help.
    """
    question = READERS_QUESTIONS[number % len(READERS_QUESTIONS)]
    passage = document[number * PASSAGE_LENGTH : (number + 1) * PASSAGE_LENGTH]
    return {"role": "user", "content": f"{document}\n\n{question}\n\n> {passage}"}


def cut_document(document: str, num_tokens: int, count: Callable[[Sequence[Message]], int]) -> str:
    """The longest beginning of the document with which the first prompt has at most `num_tokens`.

    Args:
        document: the whole text.
        num_tokens: bound of the rendered prompt, template included.
        count: tokens of a conversation.
    """
    low, high = 0, len(document)
    while low < high:
        middle = (low + high + 1) // 2
        if count([first_message(document[:middle])]) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    return document[:low]


def next_turn(messages: Sequence[Message], answer: str, turn_index: int) -> list[Message]:
    """The conversation with the answer and the question of turn `turn_index`, counted from 0."""
    return [
        *messages,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": QUESTIONS[turn_index]},
    ]

"""Text to tokens and back, and conversations to prompts, from a Hugging Face model directory.

Rules kept here: tokens are those of `tokenizer.json`; a chat template runs in a sandbox that can
change nothing, with the settings under which templates are written (trimmed blocks); a rendered
conversation carries its own special tokens, so none are added on top; a text delta never holds half
of a character.

Templates get no clock: a prompt that names today's date would not share its prefix with
yesterday's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from snowskin.engines.errors import BadPrompt, ModelCorrupt, ModelUnsupported
from snowskin.engines.model.config import Json, ModelConfig, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser

# What a decoder writes for bytes that are not (yet) a character.
REPLACEMENT = "\ufffd"

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers for training; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between the two tags, in a scope of its own."""
        line = next(parser.stream).lineno  # the tag itself
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Tokenizer:
    """The tokenizer and chat template of one model directory.

    Attributes:
        eos_token_ids: tokens that end a sequence, of all the files that name some.
        vocab_size: tokens that the tokenizer knows, added ones included; a model's table may be
            padded beyond.
    """

    def __init__(self, directory: Path | str) -> None:
        """Reads tokenizer.json and, where they exist, its settings, template and config.json.

        Raises:
            ModelMissing: no such directory, or no tokenizer.json in it.
            ModelCorrupt: a file cannot be read.
        """
        directory = Path(directory)
        read_json(directory, "tokenizer.json")
        path = directory / "tokenizer.json"
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise ModelCorrupt(
                f"{path} is no tokenizer: {error}", hint="copy tokenizer.json anew"
            ) from error
        # A file may carry the settings of a training run; a prompt is never cut or padded.
        self._fast.no_truncation()
        self._fast.no_padding()
        settings: Mapping[str, Json] = {}
        if (directory / "tokenizer_config.json").is_file():
            settings = read_json(directory, "tokenizer_config.json")
        self._specials = {
            name: text for name in _SPECIAL_NAMES if (text := _special(settings.get(name)))
        }
        self._template = _compiled(_template_source(directory, settings), directory)
        self.vocab_size = self._fast.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = self._end_tokens(directory)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with what the model expects around it if `add_special_tokens`."""
        tokens: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return tokens

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are no character become U+FFFD, unknown tokens nothing."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of one token by its spelling, or None."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model's template writes it.

        Args:
            messages: each at least with `role` and `content`.
            add_generation_prompt: whether the beginning of the answer is appended.

        Raises:
            ModelUnsupported: the model has no chat template.
            BadPrompt: the template refuses these messages, with its own reason.
        """
        if self._template is None:
            raise ModelUnsupported(
                "the model directory holds no chat template",
                hint="use /v1/completions, or add chat_template.jinja to the model directory",
            )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._specials,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise BadPrompt(
                f"the model's chat template refuses the messages: {error}",
                hint="check roles, their order, and that each content is text",
            ) from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Tokens of the rendered conversation, whose special tokens the template wrote."""
        return self.encode(
            self.render_chat(messages, add_generation_prompt), add_special_tokens=False
        )

    def _end_tokens(self, directory: Path) -> tuple[int, ...]:
        found: dict[int, None] = {}
        if (directory / "config.json").is_file():
            found |= dict.fromkeys(ModelConfig.from_directory(directory).eos_token_ids)
        if "eos_token" in self._specials:
            token = self.token_id(self._specials["eos_token"])
            if token is not None:
                found[token] = None
        return tuple(found)


class IncrementalDecoder:
    """Turns a stream of tokens into a stream of text.

    The deltas joined, `flush` included, are the text of all tokens at once. A token is decoded
    together with those of the delta before it, because a token's text can depend on its left
    neighbour (spaces at word starts); text that ends in U+FFFD is held back, because the next token
    may complete the character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens of the last delta, then those not yet shown; everything older is done with.
        self._window: list[int] = []
        self._num_shown = 0
        self._shown_text = ""

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is still open."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        return self._shown(text)

    def flush(self) -> str:
        """What was held back, as it is; the decoder is as new afterwards."""
        delta = self._tokenizer.decode(self._window)[len(self._shown_text) :]
        self._window, self._num_shown, self._shown_text = [], 0, ""
        return delta

    def _shown(self, text: str) -> str:
        delta = text[len(self._shown_text) :]
        if delta:
            del self._window[: self._num_shown]
            self._num_shown = len(self._window)
            self._shown_text = self._tokenizer.decode(self._window)
        return delta


def _special(value: Json) -> str:
    """Spelling of a special token: plain, or in the long form of an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _template_source(directory: Path, settings: Mapping[str, Json]) -> str | None:
    """The template's text: its own file before the settings, of several the default one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelCorrupt(
                f"{path} cannot be read: {error}", hint="copy chat_template.jinja anew"
            ) from error
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next(
            (entry.get("template") for entry in named if entry.get("name") == "default"), None
        )
    return source if isinstance(source, str) else None


def _compiled(source: str | None, directory: Path) -> jinja2.Template | None:
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelCorrupt(
            f"the chat template in {directory} does not compile: {error}",
            hint="copy tokenizer_config.json or chat_template.jinja anew",
        ) from error


def _to_json(value: object, indent: int | None = None) -> str:
    # Unlike jinja2's own: no HTML escapes, the model reads the text.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

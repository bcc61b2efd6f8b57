"""`kvctl match`: what of a prompt is cached where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from snowskin.tools.kvctl.output import (
    KvctlSettings,
    ask,
    print_json,
    print_table,
    table,
    with_settings,
)

if TYPE_CHECKING:
    from snowskin.tools.kvctl.admin import PromptMatch

# The conductor bounds messages at 8 MiB; a larger file is a mistake and is not read into memory.
MAX_FILE_NBYTES = 4 << 20
MAX_TOKEN_ID = (1 << 32) - 1


@click.command()
@click.option("--text", help="The prompt itself.")
@click.option(
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 file that holds the prompt.",
)
@click.option("--tokens", help="Token ids, separated by commas or spaces.")
@with_settings
def match(settings: KvctlSettings, text: str | None, path: Path | None, tokens: str | None) -> None:
    """Cached blocks of a prompt, node by node. Takes no lease and pins nothing.

    The text is tokenised by the conductor, as /v1/completions does it; no chat template is applied. Exit status 0 also
    when nothing is cached.
    """
    if sum(source is not None for source in (text, path, tokens)) != 1:
        raise click.UsageError("give the prompt by one of --text, --file and --tokens")
    prompt = _token_ids(tokens) if tokens is not None else text if path is None else _read(path)
    assert prompt is not None
    if not prompt:
        raise click.UsageError("the prompt is empty")
    answer = ask(settings, lambda admin: admin.match_prompt(prompt))
    if settings.json:
        print_json(answer)
    else:
        _print(answer)


def _token_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    try:
        token_ids = [int(word) for word in words]
    except ValueError as error:
        raise click.UsageError(f"--tokens: {error}") from error
    wrong = [token_id for token_id in token_ids if not 0 <= token_id <= MAX_TOKEN_ID]
    if wrong:
        raise click.UsageError(f"--tokens: {wrong[0]} is not a token id")
    return token_ids


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_NBYTES:
        raise click.UsageError(f"--file: {path} is larger than {MAX_FILE_NBYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--file: {path}: {error}") from error


def _print(answer: PromptMatch) -> None:
    found = table(
        "node", "#blocks from the start", "#tokens", "#blocks in all", "trouble",
        title=f"{answer.num_tokens:,} tokens, {answer.num_blocks:,} full blocks of {answer.block_size}",
    )  # fmt: skip
    for node in answer.nodes:
        found.add_row(
            node.address,
            f"{node.num_blocks:,}",
            f"{node.num_blocks * answer.block_size:,}",
            f"{node.num_blocks_present:,}",
            node.error,
        )
    print_table(found)

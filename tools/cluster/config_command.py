"""`snowskin config`: what a role's settings are, where each comes from, and whether they can work.

Rules kept here: settings are read exactly as the role would read them; a secret is never printed; a variable
`SNOWSKIN_...` that no role knows is refused, since a role itself must ignore what may be meant for another one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snowskin.kvstore.config import (
    ENVIRONMENT_PREFIX,
    Sourced,
    environment_names,
    explain,
    nearest,
)
from snowskin.kvstore.errors import BadSetting, InsecureAddress
from snowskin.tools.cluster.tables import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

COLUMN = 44  # where the comment begins, if the value leaves room
# Variables that are no field of a settings class.
OTHER_VARIABLES = (ENVIRONMENT_PREFIX + "CONFIG",)

EPILOG = """
\b
Examples:
  snowskin config print node --config snowskin.toml
  SNOWSKIN_DRAM_NBYTES=8GiB snowskin config check node --port 7100
  snowskin config print up --json

ROLE is a table of the file: {roles}. Behind it stand --config FILE and the role's own
flags, as on its command line.

Exit status: 0 the settings can work, 2 they cannot.
""".format(roles=", ".join(SETTINGS))


@click.group(epilog=EPILOG)
def config() -> None:
    """Prints or checks a role's settings, with where each comes from."""


def _takes_a_role(command: Callable[..., None]) -> click.Command:
    """A subcommand with ROLE, `--json`, and whatever flags the role has; named as its function."""
    made = click.option("--json", "as_json", is_flag=True, help="One JSON document.")(command)
    made = click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[FLAGS]...")(made)
    made = click.argument("role", type=click.Choice(list(SETTINGS)), metavar="ROLE")(made)
    name = command.__name__.removesuffix("_")
    return config.command(name, context_settings={"ignore_unknown_options": True}, epilog=EPILOG)(
        made
    )


@_takes_a_role
def print_(role: str, arguments: tuple[str, ...], as_json: bool) -> None:
    """A role's settings, each with its origin.

    The output is a table of a TOML file.
    """
    told = explain(SETTINGS[role](), table=role, arguments=arguments)
    if as_json:
        document = {each.name: _document(each) for each in told}
        print(json.dumps(document, indent=2, default=str))
        return
    print(f"[{role}]")
    for each in told:
        print(toml_line(each))


@_takes_a_role
def check(role: str, arguments: tuple[str, ...], as_json: bool) -> None:
    """Whether a role would take its settings.

    Also refuses a variable SNOWSKIN_... that no role knows.
    """
    settings_class = SETTINGS[role]()
    told = explain(settings_class, table=role, arguments=arguments)
    try:
        check_environment(os.environ)
        settings_class(**{each.name: each.value for each in told})
    except (BadSetting, InsecureAddress) as error:
        if as_json:
            print(json.dumps({"role": role, "ok": False, "error": str(error)}, indent=2))
        print(f"snowskin config: {error}", file=sys.stderr)
        raise click.exceptions.Exit(2) from error
    if as_json:
        print(json.dumps({"role": role, "ok": True, "error": ""}, indent=2))
    else:
        num_set = sum(each.origin != "default" for each in told)
        print(f"{role}: {len(told)} settings can work, {num_set} of them set")


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses variables of our prefix that no role knows; other ones are not looked at.

    Raises:
        BadSetting: with the nearest known name; the value is not said, it may be a secret.
    """
    known = known_variables()
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            raise nearest(f"environment variable {name}", name, known)


def known_variables() -> Sequence[str]:
    """Every variable that sets something, in some role."""
    names: Iterable[str] = (
        name for settings_class in SETTINGS.values() for name in environment_names(settings_class())
    )
    return tuple(dict.fromkeys((*OTHER_VARIABLES, *names)))


def toml_line(sourced: Sourced) -> str:
    """`key = value  # origin`; what cannot stand in a file is a comment as a whole."""
    value = sourced.shown
    is_hidden = sourced.secret and value
    if value is None or is_hidden:
        text = f"# {sourced.name} is {'set, and not shown' if is_hidden else 'not set'}"
    else:
        text = f"{sourced.name} = {_toml(value)}"
    origin = " ".join(word for word in (sourced.origin, sourced.where) if word)
    return f"{text:<{COLUMN}} # {origin}"


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    # JSON's words for strings, numbers and booleans are TOML's too
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _document(sourced: Sourced) -> dict[str, object]:
    return {
        "value": sourced.shown,
        "origin": sourced.origin,
        "where": sourced.where,
        "help": sourced.help,
    }

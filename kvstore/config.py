"""Settings: a frozen dataclass per process, filled from defaults, TOML file, environment, flags.

Rules kept here: a field is named once, and flag, environment variable and TOML key follow from
that name; later sources win (default < TOML < environment < flag); a key that nobody knows is
refused with the nearest known one; nothing else reads the environment. A role uses it so:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class NodeSettings:
        host: str = setting("127.0.0.1", help="Address to listen on.")
        insecure: bool = setting(False, help="Allow an address beyond loopback.")
        read_lease_s: float = setting(10.0, help="Life of a read lease, seconds.")
        pool_nbytes: int = setting(1 << 30, help="Memory of the DRAM pool.")  # accepts 512MiB

        def __post_init__(self) -> None:
            check_bind(self.host, insecure=self.insecure)
            if self.read_lease_s <= 0:
                raise BadSetting(f"read_lease_s is {self.read_lease_s}", hint="give seconds > 0")

    @click.command()
    @options(NodeSettings, table="node")
    def node(settings: NodeSettings) -> None: ...

That makes `--read-lease-s 5`, `SNOWSKIN_READ_LEASE_S=5`, and in the file of `--config` (or
`SNOWSKIN_CONFIG`) `read_lease_s = 5` below `[node]`. Types: bool (a pair of flags), int, float,
str, Path, Literal of strings, `tuple[str, ...]` (repeatable), each also `| None`. An int whose name
ends in `_nbytes` is a size, everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import ipaddress
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar, cast

import click
from click.core import ParameterSource

from snowskin.kvstore.errors import BadSetting, InsecureAddress

ENVIRONMENT_PREFIX = "SNOWSKIN_"
# One file may serve all roles of a host, so a table of another role is no mistake. Only their names
# are known here; what is in them, only their own role knows.
TABLES = ("node", "conductor", "prefill", "decode", "encode", "up", "demo", "kvctl")
UNITS_NBYTES = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
CONFIG_META = "snowskin.config"  # where a command's context keeps the file's path
SIZE = re.compile(r"(?P<number>[0-9]{1,18}(\.[0-9]{1,18})?)\s*(?P<unit>[a-z]*)")
MAX_CONFIG_NBYTES = 1 << 20  # a settings file of more is a mistake, and is not read into memory

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
LogLevel = typing.Literal["debug", "info", "warning", "error"]
# How a client's bytes travel; `auto` takes the best that there is, all others are demands.
TransportChoice = typing.Literal["auto", "shm", "tcp", "ucx", "grpc"]
Origin = typing.Literal["default", "file", "environment", "flag"]
_ORIGINS: dict[object, Origin] = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}
# `https://user:password@host`: what stands before the @ is nobody's to see.
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
Value = bool | int | float | str | Path | tuple[str, ...] | None


def setting(
    default: Value, *, help: str, secret: bool = False
) -> typing.Any:  # Any: as dataclasses.field, it stands for the value
    """A field of a settings class: its default and the sentence that `--help` shows.

    The value of a `secret` is never printed.
    """
    return dataclasses.field(default=default, metadata={"help": help, "secret": secret})


def parse_nbytes(text: str) -> int:
    """Bytes of a size such as `64MiB`, `1.5 GB` or `4096`.

    Raises:
        ValueError: not a size, negative, or not a whole number of bytes.
    """
    found = SIZE.fullmatch(text.strip().lower())
    if found is None or found["unit"] not in UNITS_NBYTES:
        raise ValueError(f"{text!r} is not a size")
    nbytes = Fraction(found["number"]) * UNITS_NBYTES[found["unit"]]
    if nbytes.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(nbytes)


def format_nbytes(nbytes: int) -> str:
    """The shortest exact way to write a size: `64MiB`, `1500`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = UNITS_NBYTES[unit.lower()]
        if nbytes and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return str(nbytes)


class SizeType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.5
    """Bytes, as a number or with a unit."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """An int stays, a string is parsed; anything else is refused."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        try:
            return parse_nbytes(str(value))
        except ValueError as error:
            self.fail(f"{error}; write bytes or a unit: 4096, 64MiB, 2GB", param, ctx)


class SecondsType(click.ParamType):  # type: ignore[type-arg]  # as above
    """A finite number; durations and rates."""

    name = "float"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuses `nan` and `inf` too: no later comparison would catch them."""
        try:
            number = float(cast("str", value))
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """One setting, as every source sees it."""

    name: str
    kind: type
    choices: tuple[str, ...]
    repeated: bool
    default: Value
    help: str
    secret: bool

    @property
    def environment(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def option(self) -> click.Option:
        flag = self.flag
        is_bool = self.kind is bool
        return click.Option(
            [self.name, f"{flag}/--no-{flag[2:]}" if is_bool else flag],
            type=self.click_type(),
            multiple=self.repeated,
            default=self.default,
            envvar=self.environment,
            show_envvar=True,
            show_default=self._shown_default(),
            help=self.help,
        )

    def click_type(self) -> click.ParamType:  # type: ignore[type-arg]  # as above
        if self.choices:
            return click.Choice(self.choices)
        if self.kind is int and self.name.endswith("_nbytes"):
            return SizeType()
        kinds: dict[type, click.ParamType] = {  # type: ignore[type-arg]  # as above
            bool: click.BOOL,
            int: click.INT,
            float: SecondsType(),
            str: click.STRING,
            Path: click.Path(path_type=Path),
        }
        return kinds[self.kind]

    def _shown_default(self) -> bool | str:
        if self.default is None or self.default == () or self.secret:
            return False
        if isinstance(self.click_type(), SizeType):
            return format_nbytes(cast("int", self.default))
        return True

    def from_toml(self, value: object, *, where: str) -> Value:
        """The value of a TOML key, with a stricter look than at a string from a shell."""
        items = value if self.repeated else [value]
        wanted = f"a list of {self.kind.__name__}" if self.repeated else self.kind.__name__
        wrong = f"{where}: {self.name} is {'(hidden)' if self.secret else repr(value)}"
        if not isinstance(items, list) or not all(self._fits(item) for item in items):
            raise BadSetting(wrong, hint=f"give {wanted}")
        try:
            converted = tuple(self.click_type().convert(item, None, None) for item in items)
        except click.BadParameter as error:
            raise BadSetting(wrong, hint=error.message) from error
        return cast("Value", converted if self.repeated else converted[0])

    def _fits(self, item: object) -> bool:
        if isinstance(item, bool):  # a bool is an int in Python, not in a file
            return self.kind is bool
        if self.kind is float:
            return isinstance(item, int | float)
        if self.kind is int:
            is_size = isinstance(self.click_type(), SizeType)
            return isinstance(item, int) or (is_size and isinstance(item, str))
        return isinstance(item, str) and self.kind in (str, Path)


def _fields(settings_class: type[S]) -> dict[str, _Field]:
    hints = typing.get_type_hints(settings_class)
    return {
        field.name: _field(field, hints[field.name])
        for field in dataclasses.fields(cast("type[typing.Any]", settings_class))
    }


def _field(field: dataclasses.Field[typing.Any], hint: object) -> _Field:
    if field.default is dataclasses.MISSING or "help" not in field.metadata:
        raise TypeError(f"{field.name} is not declared by setting(default, help=...)")
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) and type(None) in arguments:
        (hint,) = (argument for argument in arguments if argument is not type(None))
        arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    kind = str if origin is typing.Literal else arguments[0] if origin is tuple else hint
    if kind not in (bool, int, float, str, Path):
        raise TypeError(f"{field.name}: settings of type {hint} have no flag")
    return _Field(
        name=field.name,
        kind=cast("type", kind),
        choices=arguments if origin is typing.Literal else (),
        repeated=origin is tuple,
        default=field.default,
        help=field.metadata["help"],
        secret=field.metadata["secret"],
    )


def read_table(path: Path, settings_class: type[S], *, table: str) -> dict[str, Value]:
    """What `[table]` of a TOML file sets for `settings_class`; nothing, if the table is not there.

    Raises:
        BadSetting: the file cannot be read or parsed, a table or key is unknown, a type is wrong.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_NBYTES:
            raise BadSetting(
                f"{path} is larger than {MAX_CONFIG_NBYTES} bytes", hint="give a TOML file"
            )
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSetting(
            f"{path}: {error.strerror}", hint="give the path of a TOML file"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, an endless number or nest
        raise BadSetting(f"{path} is not TOML: {error}", hint="mend the line it names") from error
    for name, content in document.items():
        if name not in TABLES or not isinstance(content, Mapping):
            raise nearest(f"{path}: table [{name}]", name, TABLES)
    fields = _fields(settings_class)
    where = f"{path} [{table}]"
    values: dict[str, Value] = {}
    for key, value in document.get(table, {}).items():
        if key not in fields:
            raise nearest(f"{where}: key {key}", key, tuple(fields))
        values[key] = fields[key].from_toml(value, where=where)
    return values


def _params(settings_class: type[S], *, table: str) -> list[click.Parameter]:
    """`--config`, and an option for each field."""
    assert table in TABLES, f"[{table}] is missing from TABLES"

    def read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
        if path is not None:
            try:
                ctx.default_map = read_table(path, settings_class, table=table)
            except BadSetting as error:
                raise click.UsageError(str(error), ctx) from error
            ctx.meta[CONFIG_META] = path

    config = click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        envvar=ENVIRONMENT_PREFIX + "CONFIG",
        show_envvar=True,
        is_eager=True,  # before the others, whose defaults it brings
        expose_value=False,
        callback=read_config,
        help=f"TOML file with a table [{table}].",
    )
    return [config, *(field.option() for field in _fields(settings_class).values())]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sourced:
    """One setting: its value, and who gave it.

    Attributes:
        where: the flag, the variable, or the file and its table; empty for a default.
    """

    name: str
    value: Value = dataclasses.field(repr=False)  # it may be a secret
    origin: Origin
    where: str
    secret: bool
    help: str

    @property
    def shown(self) -> Value:
        """The value as it may be printed: sizes with their unit, no secret, no password of a URL."""
        if self.secret:
            return "(hidden)" if self.value else self.value
        if isinstance(self.value, int) and self.name.endswith("_nbytes"):
            return format_nbytes(self.value)
        if isinstance(self.value, tuple):
            return tuple(_without_user(each) for each in self.value)
        return _without_user(self.value) if isinstance(self.value, str) else self.value


def _without_user(text: str) -> str:
    return _USER_IN_URL.sub("***", text)


def explain(
    settings_class: type[S], *, table: str, arguments: Sequence[str] = ()
) -> tuple[Sourced, ...]:
    """Where each setting comes from: as a command with `options` would read them, before it checks them.

    Args:
        settings_class: of the command.
        table: its table in the file.
        arguments: its command line.

    Raises:
        click.UsageError: an unknown flag or key, a value of the wrong type.
    """
    params = _params(settings_class, table=table)
    command = click.Command(table, params=params, add_help_option=False)
    ctx = command.make_context(table, list(arguments))

    def sourced(field: _Field) -> Sourced:
        origin = _ORIGINS.get(ctx.get_parameter_source(field.name), "default")
        where = {
            "flag": field.flag,
            "environment": field.environment,
            "file": f"{ctx.meta.get(CONFIG_META)} [{table}]",
            "default": "",
        }[origin]
        return Sourced(
            name=field.name,
            value=ctx.params[field.name],
            origin=origin,
            where=where,
            secret=field.secret,
            help=field.help,
        )

    return tuple(sourced(field) for field in _fields(settings_class).values())


def environment_names(settings_class: type[S]) -> tuple[str, ...]:
    """The variables that set fields of `settings_class`."""
    return tuple(field.environment for field in _fields(settings_class).values())


def nearest(what: str, name: str, known: Sequence[str]) -> BadSetting:
    """The error that `what` is unknown, with the nearest of the `known` names."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}" if near else f"known: {', '.join(sorted(known))}"
    return BadSetting(f"{what} is unknown", hint=hint)


def options(
    settings_class: type[S], *, table: str
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[P, R]]:
    """Gives a click command the options of `settings_class`, and calls it with the settings first.

    A value that cannot work ends the command with exit status 2 and the sentence of its error.
    """
    params = _params(settings_class, table=table)
    names = _fields(settings_class)

    def decorate(command: Callable[Concatenate[S, P], R]) -> Callable[P, R]:
        @functools.wraps(command)
        def with_settings(*args: P.args, **values: P.kwargs) -> R:
            mine = {name: values.pop(name) for name in names}
            try:
                settings = settings_class(**mine)
            except (BadSetting, InsecureAddress) as error:
                raise click.UsageError(str(error)) from error
            return command(settings, *args, **values)

        # click's own place for the options of a function that becomes a command, last one first
        known = getattr(command, "__click_params__", [])
        with_settings.__click_params__ = [*known, *reversed(params)]  # type: ignore[attr-defined]
        return cast("Callable[P, R]", with_settings)

    return decorate


def check_bind(host: str, *, insecure: bool) -> None:
    """Refuses to listen beyond loopback, unless told so plainly.

    A name other than `localhost` is not resolved: what it means tomorrow is not ours to trust.

    Raises:
        InsecureAddress: `host` is not loopback and `insecure` is false.
    """
    if insecure or host == "localhost":
        return
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        is_loopback = False
    else:
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        is_loopback = (mapped or address).is_loopback
    if not is_loopback:
        raise InsecureAddress(
            f"{host!r} is not a loopback address, and this port has no credentials",
            hint="listen on 127.0.0.1, or allow it with --insecure",
        )

"""What p2pctl's commands share: where the daemon is, how its answers are read, and what errors become."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from node.cli.client import ControlClient, DaemonUnreachableError
from node.config.schema import Config, load
from node.oci.references import ImageName
from node.runtime.version import version
from protocol.errors import BadInputError, ShoalError

FAILED = 1
UNREACHABLE = 3
NEEDS_RESTART = 4

CONFIG = Path("/etc/p2pd/p2pd.toml")
DEFAULTS = Config()
_Document = TypeVar("_Document", bound=msgspec.Struct)
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Session:
    """What the options before and after the command's name say together."""

    socket: Path
    json: bool

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.socket)


class Failure(click.ClickException):
    exit_code = FAILED


class Unreachable(click.ClickException):
    exit_code = UNREACHABLE


class Group(click.Group):
    """Turns what goes wrong in operation into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DaemonUnreachableError as error:
            raise Unreachable(str(error)) from error
        except ShoalError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failure(f"{error.filename or 'p2pctl'}: {error.strerror or error}") from error


class ImageParam(click.ParamType[str]):
    name = "image"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            ImageName.parse(value)
        except BadInputError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def events(lines: Iterator[bytes], kind: Any, what: str) -> Iterator[tuple[bytes, Any]]:
    """Each line of an answer and what it says, of the union `kind`. Raises DaemonUnreachableError, naming `what`."""
    decoder = msgspec.json.Decoder(kind)
    for line in lines:
        try:
            yield line, decoder.decode(line)
        except msgspec.DecodeError as error:
            raise DaemonUnreachableError(f"{what} broke off, or is of another version: {error}") from error


def echo(told: Iterator[tuple[bytes, Any]], result: type[_Document]) -> _Document | None:
    """Print the lines as they come; the last result among them."""
    last = None
    for line, event in told:
        click.echo(line.rstrip())
        last = event if isinstance(event, result) else last
    return last


def _set(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and param.name:
        ctx.obj = replace(ctx.obj, **{param.name: value})


def common(command: Command) -> Command:
    """--json and --socket are understood after the command's name, too."""
    path = click.Path(path_type=Path)
    command = click.option("--json", is_flag=True, expose_value=False, callback=_set, help="Print JSON.")(command)
    return click.option("--socket", type=path, expose_value=False, callback=_set, hidden=True)(command)


def configuration(command: Command) -> Command:
    """--config, for what p2pctl does without the daemon; see `read_configuration`."""
    option = click.option(
        "--config", "path", type=click.Path(path_type=Path),
        help=f"The daemon's configuration.  [default: {CONFIG}, where there is one]",
    )  # fmt: skip
    return option(command)


def read_configuration(path: Path | None) -> Config:
    """Raises BadInputError."""
    return load(path or (CONFIG if CONFIG.exists() else None))


def decode(data: bytes, kind: type[_Document]) -> _Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise DaemonUnreachableError(f"what answers is not a p2pd of this version ({version()}): {error}") from error


def show_document(session: Session, data: bytes, kind: type[_Document], show: Callable[[_Document], None]) -> None:
    """Print what the daemon answered: as it is, or by `show`."""
    document = decode(data, kind)
    if session.json:
        click.echo(data.rstrip())
    else:
        show(document)

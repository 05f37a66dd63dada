"""The parts that p2pctl's commands share: options, the session with the daemon, and how an error becomes a status."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from node.api.documents import PullResult, WorkResult
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
PATH = click.Path(path_type=Path)
_Document = TypeVar("_Document", bound=msgspec.Struct)
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Session:
    """The options that every command has, whether they stand before or after the command's name."""

    socket: Path
    json: bool

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.socket)

    def get(self, path: str, kind: type[_Document]) -> _Document:
        return decode(self.client.get(path), kind)

    def show(self, data: bytes, kind: type[msgspec.Struct]) -> None:
        """Print the daemon's answer: unchanged with --json, else as a table."""
        self.print(decode(data, kind), data)

    def print(self, document: msgspec.Struct, data: bytes = b"") -> None:
        """`data` is the document's JSON, if it exists already."""
        if self.json:
            click.echo((data or msgspec.json.encode(document)).rstrip())
            return
        from node.cli.render import console, show

        show(document, console())

    def say(self, document: bytes | dict[str, Any], *lines: str, note: str = "") -> None:
        """Print the document with --json, else the lines, and `note` on standard error."""
        if self.json:
            click.echo(document.rstrip() if isinstance(document, bytes) else json.dumps(document))
            return
        for line in lines:
            click.echo(line)
        if note:
            click.echo(note, err=True)

    def follow(
        self, lines: Generator[bytes, None, None], kind: Any, *, work: str, failed: str, title: str = ""
    ) -> None:
        """Print the progress of `work` and its result. `kind` is the union of the events that the lines contain.

        Raises Failure with a text that begins with `failed`, or DaemonUnreachableError for a stream without a result.
        """
        decoder = msgspec.json.Decoder(kind)
        outcome: PullResult | WorkResult | None = None
        with ExitStack() as stack:
            stack.callback(lines.close)
            if not self.json:
                from node.cli.render import transfer_bar

                update = stack.enter_context(transfer_bar(title))
            for line in lines:
                try:
                    event = decoder.decode(line)
                except msgspec.DecodeError as error:
                    text = f"the answer to {work} broke off, or is from another version: {error}"
                    raise DaemonUnreachableError(text) from error
                if isinstance(event, PullResult | WorkResult):
                    outcome = event
                elif not self.json:
                    update(event)
                if self.json:
                    click.echo(line.rstrip())
        if outcome is None:
            raise DaemonUnreachableError(f"p2pd ended before {work} was complete: systemctl status p2pd")
        if not outcome.ok:
            raise Failure(f"{failed}: {outcome.error}")
        if not self.json:
            self.print(outcome)


class Failure(click.ClickException):
    exit_code = FAILED


class Unreachable(click.ClickException):
    exit_code = UNREACHABLE


class Group(click.Group):
    """Turns each operational error into one line and an exit status."""

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


def _set(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and param.name:
        ctx.obj = replace(ctx.obj, **{param.name: value})


def options(command: Command) -> Command:
    """Accept --json and --socket after the command's name too."""
    command = click.option("--json", is_flag=True, expose_value=False, callback=_set, help="Print JSON.")(command)
    return click.option("--socket", type=PATH, expose_value=False, callback=_set, hidden=True)(command)


configuration = click.option(
    "--config", "path", type=PATH, help=f"The daemon's configuration.  [default: {CONFIG}, if it exists]"
)
"""For commands that work without the daemon; see `read_configuration`."""


def read_configuration(path: Path | None) -> Config:
    """Raises BadInputError."""
    return load(path or (CONFIG if CONFIG.exists() else None))


def decode(data: bytes, kind: type[_Document]) -> _Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise DaemonUnreachableError(f"the answer is not from a p2pd of this version ({version()}): {error}") from error

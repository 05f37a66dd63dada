"""p2pctl's commands for sites that are cut off: export, import, pin, unpin, pins, prefetch, gc."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import click
import msgspec

from node.api.image_documents import (
    GcReport,
    PinsReport,
    PrefetchOrder,
    PrefetchReport,
    WorkEvent,
    WorkResult,
)
from node.cli.client import DaemonUnreachableError
from node.cli.common import Command, Failure, ImageParam, Session, common, echo, events, show_document
from node.config.quantities import Duration, Size
from node.oci.platforms import parse_platforms
from protocol.errors import BadInputError

MAX_LIST = 1 << 20
"""Bytes of a file with names of images."""


def add_to(group: click.Group) -> None:
    for command in (export, import_, pin, unpin, pins, prefetch, gc):
        group.add_command(command)


def _platforms(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--platform", "platforms", multiple=True, metavar="OS/ARCH[/VARIANT]",
        help=f"Such as linux/arm64; repeatable.  [default: {default}]",
    )  # fmt: skip


_everything = click.option("--all-platforms", is_flag=True, help="All that the image has.")


def _query(platforms: Sequence[str], all_platforms: bool = False) -> dict[str, str]:
    parse_platforms(platforms)
    if platforms and all_platforms:
        raise click.UsageError("either --platform or --all-platforms")
    text = "all" if all_platforms else ",".join(platforms)
    return {"platforms": text} if text else {}


# Archives


@click.command()
@click.argument("image", type=ImageParam())
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_platforms("all that the image has")
@click.option("--force", is_flag=True, help="Replace FILE.")
@common
@click.pass_obj
def export(session: Session, image: str, file: Path, platforms: tuple[str, ...], force: bool) -> None:
    """Write IMAGE to FILE, an OCI layout in a tar file, reading from the site and the registry what is missing."""
    query = _query(platforms)
    if file.exists() and not force:
        raise BadInputError(f"{file} is there already: --force replaces it")
    with _replacing(file) as descriptor:
        _work(session, "/export", f"{file}: {image} was not exported", "export", descriptor, image=image, **query)


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """An open file, which takes the place of `file` unless something fails. Raises OSError."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", type=ImageParam(), help="What the image in FILE is called, whatever FILE says.")
@click.option("--pin", "pinned", is_flag=True, help="Pin what was imported.")
@common
@click.pass_obj
def import_(session: Session, file: Path, name: str | None, pinned: bool) -> None:
    """Take the images of FILE, an OCI layout in a tar file, into this node, and through it into the site.

    Everything is checked before anything is stored. The daemon needs no access to FILE.
    """
    query = ({"name": name} if name else {}) | ({"pin": "1"} if pinned else {})
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _work(session, "/import", str(file), "import", descriptor, **query)
    finally:
        os.close(descriptor)


# Pins


@click.command()
@click.argument("image", type=ImageParam())
@_platforms("this machine's")
@_everything
@common
@click.pass_obj
def pin(session: Session, image: str, platforms: tuple[str, ...], all_platforms: bool) -> None:
    """Keep all of IMAGE on this node's disk until it is unpinned; what is missing is read now."""
    query = _query(platforms, all_platforms)
    _work(session, "/pin", f"{image} was not pinned", "pin", None, image=image, **query)


@click.command()
@click.argument("image", type=ImageParam())
@common
@click.pass_obj
def unpin(session: Session, image: str) -> None:
    """Let the cache remove IMAGE again when it needs the room."""
    show_document(session, session.client.post("/unpin", image=image), PinsReport, _show)


@click.command()
@common
@click.pass_obj
def pins(session: Session) -> None:
    """The pinned images, and how much of the disk's budget they take."""
    show_document(session, session.client.get("/pins"), PinsReport, _show)


# Prefetch


@click.command()
@click.argument("what", nargs=-1, metavar="[FILE|IMAGE]...")
@_platforms("this machine's")
@_everything
@click.option("--rate", help="Such as 2MiB: at most so much in a second.")
@click.option("--window", help="Such as 22:00-06:00, by the node's clock: only at these hours.")
@click.option("--status", "only_status", is_flag=True, help="What was ordered, and how far it is.")
@click.option("--cancel", is_flag=True, help="End all that is not done.")
@common
@click.pass_obj
def prefetch(
    session: Session, what: tuple[str, ...], platforms: tuple[str, ...], all_platforms: bool, rate: str | None,
    window: str | None, only_status: bool, cancel: bool,
) -> None:  # fmt: skip
    """Have the daemon fetch images ahead of time. A FILE has one name on each line; '#' begins a comment.

    What clients read goes first. p2pctl does not wait for it, and it goes on after a restart of p2pd.
    """
    if bool(what) + only_status + cancel != 1:
        raise click.UsageError("name images, or files with their names, or one of --status and --cancel")
    if only_status:
        answer = session.client.get("/prefetched")
    elif cancel:
        answer = session.client.post("/prefetch/cancel")
    else:
        _query(platforms, all_platforms)
        order = PrefetchOrder(
            images=tuple(_images(what)), platforms=platforms, all_platforms=all_platforms,
            rate=Size.read("--rate", rate.removesuffix("/s")).bytes if rate else 0, window=window or "",
        )  # fmt: skip
        answer = session.client.post("/prefetch", body=msgspec.json.encode(order))
    show_document(session, answer, PrefetchReport, _show)


def _images(what: Sequence[str]) -> Iterator[str]:
    for text in what:
        if not os.path.isfile(text):
            yield text
            continue
        with open(text, "rb") as file:
            data = file.read(MAX_LIST + 1)
        if len(data) > MAX_LIST:
            raise BadInputError(f"{text}: larger than a list of images can be")
        lines = (line.partition("#")[0].strip() for line in data.decode("utf-8", "replace").splitlines())
        yield from filter(None, lines)


# gc


@click.command()
@click.option("--older-than", metavar="DURATION", help="Such as 7d: what was not used for so long.")
@click.option("--to", "to", metavar="SIZE", help="Such as 5GiB: the least useful, until no more than so much is left.")
@click.option("--dry-run", is_flag=True, help="Only tell how much that is.")
@common
@click.pass_obj
def gc(session: Session, older_than: str | None, to: str | None, dry_run: bool) -> None:
    """Remove from this node's disk what is not pinned: what was not used for some time, or all beyond a size."""
    if (older_than is None) == (to is None):
        raise click.UsageError("either --older-than or --to")
    if older_than:
        Duration.read("--older-than", older_than)
    if to:
        Size.read("--to", to)
    dry = "1" if dry_run else "0"
    answer = session.client.post("/gc", older_than=older_than or "", to=to or "", dry_run=dry)
    show_document(session, answer, GcReport, _show)


# Showing


def _show(document: msgspec.Struct) -> None:
    import node.cli.render_images  # noqa: F401 - its tables
    from node.cli.render import console, show

    show(document, console())


def _work(session: Session, path: str, failed: str, what: str, descriptor: int | None, **query: str) -> None:
    with closing(session.client.stream(path, descriptor=descriptor, **query)) as lines:
        told = events(lines, WorkEvent, "the answer")
        result = echo(told, WorkResult) if session.json else _watch(told, what)
    if result is None:
        raise DaemonUnreachableError(f"p2pd went away before the {what} was over: systemctl status p2pd")
    if not result.ok:
        raise Failure(f"{failed}: {result.error}")
    if not session.json:
        _show(result)


def _watch(told: Iterator[tuple[bytes, WorkEvent]], what: str) -> WorkResult | None:
    from node.cli.render import transfer_bar

    with transfer_bar(what) as (progress, task):
        for _, event in told:
            if isinstance(event, WorkResult):
                return event
            progress.update(task, completed=event.bytes_done, total=event.bytes_total or None, description=event.phase)
    return None

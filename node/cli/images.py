"""p2pctl's commands for whole images: export, import, pin, unpin, pins, prefetch, gc."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from node.api.documents import GcReport, PinsReport, PrefetchOrder, PrefetchReport, WorkEvent
from node.cli.common import PATH, Command, ImageParam, Session, options
from node.config.quantities import Duration, Size
from node.oci.platforms import parse_platforms
from protocol.errors import BadInputError

MAX_LIST = 1 << 20
"""Bytes of a file that lists images."""


def _platforms(default: str) -> Callable[[Command], Command]:
    text = f"For example linux/arm64; repeatable.  [default: {default}]"
    return click.option("--platform", "platforms", multiple=True, metavar="OS/ARCH[/VARIANT]", help=text)


_everything = click.option("--all-platforms", is_flag=True, help="All platforms of the image.")


def _query(platforms: Sequence[str], all_platforms: bool = False) -> dict[str, str]:
    parse_platforms(platforms)
    if platforms and all_platforms:
        raise click.UsageError("either --platform or --all-platforms")
    text = "all" if all_platforms else ",".join(platforms)
    return {"platforms": text} if text else {}


@click.command()
@click.argument("image", type=ImageParam())
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_platforms("all platforms of the image")
@click.option("--force", is_flag=True, help="Replace FILE.")
@options
@click.pass_obj
def export(session: Session, image: str, file: Path, platforms: tuple[str, ...], force: bool) -> None:
    """Write IMAGE to FILE, an OCI layout in a tar file. Missing blocks are read from the site and the registry."""
    query = _query(platforms)
    if file.exists() and not force:
        raise BadInputError(f"{file} already exists: --force replaces it")
    with _replacing(file) as descriptor:
        _work(session, "/export", f"{file}: {image} was not exported", descriptor=descriptor, image=image, **query)


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """Open a temporary file, which replaces `file` if the body succeeds. Raises OSError."""
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
@click.argument("file", type=PATH)
@click.option("--name", type=ImageParam(), help="The name of the image, instead of the one in FILE.")
@click.option("--pin", "pinned", is_flag=True, help="Pin the imported images.")
@options
@click.pass_obj
def import_(session: Session, file: Path, name: str | None, pinned: bool) -> None:
    """Import the images of FILE, an OCI layout in a tar file, into this node, and so into the site.

    The whole file is checked before anything is stored. The daemon needs no access to FILE.
    """
    query = ({"name": name} if name else {}) | ({"pin": "1"} if pinned else {})
    with file.open("rb") as archive:
        _work(session, "/import", str(file), descriptor=archive.fileno(), **query)


@click.command()
@click.argument("image", type=ImageParam())
@_platforms("this machine's")
@_everything
@options
@click.pass_obj
def pin(session: Session, image: str, platforms: tuple[str, ...], all_platforms: bool) -> None:
    """Keep all of IMAGE on this node's disk until it is unpinned. Missing blocks are read now."""
    query = _query(platforms, all_platforms)
    _work(session, "/pin", f"{image} was not pinned", descriptor=None, image=image, **query)


@click.command()
@click.argument("image", type=ImageParam())
@options
@click.pass_obj
def unpin(session: Session, image: str) -> None:
    """Let the cache remove IMAGE again when it needs the space."""
    session.show(session.client.post("/unpin", image=image), PinsReport)


@click.command()
@options
@click.pass_obj
def pins(session: Session) -> None:
    """The pinned images, and how much of the disk's budget they take."""
    session.show(session.client.get("/pins"), PinsReport)


@click.command()
@click.argument("names", nargs=-1, metavar="[FILE|IMAGE]...")
@_platforms("this machine's")
@_everything
@click.option("--rate", help="For example 2MiB: at most this many bytes a second.")
@click.option("--window", help="For example 22:00-06:00, by the node's clock: only during these hours.")
@click.option("--status", "only_status", is_flag=True, help="Show the orders and their progress.")
@click.option("--cancel", is_flag=True, help="Cancel every order that is not done.")
@options
@click.pass_obj
def prefetch(
    session: Session,
    names: tuple[str, ...],
    platforms: tuple[str, ...],
    all_platforms: bool,
    rate: str | None,
    window: str | None,
    only_status: bool,
    cancel: bool,
) -> None:
    """Have the daemon fetch images ahead of time. A FILE has one name on each line; '#' begins a comment.

    Reads for clients go first. p2pctl does not wait for the fetch, which continues after a restart of p2pd.
    """
    if bool(names) + only_status + cancel != 1:
        raise click.UsageError("name images, or files with their names, or one of --status and --cancel")
    if only_status:
        answer = session.client.get("/prefetched")
    elif cancel:
        answer = session.client.post("/prefetch/cancel")
    else:
        _query(platforms, all_platforms)
        order = PrefetchOrder(
            images=tuple(_images(names)),
            platforms=platforms,
            all_platforms=all_platforms,
            rate=Size.read("--rate", rate.removesuffix("/s")).bytes if rate else 0,
            window=window or "",
        )
        answer = session.client.post("/prefetch", body=msgspec.json.encode(order))
    session.show(answer, PrefetchReport)


def _images(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if not os.path.isfile(name):
            yield name
            continue
        with open(name, "rb") as file:
            data = file.read(MAX_LIST + 1)
        if len(data) > MAX_LIST:
            raise BadInputError(f"{name}: a list of images has at most {MAX_LIST} bytes")
        lines = (line.partition("#")[0].strip() for line in data.decode("utf-8", "replace").splitlines())
        yield from filter(None, lines)


@click.command()
@click.option("--older-than", metavar="DURATION", help="For example 7d: blocks unused for this time.")
@click.option("--to", "to", metavar="SIZE", help="For example 5GiB: the least useful blocks, until this much is left.")
@click.option("--dry-run", is_flag=True, help="Only show how much would be removed.")
@options
@click.pass_obj
def gc(session: Session, older_than: str | None, to: str | None, dry_run: bool) -> None:
    """Remove unpinned blocks from this node's disk: those unused for some time, or those beyond a total size."""
    if (older_than is None) == (to is None):
        raise click.UsageError("either --older-than or --to")
    if older_than:
        Duration.read("--older-than", older_than)
    if to:
        Size.read("--to", to)
    dry = "1" if dry_run else "0"
    answer = session.client.post("/gc", older_than=older_than or "", to=to or "", dry_run=dry)
    session.show(answer, GcReport)


def _work(session: Session, path: str, failed: str, *, descriptor: int | None, **query: str) -> None:
    lines = session.client.stream(path, descriptor=descriptor, **query)
    session.follow(lines, WorkEvent, work=f"the {path[1:]}", failed=failed)


IMAGE_COMMANDS = (export, import_, pin, unpin, pins, prefetch, gc)

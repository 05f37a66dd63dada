"""p2pctl: sends commands to the daemon through its control socket, and shows the answers.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 the daemon cannot be reached, 4 it needs a restart. With --json,
standard output carries the document only. Slow modules (rich, httpx) are imported by the commands that use them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from node.api import documents
from node.cli import common, containerd_hosts
from node.cli.client import DaemonUnreachableError
from node.cli.cluster import CLUSTER_COMMANDS
from node.cli.common import PATH, ImageParam, Session, options
from node.cli.images import IMAGE_COMMANDS
from node.runtime.version import version
from protocol.errors import BadInputError, ShoalError


@click.group(cls=common.Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=PATH,
    envvar="P2PD_SOCKET",
    show_envvar=True,
    default=Path(common.DEFAULTS.control.socket),
    show_default=True,
    help="The daemon's control socket.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output.")
@click.pass_context
def main(ctx: click.Context, socket: Path, as_json: bool) -> None:
    """Show and control the p2pd daemon of this node."""
    ctx.obj = Session(socket, as_json)


for command in (*IMAGE_COMMANDS, *CLUSTER_COMMANDS):
    main.add_command(command)


def _document(name: str, kind: type[msgspec.Struct], text: str) -> None:
    """Add a command that shows the document of the same name."""

    @main.command(name, help=text)
    @options
    @click.pass_obj
    def show(session: Session) -> None:
        session.show(session.client.get(f"/{name}"), kind)


_document("status", documents.Status, "This node: its identity, the bytes that it served by source, and its cache.")
_document("peers", documents.PeersReport, "The other members, their health, and the bytes exchanged with them.")
_document("images", documents.ImagesReport, "Images that were pulled through this node, and how much of each it holds.")
_document("cache", documents.CacheReport, "The cache's tiers, and the blocks of each object that they hold.")


@main.command()
@click.argument("pattern", default="*")
@options
@click.pass_obj
def tags(session: Session, pattern: str) -> None:
    """The digest of each tag as known here, its age, its source, and the policy that applies.

    PATTERN is a glob over registry/repository:tag, or a part of it: "docker.io/*:latest", alpine.
    """
    match = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    session.show(session.client.get("/tags", match=match), documents.TagsReport)


@main.command()
@click.argument("image", type=ImageParam())
@click.option("--all-platforms", is_flag=True, help="Every platform of the image, not only this machine's.")
@options
@click.pass_obj
def pull(session: Session, image: str, all_platforms: bool) -> None:
    """Read IMAGE into this node's cache, and so into the site's."""
    lines = session.client.stream("/pull", image=image, all_platforms="1" if all_platforms else "0")
    session.follow(lines, documents.PullEvent, work="the pull", failed=f"{image} was not pulled", title=image)


@main.command()
@click.argument("image", type=ImageParam())
@click.option("--blocks", is_flag=True, help="One line for each block, not for each run of blocks from one source.")
@options
@click.pass_obj
def why(session: Session, image: str, blocks: bool) -> None:
    """The source of each block of IMAGE, the time that it took, and the retries."""
    data = session.client.get("/why", image=image)
    report = common.decode(data, documents.WhyReport)
    if session.json:
        click.echo(data.rstrip())
        return
    from node.cli.render import console, show_why

    rows = session.get("/peers", documents.PeersReport).peers
    show_why(console(), report, {row.peer_id: row.name for row in rows}, every_block=blocks)


@main.group(cls=common.Group)
def containerd() -> None:
    """Configure containerd to pull through this node's mirror."""


_certs_dir = click.option(
    "--certs-dir", type=PATH, default="/etc/containerd/certs.d", show_default=True, help="containerd's config_path."
)


@containerd.command()
@_certs_dir
@click.option("--mirror", help="The mirror's address.  [default: the daemon's, else http://127.0.0.1:5050]")
@click.option("--upstream", "upstreams", multiple=True, help="A registry; repeatable.  [default: the daemon's]")
@click.option("--dry-run", is_flag=True, help="Print the changes as a diff, without making them.")
@options
@click.pass_obj
def install(session: Session, certs_dir: Path, mirror: str | None, upstreams: tuple[str, ...], dry_run: bool) -> None:
    """Add the mirror to each registry's hosts.toml, before the hosts that are already in it."""
    running = _running(session)
    address = mirror or _mirror_url(running.mirror if running else "")
    changes = containerd_hosts.plan_install(certs_dir, address, _registries(running, upstreams))
    _change(session, changes, certs_dir, dry_run=dry_run)


@containerd.command()
@_certs_dir
@click.option("--dry-run", is_flag=True, help="Print the changes as a diff, without making them.")
@options
@click.pass_obj
def uninstall(session: Session, certs_dir: Path, dry_run: bool) -> None:
    """Remove from every hosts.toml exactly the lines that `install` added."""
    _change(session, containerd_hosts.plan_uninstall(certs_dir), certs_dir, dry_run=dry_run)


def _running(session: Session) -> documents.Status | None:
    try:
        return session.get("/status", documents.Status)
    except DaemonUnreachableError:
        click.echo(f"p2pd does not answer on {session.socket}: its default configuration is assumed", err=True)
        return None


def _mirror_url(listen: str) -> str:
    """The URL at which a client on this machine reaches the mirror that listens on `listen`."""
    host, _, port = (listen or common.DEFAULTS.mirror.listen).rpartition(":")
    anywhere = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
    return f"http://{anywhere.get(host, host)}:{port}"


def _registries(running: documents.Status | None, wanted: Sequence[str]) -> dict[str, str]:
    """The registries to configure, each with the URL that containerd falls back to."""
    urls = {part.name: part.urls[-1] for part in common.DEFAULTS.upstream}
    if running:
        urls = {row.name: row.url for row in running.upstreams}
    return {name: urls.get(name) or containerd_hosts.default_server(name) for name in wanted or urls}


def _change(session: Session, changes: Sequence[containerd_hosts.Change], certs_dir: Path, *, dry_run: bool) -> None:
    advice = containerd_hosts.config_path_advice(certs_dir)
    for change in changes:
        if not dry_run:
            containerd_hosts.apply(change)
    if session.json:
        rows = [
            {"path": str(change.path), "changed": change.is_needed, "diff": change.diff(), "notes": change.notes}
            for change in changes
        ]
        click.echo(json.dumps({"changes": rows, "dry_run": dry_run, "containerd": advice}))
        return
    for change in changes:
        _print_change(change, dry_run=dry_run)
    if not changes:
        click.echo(f"nothing to remove under {certs_dir}", err=True)
    click.echo(f"note: {advice}", err=True)


def _print_change(change: containerd_hosts.Change, *, dry_run: bool) -> None:
    if dry_run:
        click.echo(change.diff(), nl=False)
    elif change.is_needed:
        click.echo(f"{'removed' if change.after is None else 'wrote'} {change.path}")
    if not change.is_needed:
        click.echo(f"unchanged {change.path}", err=dry_run)
    for note in change.notes:
        click.echo(f"note: {change.path}: {note}", err=True)


@main.command()
@options
@click.pass_obj
def reload(session: Session) -> None:
    """Have p2pd read its configuration again. Pulls continue.

    The whole file is applied, or nothing (exit status 1). Changes that need a restart are listed (exit status 4).
    """
    data = session.client.post("/reload")
    report = common.decode(data, documents.ReloadReport)
    changed = (f"changed {line}" for line in report.changed or ("nothing",))
    session.say(data, *changed, *(f"needs a restart: {line}" for line in report.needs_restart))
    if report.needs_restart:
        sys.exit(common.NEEDS_RESTART)


@main.command()
@_certs_dir
@common.configuration
@options
@click.pass_obj
def doctor(session: Session, certs_dir: Path, path: Path | None) -> None:
    """Check this node for faults, and show the remedy of each."""
    try:
        running = session.get("/status", documents.Status)
        inside = session.get("/doctor", documents.DoctorReport).checks
    except DaemonUnreachableError as error:
        checks = [documents.Check(name="daemon", level="fail", text=str(error), hint="journalctl -u p2pd -n 50")]
        checks += [*_outside(certs_dir, None), _certificate(path)]
        session.print(documents.DoctorReport(checks=tuple(checks)))
        sys.exit(common.UNREACHABLE)
    socket = documents.Check(name="daemon", level="ok", text=f"p2pd {running.version} answers on {session.socket}")
    checks = [socket, *_outside(certs_dir, running), *inside]
    session.print(documents.DoctorReport(checks=tuple(checks)))
    if any(check.level == "fail" for check in checks):
        sys.exit(common.FAILED)


def _outside(certs_dir: Path, running: documents.Status | None) -> list[documents.Check]:
    """The checks that need no daemon."""
    from node.control.doctor import check_mirror, http_status

    mirror = _mirror_url(running.mirror if running else "")
    address = mirror.removeprefix("http://")
    return [check_mirror(address, *http_status(address)), _containerd(certs_dir, mirror, running)]


def _containerd(certs_dir: Path, mirror: str, running: documents.Status | None) -> documents.Check:
    from node.control.doctor import check_hosts

    if not certs_dir.parent.is_dir():
        return documents.Check(name="containerd", level="ok", text=f"not set up here (no {certs_dir.parent})")
    names = _registries(running, ())
    try:
        through = [name for name in names if containerd_hosts.points_at(certs_dir, mirror, name)]
    except BadInputError as error:
        return check_hosts((), (), str(error))
    return check_hosts([name for name in names if name not in through], through)


def _certificate(path: Path | None) -> documents.Check:
    """The check of the certificate in the files, while the daemon does not run."""
    from node.control.doctor import certificate_in_files, check_certificate

    try:
        return check_certificate(certificate_in_files(common.read_configuration(path)), time.time())
    except BadInputError as error:
        return documents.Check(name="configuration", level="fail", text=str(error), hint="p2pd does not start with it")


@main.command(name="version")
@options
@click.pass_obj
def show_version(session: Session) -> None:
    """The versions of p2pctl and of the running daemon."""
    try:
        daemon = session.get("/status", documents.Status).version
    except ShoalError:
        daemon = None
    lines = f"p2pctl {version()}", f"p2pd   {daemon or 'not reached'}"
    session.say({"p2pctl": version(), "p2pd": daemon}, *lines)

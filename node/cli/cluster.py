"""p2pctl's commands for who is of the cluster: cluster init, token, revoke; join. Only `revoke` asks the daemon."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from node.api.documents import RevokeReport
from node.cli.common import Group, Session, common, configuration, decode, read_configuration
from protocol.errors import BadInputError


def add_to(group: click.Group) -> None:
    group.add_command(cluster)
    group.add_command(join)


@click.group(cls=Group)
def cluster() -> None:
    """Who is of the cluster: its key, invitations, revocations."""


@cluster.command()
@click.argument("file", type=click.Path(path_type=Path))
@common
@click.pass_obj
def init(session: Session, file: Path) -> None:
    """Make a new cluster's key in FILE.

    A node that names it as [cluster] key can admit others; these join by token and need no key.
    """
    from node.identity.certificates import create_authority

    create_authority(file)
    if session.json:
        click.echo(json.dumps({"file": str(file)}))
    else:
        click.echo(f"made {file}: whoever has it can add nodes to the cluster, so keep it as a secret")


@cluster.command()
@click.option(
    "--key", type=click.Path(path_type=Path), required=True,
    help="The cluster's key file; of a node that was given none, cluster.pem in its data folder.",
)  # fmt: skip
@click.option("--site", required=True, help="The site that the nodes belong to.")
@click.option("--expires", default="24h", show_default=True, help="For how long it can be used.")
@click.option("--uses", default=0, help="How many nodes it admits.  [default: any number]")
@click.option(
    "--lifetime", default="none", show_default=True,
    help="How long a certificate is valid that it brings, 1d at least. Members with the key renew it before.",
)  # fmt: skip
@common
@click.pass_obj
def token(session: Session, key: Path, site: str, expires: str, uses: int, lifetime: str) -> None:
    """Print a join token: a secret that lets nodes join the cluster until it expires."""
    from node.cli.admin import invite
    from protocol.admission import date

    made = invite(key, site, expires, uses, lifetime)
    if session.json:
        click.echo(json.dumps(made))
    else:
        click.echo(made["token"])
        click.echo(f"for site {site}, until {date(int(made['expires']))}: p2pctl join TOKEN ADDRESS", err=True)


@cluster.command()
@click.argument("what")
@click.option(
    "--key", type=click.Path(path_type=Path),
    help="The cluster's key file. Without it, WHAT is what --print printed elsewhere.",
)  # fmt: skip
@click.option("--print", "only_print", is_flag=True, help="Print the revocation, for a member elsewhere, and no more.")
@common
@click.pass_obj
def revoke(session: Session, what: str, key: Path | None, only_print: bool) -> None:
    """Shut WHAT out for good: a peer id, or a join token (itself, or its token:... name).

    The running daemon is told, and tells the other members.
    """
    from node.cli.admin import revocation

    if key is None and only_print:
        raise BadInputError("--print needs --key, to sign what it prints")
    text = what if key is None else revocation(key, what)
    if only_print:
        click.echo(json.dumps({"revocation": text}) if session.json else text)
        return
    data = session.client.post("/revoke", body=text.encode("utf-8"))
    report = decode(data, RevokeReport)
    if session.json:
        click.echo(data.rstrip())
    else:
        click.echo(f"{'revoked' if report.new else 'was revoked already:'} {report.subject} ({report.total} in all)")


@click.command()
@click.argument("token")
@click.argument("address")
@configuration
@common
@click.pass_obj
def join(session: Session, token: str, address: str, path: Path | None) -> None:
    """Make this node a member of the cluster that TOKEN is for ("-": read it from standard input).

    ADDRESS is that of a member that holds the cluster's key: host:port of its peers.listen (4501), or a multiaddr. The
    certificate goes into the daemon's data folder; the daemon is a member from its next start on.
    """
    from node.cli.admin import join_cluster

    text = (sys.stdin.readline() if token == "-" else token).strip()  # stands for standard input
    told = join_cluster(read_configuration(path), text, address)
    if session.json:
        click.echo(json.dumps(told))
    else:
        click.echo(f"joined the cluster {told['cluster'][:16]} as {told['peer_id']}, site {told['site']}")
        click.echo("restart p2pd, where it runs", err=True)

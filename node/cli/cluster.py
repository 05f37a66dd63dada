"""p2pctl's commands for membership of the cluster: cluster init, token, revoke; join. Only `revoke` asks the daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from node.api.documents import RevokeReport
from node.cli.common import PATH, Group, Session, configuration, decode, options, read_configuration
from protocol.errors import BadInputError


@click.group(cls=Group)
def cluster() -> None:
    """Membership of the cluster: its key, invitations, revocations."""


@cluster.command()
@click.argument("file", type=PATH)
@options
@click.pass_obj
def init(session: Session, file: Path) -> None:
    """Make a new cluster's key in FILE.

    A node with this file as its [cluster] key admits other nodes, which join with a token and need no key.
    """
    from node.identity.certificates import create_authority

    create_authority(file)
    text = f"made {file}: keep it secret, because with it anyone can add nodes to the cluster"
    session.say({"file": str(file)}, text)


@cluster.command()
@click.option("--key", type=PATH, required=True, help="The cluster's key file, such as cluster.pem in a data folder.")
@click.option("--site", required=True, help="The site that the nodes belong to.")
@click.option("--expires", default="24h", show_default=True, help="How long the token can be used.")
@click.option("--uses", default=0, help="How many nodes it admits.  [default: any number]")
@click.option("--lifetime", default="none", show_default=True, help="How long its certificates are valid, at least 1d.")
@options
@click.pass_obj
def token(session: Session, key: Path, site: str, expires: str, uses: int, lifetime: str) -> None:
    """Print a join token: a secret that lets nodes join the cluster until it expires.

    Without a [cluster] key, a node keeps the key in cluster.pem in its data folder. Members that hold the key renew
    certificates before they expire.
    """
    from node.cli.admin import invite
    from protocol.admission import date

    made = invite(key, site=site, expires=expires, uses=uses, lifetime=lifetime)
    note = f"for site {site}, until {date(int(made['expires']))}: p2pctl join TOKEN ADDRESS"
    session.say(made, str(made["token"]), note=note)


@cluster.command()
@click.argument("subject", metavar="WHAT")
@click.option("--key", type=PATH, help="The cluster's key file. Without it, WHAT is the output of --print.")
@click.option("--print", "only_print", is_flag=True, help="Only print the revocation, for use on another member.")
@options
@click.pass_obj
def revoke(session: Session, subject: str, key: Path | None, only_print: bool) -> None:
    """Shut WHAT out permanently: a peer id, or a join token (itself, or its token:... name).

    The running daemon receives the revocation and passes it on to the other members.
    """
    from node.cli.admin import revocation

    if key is None and only_print:
        raise BadInputError("--print needs --key, to sign the revocation")
    text = subject if key is None else revocation(key, subject)
    if only_print:
        session.say({"revocation": text}, text)
        return
    data = session.client.post("/revoke", body=text.encode("utf-8"))
    report = decode(data, RevokeReport)
    verb = "revoked" if report.new else "was revoked already:"
    session.say(data, f"{verb} {report.subject} ({report.total} in total)")


@click.command()
@click.argument("token")
@click.argument("address")
@configuration
@options
@click.pass_obj
def join(session: Session, token: str, address: str, path: Path | None) -> None:
    """Make this node a member of the cluster that TOKEN is for ("-": read it from standard input).

    ADDRESS is a member that holds the cluster's key: host:port of its peers.listen (4501), or a multiaddr. The
    certificate is saved in the daemon's data folder, and the daemon is a member from its next start.
    """
    from node.cli.admin import join_cluster

    text = (sys.stdin.readline() if token == "-" else token).strip()
    joined = join_cluster(read_configuration(path), text, address)
    line = f"joined the cluster {joined['cluster'][:16]} as {joined['peer_id']}, site {joined['site']}"
    session.say(joined, line, note="restart p2pd, if it runs")


CLUSTER_COMMANDS = (cluster, join)

"""Faults on a site whose clients constantly pull images: `python -m tests.chaos --seed N`.

The daemons run in network namespaces behind one uplink, each with a disk of its own. The seed determines all faults and
pulls. Some nodes lie to the others for a part of the run. A run passes if: every pull that succeeds is byte-exact, and
is the registry's image of that tag; no pull exceeds its deadline; a pull fails only while its own node is down or no
node can reach the registry; no daemon dies; memory and open files do not grow; at the end all members see each other
again, and every node pulls every image. Needs root, iproute2 and docker-registry.
"""

from __future__ import annotations

import sys

import click

from tests.chaos import churn
from tests.chaos.run import Settings, run
from tests.support.lab import NoLabError, check_lab


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Determines all faults and pulls.")
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--nodes", type=click.IntRange(4, 50), default=8, show_default=True)
@click.option("--liars", type=click.IntRange(1, 4), default=2, show_default=True, help="Nodes that lie for a while.")
@click.option("--churn", "churns", is_flag=True, help="No faults, but members and clients that join and leave.")
def main(seed: int, minutes: float, nodes: int, liars: int, churns: bool) -> None:
    try:
        check_lab()
    except NoLabError as error:
        raise click.ClickException(str(error)) from error
    wrong = churn.run(seed, minutes * 60, nodes) if churns else run(Settings(seed, minutes * 60, nodes, liars))
    sys.exit(1 if wrong else 0)


main()

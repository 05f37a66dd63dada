"""`python -m simulations NAME` runs a scenario. A seed decides everything in it."""

from __future__ import annotations

import click

from simulations.cache_policies import cache
from simulations.churn import churn
from simulations.cold_restart import cold_restart
from simulations.flash_crowd import flash_crowd
from simulations.fleet_start import fleet_start
from simulations.liar import liar
from simulations.run import fix_hashes
from simulations.site_cache import site_cache
from simulations.tail import tail
from simulations.two_sites import two_sites
from simulations.uplink_cut import uplink_cut


@click.group()
def main() -> None:
    """Run the shipped code in virtual time. Results: docs/SIMULATIONS.md."""


main.add_command(cache)
main.add_command(site_cache)
main.add_command(flash_crowd)
main.add_command(uplink_cut)
main.add_command(two_sites)
main.add_command(cold_restart)
main.add_command(tail)
main.add_command(fleet_start)
main.add_command(churn)
main.add_command(liar)

if __name__ == "__main__":
    fix_hashes()
    main(prog_name="python -m simulations")

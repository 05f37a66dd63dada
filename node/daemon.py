"""p2pd: options, signals, the order in which the parts start and stop, and the exit status.

node/assembly.py constructs the parts.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import click
import trio

from node import assembly
from node.config.quantities import HostPort
from node.config.schema import Config, check, load
from node.control.routes import METRICS_LIMITS, metrics_handler, serve_control
from node.identity.identity import load_or_create
from node.mirror.mirror import LIMITS
from node.runtime.allocator import tune_allocator
from node.runtime.logs import configure
from node.runtime.systemd import Notifier
from node.runtime.version import version
from node.stages import Node
from node.web.server import serve_http
from protocol.errors import BadInputError

log = logging.getLogger(__name__)

STOP_S = 15.0
"""Longest time to inform the members that this node leaves, after running bodies have ended (`Limits.grace_s`)."""


async def run(config: Config, path: Path | None, notifier: Notifier, stop: trio.Event) -> None:
    """Run the node until `stop` is set. `path` is the configuration file; SIGHUP makes the node read it again.

    Raises BadInputError if the configuration cannot be applied.
    """
    folder = data_dir(config)
    own = assembly.admitted(config, folder)
    async with AsyncExitStack() as stack:
        hang_ups = stack.enter_context(trio.open_signal_receiver(signal.SIGHUP))
        listeners = await _listeners(config.mirror.listen, "mirror.listen")
        storage = await assembly.storage(config, folder, own, stack)
        network = assembly.network(config, own)
        registry = await assembly.registry(config, network, storage, stack)
        work = await stack.enter_async_context(trio.open_nursery())
        stack.callback(work.cancel_scope.cancel)
        member = assembly.participant(config, own, storage, network, registry=registry, nursery=work)
        clients = assembly.clients(config, folder, own, storage, member=member, registry=registry, nursery=work)
        stack.callback(clients.listings.close)
        node = Node(admitted=own, storage=storage, network=network, registry=registry, member=member, clients=clients)
        reloader, routes = assembly.operator(node, config, path, notifier)
        for service in assembly.services(node, folder):
            await work.start(service)
        await work.start(partial(serve_control, Path(config.control.socket), routes))
        if address := config.control.metrics.address:
            shown = await _listeners(address, "control.metrics")
            await work.start(partial(serve_http, shown, metrics_handler(network.metrics), limits=METRICS_LIMITS))
        async with trio.open_nursery() as serving:
            await serving.start(partial(serve_http, listeners, clients.mirror.handle, limits=LIMITS, stop=stop))
            await work.start(notifier.watchdog)
            work.start_soon(reloader.on_signals, hang_ups)
            notifier.ready(f"mirror on {config.mirror.listen}")
            log.info("ready", extra={"mirror": config.mirror.listen, "peer_id": own.identity.peer_id})
            await stop.wait()
            notifier.stopping()
            log.info("stopping")
        with trio.move_on_after(STOP_S):
            await member.gossiper.leave()
        work.cancel_scope.cancel()
    log.info("stopped")


def data_dir(config: Config) -> Path:
    """The folder of everything that survives a restart. Creates it if it is missing. Raises BadInputError."""
    path = Path(config.node.data_dir)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise BadInputError(f"node.data_dir: cannot make {path}: {error.strerror}") from error
    return path


async def _listeners(address: HostPort, key: str) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise BadInputError(f'{key} = "{address}": cannot listen there: {error.strerror or error}') from error


async def _run_until_signal(config: Config, path: Path | None) -> None:
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def watch() -> None:
            async for _ in signals:
                stop.set()
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await run(config, path, Notifier(), stop)
            nursery.cancel_scope.cancel()


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="The configuration file (TOML).")
@click.option("--print-peer-id", is_flag=True, help="Print this node's peer id and exit. Creates its key if needed.")
@click.version_option(version(), prog_name="p2pd")
def main(path: Path | None, print_peer_id: bool) -> None:
    """Serve a pull-through registry mirror that shares blocks with the other nodes of its site."""
    try:
        config = load(path)
        check(config)
        if print_peer_id:
            click.echo(load_or_create(data_dir(config)).peer_id)
        else:
            configure(config.node.log)
            tune_allocator()
            gc.freeze()  # imported modules stay: without this each full collection scans them, for 80 ms
            trio.run(_run_until_signal, config, path)
    except* BadInputError as group:
        for error in _leaves(group):
            click.echo(f"p2pd: {error}", err=True)
        sys.exit(2)


def _leaves(group: BaseExceptionGroup[BadInputError]) -> list[BaseException]:
    """The errors without the exception groups of the nurseries that raised them."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


if __name__ == "__main__":
    main()

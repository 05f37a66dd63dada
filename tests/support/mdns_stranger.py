"""A host without a certificate announces peers by mDNS: `python -m tests.support.mdns_stranger HOST CLUSTER COUNT`.

All peers are at a port of HOST that accepts connections and says nothing. After each connection the number of
connections so far is printed, beginning with 0 once all peers are announced.
"""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import zeroconf
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.identity import Identity
from node.membership.mdns import SERVICE

AT_ONCE = 64


def announce(responder: zeroconf.Zeroconf, host: str, port: int, cluster: str) -> None:
    peer = Identity.of(Ed25519PrivateKey.generate()).peer_id
    service = zeroconf.ServiceInfo(
        SERVICE,
        f"{peer}.{SERVICE}",
        port=port,
        properties={"txtvers": "1", "cluster": cluster},
        server=f"{peer}.local.",
        parsed_addresses=[host],
    )
    responder.register_service(service, cooperating_responders=True)


def main() -> None:
    host, cluster, count = sys.argv[1:]
    hole = socket.create_server((host, 0), backlog=4096)
    responder = zeroconf.Zeroconf(interfaces=[host])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        port = hole.getsockname()[1]
        list(pool.map(lambda _: announce(responder, host, port, cluster), range(int(count))))
    held = []
    print(0, flush=True)
    while True:
        held.append(hole.accept())
        print(len(held), flush=True)


if __name__ == "__main__":
    main()

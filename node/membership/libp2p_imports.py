"""Imported before anything of py-libp2p, so that its parts can be used without the whole.

The `__init__` of these packages import all that there is, among it QUIC, a DHT, relays and an HTTP client, and some
modules a library for a class that node/membership/libp2p.py never meets: 27 MiB of resident memory and 1.2 s of every
start. The packages are made known here without running that, empty classes stand in for those, and all other modules
are imported as ever.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import NoReturn

_PACKAGES = ("libp2p", "libp2p.transport", "libp2p.network", "libp2p.transport.quic")
_CLASSES = {
    "libp2p.transport.quic.stream": ("QUICStream",),
    "libp2p.crypto.rsa": ("RSAPrivateKey", "RSAPublicKey"),
    "libp2p.crypto.secp256k1": ("Secp256k1PrivateKey", "Secp256k1PublicKey"),
}


class _LeftOut:
    """A member's key is of Ed25519: a handshake with any other fails here."""

    @classmethod
    def from_bytes(cls, data: bytes) -> NoReturn:
        raise ValueError(f"no member has a key of this kind: {cls.__name__}")


def _make_known(name: str) -> None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        package = ModuleType(name)
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


def _stand_in(name: str, classes: tuple[str, ...]) -> None:
    if name not in sys.modules:
        sys.modules[name] = module = ModuleType(name)
        for one in classes:
            setattr(module, one, type(one, (_LeftOut,), {}))


for _name in _PACKAGES:
    _make_known(_name)
for _name, _classes in _CLASSES.items():
    _stand_in(_name, _classes)

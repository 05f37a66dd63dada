"""Imported before any module of py-libp2p, so that parts of it can be used without the whole.

The `__init__` files of _PACKAGES import everything: QUIC, a DHT, relays, an HTTP client. Some modules import a
library only for a class that node/membership/libp2p.py never uses. Together that costs 27 MiB of resident memory and
1.2 s of every start. This module registers the packages without running their `__init__`, and puts empty classes in
place of the unused ones; all other modules are imported as usual.
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
    """Replaces keys of other kinds: members have Ed25519 keys, so a handshake with another kind of key fails here."""

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
        for class_name in classes:
            setattr(module, class_name, type(class_name, (_LeftOut,), {}))


for _name in _PACKAGES:
    _make_known(_name)
for _name, _classes in _CLASSES.items():
    _stand_in(_name, _classes)

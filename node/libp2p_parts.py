"""Imported before anything of py-libp2p, so that its parts can be used without the whole.

The `__init__` of these two packages import all that there is, among it QUIC, a DHT, relays and an HTTP client: 20 MiB
of resident memory and 0.9 s of every start, for nothing that node/swarm_libp2p.py uses. They are made known as
packages here without running it; their modules are imported as ever.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

_PACKAGES = ("libp2p", "libp2p.transport")


def _make_known(name: str) -> None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        package = ModuleType(name)
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


for _name in _PACKAGES:
    _make_known(_name)

"""The view: the members of the site, as the rest of the node sees them."""

from __future__ import annotations

from typing import Protocol

from protocol.ids import PeerId
from protocol.members import Member


class View(Protocol):
    """The members of this node's site as this node sees them now. All methods are immediate.

    - `site`: the alive members of the own site, this node among them, without those in quarantine; sorted by peer id.
    - `version` grows with every change of `site`; `changed_at` is trio.current_time() at the last change.
    - `known`: all members of the own site that are not forgotten, this node among them, alive or not.
    - `find` returns any member that was introduced or gossiped and is not forgotten, alive or not, of any site.
    - `report_failure`: a read from the peer failed, so it is probed at once.
    - `quarantine` takes a peer out of the view for a time; operators see the reason.
    """

    @property
    def site(self) -> tuple[Member, ...]: ...

    @property
    def version(self) -> int: ...

    @property
    def changed_at(self) -> float: ...

    @property
    def known(self) -> tuple[Member, ...]: ...

    def find(self, peer: PeerId) -> Member | None: ...

    def report_failure(self, peer: PeerId) -> None: ...

    def quarantine(self, peer: PeerId, reason: str) -> None: ...

    def is_quarantined(self, peer: PeerId) -> bool: ...

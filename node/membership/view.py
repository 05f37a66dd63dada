"""What the rest of the node asks of the membership."""

from __future__ import annotations

from typing import Protocol

from protocol.ids import PeerId
from protocol.members import Member


class View(Protocol):
    """The members of this node's site as this node sees them now. All methods are immediate.

    - `site` is the alive members of the own site, this node among them, without the quarantined; sorted by peer id.
    - `version` grows with every change of `site`; `changed_at` is trio.current_time() of the last one.
    - `known` is the members of the own site that are not forgotten, this node among them, whatever became of them.
    - `find` knows every member that was ever introduced or gossiped and is not forgotten, dead ones too.
    - `report_failure` tells that a read from the peer failed: it is probed at once.
    - `quarantine` takes a peer out of the view for a time; the reason is shown to the operator.
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

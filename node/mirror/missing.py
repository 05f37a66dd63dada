"""Names that the registry did not have, for answers while it is out of reach: clients that probe for signatures accept
only 404 for an absent one.

A client may ask for any names. Those of repositories that a client has read from are kept apart, so that invented ones
do not push them out; among them, the repository with the most names loses its oldest.
"""

from __future__ import annotations

from collections import OrderedDict

from cachetools import LRUCache

from node.oci.references import Locator

MAX_MISSING = 4096
"""Names in repositories that clients have read from; others; and such repositories. 1 KiB each."""

_Repository = tuple[str, str]
Name = tuple[Locator, str, str]
"""A locator, the word in its path, and a reference."""


class MissingNames:
    """The text of the registry's error, by name."""

    def __init__(self) -> None:
        self._read_from: OrderedDict[_Repository, OrderedDict[Name, str]] = OrderedDict()
        """The least recently read from first."""
        self._count = 0
        self._others: LRUCache[Name, str] = LRUCache(MAX_MISSING)

    def read_from(self, locator: Locator) -> None:
        """The registry gave a client something of the locator's repository."""
        repository = _repository(locator)
        self._read_from.setdefault(repository, OrderedDict())
        self._read_from.move_to_end(repository)
        if len(self._read_from) > MAX_MISSING:
            self._count -= len(self._read_from.popitem(last=False)[1])

    def note(self, name: Name, text: str) -> None:
        self.forget(name)
        texts = self._read_from.get(_repository(name[0]))
        if texts is None:
            self._others[name] = text
            return
        texts[name], self._count = text, self._count + 1
        if self._count > MAX_MISSING:
            max(self._read_from.values(), key=len).popitem(last=False)
            self._count -= 1

    def forget(self, name: Name) -> None:
        self._others.pop(name, None)
        texts = self._read_from.get(_repository(name[0]))
        if texts is not None and texts.pop(name, None) is not None:
            self._count -= 1

    def get(self, name: Name) -> str | None:
        texts = self._read_from.get(_repository(name[0]))
        held = None if texts is None else texts.get(name)
        return held if held is not None else self._others.get(name)


def _repository(locator: Locator) -> _Repository:
    return locator.upstream, locator.repository

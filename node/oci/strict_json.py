"""JSON from outside, decoded so that no other decoder can read another value from the same bytes.

Decoders differ in what they do with a member that occurs twice, and Go's encoding/json, with which registries and
clients are written, lets `"Layers"` set the field `layers`. Such documents are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from protocol.errors import BadInputError

MAX_MARKS = 1 << 15
"""Brackets, commas and colons of a document, which bound the time that decoding takes: 20 ms. An index of 1024 entries,
each with a platform and two annotations, has two thirds of them."""
MAX_DIGITS = 20
"""Digits of an integer: as many as 64 bits need. Longer ones take time that grows with their square."""


def decode_strictly(data: bytes) -> Any:
    """Raises BadInputError for bytes that are not JSON in UTF-8, for a member that occurs twice in an object, for
    constants like NaN, and for more than MAX_MARKS marks."""
    if sum(data.count(mark) for mark in (b"{", b"[", b",", b":")) > MAX_MARKS:
        raise BadInputError("JSON of too many values")
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"not JSON: {type(error).__name__}") from error


def check_members(document: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises BadInputError if a member equals one of `known` except for its case."""
    folded = {name.casefold() for name in known}
    for name in document.keys() - known:
        if name.casefold() in folded:
            raise BadInputError(f"a member {name[:40]!r} beside the known ones")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise BadInputError("a member occurs twice")
    return document


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise BadInputError("an integer beyond 64 bits")
    return int(text)


def _refuse(constant: str) -> None:
    raise BadInputError(f"{constant} is not JSON")

"""Comparison of two tables of members. One side sends a summary of 16 bytes for each member, the other what differs.

A row of a summary is the key of a member (`key_of`), and in one integer its incarnation, its state, and a byte of the
signature (a member that signs two statements of one incarnation must not divide the others). Who receives a summary
answers with the statements that the other side lacks or has older, with the members that it cannot reach
itself, and with the keys of those about which the other side has a later statement. What does not fit one answer is
drawn at random, so that repeated comparisons make progress even if the other side refuses some of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import msgspec

from protocol.member_table import KEY, MemberTable, key_of
from protocol.members import State, Statement, Vouched

ROW = struct.Struct(f">{KEY}sQ")
MAX_STATEMENTS = 128
"""Statements, and keys of each kind, that one message may have: checking them takes a few turns of the event loop."""
ANSWER_BYTES = 7 << 10
"""An answer takes no further statement beyond these: it carries some 12, with certificates. On a busy or slow link it
must arrive within the timeout of a sync, and a peer that asks and does not read makes this node hold little."""
MAX_WANTED = 12
"""Keys of statements that one answer asks for: about as many bytes."""

_STATE_BITS, _TIE_BITS = 2, 8
_ENCODER = msgspec.msgpack.Encoder()
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Difference:
    """`doubts` and `wanted` are keys. `more`: not everything fits."""

    statements: tuple[Vouched, ...]
    doubts: bytes
    wanted: bytes
    more: bool


def summary_of(table: MemberTable) -> bytes:
    """The rows of all members that are no hints, this node's own first."""
    rows = [ROW.pack(table.own_key, _value(table.own, table.own.state))]
    rows += [ROW.pack(e.key, _value(e.statement, e.state)) for e in table.entries.values() if not e.is_hint]
    return b"".join(rows)


def state_in(summary: bytes, key: bytes) -> tuple[int, State] | None:
    """Incarnation and state of a member in a summary; None if it is not in it."""
    value = dict(ROW.iter_unpack(summary)).get(key)
    return None if value is None else (value >> _TIE_BITS + _STATE_BITS, _state(value))


def difference(table: MemberTable, summary: bytes) -> Difference:
    """The answer to another member's summary."""
    theirs: dict[bytes, int] = dict(ROW.iter_unpack(summary))
    statements: list[Vouched] = []
    doubts: list[bytes] = []
    wanted: list[bytes] = []
    for key, statement, state in _held(table):
        value = theirs.pop(key, None)
        if value is None:
            if state < State.DEAD:
                statements.append(statement)
            continue
        their, their_state = _rank(value), _state(value)
        mine = _rank(_value(statement, state))
        if mine > their:
            statements.append(statement)
        elif mine < their:
            wanted.append(key)
        if state in (State.SUSPECT, State.DEAD) and mine >= their and their_state < State.DEAD:
            doubts.append(key)
    banished = {key_of(peer) for peer in table.banished} if theirs else set()
    wanted += [key for key, value in theirs.items() if key not in banished and _state(value) < State.DEAD]
    chosen = tuple(_fitting(_some(table.rng, statements, MAX_STATEMENTS)))
    more = len(chosen) < len(statements) or len(wanted) > MAX_WANTED
    doubts, wanted = _some(table.rng, doubts, MAX_STATEMENTS), _some(table.rng, wanted, MAX_WANTED)
    return Difference(chosen, b"".join(doubts), b"".join(wanted), more)


def keys_in(keys: bytes) -> Iterator[bytes]:
    return (keys[start : start + KEY] for start in range(0, len(keys), KEY))


def _held(table: MemberTable) -> Iterator[tuple[bytes, Vouched, State]]:
    yield table.own_key, table.own, table.own.state
    for entry in table.entries.values():
        if not entry.is_hint:
            yield entry.key, entry.statement, entry.state


def _some(rng: Random, values: Sequence[_T], most: int) -> list[_T]:
    """In random order."""
    return rng.sample(values, min(most, len(values)))


def _fitting(statements: list[Vouched]) -> Iterator[Vouched]:
    """At least one of `statements`, and as many as fit into ANSWER_BYTES."""
    room = ANSWER_BYTES
    for statement in statements:
        yield statement
        room -= len(_ENCODER.encode(statement))
        if room <= 0:
            return


def _value(statement: Statement, state: State) -> int:
    return (statement.incarnation << _TIE_BITS | statement.signature[0]) << _STATE_BITS | state


def _state(value: int) -> State:
    return State(value & (1 << _STATE_BITS) - 1)


def _rank(value: int) -> tuple[int, bool, int]:
    """In the order of `Statement.rank`."""
    incarnation, tie = divmod(value >> _STATE_BITS, 1 << _TIE_BITS)
    return incarnation, _state(value) is State.LEFT, tie

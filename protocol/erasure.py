"""The systematic Reed-Solomon code of a block: any k of its k+m shards restore the block.

The code is the one that reedsolo's `RSCodec(m, nsize=k+m, fcr=0)` defines column-wise over the k slices of a block:
GF(256) modulo 0x11d, generator 2 (Reed & Solomon 1960; docs/FORMATS.md, "Shards"). reedsolo supplies the field's tables
and the parity matrix, but its own loop codes only 1 MB/s. So this module does the bulk of the work: a sum of rows times
coefficients is evaluated by Horner's rule over the *bits* of the coefficients, which costs XORs and seven doublings of
the sum, all at memory speed in numpy, and no lookup. (16-bit tables have half the speed, and 128 KiB per coefficient.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import reedsolo

from protocol.errors import BadInputError
from protocol.ids import Buffer, shard_length

Row = npt.NDArray[np.uint8]
Coefficients = tuple[int, ...]

MAX_DATA_SHARDS = 32
MAX_PARITY_SHARDS = 8
_MATRICES = 512
"""Cached recovery matrices, at most 3 KiB each: all loss patterns of the usual geometries, many of the others."""

_POLYNOMIAL = 0x11D
_LOG, _EXP, _ORDER = reedsolo.init_tables(_POLYNOMIAL, 2, 8)


def encode_shard(block: Buffer, k: int, m: int, index: int) -> memoryview:
    """Shard `index` of the block, `shard_length(len(block), k)` bytes. A data shard that needs no padding is a view of
    `block`. Raises BadInputError for an impossible geometry or index."""
    _check_index(k, m, index)
    size = shard_length(len(block), k)
    if index < k:
        data = memoryview(block)[index * size : (index + 1) * size]
        return data if len(data) == size else memoryview(bytes(data).ljust(size, b"\0"))
    whole = np.frombuffer(block, np.uint8)
    shard = bytearray(size)
    slices = [whole[j * size : (j + 1) * size] for j in range(k)]
    _add_up(np.frombuffer(shard, np.uint8), _parity_matrix(k, m)[index - k], slices)
    return memoryview(shard)


def decode_block(shards: Mapping[int, Buffer], k: int, m: int, length: int, out: bytearray | None = None) -> bytearray:
    """The block of `length` bytes, from k or more of its shards by index, in `out` (of that length) if it is given.
    Raises BadInputError for fewer than k shards, a shard of a wrong size, or an impossible index or geometry. Wrong
    bytes in a shard give a wrong block, which the record's sha256 reveals."""
    _check_index(k, m, 0)
    size = shard_length(length, k)
    for index, shard in shards.items():
        _check_index(k, m, index)
        if len(shard) != size:
            raise BadInputError(f"shard {index} of {k}+{m} has {len(shard)} bytes, not {size}")
    if len(shards) < k:
        raise BadInputError(f"{len(shards)} shards of {k}+{m} do not make a block")
    block = bytearray(length) if out is None else out
    if len(block) != length:
        raise BadInputError(f"a block of {length} bytes does not fit a buffer of {len(block)}")
    if length:
        _fill(np.frombuffer(block, np.uint8), {i: np.frombuffer(shards[i], np.uint8) for i in sorted(shards)}, k, m)
    return block


def _check_index(k: int, m: int, index: int) -> None:
    if not (1 <= k <= MAX_DATA_SHARDS and 0 <= m <= MAX_PARITY_SHARDS):
        raise BadInputError(f"no code {k}+{m}: 1 to {MAX_DATA_SHARDS} data and 0 to {MAX_PARITY_SHARDS} parity shards")
    if not 0 <= index < k + m:
        raise BadInputError(f"no shard {index} in {k}+{m}")


def _fill(block: Row, rows: dict[int, Row], k: int, m: int) -> None:
    """Write the block's k slices: copy those in `rows`, recover the others from the first k of `rows` (by index)."""
    size = len(next(iter(rows.values())))
    slices = [block[j * size : (j + 1) * size] for j in range(k)]
    for j in rows.keys() & range(k):
        slices[j][:] = rows[j][: len(slices[j])]
    missing = [j for j in range(k) if j not in rows]
    if not missing:
        return
    # Each codeword's symbols add up to zero (its polynomial has the root 1), so one unknown is the sum of the others.
    last = missing.pop() if len(rows) - k + len(missing) == m else None
    chosen = tuple(rows)[:k]
    for j in missing:
        slices[j][:] = 0
        _add_up(slices[j], _recovery(k, m, chosen)[j], [rows[i] for i in chosen])
    if last is not None:
        others = [*rows.values(), *(slices[j] for j in missing)]
        slices[last][:] = 0
        _add_up(slices[last], (1,) * len(others), others)


def _add_up(target: Row, coefficients: Coefficients, rows: Sequence[Row]) -> None:
    """Add the sum of coefficient times row over GF(256) to `target`, which is zero. Rows may be longer or shorter."""
    scratch = np.empty_like(target)
    top = max(coefficients).bit_length()
    for bit in reversed(range(top)):
        if bit < top - 1:
            _double(target, scratch)
        for coefficient, row in zip(coefficients, rows, strict=True):
            if coefficient >> bit & 1:
                part = target[: len(row)]
                np.bitwise_xor(part, row[: len(part)], out=part)


def _double(row: Row, scratch: Row) -> None:
    """row *= 2 in GF(256): shift, and reduce by the polynomial where the high bit was set."""
    np.right_shift(row.view(np.int8), 7, out=scratch.view(np.int8))  # arithmetic: all ones or all zeros
    np.bitwise_and(scratch, _POLYNOMIAL & 0xFF, out=scratch)
    np.add(row, row, out=row)
    np.bitwise_xor(row, scratch, out=row)


@lru_cache(maxsize=MAX_DATA_SHARDS * MAX_PARITY_SHARDS)
def _parity_matrix(k: int, m: int) -> tuple[Coefficients, ...]:
    """m rows of k coefficients: what each slice contributes to each parity shard."""
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0)
    columns = [codec.encode(bytes(j == i for j in range(k)))[k:] for i in range(k)]
    return tuple(zip(*columns, strict=True))


@lru_cache(maxsize=_MATRICES)
def _recovery(k: int, m: int, chosen: tuple[int, ...]) -> dict[int, Coefficients]:
    """For each data shard that is not among the k `chosen`: the coefficients of the chosen shards, in order. The parity
    rows p = A·missing + B·present are solved for the missing: A⁻¹·B·present + A⁻¹·p, by Gauss-Jordan elimination of (A
    | B | I). Any square A of parity coefficients can be inverted, because the code is MDS."""
    missing = [j for j in range(k) if j not in chosen]
    present = [i for i in chosen if i < k]
    parities = [i for i in chosen if i >= k]
    matrix = [
        [_parity_matrix(k, m)[p - k][j] for j in (*missing, *present)] + [int(p == other) for other in parities]
        for p in parities
    ]
    for column in range(len(missing)):
        pivot = next(r for r in range(column, len(matrix)) if matrix[r][column])
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        matrix[column] = [_divide(value, matrix[column][column]) for value in matrix[column]]
        for r, row in enumerate(matrix):
            if r != column:
                matrix[r] = [v ^ _multiply(row[column], w) for v, w in zip(row, matrix[column], strict=True)]
    return {j: tuple(matrix[r][len(missing) :]) for r, j in enumerate(missing)}


def _multiply(a: int, b: int) -> int:
    return int(_EXP[(_LOG[a] + _LOG[b]) % _ORDER]) if a and b else 0


def _divide(a: int, b: int) -> int:
    return int(_EXP[(_LOG[a] - _LOG[b]) % _ORDER]) if a else 0

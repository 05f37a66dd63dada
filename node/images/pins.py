"""The objects that the disk must not evict: those of pinned images, kept in a file, and those of operations under way.

Bytes: docs/FORMATS.md, "Pins".
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import trio

from cache.runs import space
from cache.store import StoreStatistics
from node.oci.layout import Packed, PackedImage
from node.oci.references import ImageName, Kind, Locator
from protocol.errors import UNDECODABLE, BadInputError, NotFoundError, UnavailableError
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

MAX_PINS = 1024
MAX_FILE = 64 << 20
LEFT_FREE = 10
"""1/LEFT_FREE of the disk's budget is never pinned: a node that keeps no blocks for others and reads no other images is
of little use."""


class _Object(msgspec.Struct, frozen=True, array_like=True):
    digest: str
    size: int
    kind: Kind
    media_type: str


class _Pin(msgspec.Struct, frozen=True):
    image: str
    since: float
    objects: tuple[_Object, ...]


class _File(msgspec.Struct, frozen=True):
    version: Literal[1]
    pins: tuple[_Pin, ...]


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned image and the Unix time of its pinning."""

    image: PackedImage
    since: float


class PinningDisk(Protocol):
    """The part of the disk store that pins use."""

    def pin(self, digest: Digest) -> None: ...

    def unpin(self, digest: Digest) -> None: ...

    def statistics(self) -> StoreStatistics: ...


def load_pins(path: Path) -> tuple[Pin, ...]:
    """The pins of the last run. A damaged file is moved aside, with a warning in the log."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE)
        return tuple(map(_parsed, msgspec.json.decode(data, type=_File).pins))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except (*UNDECODABLE, BadInputError) as error:
        aside = path.with_suffix(".damaged")
        log.warning("%s is damaged (%s): moved to %s: nothing is pinned any more", path, error, aside)
        path.replace(aside)
        return ()


def _parsed(pin: _Pin) -> Pin:
    objects = (Packed(ObjectRef(Digest.parse(o.digest), o.size), o.kind, o.media_type) for o in pin.objects)
    return Pin(PackedImage(ImageName.parse(pin.image), tuple(objects)), pin.since)


def digests_of(pins: Iterable[Pin]) -> frozenset[Digest]:
    return frozenset(packed.ref.digest for pin in pins for packed in pin.image.objects)


class Pins:
    """`loaded` are the pins of the last run, whose objects the disk has kept since it was opened."""

    def __init__(self, path: Path, loaded: Iterable[Pin], disk: PinningDisk) -> None:
        self._path, self._disk = path, disk
        self._pins = {pin.image.name: pin for pin in loaded}
        self._wanted: Counter[Digest] = Counter()
        self._sizes: dict[Digest, int] = {}
        self._saving = trio.Lock()
        for pin in self._pins.values():
            self._take(pin.image.objects)

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._pins.values()))

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def bytes(self) -> int:
        """Space on the disk for all objects that are pinned or held, including those that are still being fetched."""
        return sum(map(space, self._sizes.values()))

    @property
    def most_bytes(self) -> int:
        return _most(self._disk.statistics().budget_bytes)

    def check_fits(self, budget_bytes: int) -> None:
        """Raises BadInputError if the disk's new, smaller budget has no room for the pinned objects."""
        if budget_bytes < self._disk.statistics().budget_bytes and self.bytes > _most(budget_bytes):
            raise BadInputError(
                f"cache.disk: {_mib(self.bytes)} are pinned, and at most {_mib(_most(budget_bytes))} could be, nine"
                " tenths of it: unpin something"
            )

    def names(self, source: str, reference: str) -> bool:
        """Whether a pinned image has this name. Such a name stays usable, however long ago it was confirmed."""
        return any(str(n.manifests) == source and n.reference == reference for n in self._pins)

    def has_of(self, locator: Locator) -> bool:
        """Whether an image of the locator's repository is pinned."""
        where = (locator.upstream, locator.repository)
        return any((n.manifests.upstream, n.manifests.repository) == where for n in self._pins)

    @contextmanager
    def holding(self, objects: Iterable[Packed]) -> Iterator[None]:
        """Keep the objects like pinned ones within the context. Raises BadInputError if there is no room for them."""
        listed = list(objects)
        self._check_room(listed)
        self._take(listed)
        try:
            yield
        finally:
            self._leave(listed)

    async def add(self, image: PackedImage) -> None:
        """Pin an image whose objects are on the disk, within `holding`."""
        async with self._saving:
            if len(self._pins) >= MAX_PINS and image.name not in self._pins:
                raise BadInputError(f"{MAX_PINS} images are pinned, which is the most: unpin some")
            before = self._pins.get(image.name)
            await self._save({**self._pins, image.name: Pin(image, time.time())})
            self._take(image.objects)
            if before is not None:
                self._leave(before.image.objects)

    async def remove(self, name: ImageName) -> Pin:
        """Raises NotFoundError."""
        async with self._saving:
            pin = self._pins.get(name)
            if pin is None:
                raise NotFoundError(f"{name} is not pinned: see p2pctl pins")
            await self._save({other: pin for other, pin in self._pins.items() if other != name})
            self._leave(pin.image.objects)
            return pin

    def _check_room(self, objects: Iterable[Packed]) -> None:
        most = self.most_bytes
        pinned = self.bytes
        more = sum(space(size) for digest, size in _sizes(objects).items() if digest not in self._sizes)
        if pinned + more > most:
            raise BadInputError(
                f"{_mib(more)} more do not fit: {_mib(pinned)} are pinned or being stored, and at most {_mib(most)}"
                " may be, nine tenths of cache.disk: raise it, or unpin something"
            )

    def _take(self, objects: Iterable[Packed]) -> None:
        for digest, size in _sizes(objects).items():
            self._wanted[digest] += 1
            self._sizes.setdefault(digest, size)
            self._disk.pin(digest)

    def _leave(self, objects: Iterable[Packed]) -> None:
        for digest in _sizes(objects):
            self._wanted[digest] -= 1
            if not self._wanted[digest]:
                del self._wanted[digest], self._sizes[digest]
                self._disk.unpin(digest)

    async def _save(self, pins: dict[ImageName, Pin]) -> None:
        """Write the file durably, then use the new pins. Raises UnavailableError."""
        data = msgspec.json.encode(_File(1, tuple(map(_written, pins.values()))))
        if len(data) > MAX_FILE:
            raise BadInputError(f"the pinned images have too many objects for {self._path}: unpin some")
        try:
            await trio.to_thread.run_sync(_replace, self._path, data)
        except OSError as error:
            raise UnavailableError(f"cannot write {self._path}: {error.strerror}") from error
        self._pins = pins


def _sizes(objects: Iterable[Packed]) -> dict[Digest, int]:
    return {packed.ref.digest: packed.ref.size for packed in objects}


def _written(pin: Pin) -> _Pin:
    objects = (_Object(str(p.ref.digest), p.ref.size, p.kind, p.media_type) for p in pin.image.objects)
    return _Pin(str(pin.image.name), pin.since, tuple(objects))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _most(budget_bytes: int) -> int:
    return budget_bytes - budget_bytes // LEFT_FREE


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"

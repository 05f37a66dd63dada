"""A ControlApi with fixed values, and a server for it in a thread: for tests of its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from node.api.documents import (
    CachedObject,
    CacheReport,
    Check,
    ClusterRow,
    DoctorReport,
    EndpointRow,
    EvidenceRow,
    ImageRow,
    ImagesReport,
    PeerRow,
    PeersReport,
    PullEvent,
    PullProgress,
    PullResult,
    Status,
    TagRow,
    TagsReport,
    TierRow,
    UplinkRow,
    UpstreamRow,
    WhyBlock,
    WhyReport,
    why_report,
)
from node.control.routes import Route, control_routes, serve_control
from node.oci.references import ImageName
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef

DIGEST = Digest("sha256", "ab" * 32)
PEER = "12D3KooWPeerOfTheTests"
LEFT_S = 10 * 86400 + 5400.0
"""Until the certificate ends, from when the control is made."""
SOURCES = ("memory", "disk", "containerd", "peer", "origin")


class FakeControl:
    """`mirror` is the address in its status. A pull fails if the image is named `missing` or `failing`."""

    def __init__(self, mirror: str = "127.0.0.1:1") -> None:
        self.mirror = mirror
        self.certificate_ends = time.time() + LEFT_S
        self.pulls: list[tuple[str, bool]] = []
        self.patterns: list[str] = []
        self.checks: tuple[Check, ...] = (Check(name="clock", level="ok", text="agrees"),)

    async def status(self) -> Status:
        await trio.lowlevel.checkpoint()
        return Status(
            name="edge-1",
            site="lab",
            peer_id=PEER,
            addresses=("/ip4/127.0.0.1/tcp/4501/p2p/" + PEER,),
            uptime_s=3700.0,
            version="1.2.3",
            ready=True,
            peers_alive=4,
            bytes_served=dict.fromkeys(SOURCES, 0) | {"peer": 3 << 20, "origin": 1 << 20},
            requests=dict.fromkeys(SOURCES, 0) | {"peer": 3, "origin": 1},
            cache={"memory": TierRow(bytes=1 << 20, budget_bytes=64 << 20, entries=1)},
            origin_bytes=1 << 20,
            rss_bytes=90 << 20,
            mirror=self.mirror,
            cluster=ClusterRow(id="ab" * 32, admits=False, certificate_ends=self.certificate_ends, revocations=3),
            upstreams=(
                UpstreamRow(
                    name="r.example:5000",
                    url="http://r.example:5000",
                    endpoints=(
                        EndpointRow(url="http://mirror.example", problem="answered 503", retry_in_s=2.0),
                        EndpointRow(url="http://r.example:5000", bytes_received=1 << 20),
                    ),
                    uplink=UplinkRow(
                        rate=2.0 * 2**20, daily_bytes=10.0 * 2**30, used_today_bytes=3 << 30, free=True, spent=False
                    ),
                ),
            ),
        )

    async def peers(self) -> PeersReport:
        await trio.lowlevel.checkpoint()
        row = EvidenceRow(
            block=f"{DIGEST}#3",
            source="docker.io/library/alpine#blobs",
            found_by="edge-3",
            found_by_id=PEER,
            age_s=60.0,
            verdict="proven here",
        )
        bad = PeerRow(
            peer_id="12D3bad", name="evil\x1b[2J", site="lab", state="alive", quarantine="wrong bytes", evidence=(row,)
        )
        return PeersReport(peers=(PeerRow(peer_id=PEER, name="edge-2", site="lab", state="alive", rtt_ms=0.4), bad))

    async def images(self) -> ImagesReport:
        await trio.lowlevel.checkpoint()
        row = ImageRow(
            image="docker.io/library/alpine:latest",
            digest=str(DIGEST),
            media_type="m",
            size=10,
            bytes_held=5,
            complete=False,
            layers=1,
            age_s=12.0,
        )
        return ImagesReport(images=(row,))

    async def tags(self, pattern: str) -> TagsReport:
        await trio.lowlevel.checkpoint()
        self.patterns.append(pattern)
        row = TagRow(
            tag="docker.io/library/alpine:latest",
            digest=str(DIGEST),
            age_s=75.0,
            state="stale",
            source="members",
            told_by=("edge-2", "edge-3"),
            rule="docker.io/*",
            ttl_s=30.0,
            max_age_s=3600.0,
        )
        never = TagRow(
            tag="r.example/app:edge\x1b[2J",
            digest=str(DIGEST),
            age_s=1.0,
            state="due",
            source="registry",
            ttl_s=0.0,
            max_age_s=0.0,
            cache=False,
        )
        return TagsReport(tags=(row, never))

    async def cache(self) -> CacheReport:
        held = CachedObject(digest=str(DIGEST), tier="disk", blocks=2, shards=1)
        return CacheReport(tiers=(await self.status()).cache, objects=(held,))

    async def pull(self, image: ImageName, *, all_platforms: bool) -> AsyncGenerator[PullEvent, None]:
        self.pulls.append((str(image), all_platforms))
        yield PullProgress(phase="resolving")
        if "missing" in image.repository:
            raise NotFoundError(f"{image} does not exist")
        yield PullProgress(phase="pulling", bytes_done=5, bytes_total=10, by_source={"peer": 5})
        if "failing" in image.repository:
            raise UnavailableError("no member has it")
        yield PullResult(
            ok=True, image=str(image), seconds=0.5, digest=str(DIGEST), bytes_total=10, by_source={"peer": 10}
        )

    async def why(self, image: ImageName) -> WhyReport:
        await trio.lowlevel.checkpoint()
        if "missing" in image.repository:
            raise NotFoundError(f"{image} was not asked for here")
        ref = ObjectRef(DIGEST, 40 * BLOCK_SIZE + 7)
        read = {
            index: WhyBlock(index=index, length=BLOCK_SIZE, source="peer", peers=(PEER,), milliseconds=2.0, when=1.0)
            for index in range(30)
        }
        read[30] = WhyBlock(index=30, length=BLOCK_SIZE, source="origin", milliseconds=90.0, retries=2, when=1.0)
        return why_report(str(image), str(DIGEST), [(ref, "layer", read)])

    async def doctor(self) -> DoctorReport:
        await trio.lowlevel.checkpoint()
        return DoctorReport(checks=self.checks)


@contextmanager
def served(api: FakeControl, path: Path, more: Iterable[Route] = ()) -> Iterator[None]:
    """The control socket at `path` answers, from another thread, while the context lasts."""
    ready = threading.Event()
    stop: list[trio.CancelScope] = []
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, path, [*control_routes(api), *more])
            stop.append(nursery.cancel_scope)
            tokens.append(trio.lowlevel.current_trio_token())
            ready.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(60), "the control socket did not come up"
        yield
    finally:
        if tokens:
            tokens[0].run_sync_soon(stop[0].cancel)
        thread.join(60)
    assert not thread.is_alive()

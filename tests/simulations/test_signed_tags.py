"""Tags that need a signature, on the shipped nodes of a site, with the registry up and out of reach. Virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from node.config.schema import Config, config_of, tag_policies
from node.content.listings import Listings
from node.content.signatures import SignedLibrary, Verified, load_keys
from node.exchange.contract import Answer
from node.oci.manifests import Resolved
from node.oci.signatures import BUNDLE, signature_tag
from node.registry.client import BROKEN_S
from protocol.errors import NotFoundError, UnavailableError, UnsignedError
from protocol.ids import ObjectRef, PeerId
from protocol.messages import Resolve
from protocol.messages import Resolved as Told
from simulations.cluster import IN_MEMORY, Cluster, Node
from simulations.registry import Image, Registry, locator
from simulations.run import play as run
from simulations.scenario import SITE, Setting, running
from tests.support import signing
from tests.support.signing import sign_in_bundle, sign_simply

SETTING = Setting(nodes=4, image=100_000, layers=1)
OWNER, STRANGER = signing.ecdsa(), signing.ed25519()
APP = locator("manifests")
PATH = "/v2/app/manifests/"
TTL_S = 60.0


class Site:
    """A site whose nodes want the owner's signature on all tags but those that begin with `free`."""

    def __init__(self, cluster: Cluster, registry: Registry, config: Config) -> None:
        self.cluster, self.registry = cluster, registry
        self.image = SETTING.push(registry)
        keys = load_keys(config.tags)
        self.signed: list[SignedLibrary] = []
        for node in cluster.nodes:
            node.member.resolver.known.policies = tag_policies(config)
            listings = Listings(node.upstreams().passthrough, node.library, IN_MEMORY, 1e6)
            self.signed.append(SignedLibrary(node.library, listings.referrers, keys, Verified(IN_MEMORY)))

    async def resolve(self, number: int, tag: str = "v1") -> ObjectRef:
        return (await self.signed[number].resolve(APP, tag)).ref

    def sign(self, *signers: signing.Signer, image: Image | None = None) -> None:
        digest = (image or self.image).manifest.digest
        self.registry.tag(signature_tag(digest), sign_simply(self.registry.add, digest, *signers))

    def cut(self) -> None:
        self.cluster.network.cut_uplink(SITE)

    async def refuses(self, number: int, tag: str = "v1") -> None:
        with pytest.raises(UnsignedError) as caught:
            await self.resolve(number, tag)
        digest = (await self.cluster.nodes[number].library.resolve(APP, tag)).ref.digest
        for part in (f"registry.test/app:{tag}", str(digest), "owner.pub"):
            assert part in str(caught.value)


def play(folder: Path, scenario: Callable[[Site], Awaitable[None]], key: bytes = OWNER.pem) -> None:
    """Run a scenario. `key`: the owner's public key."""
    path = folder / "owner.pub"
    path.write_bytes(key)
    rules = [{"match": "*:free*"}, {"match": "registry.test/*", "verify": [str(path)]}]
    config = config_of({"mirror": {"tag_ttl": f"{TTL_S}s"}, "tags": rules})

    async def main() -> None:
        registry = SETTING.registry()
        cluster = SETTING.cluster(registry, lambda count: None)
        async with running(cluster):
            with trio.fail_after(100 * TTL_S):
                await scenario(Site(cluster, registry, config))

    run(1, main)


def test_an_image_is_given_only_with_a_signature_of_the_owner(tmp_path: Path) -> None:
    """S-48"""

    async def scenario(site: Site) -> None:
        await site.refuses(0)
        site.sign(STRANGER)
        await trio.sleep(TTL_S)
        await site.refuses(0)
        site.sign(STRANGER, OWNER)
        await trio.sleep(TTL_S)
        for number in range(SETTING.nodes):
            assert await site.resolve(number) == site.image.manifest
        questions = site.registry.methods.total()
        assert await site.resolve(0) == site.image.manifest
        assert site.registry.methods.total() == questions, "it is remembered"
        manifest = site.registry.methods[f"GET {PATH}{site.image.manifest.digest}"]
        assert manifest <= 2, "the site reads each object about once"

    play(tmp_path, scenario)


def test_a_signature_of_another_image_does_not_count(tmp_path: Path) -> None:
    """S-48"""

    async def scenario(site: Site) -> None:
        site.sign(OWNER)
        other = SETTING.push(site.registry, "v2")
        digest = site.image.manifest.digest
        site.registry.tag(signature_tag(other.manifest.digest), sign_simply(site.registry.add, digest, OWNER))
        assert await site.resolve(0, "v1") == site.image.manifest
        await site.refuses(0, "v2")

    play(tmp_path, scenario)


@pytest.mark.parametrize("listed_as", [BUNDLE, "application/vnd.oci.empty.v1+json"])
def test_a_bundle_that_refers_to_the_image_counts_too(tmp_path: Path, listed_as: str) -> None:
    async def scenario(site: Site) -> None:
        digest = site.image.manifest.digest
        site.registry.tag(f"sha256-{digest.hex}", sign_in_bundle(site.registry.add, digest, STRANGER))
        await site.refuses(0)
        site.registry.tag(f"sha256-{digest.hex}", sign_in_bundle(site.registry.add, digest, OWNER, listed_as))
        assert await site.resolve(1) == site.image.manifest

    play(tmp_path, scenario)


@pytest.mark.parametrize("end", signing.RECORDED)
def test_a_signature_that_cosign_made_counts_for_its_image_and_its_key_only(tmp_path: Path, end: str) -> None:
    def push(registry: Registry) -> ObjectRef:
        """Let v1 be the image that cosign signed, and v2 another one that shows the same signature."""
        signed, other = registry.add(signing.recorded("image.json")), SETTING.push(registry, "v2").manifest
        registry.tag("v1", signed)
        tagged, *_ = [registry.add(signing.recorded(name)) for name in signing.RECORDED[end]]
        for image in (signed, other):
            registry.tag(f"sha256-{image.digest.hex}{end}", tagged)
        return signed

    async def accepted(site: Site) -> None:
        signed = push(site.registry)
        assert [await site.resolve(number) for number in range(SETTING.nodes)] == [signed] * SETTING.nodes
        await site.refuses(0, "v2")

    async def refused(site: Site) -> None:
        push(site.registry)
        await site.refuses(0)

    play(tmp_path, accepted, signing.recorded("cosign.pub"))
    play(tmp_path, refused)


def test_other_tags_digests_and_the_signatures_themselves_need_none(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        free = SETTING.push(site.registry, "free")
        assert await site.resolve(0, "free") == free.manifest
        assert await site.resolve(0, str(site.image.manifest.digest)) == site.image.manifest
        with pytest.raises(NotFoundError):
            await site.resolve(0, signature_tag(site.image.manifest.digest))
        site.sign(OWNER)
        await trio.sleep(2 * BROKEN_S)  # so long a missing object is not asked for again
        await site.resolve(0, signature_tag(site.image.manifest.digest))

    play(tmp_path, scenario)


def test_in_an_outage_a_signature_decides_with_one_witness(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        site.sign(OWNER)
        assert await site.resolve(0) == site.image.manifest
        site.cut()
        assert await site.resolve(1) == site.image.manifest
        assert await site.resolve(1) == site.image.manifest
        with pytest.raises(UnavailableError):
            await site.cluster.nodes[2].library.resolve(APP, "v1")

    play(tmp_path, scenario)


def test_in_an_outage_liars_can_only_show_an_older_signed_image(tmp_path: Path) -> None:
    """S-48"""

    async def scenario(site: Site) -> None:
        site.sign(OWNER)
        unsigned = SETTING.push(site.registry, "free")
        for liar in site.cluster.nodes[1:3]:
            lie_about(liar, Resolved(unsigned.manifest, "a/b"))
        assert await site.resolve(3) == site.image.manifest
        site.cut()
        assert await site.resolve(0) == site.image.manifest, "one honest member against two"

    play(tmp_path, scenario)


def test_what_was_verified_is_served_in_an_outage_without_its_signature(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        site.sign(OWNER)
        assert await site.resolve(0) == site.image.manifest
        site.cut()
        await trio.sleep(2 * TTL_S)
        known = site.cluster.nodes[0].member.resolver.known
        known.forget(APP, signature_tag(site.image.manifest.digest))
        assert await site.resolve(0) == site.image.manifest

    play(tmp_path, scenario)


def lie_about(node: Node, answer: Resolved) -> None:
    async def lie(peer: PeerId, request: Resolve) -> Answer:
        await trio.lowlevel.checkpoint()
        return Answer(Told(str(answer.ref.digest), answer.ref.size, answer.media_type, 0.0))

    node.dispatcher.route(lie, Resolve)

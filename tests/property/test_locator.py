"""Names of registries, repositories and images: accepted names round-trip unchanged, and all others are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.oci.references import ImageName, Kind, Locator, check_reference, check_upstream, is_digest
from protocol.errors import BadInputError

DIGEST = "sha256:" + "0a" * 32

words = st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+){0,2}", fullmatch=True).filter(lambda word: len(word) < 40)
repositories = st.lists(words, min_size=1, max_size=4).map("/".join)
upstreams = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}\.[a-z]{2,5}(:[0-9]{1,5})?", fullmatch=True)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)
kinds: st.SearchStrategy[Kind] = st.sampled_from(["manifests", "blobs"])


@given(upstreams, repositories, kinds)
def test_locators_round_trip(upstream: str, repository: str, kind: Kind) -> None:
    locator = Locator(upstream, repository, kind)
    assert Locator.parse(str(locator)) == locator
    assert locator.of_kind("blobs") == Locator(upstream, repository, "blobs")


@given(st.text(max_size=80) | st.text("ab./:#-_@", max_size=20).map(lambda text: f"docker.io/{text}#blobs"))
def test_a_locator_is_exact_or_refused(text: str) -> None:
    try:
        locator = Locator.parse(text)
    except BadInputError:
        return
    assert str(locator) == text
    assert not {"..", ".", ""} & set(locator.repository.split("/"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "docker.io",
        "docker.io/a",
        "docker.io/a#",
        "docker.io/a#tags",
        "docker.io/a#blobs#blobs",
        "docker.io/a#blobs\n",
        "docker.io/a\n#blobs",
        "docker.io/#blobs",
        "/a#blobs",
        "docker.io//a#blobs",
        "docker.io/a/#blobs",
        "docker.io/../a#blobs",
        "docker.io/a/..#blobs",
        "docker.io/.a#blobs",
        "docker.io/A#blobs",
        "docker.io/a___b#blobs",
        "docker.io/a%2f..#blobs",
        "docker.io/a?x#blobs",
        "docker.io/a b#blobs",
        "docker.io/\N{LATIN SMALL LETTER E WITH ACUTE}#blobs",
        "docker.io/\N{ARABIC-INDIC DIGIT ONE}#blobs",
        f"docker.io/{'a' * 256}#blobs",
        "../a#blobs",
        "user@docker.io/a#blobs",
        "docker.io:123456/a#blobs",
        "docker.io:/a#blobs",
        "[::1]/a#blobs",
        f"{'a' * 255}/a#blobs",
    ],
)
def test_hostile_locators_are_refused(text: str) -> None:
    with pytest.raises(BadInputError):
        Locator.parse(text)


def test_long_hostile_names_are_refused_at_once_and_quoted_short() -> None:
    for text in ("a-" * 1_000_000, "a" * 1_000_000 + "!", "a." * 500_000 + "/x#blobs", f"h/{'a_' * 500_000}#blobs"):
        with pytest.raises(BadInputError) as caught:
            Locator.parse(text)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a:b", "-a", "a-", "a:", ":80", "a\n", "a#", "\0"])
def test_wrong_registry_names_are_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="registry name"):
        check_upstream(name)


@given(tags)
def test_references_are_tags_or_digests(tag: str) -> None:
    assert check_reference(tag) == tag
    assert not is_digest(tag)
    assert is_digest(check_reference(DIGEST))


@pytest.mark.parametrize("reference", ["", ".a", "-a", "a" * 129, "a/b", "a b", "a\n", "sha256:00", "md5:" + "0" * 32])
def test_wrong_references_are_refused(reference: str) -> None:
    with pytest.raises(BadInputError):
        check_reference(reference)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("org/app", "docker.io/org/app:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("Index.Docker.io/alpine", "docker.io/library/alpine:latest"),
        ("docker.io/library/alpine:3", "docker.io/library/alpine:3"),
        ("ghcr.io/org/app:1.2", "ghcr.io/org/app:1.2"),
        ("quay.io/app", "quay.io/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:x", "localhost:5000/app:x"),
        ("10.0.0.1:5000/a/b/c", "10.0.0.1:5000/a/b/c:latest"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        (f"alpine:3@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        (f"10.0.0.1:5000/app@{DIGEST}", f"10.0.0.1:5000/app@{DIGEST}"),
    ],
)
def test_image_names_have_dockers_defaults(text: str, full: str) -> None:
    image = ImageName.parse(text)
    assert str(image) == full
    assert ImageName.parse(full) == image
    assert str(image.manifests) == f"{image.upstream}/{image.repository}#manifests"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/",
        "/a",
        "Alpine",
        "alpine:",
        "alpine@",
        "alpine:a:b",
        "alpine@latest",
        "alpine@sha256:00",
        f"alpine@{DIGEST}@{DIGEST}",
        f"alpine:{DIGEST}",
        f"alpine:not a tag@{DIGEST}",
        "alpine latest",
        "alpine\n",
        "docker.io/",
        "../alpine",
        "https://docker.io/alpine",
        "a" * 300,
    ],
)
def test_wrong_image_names_are_refused(text: str) -> None:
    with pytest.raises(BadInputError):
        ImageName.parse(text)


@given(upstreams, repositories, tags)
def test_full_image_names_round_trip(upstream: str, repository: str, tag: str) -> None:
    image = ImageName(upstream, repository, tag)
    assert ImageName.parse(str(image)) == image

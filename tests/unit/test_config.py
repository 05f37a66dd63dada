"""The configuration file: the documented file loads, and an error names the wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.config.quantities import Duration, Floor, HostPort, Size
from node.config.schema import Config, check, load
from protocol.errors import BadInputError

CONTRACT = """
[node]
name = "edge-1"
site = "default"
data_dir = "/var/lib/p2pd"
[mirror]
listen = "127.0.0.1:5050"
[peers]
listen = "/ip4/0.0.0.0/tcp/4501"   # libp2p
bulk = "0.0.0.0:4502"        # the bulk channel
bootstrap = []               # multiaddrs with /p2p/<peer id>
mdns = true
k = 4
m = 1
[[upstream]]
name = "docker.io"           # the ns= key, and the first part of the path
url = "https://registry-1.docker.io"   # http:// allowed
[cluster]
key = ""
[cache]
memory = "64MiB"
disk = "10GiB"
min_free = "5%"
containerd_store = ""        # its content store's folder; empty: not used
[control]
socket = "/run/p2pd/p2pd.sock"
metrics = "127.0.0.1:5051"   # /metrics ; empty: off
"""


def load_text(folder: Path, text: str) -> Config:
    path = folder / "p2pd.toml"
    path.write_text(text, "utf-8")
    return load(path)


def test_without_a_file_every_key_has_a_default() -> None:
    config = load(None)
    check(config)
    assert config.node.name
    assert [upstream.name for upstream in config.upstream] == ["docker.io", "ghcr.io", "quay.io", "registry.k8s.io"]
    assert (config.peers.k, config.peers.m) == (4, 1)
    assert config.cache.memory.bytes == 64 << 20
    assert config.cache.disk.bytes == 10 << 30


def test_the_documented_file_has_the_defaults(tmp_path: Path) -> None:
    config, defaults = load_text(tmp_path, CONTRACT), load(None)
    assert config.node.name == "edge-1"
    assert config.upstream == defaults.upstream[:1]
    for part in ("mirror", "peers", "cluster", "cache", "control"):
        assert getattr(config, part) == getattr(defaults, part)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, "") == load(None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[node]\nnmae = 'x'", "nmae"),
        ("[mirrors]\n", "mirrors"),
        ("[mirror]\nmax_object = '0'", "mirror.max_object"),
        ("[mirror]\nmax_object = '2000GiB'", "mirror.max_object"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\ninsecure = true", "insecure"),
        ("[[upstream]]\nurl = 'http://x'", "name"),
        ("[[upstream]]\nname = 'x'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = 'ftp://x'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = 'x:5000'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x/?y'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x:99999'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://[::1'", 'upstream "x": url'),
        ("[[upstream]]\nname = 'x'\nurl = ['http://m', 'x:5000']", 'upstream "x": url = "x:5000"'),
        ("[[upstream]]\nname = 'x'\nurl = ['http://m', 'http://m/']", "none twice"),
        ("[[upstream]]\nname = 'x'\nurl = []", "from 1 to 8"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://u:secret@m'", "docker_config"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nrate = 'fast'", 'upstream "x": rate = "fast": not a size'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nrate = '0'", "rate and daily"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\ndaily = '20 GB/day'", 'upstream "x": daily'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\ndaily_spent = 'wait'", "daily_spent"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nprefer = 'slowest'", "prefer"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nhours = '22:00-06:00'", "hours"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nhours = ['22-6']", 'upstream "x": hours = "22-6": not hours'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nhours = ['06:00-06:00']", 'upstream "x": hours'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nhours = ['24:00-06:00']", 'upstream "x": hours'),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nhours = ['22:00-24:01']", 'upstream "x": hours'),
        ("[[upstream]]\nname = 'a b'\nurl = 'http://x'", "a b"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\n" * 2, "upstream: a name occurs twice"),
        ("[[upstream]]\nname = 'x'\nurl = 'http://x'\nconnections = 0", "connections"),
        ("[peers]\nk = 0", "peers.k"),
        ("[peers]\nk = 33", "peers.k"),
        ("[peers]\nk = '4'", "peers.k"),
        ("[peers]\nm = 9", "peers.m"),
        ("[peers]\nm = -1", "peers.m"),
        ("[peers]\nmdns = 'no'", "peers.mdns"),
        ("[peers]\nbootstrap = '/ip4/1.2.3.4/tcp/1'", "peers.bootstrap"),
        ("[peers]\nbulk = '4502'", "peers.bulk"),
        ("[mirror]\nlisten = ':5050'", 'mirror.listen = ":5050": not an address'),
        ("[mirror]\nlisten = 'localhost:70000'", "mirror.listen"),
        ("[mirror]\nlisten = 'localhost:²'", "mirror.listen"),
        (f"[mirror]\nlisten = 'localhost:{'1' * 5000}'", "mirror.listen"),
        ("[mirror]\ntag_ttl = '60'", "mirror.tag_ttl"),
        ("[mirror]\ntag_max_age = '7 days'", "mirror.tag_max_age"),
        (f"[mirror]\ntag_ttl = '{'9' * 400}s'", "mirror.tag_ttl"),
        ("[[tags]]\nmatch = 'alpine'", 'tags "alpine": match'),
        (f"[[tags]]\nmatch = '*{'x' * 600}'", "longer than 512"),
        ("[[tags]]\nttl = '5s'", "match"),
        ("[[tags]]\nmatch = '*'\nttl = '5'", 'tags "*": ttl = "5": not a duration'),
        ("[[tags]]\nmatch = '*'\nmax_age = 'old'", 'tags "*": max_age'),
        ("[[tags]]\nmatch = '*'\ncache = false\nttl = '5s'", "cache = false"),
        ("[[tags]]\nmatch = '*'\n" * 300, "tags"),
        ("[cache]\nmemory = '64 Mo'", "cache.memory"),
        (f"[cache]\nmemory = '{'9' * 400}'", "cache.memory"),
        ("[cache]\nmemory = 64", "Expected `str`, got `int` - at `$.cache.memory`"),
        ("[cache]\ndisk = '-1'", "cache.disk"),
        ("[cache]\nmin_free = '100%'", "cache.min_free"),
        ("[cache]\nmin_free = 'nan%'", "cache.min_free"),
        ("[cache]\nmin_free = 'some'", "cache.min_free"),
        ("[control]\nmetrics = 'on'", "control.metrics"),
        ("[node]\nlog = 'loud'", "node.log"),
        ("[node]\nname = ''", "node.name"),
        ("[node]\nsite = ''", "node.site"),
        ("[node]\ndata_dir = ''", "node.data_dir"),
        ("[node", "not TOML"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(BadInputError) as caught:
        load_text(tmp_path, text)
    assert named in str(caught.value)
    assert "p2pd.toml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot read.*absent\.toml"):
        load(tmp_path / "absent.toml")
    with pytest.raises(BadInputError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[node]\nname = '\xe9'")
    with pytest.raises(BadInputError, match="not TOML"):
        load(tmp_path / "latin.toml")


def test_empty_metrics_is_off(tmp_path: Path) -> None:
    assert load_text(tmp_path, "[control]\nmetrics = ''").control.metrics == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1B", 1),
        ("64MiB", 64 << 20),
        ("10 GB", 10**10),
        ("1.5KiB", 1536),
        (" 2TiB ", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Size(text).bytes == size


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("60s", 60), ("1.5m", 90), ("2h", 7200), ("7d", 604800)])
def test_durations(text: str, seconds: float) -> None:
    assert Duration(text).seconds == seconds


def test_floors() -> None:
    floors = [Floor(text) for text in ("5%", "0%", "1GiB")]
    assert [(floor.share, floor.bytes) for floor in floors] == [(0.05, 0), (0.0, 0), (0.0, 1 << 30)]
    assert [floor.of(100 << 30) for floor in floors] == [5 << 30, 0, 1 << 30]


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:5050", ("127.0.0.1", 5050)), ("[::1]:80", ("::1", 80)), ("edge:0", ("edge", 0))],
)
def test_addresses_round_trip(text: str, address: tuple[str, int]) -> None:
    parsed = HostPort.parse(text)
    assert parsed == HostPort(*address)
    assert (parsed.host, parsed.port) == address
    assert str(parsed) == text

"""The files shipped for operators: they parse, they agree with the code, and systemd accepts them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from node.cli.containerd_hosts import default_server
from node.config.schema import Config, TagsPart, UpstreamPart, load

DEPLOY = Path(__file__).parents[2] / "deploy"
MIRROR = Config().mirror.listen


def keys() -> set[tuple[str, str]]:
    tables = {"upstream": UpstreamPart, "tags": TagsPart}
    parts = {part.name: part.type for part in msgspec.structs.fields(Config)} | tables
    return {(name, field.name) for name, kind in parts.items() for field in msgspec.structs.fields(kind)}


def test_the_example_is_the_defaults() -> None:
    assert load(DEPLOY / "p2pd.toml") == Config()


def test_the_example_has_every_key_with_its_reason() -> None:
    listed = set()
    section = ""
    for line in (DEPLOY / "p2pd.toml").read_text().splitlines():
        if header := re.match(r"(?:# )?\[+(\w+)\]+$", line):
            section = header[1]
        elif key := re.match(r"(?:# )?(\w+) = [^#]*?( +# .+)?$", line):
            reason = key[2] or (section, key[1]) in listed
            assert reason, f"{section}.{key[1]} does not name its trade-off"
            listed.add((section, key[1]))
    assert listed == keys()


def test_client_snippets_point_at_the_mirror() -> None:
    hosts = tomllib.loads((DEPLOY / "hosts.toml").read_text())
    assert hosts == {
        "server": default_server("docker.io"),
        "host": {f"http://{MIRROR}": {"capabilities": ["pull", "resolve"]}},
    }
    registries = tomllib.loads((DEPLOY / "registries.conf").read_text())["registry"]
    upstreams = {upstream.name for upstream in Config().upstream}
    for registry in registries:
        assert registry["prefix"] in upstreams
        assert registry["mirror"] == [{"location": f"{MIRROR}/{registry['prefix']}", "insecure": True}]
    buildkit = tomllib.loads((DEPLOY / "buildkitd.toml").read_text())["registry"]
    assert buildkit == {"docker.io": {"mirrors": [MIRROR]}, MIRROR: {"http": True}}
    assert json.loads((DEPLOY / "daemon.json").read_text()) == {"registry-mirrors": [f"http://{MIRROR}"]}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(("drop_in", "most"), [("", 13), ("containerd-store.conf", 17)])
def test_systemd_accepts_the_unit_and_its_exposure_does_not_grow(tmp_path: Path, drop_in: str, most: int) -> None:
    """`most` is in tenths; docs/OPERATIONS.md gives the same number."""
    unit = tmp_path / "p2pd.service"
    if drop_in:
        (tmp_path / "p2pd.service.d").mkdir()
        shutil.copy(DEPLOY / drop_in, tmp_path / "p2pd.service.d")
    program = shutil.which("true")
    unit.write_text(re.sub(r"(?m)^(Exec\w+)=\S+", rf"\1={program}", (DEPLOY / "p2pd.service").read_text()))
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    complaints = [line for line in verify.stderr.splitlines() if "p2pd.service" in line]
    assert complaints == []
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={most}", unit]
    rating = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rating.returncode == 0, rating.stdout[-300:]


def test_the_unit_fits_the_configuration() -> None:
    text = (DEPLOY / "p2pd.service").read_text()
    config = Config()
    assert config.node.data_dir == "/var/lib/p2pd"
    assert "\nStateDirectory=p2pd\n" in text
    assert config.control.socket == "/run/p2pd/p2pd.sock"
    assert "\nRuntimeDirectory=p2pd\n" in text
    assert "\nType=notify\n" in text
    assert "\nWatchdogSec=" in text

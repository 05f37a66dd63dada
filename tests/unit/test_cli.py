"""p2pctl for an operator: tables, --json, exit statuses and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from node.api.documents import Check
from node.cli.main import main
from node.web.server import Request, Response
from protocol.admission import read_revocation, read_token
from protocol.records import peer_id_of
from tests.support.fake_control import DIGEST, PEER, FakeControl, served
from tests.support.fake_registry import serve

PEER_ID = peer_id_of(bytes(32))
DOCUMENTS = {name: name for name in ("peers", "images", "tags")} | {
    "status": "name",
    "cache": "tiers",
    "why alpine": "objects",
    "doctor": "checks",
    "version": "p2pctl",
}
"""Commands, and a field of the document that each prints."""


@pytest.fixture
def api() -> FakeControl:
    return FakeControl()


@pytest.fixture
def path(tmp_path: Path, api: FakeControl) -> Iterator[Path]:
    path = tmp_path / "p2pd.sock"
    with served(api, path):
        yield path


def run(*arguments: str | Path) -> Result:
    """Run p2pctl. An argument may hold several words, with spaces between them."""
    result = CliRunner().invoke(main, [word for argument in arguments for word in str(argument).split(" ")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# JSON


@pytest.mark.parametrize("command", DOCUMENTS)
def test_json_before_and_after_the_command(path: Path, command: str, tmp_path: Path) -> None:
    words = command.split()
    if command == "doctor":
        words += ["--certs-dir", str(tmp_path / "none" / "certs.d")]
    before = run("--socket", path, "--json", *words)
    after = run("--socket", path, *words, "--json")
    assert before.stdout == after.stdout
    assert DOCUMENTS[command] in json.loads(before.stdout)
    assert len(before.stdout.splitlines()) == 1


def test_json_of_a_pull_is_one_event_a_line(path: Path) -> None:
    result = run(f"--socket {path} pull alpine --json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["progress", "progress", "result"]
    assert events[-1]["by_source"] == {"peer": 10}


def test_the_socket_comes_from_the_environment_too(path: Path) -> None:
    result = CliRunner(env={"P2PD_SOCKET": str(path)}).invoke(main, ["status", "--json"])
    assert json.loads(result.stdout)["name"] == "edge-1"
    assert run("status", "--json", "--socket", path).exit_code == 0


# Tables


def test_status(path: Path) -> None:
    text = run("--socket", path, "status").stdout
    for part in (
        "edge-1 (site lab)",
        "abababababababab (joined, certificate for 10 d 1 h, 3 revoked)",
        "ready, up 1 h 1 m",
        "r.example:5000",
        "answered 503; again in 2.0 s",
        "75.0 %",
        "64.0 MiB",
        PEER,
    ):
        assert part in text


def test_peers_with_a_name_that_would_steer_the_terminal(path: Path) -> None:
    text = run("--socket", path, "peers").stdout
    assert "edge-2" in text
    assert "quarantined: wrong bytes" in text
    assert "\x1b" not in text
    assert "evil?[2J" in text


def test_peers_with_the_evidence_against_them(path: Path) -> None:
    text = run("--socket", path, "peers").stdout
    row = next(line for line in text.splitlines() if "proven here" in line)
    for part in ("evil", "#3", "edge-3", "1 m 0 s"):
        assert part in row


def test_tags(path: Path) -> None:
    text = run("--socket", path, "tags", "alpine").stdout
    for part in ("docker.io/library/alpine:latest", "1 m 15 s", "stale", "edge-2", "docker.io/*", "1 h 0 m", "always"):
        assert part in text
    assert "\x1b" not in text


def test_images_and_cache(path: Path) -> None:
    images = run("--socket", path, "images").stdout
    assert "docker.io/library/alpine:latest" in images
    assert str(DIGEST)[:19] in images
    assert "1.0 MiB" in run("--socket", path, "cache").stdout


def test_a_pull_ends_with_bytes_by_source(path: Path, api: FakeControl) -> None:
    result = run(f"--socket {path} pull alpine --all-platforms")
    assert result.exit_code == 0
    assert api.pulls == [("docker.io/library/alpine:latest", True)]
    assert f"docker.io/library/alpine:latest {DIGEST}" in result.stdout
    assert "100.0 %" in result.stdout


def test_why_in_runs(path: Path) -> None:
    lines = run("--socket", path, "why", "alpine").stdout.splitlines()
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0-29", "30", "31-40"]
    assert "edge-2" in rows[0], "a peer is shown by its name"
    assert lines[-1] == "all 41 blocks, 20.0 MiB: 30 peer (15.0 MiB), 1 origin (512.0 KiB), 10 not read (4.5 MiB)"


def test_why_block_by_block(path: Path) -> None:
    lines = run(f"--socket {path} why alpine --blocks").stdout.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isdigit()] == [str(index) for index in range(41)]


# Failures


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["pull", "missing"], 1, "was not pulled: docker.io/library/missing:latest does not exist"),
        (["pull", "failing", "--json"], 1, "no member has it"),
        (["why", "missing"], 1, "was not asked for here"),
        (["why", "UPPER"], 2, "not a repository name"),
        (["pull"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
        (["containerd", "install", "--mirror", "nonsense"], 1, "not a mirror address"),
        (["containerd", "install", "--upstream", "../x"], 1, "not a registry name"),
    ],
)
def test_failures(path: Path, arguments: list[str], code: int, text: str) -> None:
    result = run("--socket", path, *arguments)
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["status", "peers", "images", "cache", "pull x", "why x", "doctor"])
def test_a_daemon_that_is_down(tmp_path: Path, command: str) -> None:
    missing = tmp_path / "none.sock"
    arguments = command.split()
    result = run(
        "--socket", missing, *arguments, *(["--certs-dir", str(tmp_path / "a/b")] if command == "doctor" else [])
    )
    assert result.exit_code == 3
    assert f"no control socket at {missing}" in result.output
    assert "systemctl status p2pd" in result.output


def test_something_else_on_the_socket(tmp_path: Path) -> None:
    class Other(FakeControl):
        async def status(self):  # type: ignore[no-untyped-def,override]
            return Check(name="x", level="ok", text="y")

    with served(Other(), tmp_path / "s"):
        result = run("--socket", tmp_path / "s", "status")
    assert result.exit_code == 3
    assert "not from a p2pd of this version" in result.stderr


def test_no_traceback_from_a_process_of_its_own(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from node.cli.main import main; main()",
        "--socket",
        str(tmp_path / "s"),
        "status",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_slow_modules_are_not_imported_for_an_answer_in_json(path: Path) -> None:
    script = (
        "import sys; from node.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {'rich', 'httpx', 'trio', 'cryptography', 'numpy', 'libp2p'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, "--socket", str(path), "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


# containerd, cluster, doctor


def test_containerd_install_asks_the_daemon_for_its_registries(path: Path, tmp_path: Path) -> None:
    certs = tmp_path / "certs.d"
    dry = run(f"--socket {path} containerd install --certs-dir {certs} --dry-run")
    assert dry.exit_code == 0
    assert '+[host."http://127.0.0.1:1"]' in dry.stdout
    assert not certs.exists()

    hosts = certs / "r.example:5000" / "hosts.toml"
    assert run(f"--socket {path} containerd install --certs-dir {certs}").stdout == f"wrote {hosts}\n"
    assert 'server = "http://r.example:5000"' in hosts.read_text()
    again = run(f"--socket {path} containerd install --certs-dir {certs} --json")
    assert [change["changed"] for change in json.loads(again.stdout)["changes"]] == [False]

    assert run(f"--socket {path} containerd uninstall --certs-dir {certs}").stdout == f"removed {hosts}\n"
    assert list(certs.iterdir()) == []
    nothing = run("containerd", "uninstall", "--certs-dir", certs)
    assert nothing.exit_code == 0
    assert "nothing to remove" in nothing.stderr


def test_containerd_install_without_a_daemon(tmp_path: Path) -> None:
    certs = tmp_path / "certs.d"
    missing = tmp_path / "none.sock"
    result = run(f"--socket {missing} containerd install --certs-dir {certs} --upstream q.example")
    assert result.exit_code == 0
    assert "its default configuration is assumed" in result.stderr
    text = (certs / "q.example/hosts.toml").read_text()
    assert 'server = "https://q.example"' in text
    assert '[host."http://127.0.0.1:5050"]' in text
    run(f"--socket {missing} containerd install --certs-dir {certs}")
    names = {"q.example", "docker.io", "ghcr.io", "quay.io", "registry.k8s.io"}
    assert {folder.name for folder in certs.iterdir()} == names


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(f"--socket {tmp_path}/s containerd install --certs-dir {tmp_path}/file --upstream q.io")
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr


def test_cluster_init(tmp_path: Path) -> None:
    key = tmp_path / "cluster.key"
    assert json.loads(run("cluster", "init", key, "--json").stdout) == {"file": str(key)}
    assert key.stat().st_mode & 0o777 == 0o600
    again = run("cluster", "init", key)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert run("cluster", "init", tmp_path / "none" / "key").exit_code == 1


def test_doctor_from_outside_and_inside(tmp_path: Path) -> None:
    """A mirror that answers, a containerd that does not use it, and the daemon's own checks."""
    certs = tmp_path / "containerd" / "certs.d"
    certs.mkdir(parents=True)

    async def answers(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(200)

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            url = await serve(nursery, answers)
            await trio.to_thread.run_sync(check, FakeControl(url.removeprefix("http://")))
            nursery.cancel_scope.cancel()

    def check(api: FakeControl) -> None:
        socket = tmp_path / "s"
        with served(api, socket):
            result = run(f"--socket {socket} doctor --certs-dir {certs}")
            assert result.exit_code == 0
            assert "/v2/ answers" in result.stdout
            assert "does not pull r.example:5000 through the mirror" in result.stdout
            run(f"--socket {socket} containerd install --certs-dir {certs}")
            assert (
                "pulls r.example:5000 through the mirror" in run(f"--socket {socket} doctor --certs-dir {certs}").stdout
            )
            api.checks = (Check(name="data_dir", level="fail", text="read-only", hint="mount it"),)
            failing = run(f"--socket {socket} doctor --certs-dir {certs}")
            assert failing.exit_code == 1
            assert "FAIL data_dir: read-only" in failing.stdout

    trio.run(scenario)


def test_doctor_without_a_mirror(path: Path, tmp_path: Path) -> None:
    result = run(f"--socket {path} doctor --certs-dir {tmp_path}/a/b --json")
    assert result.exit_code == 1
    levels = {check["name"]: check["level"] for check in json.loads(result.stdout)["checks"]}
    assert levels == {"daemon": "ok", "mirror": "fail", "containerd": "ok", "clock": "ok"}


def test_doctor_without_a_daemon_looks_at_the_certificate_in_its_files(tmp_path: Path) -> None:
    def checks(text: str) -> dict[str, str]:
        (tmp_path / "p2pd.toml").write_text(text)
        result = run(f"--socket {tmp_path}/s doctor --config {tmp_path}/p2pd.toml --json")
        assert result.exit_code == 3
        return {check["name"]: check["level"] for check in json.loads(result.stdout)["checks"]}

    good = f'[node]\ndata_dir = "{tmp_path}"\n'
    assert checks(good)["certificate"] == "ok"
    (tmp_path / "identity.key").write_text("none")
    assert checks(good)["certificate"] == "fail"
    assert checks("[nodes]\n")["configuration"] == "fail"


# Admission


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert run("cluster", "init", tmp_path / "cluster.key").exit_code == 0
    return tmp_path / "cluster.key"


def test_cluster_token(key: Path) -> None:
    made = json.loads(run(f"cluster token --key {key} --site harbour --uses 3 --json").stdout)
    token = read_token(made["token"])
    assert (token.site, token.uses, token.lifetime) == ("harbour", 3, 0)
    assert token.expires - token.made == 24 * 3600
    assert (made["subject"], made["site"]) == (token.subject, "harbour")
    plain = run(f"cluster token --key {key} --site harbour --expires 2h --lifetime 90d")
    token = read_token(plain.stdout.strip())
    assert (token.expires - token.made, token.lifetime) == (7200, 90 * 86400)
    assert "for site harbour" in plain.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--site", ""), "--site"),
        (("--site", "s" * 65), "--site"),
        (("--site", "s", "--uses", "-1"), "--uses"),
        (("--site", "s", "--lifetime", "23h"), "--lifetime"),
        (("--site", "s", "--expires", "0s"), "--expires"),
        (("--site", "s", "--expires", "soon"), "--expires"),
    ],
)
def test_invalid_token_options_are_named(key: Path, options: tuple[str, ...], named: str) -> None:
    result = run(f"cluster token --key {key}", *options)
    assert result.exit_code == 1
    assert named in result.stderr


def test_cluster_revoke_prints_text_that_another_machine_can_use(key: Path) -> None:
    token = run(f"cluster token --key {key} --site s").stdout.strip()
    for text, subject in ((token, read_token(token).subject), (PEER_ID, PEER_ID)):
        revocation = run(f"cluster revoke --key {key} {text} --print").stdout.strip()
        assert read_revocation(revocation).subject == subject
    assert "--key" in run("cluster", "revoke", PEER_ID, "--print").stderr
    assert "not an Ed25519 peer id" in run(f"cluster revoke --key {key} nobody --print").stderr
    assert run(f"--socket /none cluster revoke --key {key} {PEER_ID}").exit_code == 3


def test_join_reports_wrong_arguments_before_it_connects(tmp_path: Path) -> None:
    config = tmp_path / "p2pd.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path}/data"\n')
    result = run(f"join nonsense 127.0.0.1:1 --config {config}")
    assert result.exit_code == 1
    assert "not a join token" in result.stderr
    assert not (tmp_path / "data").exists()

"""hosts.toml: the added lines, the text that stays, and an uninstall that restores the original bytes."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.cli import containerd_hosts
from node.cli.containerd_hosts import apply, config_path_advice, default_server, plan_install, plan_uninstall
from protocol.errors import BadInputError

MIRROR = "http://127.0.0.1:5050"
DOCKER = ("docker.io", "https://registry-1.docker.io")


def install(certs: Path, *registries: tuple[str, str], mirror: str = MIRROR) -> list[containerd_hosts.Change]:
    changes = plan_install(certs, mirror, dict(registries or (DOCKER,)))
    for change in changes:
        apply(change)
    return changes


def uninstall(certs: Path) -> None:
    for change in plan_uninstall(certs):
        apply(change)


def given_file(certs: Path, text: str, registry: str = "docker.io") -> Path:
    path = certs / registry / "hosts.toml"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode())
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# Generated files

comments = st.text(st.characters(blacklist_categories=("Cc", "Cs")), max_size=20).map(lambda text: f"#{text}")
strings = st.text(st.sampled_from("ab[]#.\\\"' \n=é"), max_size=12)


def basic(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def multiline(text: str) -> str:
    return '"""\n' + text.replace("\\", "\\\\").replace('"', '\\"') + '\n[host."x"]\n# not a comment\n"""'


values = st.one_of(
    strings.map(basic),
    strings.map(multiline),
    st.booleans().map(lambda flag: str(flag).lower()),
    st.lists(strings.map(basic), max_size=3).map(lambda items: "[\n" + "".join(f"[{i}],\n# c\n" for i in items) + "]"),
)
spaces = st.sampled_from(["", " ", "  ", "\t"])


@st.composite
def entries(draw: st.DrawFn, names: tuple[str, ...]) -> list[str]:
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    lines: list[str] = []
    for name in chosen:
        lines += draw(st.lists(st.one_of(comments, st.just("")), max_size=2))
        lines.append(f"{draw(spaces)}{name} = {draw(values)}{draw(spaces)}{draw(st.one_of(st.just(''), comments))}")
    return lines


@st.composite
def hosts_files(draw: st.DrawFn) -> str:
    lines = draw(entries(("server", "ca", "skip_verify", "override_path")))
    if draw(st.booleans()):
        lines += ["[header]", *draw(entries(("x-one", "x-two")))]
    for host in draw(st.lists(st.integers(0, 9), unique=True, max_size=3)):
        lines += draw(st.lists(st.one_of(comments, st.just("")), max_size=2))
        lines.append(f'{draw(spaces)}[ host . "https://m{host}.example" ]{draw(st.one_of(st.just(""), comments))}')
        lines += draw(entries(("capabilities", "ca", "client")))
        if draw(st.booleans()):
            lines += [f'[host."https://m{host}.example".header]', "x = 'y'"]
    lines += draw(st.lists(st.one_of(comments, st.just("")), max_size=2))
    text = "\n".join(lines)
    text += draw(st.sampled_from(["", "\n"]))
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


@settings(max_examples=150)
@given(hosts_files())
def test_install_adds_only_the_mirror_and_uninstall_is_its_inverse(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        certs = Path(name)
        path = given_file(certs, text)
        before = tomllib.loads(text)
        install(certs)

        once = path.read_bytes()
        after = tomllib.loads(once.decode())
        assert next(iter(after["host"])) == MIRROR
        assert after["host"].pop(MIRROR) == {"capabilities": ["pull", "resolve"]}
        assert after["server"] == before.get("server", DOCKER[1])
        assert {"server": after["server"], "host": {}, **before} == after

        install(certs)
        assert path.read_bytes() == once, "installing twice changes nothing"
        install(certs, mirror="http://127.0.0.1:6060")
        assert MIRROR not in tomllib.loads(path.read_text())["host"], "another mirror replaces ours"
        uninstall(certs)
        assert tree(certs) == {"docker.io": None, "docker.io/hosts.toml": text.encode()}


# Single cases


def test_an_example_as_the_operator_sees_it(tmp_path: Path) -> None:
    path = given_file(tmp_path, '# ours\nserver = "https://up.example"\n\n# office\n[host."https://m.example"]\n')
    (change,) = install(tmp_path)
    assert path.read_text() == (
        '# ours\nserver = "https://up.example"\n\n'
        "# >>> p2pctl: added lines; `p2pctl containerd uninstall` removes them\n"
        '[host."http://127.0.0.1:5050"]\n  capabilities = ["pull", "resolve"]\n# <<< p2pctl\n'
        '# office\n[host."https://m.example"]\n'
    )
    added = [line for line in change.diff().splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 4


@pytest.mark.parametrize("folder_exists", [True, False])
def test_a_created_file_is_deleted_again(tmp_path: Path, folder_exists: bool) -> None:
    if folder_exists:
        (tmp_path / "docker.io").mkdir()
    before = tree(tmp_path)
    install(tmp_path, DOCKER, ("ghcr.io", "https://ghcr.io"))
    assert tomllib.loads((tmp_path / "ghcr.io/hosts.toml").read_text()) == {
        "server": "https://ghcr.io",
        "host": {MIRROR: {"capabilities": ["pull", "resolve"]}},
    }
    uninstall(tmp_path)
    assert tree(tmp_path) == before


def test_lines_that_others_add_later_stay(tmp_path: Path) -> None:
    install(tmp_path)
    path = tmp_path / "docker.io/hosts.toml"
    path.write_text(path.read_text() + '[host."https://later.example"]\n')
    uninstall(tmp_path)
    assert path.read_text() == '[host."https://later.example"]\n'


def test_the_backup_is_made_once_and_never_overwritten(tmp_path: Path) -> None:
    path = given_file(tmp_path, "# first\n")
    backup = path.with_name("hosts.toml.before-p2pctl")
    install(tmp_path)
    assert backup.read_text() == "# first\n"
    path.write_text(path.read_text() + "# more\n")
    uninstall(tmp_path)
    assert path.read_text() == "# first\n# more\n"
    install(tmp_path)
    assert backup.read_text() == "# first\n", "the older backup stands"


def test_mode_and_link_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("# shared\n")
    real.chmod(0o640)
    link = tmp_path / "certs/docker.io/hosts.toml"
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    install(tmp_path / "certs")
    assert link.is_symlink()
    assert MIRROR in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("text", "line"),
    [("server = \n", "line 1"), ("# ok\n[host.\n", "line 2"), ("a = 1\na = 2\n", "line 2")],
)
def test_a_malformed_file_is_named_with_its_line_and_nothing_changes(tmp_path: Path, text: str, line: str) -> None:
    given_file(tmp_path, text, "ghcr.io")
    before = tree(tmp_path)
    with pytest.raises(BadInputError) as raised:
        install(tmp_path, DOCKER, ("ghcr.io", "https://ghcr.io"))
    assert "ghcr.io/hosts.toml" in str(raised.value)
    assert line in str(raised.value)
    assert tree(tmp_path) == before, "the registries before it also stay unchanged"


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = given_file(tmp_path, "")
    path.write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(BadInputError, match="line 2: not UTF-8"):
        install(tmp_path)


@pytest.mark.parametrize("text", ['host = {"https://a.example" = {}}\n', 'host."https://a.example".ca = "x"\n'])
def test_hosts_that_are_not_tables_are_refused_or_merged_rightly(tmp_path: Path, text: str) -> None:
    path = given_file(tmp_path, text)
    with pytest.raises(BadInputError, match="write its hosts as tables"):
        install(tmp_path)
    assert path.read_text() == text


def test_the_operators_own_entry_is_left_alone(tmp_path: Path) -> None:
    text = f'[host."https://m.example"]\n[host."{MIRROR}"]\n'
    path = given_file(tmp_path, text)
    (change,) = install(tmp_path)
    assert path.read_text() == text
    assert "not first" in change.notes[0]
    uninstall(tmp_path)
    assert path.read_text() == text


def test_edited_lines_are_not_removed(tmp_path: Path) -> None:
    install(tmp_path)
    path = tmp_path / "docker.io/hosts.toml"
    path.write_text(path.read_text().replace("# <<<", '[host."https://mine.example"]\n# <<<'))
    with pytest.raises(BadInputError, match="line 1: the lines that p2pctl added were edited"):
        uninstall(tmp_path)
    assert "mine.example" in path.read_text()


def test_folders_as_containerd_finds_them(tmp_path: Path) -> None:
    (tmp_path / "r.example_5000_").mkdir()
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default/hosts.toml").write_text("")
    (tmp_path / "r.example_5000_/ca.crt").write_text("")
    ported, plain = install(tmp_path, ("r.example:5000", ""), ("q.example:5000", ""))
    assert ported.path == tmp_path / "r.example_5000_/hosts.toml"
    assert "ignores ca.crt" in ported.notes[0]
    assert plain.path == tmp_path / "q.example:5000/hosts.toml"
    assert "_default" in plain.notes[0]
    assert "server" not in tomllib.loads(plain.path.read_text())


def test_two_registries_never_share_a_file(tmp_path: Path) -> None:
    given_file(tmp_path, "")
    (tmp_path / "ghcr.io").symlink_to(tmp_path / "docker.io")
    with pytest.raises(BadInputError, match="shares"):
        install(tmp_path, DOCKER, ("ghcr.io", ""))


@pytest.mark.parametrize("mirror", ["127.0.0.1:5050", "ftp://x", "http://127.0.0.1:5050/path", "http://u:p@h:1"])
def test_a_mirror_is_an_address(tmp_path: Path, mirror: str) -> None:
    with pytest.raises(BadInputError, match="not a mirror address"):
        install(tmp_path, mirror=mirror)


def test_default_servers() -> None:
    assert default_server("docker.io") == "https://registry-1.docker.io"
    assert default_server("ghcr.io") == "https://ghcr.io"
    assert default_server("localhost:5000") == default_server("127.0.0.1:5000") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "does not exist"),
        ("version = 2\n", "sets no config_path"),
        ('[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{certs}"\n', "no restart is needed"),
        ('[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "{certs}"\n', "no restart is needed"),
        ('[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "{certs}:/x"\n', "several folders"),
        ('[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/x"\n', "another folder"),
    ],
)
def test_advice_on_containerds_own_configuration(tmp_path: Path, text: str | None, expected: str) -> None:
    config = tmp_path / "config.toml"
    if text is not None:
        config.write_text(text.replace("{certs}", str(tmp_path)))
    assert expected in config_path_advice(tmp_path, config)

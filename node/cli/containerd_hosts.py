"""Pointing containerd at the mirror: one `hosts.toml` for each registry, merged into the operator's own file.

Facts of containerd (docs/hosts.md and core/remotes/docker/config/hosts.go): it tries the hosts in the order of their
tables in the file, then `server`, by default the registry itself. It reads the file again at every pull. It uses only
the first existing folder among `host_port_`, `host:port` and `_default`, and reads certificates from a folder only if
that has no hosts.toml.

`install` inserts a few lines between two marks into the text, instead of writing the file anew: the operator's own text
stays unchanged, and removing the lines restores the original. The changes to all files are planned and checked before
the first file is written.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from node.oci.references import check_upstream
from node.runtime import secret_files
from protocol.errors import BadInputError

DEFAULT_CONFIG = Path("/etc/containerd/config.toml")
BACKUP_SUFFIX = ".before-p2pctl"
MAX_FILE = 256 << 10
"""A hosts.toml has a few dozen lines; a larger file is something else."""

_BEGIN = "# >>> p2pctl: added lines"
_END = "# <<< p2pctl"
_MADE_FILE = " (in a file it made)"
_MADE_FOLDER = " (in a folder it made)"
_REMOVES = "; `p2pctl containerd uninstall` removes them"
_STRING = r'"(?:[^"\\\r\n]|\\.)*"'
_BLOCK = re.compile(
    rf"^{re.escape(_BEGIN)}(?P<made>{re.escape(_MADE_FILE)}|{re.escape(_MADE_FOLDER)})?{re.escape(_REMOVES)}\r?\n"
    rf"(?:server = {_STRING}\r?\n\r?\n)?"
    rf"\[host\.{_STRING}\]\r?\n"
    rf"  capabilities = [^\r\n]*\r?\n"
    rf"{re.escape(_END)}(?:\r?\n|\Z)",
    re.MULTILINE,
)
_MARK = re.compile(rf"^(?:{re.escape(_BEGIN)}|{re.escape(_END)})", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Change:
    """The text of one file before and after, None for no file. `notes` are for the operator."""

    path: Path
    before: str | None
    after: str | None
    notes: tuple[str, ...] = ()
    made_folder: bool = False

    @property
    def is_needed(self) -> bool:
        return self.before != self.after

    @property
    def backup(self) -> Path:
        return self.path.with_name(self.path.name + BACKUP_SUFFIX)

    def diff(self) -> str:
        """The change in the format of `diff -u`."""
        old, new = (_lines(text or "") for text in (self.before, self.after))
        old_name, new_name = ("/dev/null" if text is None else str(self.path) for text in (self.before, self.after))
        lines = difflib.unified_diff(old, new, old_name, new_name)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def default_server(name: str) -> str:
    """The URL that containerd itself uses for a registry; empty for loopback, where it depends on the answer."""
    if name == "docker.io":
        return "https://registry-1.docker.io"
    host = name.rpartition(":")[0] or name
    return "" if host == "localhost" or host.startswith("127.") else f"https://{name}"


def check_mirror(url: str) -> str:
    """The mirror's URL for the files: scheme, host and port only. Raises BadInputError."""
    parts = urlsplit(url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
        raise BadInputError(f'not a mirror address: "{url}": write for example http://127.0.0.1:5050')
    return url.rstrip("/")


def plan_install(certs_dir: Path, mirror: str, servers: Mapping[str, str]) -> list[Change]:
    """Changes after which each registry is pulled through `mirror`. Writes nothing. Raises BadInputError.

    `servers` maps a registry's name to the URL that containerd falls back to. It is written if the file has none.
    """
    changes: dict[Path, Change] = {}
    for name, server in servers.items():
        change = _plan_registry(certs_dir, check_mirror(mirror), name, server)
        if change.path in changes:
            raise BadInputError(f"{name} shares {change.path} with another registry: give each a file of its own")
        changes[change.path] = change
    return list(changes.values())


def plan_uninstall(certs_dir: Path) -> list[Change]:
    """Changes that remove everything that `plan_install` added, in every folder of `certs_dir`."""
    changes = []
    for path in sorted({path.resolve() for path in certs_dir.glob("*/hosts.toml")}):
        text = _read(path)
        if text is not None and _MARK.search(text):
            changes.append(_plan_removal(path, text))
    return changes


def _plan_registry(certs_dir: Path, mirror: str, name: str, server: str) -> Change:
    folder = _folder(certs_dir, check_upstream(name))
    path = (folder / "hosts.toml").resolve()
    before = _read(path)
    if before is None:
        made = _MADE_FILE if folder.is_dir() else _MADE_FOLDER
        after = _block(mirror, server, made, "\n")
        return Change(path, None, after, _masked(certs_dir, folder), made_folder=made == _MADE_FOLDER)
    rest, made = _without_block(before, path)
    hosts = _parse(rest, path).get("host")
    if isinstance(hosts, dict) and mirror in hosts:
        place = "first" if next(iter(hosts)) == mirror else "not first: containerd asks the hosts before it first"
        return Change(path, before, before, (f"it already has [host.{json.dumps(mirror)}], {place}; left as it is",))
    return Change(path, before, _with_block(rest, path, mirror=mirror, server=server, made=made))


def _plan_removal(path: Path, before: str) -> Change:
    rest, made = _without_block(before, path)
    unused = bool(made) and not rest.strip()
    return Change(path, before, None if unused else rest, made_folder=made == _MADE_FOLDER)


def _folder(certs_dir: Path, name: str) -> Path:
    """The first existing folder in which containerd looks for this registry's hosts.toml."""
    host, colon, port = name.rpartition(":")
    underscored = certs_dir / f"{host}_{port}_"
    return underscored if colon and underscored.is_dir() else certs_dir / name


def _masked(certs_dir: Path, folder: Path) -> tuple[str, ...]:
    """Notes on settings that a new hosts.toml makes containerd ignore."""
    notes = []
    certificates = [file.name for file in folder.glob("*") if file.suffix in (".crt", ".cert", ".key")]
    if certificates:
        notes.append(f"containerd now ignores {', '.join(sorted(certificates))} there: add them as ca or client")
    if not folder.is_dir() and (certs_dir / "_default" / "hosts.toml").exists():
        notes.append("containerd now ignores _default/hosts.toml for this registry: copy the lines that it needs")
    return tuple(notes)


def points_at(certs_dir: Path, mirror: str, name: str) -> bool:
    """Whether containerd asks `mirror` for this registry. Raises BadInputError for a malformed file."""
    folder = _folder(certs_dir, check_upstream(name))
    path = (folder if folder.is_dir() else certs_dir / "_default") / "hosts.toml"
    text = _read(path)
    return text is not None and mirror in _table(_parse(text, path), "host")


def _block(mirror: str, server: str, made: str, newline: str) -> str:
    lines = [f"{_BEGIN}{made}{_REMOVES}"]
    if server:
        lines += [f"server = {json.dumps(server)}", ""]
    lines += [f"[host.{json.dumps(mirror)}]", '  capabilities = ["pull", "resolve"]', _END, ""]
    return newline.join(lines)


def _with_block(text: str, path: Path, *, mirror: str, server: str, made: str) -> str:
    """Insert the lines before the first table: after the top-level keys and before all hosts. Verify the result."""
    document = _parse(text, path)
    block = _block(mirror, "" if "server" in document else server, made, "\r\n" if "\r\n" in text else "\n")
    at = _first_table(text)
    if text[:at] and not text[:at].endswith("\n"):
        result = text + "\n" + block.rstrip()
    else:
        result = text[:at] + block + text[at:]
    _check_added(result, document, mirror, path)
    return result


def _without_block(text: str, path: Path) -> tuple[str, str]:
    """The text without the added lines; _MADE_FILE, _MADE_FOLDER or "". Raises BadInputError if they were edited."""
    match = _BLOCK.search(text)
    start, stop = match.span() if match else (0, 0)
    if match and stop == len(text) and not match[0].endswith("\n") and start:
        start -= 1  # the file had no line end, so one was added before the lines
    rest = text[:start] + text[stop:]
    mark = _MARK.search(rest)
    if mark:
        line = text.count("\n", 0, text.index(mark[0])) + 1
        raise BadInputError(f"{path}, line {line}: the lines that p2pctl added were edited: remove them by hand")
    return rest, (match["made"] or "") if match else ""


def _first_table(text: str) -> int:
    """Offset of the first table and the comment lines right above it; the text's length if there is no table."""
    lines = _lines(text)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    for number, line in enumerate(lines):
        # A bracket inside a value of several lines begins no table: the text before it is not valid TOML then.
        if line.lstrip(" \t").startswith("[") and _is_whole(text[: offsets[number]]):
            while number and lines[number - 1].lstrip(" \t").startswith("#") and _is_whole(text[: offsets[number - 1]]):
                number -= 1
            return offsets[number]
    return len(text)


def _lines(text: str) -> list[str]:
    """Lines with their ends. TOML ends lines at line feeds only; str.splitlines also splits at others."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _is_whole(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _check_added(text: str, document: dict[str, object], mirror: str, path: Path) -> None:
    hosts = document.get("host", {})
    with contextlib.suppress(tomllib.TOMLDecodeError):
        merged = tomllib.loads(text)
        if isinstance(hosts, dict) and next(iter(merged["host"])) == mirror:
            capabilities = {"capabilities": ["pull", "resolve"]}
            expected = {"server": merged.get("server"), **document, "host": {mirror: capabilities, **hosts}}
            if {"server": None, **merged} == expected:
                return
    raise BadInputError(f'{path}: write its hosts as tables such as [host."https://..."], or add the mirror by hand')


def _parse(text: str, path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"{path}: not valid TOML, nothing was changed: {error}") from error


def _read(path: Path) -> str | None:
    """The file's text with its line ends unchanged; None for no file."""
    try:
        data = secret_files.read(path, MAX_FILE)
    except FileNotFoundError:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInputError(f"{path}, line {line}: not UTF-8, nothing was changed") from error


def apply(change: Change) -> None:
    """Make one planned change atomically. The first one keeps a backup of the operator's file. Raises BadInputError.

    A backup is never overwritten; it is removed once the file has the same content again.
    """
    if not change.is_needed:
        return
    try:
        if change.after is not None:
            _write(change, change.after)
            return
        change.path.unlink()
        if change.made_folder:
            with contextlib.suppress(OSError):  # not empty: another program uses it
                change.path.parent.rmdir()
    except OSError as error:
        raise BadInputError(f"cannot change {change.path}: {error.strerror}") from error


def _write(change: Change, after: str) -> None:
    change.path.parent.mkdir(parents=True, exist_ok=True)
    mode = change.path.stat().st_mode & 0o7777 if change.before is not None else 0o644
    restored = change.before is not None and _MARK.search(change.before) and not _MARK.search(after)
    if change.before is not None and not _MARK.search(change.before) and not change.backup.exists():
        _replace(change.backup, change.before, mode)
    _replace(change.path, after, mode)
    if restored and change.backup.exists() and change.backup.read_bytes() == after.encode():
        change.backup.unlink()


def _replace(path: Path, text: str, mode: int) -> None:
    """Readers see the old file or the new one, even after a power cut. The owner stays the same."""
    owner = path.stat() if path.exists() and os.geteuid() == 0 else None
    secret_files.replace(path, text.encode("utf-8"), mode)
    if owner:
        os.chown(path, owner.st_uid, owner.st_gid)


def config_path_advice(certs_dir: Path, config: Path = DEFAULT_CONFIG) -> str:
    """Advice on `config_path` in containerd's own configuration, which is read and never changed."""
    header = 'under [plugins."io.containerd.cri.v1.images".registry] (containerd 1.x: "io.containerd.grpc.v1.cri")'
    wanted = f'config_path = "{certs_dir}" {header}'
    text = _read(config)
    if text is None:
        return f"{config} does not exist: kubelet and crictl pull through the mirror once it has {wanted}"
    plugins = _parse(text, config).get("plugins", {})
    names = ("io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri")
    registries = [_table(_table(plugins, name), "registry") for name in names]
    paths = [str(registry["config_path"]) for registry in registries if registry.get("config_path")]
    if not paths:
        return f"{config} itself sets no config_path: kubelet and crictl pull through the mirror once it has {wanted}"
    if ":" in paths[0]:
        return f'{config}: config_path = "{paths[0]}" names several folders, which containerd 2.2 ignores: use {wanted}'
    if Path(paths[0]) != certs_dir:
        return f'{config}: config_path = "{paths[0]}" is another folder than {certs_dir}'
    return f"{config} reads {certs_dir}; no restart is needed"


def _table(parent: object, name: str) -> dict[str, object]:
    table = parent.get(name) if isinstance(parent, dict) else None
    return table if isinstance(table, dict) else {}

"""Odd and malformed requests to a mirror, generated from the grammar of clients' requests, and a check of its answers.

A connection carries a few whole requests; the last one may be mangled. The mirror must answer well-formed and in order,
with no 5xx except 501 and 505, with errors in the specification's form, and with exactly the bytes that it holds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import trio

WORKERS = 8
ANSWER_S = 60.0
"""Bounds the wait for answers. A later answer counts as a hang."""
MAX_WRONG = 20
"""Problems kept for the report."""
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*\r\n((?:[!-9;-~]+: [ -~]*\r\n)*)\r\n")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_CODE = re.compile(r"[A-Z_]+")
CLIENTS_FAULT = (501, 505)


@dataclass(frozen=True, slots=True)
class Content:
    """The content of the registry behind the mirror: `namespace` is its name; objects are by digest."""

    namespace: str
    repository: str
    tags: Sequence[str]
    manifests: Mapping[str, bytes]
    blobs: Mapping[str, bytes]

    @property
    def objects(self) -> Mapping[str, bytes]:
        return {**self.manifests, **self.blobs}


@dataclass(frozen=True, slots=True)
class Shot:
    """The bytes sent on a connection: whole requests, whose methods are `methods`, and mangled bytes at the end."""

    methods: tuple[str, ...]
    data: bytes
    mangled: bool
    """Whether mangled bytes follow. The mirror may read them as any number of requests."""


@dataclass(slots=True)
class Findings:
    """The answers by status. `wrong` has the first MAX_WRONG faults of the mirror, with the bytes that caused them."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def answers(self) -> int:
        """May be fewer than the requests: the mirror sends nothing after an answer that ends the connection."""
        return self.statuses.total()

    def add(self, shot: Shot, problem: str) -> None:
        if len(self.wrong) < MAX_WRONG:
            self.wrong.append(f"{problem}\n  for {shot.data[:1500]!r}")


class Grammar:
    """Random requests, the same for the same seed."""

    def __init__(self, seed: int, content: Content) -> None:
        self._rng = Random(seed)
        self._content = content

    def shot(self) -> Shot:
        rng = self._rng
        requests = [self._request() for _ in range(rng.randrange(1, 5))]
        mangled = rng.random() < 0.4
        if mangled:
            requests.append(("", self._mangle(self._request()[1])))
        methods = tuple(method for method, _ in requests[: len(requests) - mangled])
        return Shot(methods, b"".join(data for _, data in requests), mangled)

    # Whole requests

    def _request(self) -> tuple[str, bytes]:
        rng = self._rng
        method = self._method()
        headers = ["Host: x", *(self._header() for _ in range(rng.randrange(3)))]
        body = b""
        if rng.random() < 0.05:
            body = rng.randbytes(rng.randrange(1, 200))
            headers.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([f"{method} {self._target()} HTTP/1.1", *headers, "", ""])
        return method, head.encode("latin-1") + body

    def _method(self) -> str:
        rng = self._rng
        if rng.random() < 0.9:
            return rng.choice(["GET", "GET", "HEAD"])
        return rng.choice(["PUT", "POST", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "M-SEARCH"])

    def _target(self) -> str:
        rng = self._rng
        path = "/v2/" + self._name() + rng.choice(self._tails())()
        if rng.random() < 0.1:
            path = rng.choice(["/", "/v2", "/v2/", "/v2/_catalog", "*", "//v2/", "/v1/", "/metrics", "http://x" + path])
        path += self._query()
        return self._twist(path) if rng.random() < 0.2 else path

    def _name(self) -> str:
        rng, name = self._rng, self._content.repository
        odd = ["", "a" * 256, "a/" * 130 + "a", "A/b", "..", "a/../b", "a//b", "a%2Fb", "%2e%2e/a"]
        odd += ["_a", "a___b", "a%00b"]
        return rng.choice([*[name] * 20, f"{self._content.namespace}/{name}", "no/such", self._word(), *odd])

    def _tails(self) -> list[Callable[[], str]]:
        rng, tags = self._rng, self._content.tags
        odd = ["missing", ".x", "-", "a" * 129, "sha256:", "sha256:zz", "md5:00", self._word()]
        missing = ["sha256:" + "0" * 64, "sha512:" + "0" * 128]
        # Layers are not requested as manifests: docker-registry answers that with 500, which is not the mirror's fault.
        manifests = [*[*tags, *self._content.manifests] * 3, *missing, *odd]
        blobs = [*[*self._content.objects] * 3, *missing, *odd]
        return [
            lambda: f"/manifests/{rng.choice(manifests)}",
            lambda: f"/blobs/{rng.choice(blobs)}",
            lambda: f"/referrers/{rng.choice(blobs)}",
            lambda: rng.choice(["/tags/list", "/tags/list", "/tags/", "/tags/list/", "/blobs/uploads/", "/manifests"]),
        ]

    def _query(self) -> str:
        rng = self._rng
        fields = [f"ns={self._content.namespace}"] if rng.random() < 0.85 else []
        odd = [
            *("ns=", "ns=evil.example", "ns=127.0.0.1:22", "ns=%0d%0aX:y", f"ns={'a' * 5000}", "n=1", "n=0", "n=-1"),
            *("n=99999999999999999999", "n=x", "last=v", "last=%ff", f"last={'z' * 3000}", "artifactType=a/b", "&&=&="),
            *("artifactType=%F0%9F%90%8B", "x[]=1;y", "%", "%zz=%", "&".join(f"a{i}={i}" for i in range(40))),
        ]
        fields += [rng.choice(odd) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
        return "?" + "&".join(fields) if fields else ""

    def _header(self) -> str:
        rng = self._rng
        tag = f'"{rng.choice([*self._content.objects])}"'
        size = len(rng.choice([*self._content.objects.values()]))
        first, last = rng.randrange(size + 9), rng.randrange(size + 9)
        ranges = [f"{first}-{last}", f"{first}-", f"-{last}", "-0", "-", "9-1", "a-b", "0-0,-1", f"0-1,{first}-"]
        ranges += [",", "1-2,x"]
        ranges += [",".join(f"{start}-{start}" for start in range(rng.randrange(2, 400))), "9" * 30 + "-"]
        return rng.choice(
            [
                f"Range: bytes={rng.choice(ranges)}",
                f"Range: bytes={rng.choice(ranges)}",
                f"Range: {rng.choice(['items=0-1', 'bytes', 'bytes=', 'BYTES=0-1', 'bytes = 0-1'])}",
                f"If-Range: {rng.choice([tag, 'W/' + tag, 'x', 'Tue, 24 Nov 2026 10:00:00 GMT'])}",
                f"If-None-Match: {rng.choice([tag, 'W/' + tag, '*', ',,', tag + ', ' + tag])}",
                f"If-Match: {rng.choice([tag, 'W/' + tag, '*', ''])}",
                f"Accept: {rng.choice(['*/*', '', 'application/json', 'a' * 3000])}",
                f"Accept-Encoding: {rng.choice(['gzip', 'identity;q=0', 'br, zstd'])}",
                f"Authorization: {rng.choice(['Bearer x', 'Basic eDp5', 'Basic', 'é' * 10])}",
                "X-Odd: " + "".join(chr(rng.randrange(0x21, 0xFF)) for _ in range(20)),
            ]
        )

    def _word(self) -> str:
        alphabet = "abz019._-/:@%~+*&#[]{}|\\^`\"'<>"
        return "".join(self._rng.choice(alphabet) for _ in range(self._rng.randrange(1, 30)))

    def _twist(self, text: str) -> str:
        """Replace a character of a target, or write it in another way."""
        rng = self._rng
        at = rng.randrange(len(text))
        code = f"{ord(text[at]) & 255:02x}"
        other = [f"%{code}", f"%25{code}", "/", "//", "/./", "/../", "%", "%00", "?", ";"]
        return text[:at] + rng.choice(other) + text[at + 1 :]

    # Mangled requests

    def _mangle(self, data: bytes) -> bytes:
        rng = self._rng
        kind = rng.randrange(7)
        at = rng.randrange(len(data))
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        if kind == 2:
            return data[:at] + rng.randbytes(rng.randrange(1, 50)) + data[at:]
        if kind == 3:
            return rng.randbytes(rng.randrange(1, 300))
        if kind == 4:
            version = rng.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/11", b"ICAP/1.0", b""])
            return data.replace(b"HTTP/1.1", version, 1)
        lines = [b"Host: y", *(b"Content-Length: " + value for value in (b"-1", b"5, 6", b"9" * 20, b"7"))]
        lines += [b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", b"Expect: 100-continue"]
        lines += [b"Connection: upgrade\r\nUpgrade: h2c", b" folded", b"a b: c", b": x", b"no colon", b"X: \0"]
        line = rng.choice([*lines, b"X: " + b"y" * 40000])
        first, _, rest = data.partition(b"\r\n")
        chunks = rng.choice([b"", b"3\r\nabc\r\n0\r\n\r\n", b"zz\r\n", b"ffffffffffffffffff\r\n", b"0\r\n\r\n"])
        return first + b"\r\n" + line + b"\r\n" + rest + chunks


async def fire(host: str, port: int, grammar: Grammar, content: Content, answers: int) -> Findings:
    """Send requests on WORKERS connections at a time until `answers` have arrived, and return the findings."""
    findings = Findings()

    async def work() -> None:
        while findings.answers < answers:
            shot = grammar.shot()
            try:
                with trio.fail_after(ANSWER_S):
                    data = await _exchange(host, port, shot.data)
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                findings.add(shot, f"the connection broke: {error!r}")
                continue
            check(shot, data, content, findings)

    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(work)
    return findings


async def _exchange(host: str, port: int, data: bytes) -> bytes:
    """Send `data` and then FIN. Returns all bytes up to the server's FIN."""
    answer = bytearray()

    async def receive() -> None:
        async for part in stream:
            answer.extend(part)

    async with await trio.open_tcp_stream(host, port) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await stream.send_all(data)
        await stream.send_eof()
    return bytes(answer)


def check(shot: Shot, data: bytes, content: Content, findings: Findings) -> None:
    """Check all answers on a connection, and add them to `findings`."""
    answered, closed = 0, False
    while data:
        match = _HEAD.match(data)
        if not match or closed or (answered == len(shot.methods) and not shot.mangled):
            return findings.add(shot, f"not an answer, or an answer to no request: {data[:300]!r}")
        status, data = int(match[1]), data[match.end() :]
        findings.statuses[match[1].decode()] += 1
        if status == 100:
            continue
        method = shot.methods[answered] if answered < len(shot.methods) else ""
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in match[2].decode().splitlines())
        }
        bodiless = method == "HEAD" or status == 304 or (not method and data[:5] in (b"", b"HTTP/"))
        length = 0 if bodiless else int(headers["content-length"])
        body, data = data[:length], data[length:]
        problem = _wrong(status, headers, body, None if bodiless else content.objects)
        if len(body) != length:
            problem = f"the header promises {length} bytes"
        if problem:
            findings.add(shot, f"{status} {headers} {body[:300]!r}: {problem}")
        answered += 1
        closed = headers.get("connection") == "close"
    if answered < len(shot.methods) and not closed:
        findings.add(shot, f"{answered} answers to {len(shot.methods)} requests")
    return None


def _wrong(status: int, headers: Mapping[str, str], body: bytes, objects: Mapping[str, bytes] | None) -> str:
    """The fault of an answer, "" for none. `objects` is None for an answer without a body."""
    if status >= 500 and status not in CLIENTS_FAULT:
        return "a failure of the mirror itself"
    if objects is None:
        return ""
    if status >= 400:
        return "" if _is_error(body) else "not an error in the specification's form"
    return _wrong_bytes(status, headers, body, objects)


def _is_error(body: bytes) -> bool:
    try:
        return all(_CODE.fullmatch(error["code"]) and error["message"] for error in json.loads(body)["errors"])
    except (ValueError, KeyError, TypeError):
        return False


def _wrong_bytes(status: int, headers: Mapping[str, str], body: bytes, objects: Mapping[str, bytes]) -> str:
    name = headers.get("docker-content-digest")
    if name is None:
        return ""
    whole = objects[name]
    if status == 200:
        return "" if body == whole else f"not the bytes of {name}"
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if match:
        first, last, size = map(int, match.groups())
        return "" if (body, len(whole)) == (whole[first : last + 1], size) else f"not these bytes of {name}"
    boundary = headers["content-type"].partition("boundary=")[2].encode()
    parts = body.split(b"\r\n--" + boundary)
    ranges = [re.search(rb"Content-Range: bytes (\d+)-(\d+)/", part) for part in parts[1:-1]]
    expected = [whole[int(span[1]) : int(span[2]) + 1] for span in ranges if span]
    return "" if [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]] == expected else f"not these parts of {name}"

"""A registry that generates large blobs while it sends them: `python -m tests.support.generated_origin PORT`.

It serves `/v2/app/blobs/<digest>` for each of `digests()`, with HEAD and one range. `/asked` gives the number of
requested blob bytes. Nothing is stored. No two blocks are equal, so that a mixed-up block is always detected.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

REPOSITORY = "app"
COUNT = 8
BLOCK = 1 << 19
BLOCKS = 2048
SIZE = BLOCKS * BLOCK

_NOISE = memoryview(Random(1).randbytes(BLOCK))
_MARK = 16
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def _parts(blob: int, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes [start, stop) of a blob. Each block begins with a mark of its own, and has the same noise after it."""
    for index in range(start // BLOCK, -(-stop // BLOCK)):
        mark = memoryview(f"{blob:8d}{index:8d}".encode())
        first, last = max(0, start - index * BLOCK), min(BLOCK, stop - index * BLOCK)
        yield from (mark[first : min(last, _MARK)], _NOISE[max(first, _MARK) : last])


def _digest(blob: int) -> str:
    whole = hashlib.sha256()
    for part in _parts(blob, 0, SIZE):
        whole.update(part)
    return f"sha256:{whole.hexdigest()}"


def digests() -> list[str]:
    """The digests of all blobs. Takes some seconds: 8 GiB are hashed."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_digest, range(COUNT)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    blobs: dict[str, int]
    asked = 0

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._head(200 if self._blob() is not None else 404, SIZE)

    def do_GET(self) -> None:
        blob = self._blob()
        if self.path == "/asked":
            body = str(_Handler.asked).encode()
            self._head(200, len(body))
            self.wfile.write(body)
        elif blob is None:
            self._head(200 if self.path == "/v2/" else 404, 0)
        else:
            self._send(blob)

    def _blob(self) -> int | None:
        return self.blobs.get(self.path.removeprefix(f"/v2/{REPOSITORY}/blobs/"))

    def _send(self, blob: int) -> None:
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, SIZE)
        _Handler.asked += stop - start
        self._head(206 if match else 200, stop - start, f"bytes {start}-{stop - 1}/{SIZE}" if match else "")
        try:
            for part in _parts(blob, start, stop):
                self.connection.sendall(part)
        except ConnectionError:
            self.close_connection = True

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


def main() -> None:
    """Serve. Print the digests in one line once they are computed and the port answers."""
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler)
    names = digests()
    _Handler.blobs = {digest: blob for blob, digest in enumerate(names)}
    print(" ".join(names), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

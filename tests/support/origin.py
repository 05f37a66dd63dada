"""A read-only registry for one OCI layout: `python -m tests.support.origin PORT LAYOUT REPOSITORY TAG`.

It replaces docker-registry on machines without it, and serves manifests and blobs, HEAD and GET, and one range.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.image import INDEX, blob_path

CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    layout: Path
    repository: str
    tag: str

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Log nothing: the proxy in front counts the requests."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == "/v2/":
            return self._empty(200)
        kind, _, reference = path.removeprefix(f"/v2/{self.repository}/").partition("/")
        index = (self.layout / "index.json").read_bytes()
        if kind == "manifests" and reference == self.tag:
            return self._bytes(index, INDEX, with_body)
        if not _DIGEST.fullmatch(reference) or not (file := blob_path(self.layout, reference)).is_file():
            return self._empty(404)
        if kind == "manifests":
            data = file.read_bytes()
            return self._bytes(data, json.loads(data)["mediaType"], with_body)
        return self._file(file, reference, with_body)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _bytes(self, data: bytes, media_type: str, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _file(self, path: Path, digest: str, with_body: bool) -> None:
        size = path.stat().st_size
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        stop = min(size, int(match[2]) + 1) if match and match[2] else size
        if start >= size:
            return self._empty(416)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Docker-Content-Digest", digest)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if with_body:
            with path.open("rb") as file:
                file.seek(start)
                left = stop - start
                while left:
                    chunk = file.read(min(left, CHUNK))
                    self.wfile.write(chunk)
                    left -= len(chunk)
        return None


def main() -> None:
    port, layout, repository, tag = sys.argv[1:]
    handler = type("Handler", (_Handler,), {"layout": Path(layout), "repository": repository, "tag": tag})
    ThreadingHTTPServer(("127.0.0.1", int(port)), handler).serve_forever()


if __name__ == "__main__":
    main()

"""A registry that sends its clients elsewhere, and the place to which it sends them.

`python -m tests.support.redirector HOST PORT TARGET` answers requests for repository NAME with a redirect, or with a
challenge, that leads to NAME's entry in PLACES, at port TARGET. `python -m tests.support.redirector HOST PORT` is a
service that knows nothing of registries: it answers everything with SECRET, and prints each request.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [], "secret": 1}'
PLACES = {
    "loopback": "http://127.0.0.1:{port}/x",
    "loopback-8": "http://127.9.9.9:{port}/x",
    "localhost": "http://localhost:{port}/x",
    "decimal": "http://2130706433:{port}/x",
    "octal": "http://0177.0.0.1:{port}/x",
    "short": "http://127.1:{port}/x",
    "mapped": "http://[::ffff:127.0.0.1]:{port}/x",
    "loopback-6": "http://[::1]:{port}/x",
    "unspecified": "http://0.0.0.0:{port}/x",
    "link-local": "http://169.254.169.254:{port}/latest/meta-data",
    "chain": "/v2/loopback/{rest}",
    "scheme-less": "//127.0.0.1:{port}/x",
    "user": "http://registry@127.0.0.1:{port}/x",
    "file": "file:///etc/passwd",
}
CODES = (301, 302, 303, 307, 308)


class Redirector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target = 0

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/")
        if len(parts) < 4:
            return self._empty(200, {})
        name, rest = parts[2], "/".join(parts[3:])
        name, _, how = name.partition("_")
        place = PLACES[name].format(port=self.target, rest=rest)
        if how == "realm":
            return self._empty(401, {"WWW-Authenticate": f'Bearer realm="{place}",service="x"'})
        if how == "next":
            return self._empty(200, {"Link": f'<{place}>; rel="next"'}, b'{"name": "x", "tags": ["a"]}')
        return self._empty(CODES[sum(map(ord, rest)) % len(CODES)], {"Location": place})

    do_HEAD = do_GET

    def _empty(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Service(Redirector):
    def do_GET(self) -> None:
        print(self.command, self.path, flush=True)
        self._empty(200, {"Content-Type": "application/vnd.oci.image.index.v1+json"}, SECRET)

    do_HEAD = do_POST = do_GET


def main() -> None:
    host, port, *target = sys.argv[1:]
    handler = type("Handler", (Redirector,), {"target": int(target[0])}) if target else Service
    ThreadingHTTPServer((host, int(port)), handler).serve_forever()


if __name__ == "__main__":
    main()

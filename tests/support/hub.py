"""docker.io on loopback, for clients that cannot use another name for it: its hosts, its port 443, and a certificate.

`Hub.prefix` runs a program in a mount namespace of its own, in which docker.io's names have this proxy's address. No
request leaves this machine, and nothing is written to the machine's directories. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import random
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.proxy import CountingProxy

NAME, SERVER = "docker.io", "registry-1.docker.io"
NAMES = (NAME, SERVER, "index.docker.io", "auth.docker.io", "hub.docker.com")
HTTPS = 443
NAMESPACE = """\
mount --bind "$0" /etc/hosts
for place in /run /var/lib /dev/shm /etc/docker; do
    [ ! -d $place ] || mount -t tmpfs none $place
done
exec "$@"
"""
"""A shell script. Clients keep state in these places, and no option can move it."""


@dataclass(frozen=True, slots=True)
class Hub:
    """`proxy` counts the requests to docker.io itself, past all mirrors."""

    folder: Path
    proxy: CountingProxy

    @property
    def prefix(self) -> list[str]:
        """Words to put before a command, which then reaches this hub as docker.io. Its mounts end with the command."""
        return ["unshare", "--mount", "sh", "-euc", NAMESPACE, str(self.folder / "hosts")]

    @property
    def env(self) -> dict[str, str]:
        """An environment in which Go programs (crypto/x509) trust only this certificate's authority."""
        return {**os.environ, "SSL_CERT_FILE": str(self.folder / "hub.pem"), "SSL_CERT_DIR": str(self.folder / "none")}


@contextlib.contextmanager
def hub(folder: Path, host: str, port: int) -> Iterator[Hub]:
    """A hub that passes requests to docker.io on to `host:port`."""
    folder.mkdir(parents=True)
    address = ".".join(["127", *(str(random.randrange(1, 255)) for _ in range(3))])
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {' '.join(NAMES)}\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(folder / "hub.pem"))
    with CountingProxy(host, port, listen=address, port_here=HTTPS, tls=context) as proxy:
        yield Hub(folder, proxy)


def _certificate(path: Path) -> Path:
    """A key and a self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in NAMES]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path

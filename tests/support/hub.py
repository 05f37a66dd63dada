"""docker.io on loopback, for clients that know no other name for it: its hosts, its port 443, and a certificate.

`Hub.prefix` runs a program in a mount namespace of its own, where docker.io's names are this proxy's address, so that
nothing that it does can leave this machine, and where it writes to none of the machine's places. Needs root.
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
"""A script: in these places clients keep what no option moves elsewhere."""


@dataclass(frozen=True, slots=True)
class Hub:
    """`proxy` counts what comes to docker.io itself, past all mirrors."""

    folder: Path
    proxy: CountingProxy

    @property
    def prefix(self) -> list[str]:
        """Put before a command, docker.io is here for it; what it mounts is gone with it."""
        return ["unshare", "--mount", "sh", "-euc", NAMESPACE, str(self.folder / "hosts")]

    @property
    def env(self) -> dict[str, str]:
        """The environment, with the one authority that its certificate is from (Go, crypto/x509)."""
        return {**os.environ, "SSL_CERT_FILE": str(self.folder / "hub.pem"), "SSL_CERT_DIR": str(self.folder / "none")}


@contextlib.contextmanager
def hub(folder: Path, host: str, port: int) -> Iterator[Hub]:
    """docker.io is what answers at `host:port`."""
    folder.mkdir(parents=True)
    address = ".".join(["127", *(str(random.randrange(1, 255)) for _ in range(3))])
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {' '.join(NAMES)}\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(folder / "hub.pem"))
    with CountingProxy(host, port, listen=address, port_here=HTTPS, tls=context) as proxy:
        yield Hub(folder, proxy)


def _certificate(path: Path) -> Path:
    """Key and certificate, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in NAMES]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path

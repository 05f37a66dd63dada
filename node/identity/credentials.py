"""How this node belongs to its cluster: it holds the authority's key, or it joined, or it is a cluster of its own.

Use: docs/OPERATIONS.md, "Clusters". Format of `joined.json`: docs/FORMATS.md, "Joined".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from node.config.schema import Config, NodePart
from node.identity import certificates
from node.identity.certificates import Authority, Credentials
from node.identity.identity import Identity
from node.runtime import secret_files
from protocol.admission import cluster_id
from protocol.errors import UNDECODABLE, BadInputError, PeerMisbehavedError

log = logging.getLogger(__name__)

FILE_NAME = "joined.json"


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a join. Certificates are DER. `bootstrap` holds multiaddrs of the member that issued the first."""

    version: Literal[1] = 1
    certificate: bytes
    authority: bytes
    bootstrap: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        return certificates.subject_of(self.certificate).site


@dataclass(frozen=True, slots=True)
class Enrollment:
    """`authority` is None on a node that joined: it cannot admit others. `joined` is None on a node that did not."""

    credentials: Credentials
    authority: Authority | None
    site: str
    joined: Joined | None = None

    @property
    def bootstrap(self) -> tuple[str, ...]:
        """Multiaddrs to dial in addition to the configured ones."""
        return self.joined.bootstrap if self.joined else ()


def load_joined(data_dir: Path, identity: Identity) -> Joined | None:
    """None if the node never joined. Raises BadInputError for a file that is damaged or of another identity."""
    path = data_dir / FILE_NAME
    try:
        joined = msgspec.json.decode(secret_files.read(path), type=Joined)
        certificates.key_of_authority(joined.authority)
        peer = certificates.issued_by(joined.certificate, joined.authority)
    except FileNotFoundError:
        return None
    except (*UNDECODABLE, PeerMisbehavedError) as error:
        raise BadInputError(f"{path} is damaged ({error}): remove it and join again") from error
    if peer != identity.peer_id:
        raise BadInputError(f"{path} is for {peer}, and this node is {identity.peer_id}: remove it and join again")
    return joined


def save_joined(data_dir: Path, joined: Joined) -> None:
    """Write `joined.json`, and replace an earlier one. Raises BadInputError."""
    secret_files.replace(data_dir / FILE_NAME, msgspec.json.encode(joined) + b"\n", 0o644)


def enroll(config: Config, data_dir: Path, identity: Identity) -> Enrollment:
    """`cluster.open` or `cluster.key` goes before a join, and a join before a cluster of one. Raises BadInputError."""
    authority, joined = authority_and_join(config, data_dir, identity)
    if config.cluster.open:
        log.warning(
            "cluster.open: anyone that reaches this node's ports is a member, can read its cache and can alter the"
            " content that it serves. Use it in a lab only"
        )
    if authority is None and joined is not None:
        credentials = Credentials(identity, joined.certificate, joined.authority)
        return Enrollment(credentials, None, joined_site(config.node, joined.site), joined)
    authority = authority or certificates.own_authority(data_dir)
    credentials = Credentials.issued(authority, identity, config.node.name, config.node.site)
    return Enrollment(credentials, authority, config.node.site)


def authority_and_join(config: Config, data_dir: Path, identity: Identity) -> tuple[Authority | None, Joined | None]:
    """The configured authority and the result of a join; creates no file. Raises BadInputError."""
    joined = load_joined(data_dir, identity)
    authority = None
    if config.cluster.open:
        authority = certificates.open_authority()
    elif config.cluster.key:
        authority = certificates.load_authority(Path(config.cluster.key))
    if authority is not None and joined is not None and joined.authority != authority.der:
        raise BadInputError(
            f"{data_dir / FILE_NAME} is of the cluster {cluster_id(joined.authority).hex()[:16]}, but [cluster] is"
            f" configured for {authority.cluster.hex()[:16]}: remove one of them"
        )
    return authority, joined


def joined_site(part: NodePart, joined: str) -> str:
    """The site that the token is for. Raises BadInputError if the configuration names another."""
    if part.site not in (joined, NodePart().site):
        raise BadInputError(f'node.site = "{part.site}", but the token is for "{joined}": the two must be the same')
    return joined

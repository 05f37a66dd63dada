"""What p2pctl's cluster commands do themselves, without the daemon: with the authority's key, or in the data folder."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import trio

from node.config.quantities import Duration
from node.config.schema import Config
from node.identity.certificates import load_authority, subject_of
from node.identity.credentials import joined_site, save_joined
from node.identity.identity import load_or_create
from node.membership.join import join
from protocol import admission
from protocol.admission import Token, cluster_id
from protocol.errors import BadInputError

FOR_EVER = "none"


def invite(key: Path, site: str, expires: str, uses: int, lifetime: str) -> dict[str, str | int]:
    """A join token, and what it says. Raises BadInputError naming the option."""
    authority = load_authority(key)
    now = int(time.time())
    token = Token(
        authority.cluster,
        site,
        now,
        now + int(Duration.read("--expires", expires).seconds),
        uses,
        0 if lifetime == FOR_EVER else int(Duration.read("--lifetime", lifetime).seconds),
        secrets.token_bytes(admission.ID_BYTES),
    )
    _check(token)
    text = admission.make_token(token, authority.key.sign)
    return {"token": text, "subject": token.subject, "site": site, "expires": token.expires}


def _check(token: Token) -> None:
    if not admission.is_site(token.site):
        raise BadInputError(f"--site: 1 to {admission.MAX_SITE} printable characters")
    if not 0 <= token.uses <= admission.MAX_USES:
        raise BadInputError(f"--uses: from 1 to {admission.MAX_USES}, or 0 for any number")
    if token.lifetime and token.lifetime < admission.MIN_LIFETIME_S:
        raise BadInputError(f'--lifetime: at least 1d, for clocks are wrong by hours; or "{FOR_EVER}"')
    if not token.made < token.expires <= admission.MAX_TIME:
        raise BadInputError("--expires: at least 1s")


def revocation(key: Path, what: str) -> str:
    """The text of a revocation of a peer id or of a token, which may be given itself. Raises BadInputError."""
    authority = load_authority(key)
    subject = admission.read_token(what).subject if what.startswith(admission.TOKEN_PREFIX) else what
    made = admission.make_revocation(authority.cluster, subject, int(time.time()), authority.key.sign)
    return admission.revocation_text(made)


def join_cluster(config: Config, text: str, address: str) -> dict[str, str]:
    """Get this node a certificate, into its data folder, and tell what it says.

    Raises BadInputError, and UnavailableError where nothing came of it.
    """
    if config.cluster.key or config.cluster.open:
        raise BadInputError("this node's configuration has a [cluster] key or is open: it needs no token")
    joined_site(config.node, admission.read_token(text).site)
    return _as_owner(Path(config.node.data_dir), lambda: _join(config, text, address))


def _join(config: Config, text: str, address: str) -> dict[str, str]:
    data_dir = Path(config.node.data_dir)
    identity = load_or_create(data_dir)
    joined = trio.run(join, identity, text, address, config.node.name)
    save_joined(data_dir, joined)
    site, cluster = subject_of(joined.certificate).site, cluster_id(joined.authority).hex()
    return {"peer_id": identity.peer_id, "cluster": cluster, "site": site, "member": joined.bootstrap[0]}


def _as_owner(folder: Path, work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Root makes files in the daemon's folder as its owner, so that the daemon can read them."""
    if os.geteuid() == 0 and folder.exists():
        owner = folder.stat()
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    return work()

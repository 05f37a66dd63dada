"""The part of p2pctl's cluster commands that needs no daemon, only the authority's key or the data folder."""

from __future__ import annotations

import os
import secrets
import time
from functools import partial
from pathlib import Path

import trio

from node.config.quantities import Duration
from node.config.schema import Config
from node.identity.certificates import load_authority, subject_of
from node.identity.credentials import joined_site, save_joined
from node.identity.identity import load_or_create
from node.membership.libp2p import join
from protocol import admission
from protocol.errors import BadInputError

FOR_EVER = "none"


def invite(key: Path, *, site: str, expires: str, uses: int, lifetime: str) -> dict[str, str | int]:
    """A join token and its contents. Raises BadInputError naming the option."""
    authority = load_authority(key)
    now = int(time.time())
    token = admission.Token(
        cluster=authority.cluster,
        site=site,
        made=now,
        expires=now + int(Duration.read("--expires", expires).seconds),
        uses=uses,
        lifetime=0 if lifetime == FOR_EVER else int(Duration.read("--lifetime", lifetime).seconds),
        id=secrets.token_bytes(admission.ID_BYTES),
    )
    if not admission.is_site(site):
        raise BadInputError(f"--site: 1 to {admission.MAX_SITE} printable characters")
    if not 0 <= uses <= admission.MAX_USES:
        raise BadInputError(f"--uses: from 1 to {admission.MAX_USES}, or 0 for any number")
    if token.lifetime and token.lifetime < admission.MIN_LIFETIME_S:
        raise BadInputError(f'--lifetime: at least 1d, because clocks may be wrong by hours; or "{FOR_EVER}"')
    if not token.made < token.expires <= admission.MAX_TIME:
        raise BadInputError("--expires: at least 1s")
    text = admission.make_token(token, authority.key.sign)
    return {"token": text, "subject": token.subject, "site": site, "expires": token.expires}


def revocation(key: Path, text: str) -> str:
    """A signed revocation of `text`: a peer id, a token, or a token's name. Raises BadInputError."""
    authority = load_authority(key)
    subject = admission.read_token(text).subject if text.startswith(admission.TOKEN_PREFIX) else text
    made = admission.make_revocation(authority.cluster, subject, int(time.time()), authority.key.sign)
    return admission.revocation_text(made)


def join_cluster(config: Config, text: str, address: str) -> dict[str, str]:
    """Obtain a certificate for this node, save it in the data folder and return its contents.

    Raises BadInputError, or UnavailableError if no member issued a certificate.
    """
    if config.cluster.key or config.cluster.open:
        raise BadInputError("this node needs no token: its configuration has a [cluster] key or is open")
    joined_site(config.node, admission.read_token(text).site)
    data_dir = Path(config.node.data_dir)
    if os.geteuid() == 0 and data_dir.exists():
        owner = data_dir.stat()  # root writes the files as the folder's owner, so that the daemon can read them
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    identity = load_or_create(data_dir)
    joined = trio.run(partial(join, identity, text, address, name=config.node.name))
    save_joined(data_dir, joined)
    site, cluster = subject_of(joined.certificate).site, admission.cluster_id(joined.authority).hex()
    return {"peer_id": identity.peer_id, "cluster": cluster, "site": site, "member": joined.bootstrap[0]}

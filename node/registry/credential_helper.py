"""Credentials from docker's helper programs (`docker-credential-ecr-login`, `-gcr`, `-acr-env` ...).

Protocol: docker/docker-credential-helpers, "Development": `docker-credential-NAME get`, the registry on standard input,
JSON on standard output. The operator names the helper in docker's config.json. It is started without a shell, its time
and output are bounded, and its output is never logged or shown.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from functools import partial

import msgspec
import trio
from cachetools import TTLCache

from node.oci.challenges import Credentials
from protocol.errors import UNDECODABLE

log = logging.getLogger(__name__)

LIMIT_S = 10.0
"""Longest run: some helpers ask a cloud's service; a client waits for 25 s."""
MAX_OUTPUT = 64 << 10
KEPT_S = 300.0
"""How long an answer is used: the protocol has no field for an expiry."""
AGAIN_S = 10.0
"""Pause before a helper is started again after a failure, or after the registry refused its answer."""
MAX_KEPT = 64
NOT_FOUND = b"credentials not found in native keychain"
"""Helpers print this if they have no credentials for the registry. That is not a failure."""


class HelperError(Exception):
    """The helper returned no answer. The text names the helper and the cause, without any part of its output."""


class _Answer(msgspec.Struct):
    username: str = msgspec.field(name="Username")
    secret: str = msgspec.field(name="Secret")


class CredentialHelpers:
    """Asks the helpers and keeps their answers for KEPT_S."""

    def __init__(self) -> None:
        self._kept: TTLCache[tuple[str, str], tuple[float, Credentials | None]] = TTLCache(
            MAX_KEPT, KEPT_S, timer=trio.current_time
        )
        self._failed: TTLCache[tuple[str, str], str] = TTLCache(MAX_KEPT, AGAIN_S, timer=trio.current_time)

    async def get(self, name: str, registry: str, refused: str) -> Credentials | None:
        """None if the helper has none. `refused` is the last header that the registry refused. Raises HelperError."""
        key = name, registry
        if key in self._failed:
            raise HelperError(self._failed[key])
        at, kept = self._kept.get(key, (-KEPT_S, None))
        if trio.current_time() - at < (AGAIN_S if kept is None or kept.header == refused else KEPT_S):
            return kept
        try:
            answer = await _ask(name, registry)
        except HelperError as error:
            log.warning("%s", error)
            self._failed[key] = str(error)
            raise
        self._kept[key] = trio.current_time(), answer
        return answer


async def _ask(name: str, registry: str) -> Credentials | None:
    program = f"docker-credential-{name}"
    path = shutil.which(program)
    if path is None:
        raise HelperError(f"{program} is not in PATH")
    status, output = await _run(path, program, registry.encode())
    if status != 0:
        if NOT_FOUND in output:
            return None
        raise HelperError(f"{program} ended with status {status}")
    try:
        answer = msgspec.json.decode(output, type=_Answer)
    except UNDECODABLE:
        raise HelperError(f"{program} did not answer as credential helpers do") from None
    return Credentials(answer.username, answer.secret) if answer.username and answer.secret else None


async def _run(path: str, program: str, question: bytes) -> tuple[int | None, bytes]:
    """Exit status and output. The program is killed after LIMIT_S, or if its output is too long."""
    output = bytearray()
    with trio.move_on_after(LIMIT_S) as limit:
        try:
            async with trio.open_nursery() as nursery:
                pipes = {"stdin": question, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                start = partial(trio.run_process, [path, "get"], **pipes, check=False, deliver_cancel=_kill)
                process: trio.Process = await nursery.start(start)
                assert process.stdout is not None
                async for portion in process.stdout:
                    output += portion
                    if len(output) > MAX_OUTPUT:
                        nursery.cancel_scope.cancel()
        except* OSError as group:
            raise HelperError(f"{program} cannot be run: {type(group.exceptions[0]).__name__}") from None
    if limit.cancelled_caught:
        raise HelperError(f"{program} did not answer in {LIMIT_S:.0f} s")
    if len(output) > MAX_OUTPUT:
        raise HelperError(f"{program} printed more than {MAX_OUTPUT} bytes")
    return process.returncode, bytes(output)


async def _kill(process: trio.Process) -> None:
    process.kill()

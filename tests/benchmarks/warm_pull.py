"""A pull from a warm mirror, compared with the same pull from docker-registry: one client, in turns, medians.

`python -m tests.benchmarks.warm_pull [ROUNDS]`
"""

from __future__ import annotations

import shutil
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support import image as images
from tests.support import registry as registries
from tests.support.processes import scratch
from tests.support.pull import TOOLS, Pull, best_tool, verify
from tests.support.site import UPSTREAM, site

REPOSITORY, TAG = "demo/app", "v1"
ROUNDS = 7


def timed(start: Callable[[Path], Pull], folder: Path, image: images.Image) -> float:
    pull = start(folder)
    seconds = pull.wait()
    verify(pull.folder, image)
    shutil.rmtree(pull.folder)
    return seconds


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    tools = sorted({"built-in", best_tool()})
    table = Table("client", "registry s", "warm mirror s", "mirror / registry", title=f"medians of {rounds}")
    with scratch("shoal-bench-") as folder:
        wheels = images.tree(Path(sysconfig.get_path("purelib")), "opt/app", lambda path: path.suffix != ".pyc")
        image = images.build(folder / "image", [images.shell_root(), wheels, [("noise", images.noise(1, 40_000_000))]])
        with (
            registries.docker_registry(folder / "registry") as registry,
            site(folder / "site", registry.url, 1) as (node,),
        ):
            registries.push(registry, image, REPOSITORY, TAG)
            for tool in tools:

                def straight(into: Path, tool: str = tool) -> Pull:
                    return TOOLS[tool](registry.url, REPOSITORY, TAG, into)

                def mirror(into: Path, tool: str = tool) -> Pull:
                    return TOOLS[tool](node.mirror, f"{UPSTREAM}/{REPOSITORY}", TAG, into)

                timed(mirror, folder / "out", image)
                timed(straight, folder / "out", image)
                pairs = [
                    (timed(straight, folder / "out", image), timed(mirror, folder / "out", image))
                    for _ in range(rounds)
                ]
                direct, mirrored = (statistics.median(column) for column in zip(*pairs, strict=True))
                table.add_row(tool, f"{direct:.3f}", f"{mirrored:.3f}", f"{mirrored / direct:.2f}")
        Console().print(f"image of {image.size / 1e6:.0f} MB, everything on this machine", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Folders of this machine that no sandbox is shown: the run's, and those that have credentials."""

import os
from collections.abc import Sequence
from pathlib import Path

from k25_train.environments.sandboxes.base import SandboxError, SandboxSpec

_OF_THE_MACHINE = ("/proc", "/sys", "/dev", "/run", "/etc", "/root")


def check_folders(spec: SandboxSpec, secret: Sequence[Path]) -> None:
    """Raises SandboxError for folders that no sandbox may see.

    Args:
        spec: with its folders.
        secret: folders of which it sees nothing, neither within them nor around them.
    """
    home = Path.home().resolve()
    for within, folder in spec.folders.items():
        real = folder.resolve()
        if not os.path.isabs(within) or not real.is_dir():
            raise SandboxError(f"sandbox {spec.name} cannot show {folder} as {within}: no folder, or no path")
        places = [place.resolve() for place in (*secret, *map(Path, _OF_THE_MACHINE))]
        near = [
            place
            for place in (*places, home)
            if place.is_relative_to(real) or (real.is_relative_to(place) and place != home)
        ]
        if real.is_relative_to(home) and any(part.startswith(".") for part in real.relative_to(home).parts):
            near.append(home)
        if near:
            raise SandboxError(
                f"sandbox {spec.name} may not show {folder}: it has {near[0]}, or is in it. Copy what it "
                "needs to a folder of its own."
            )

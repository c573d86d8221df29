"""A file system that is soon full; needs root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    """Within: a file system of 64 KiB. Raises `CalledProcessError` where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room on a tiny disk."""
    with suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

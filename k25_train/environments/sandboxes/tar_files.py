"""Regular files of a tar that nobody trusts, in memory: nothing of it reaches a disk."""

import io
import tarfile
from pathlib import PurePosixPath

from k25_train.environments.sandboxes.base import SandboxError

_FILE_OVERHEAD = 256
"""Bytes that a file counts for beside its content, as in `session_init.py`."""


def files_of(content: bytes, max_bytes: int) -> dict[str, bytes]:
    """Path -> content of its regular files; links, devices and paths that lead elsewhere are left out.

    Raises ValueError for more bytes than that, SandboxError for what is no tar.
    """
    found: dict[str, bytes] = {}
    left = max_bytes
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not path.parts:
                    continue
                if member.isreg():
                    file = archive.extractfile(member)
                    found[str(path)] = file.read() if file else b""
                elif member.islnk() and (same := found.get(str(PurePosixPath(member.linkname)))) is not None:
                    # A second name of a file.
                    found[str(path)] = same
                else:
                    continue
                left -= len(found[str(path)]) + len(str(path)) + _FILE_OVERHEAD
                if left < 0:
                    raise ValueError(f"there are more files than {max_bytes} bytes hold")
    except tarfile.TarError as error:
        raise SandboxError(f"a sandbox hands over its files as no tar: {error}") from error
    return found

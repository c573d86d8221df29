"""Which code this is: the commit of a checkout, or what was recorded where there is no git, as in an image.

An image's build writes REVISION next to the code (`launch.revision`), with two lines: the revision, and a
digest of the code as it was then, by which later changes are noticed. Only the standard library is used,
since this also runs on nodes whose Python has nothing else.
"""

import hashlib
import subprocess
from pathlib import Path

from k25_train.errors import ConfigError

CODE = ("conf", "k25_train", "launch", "parallel")
"""Folders whose files make a run what it is."""
FILE = "REVISION"
CHANGED = ", with local changes"


def code_version(checkout: Path) -> str:
    """Commit of the code and whether there are local changes; why, if neither git nor a record tells."""
    if (checkout / FILE).is_file() and not (checkout / ".git").exists():
        return _recorded(checkout)
    head, status = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain")
    if head is None or status is None:
        return f"not a git checkout: {checkout}"
    return head + (CHANGED if status else "")


def _git(checkout: Path, *words: str) -> str | None:
    command = ["git", "-C", str(checkout), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def record(checkout: Path, revision: str) -> None:
    """Write REVISION. Raises `ConfigError` if the revision is empty or has several lines."""
    if not revision.strip() or len(revision.splitlines()) != 1:
        raise ConfigError(
            f"revision {revision!r}: must be one line, such as a commit; docker/build.sh gives it"
        )
    (checkout / FILE).write_text(f"{revision.strip()}\n{code_digest(checkout)}\n", encoding="utf-8")


def _recorded(checkout: Path) -> str:
    path = checkout / FILE
    try:
        revision, digest = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return f"unknown: {path} cannot be read ({error}): build the image again"
    same = digest == code_digest(checkout)
    return revision if same or revision.endswith(CHANGED) else revision + CHANGED


def code_digest(checkout: Path) -> str:
    """SHA-256 of names and contents of all files of the code, but what Python compiles from them."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(checkout).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    return f"sha256:{digest.hexdigest()}"

"""What a rank leaves for the torchrun that started it: the error that ended it, and that it was done.

torchrun gives each rank the path of a file for its error. In its folder `launch.agent` puts an empty file,
which a rank removes when its command is done: one that ends with status 0 but left it there ended too early.
Removing needs no room, so a full disk makes no failure of a rank that is done.

Standard library only.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k25_train.errors import DamagedCheckpointError, K25Error

RUNNING = "running"
"""The empty file's name."""
DETAILS = "k25"
"""Key of our part of the error's file; torchrun reads the others."""
MAX_CHARACTERS = 4000
"""Of a text that is kept."""
_OF_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Connection closed by remote peer",
    "Got completion from peer", "Broken pipe", "gloo/transport", "Timed out waiting",
    "a connection between ranks failed",
    "Watchdog caught collective operation timeout", "ncclRemoteError", "ncclSystemError",
)  # fmt: skip
"""Parts of texts about a connection to another rank; gloo names its source file."""


def error_file() -> Path | None:
    """Where torchrun expects the error of this process; None without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def is_done() -> None:
    """Note that this process's command is done."""
    if (file := error_file()) is not None:
        with contextlib.suppress(OSError):
            file.with_name(RUNNING).unlink(missing_ok=True)


def tell(text: str, error: BaseException, *, is_fault: bool) -> None:
    """Have torchrun end its report with the error instead of a link to its manual, and keep what it is.

    Args:
        text: what was printed.
        error: what ended the command.
        is_fault: whether it is an error of the code.
    """
    file = error_file()
    if file is None:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    kept = {
        "message": {"message": text, "extraInfo": details},
        DETAILS: facts_of(text, error, is_fault=is_fault),
    }
    # The error is on stderr, too.
    with contextlib.suppress(OSError):
        if not file.exists():
            scratch = file.with_name(f"{file.name}.{os.getpid()}")
            scratch.write_text(json.dumps(kept), encoding="utf-8")
            scratch.replace(file)


def facts_of(text: str, error: BaseException, *, is_fault: bool) -> dict[str, Any]:
    """What the error is, for whoever looks for the node to blame (`launch.blame.evidence.RankError`)."""
    causes = list(chain_of(error))
    system = [each for each in causes if isinstance(each, OSError) and each.errno]
    named = [each for each in causes if isinstance(each, K25Error)]
    code = next((each.code for each in named if each.code), "")
    path = next((str(each.filename) for each in system if each.filename), "")
    damaged = next((each for each in named if isinstance(each, DamagedCheckpointError)), None)
    raw = "\n".join(str(each) for each in causes if not isinstance(each, K25Error))
    return {
        "kind": type(error).__name__ if damaged is None else type(damaged).__name__,
        "text": text.partition(": ")[2][:MAX_CHARACTERS] or text[:MAX_CHARACTERS],
        "is_fault": is_fault,
        "is_shared": bool(getattr(error, "is_shared", False)),
        "is_of_peer": is_of_peer(text, causes),
        "code": code or next((errno.errorcode.get(each.errno or 0, "") for each in system), ""),
        "path": str(damaged.folder) if damaged else path,
        "instead": str(damaged.instead or "") if damaged else "",
        "raw": raw[:MAX_CHARACTERS],
        "of_ranks": next((list(found) for each in causes if (found := getattr(each, "of_ranks", ()))), []),
    }


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def is_of_peer(text: str, causes: list[BaseException]) -> bool:
    """Whether an error says that a connection to another rank failed, or that one did not come."""
    if any(
        f"{type(each).__module__}.{type(each).__name__}".startswith("torch.distributed.Dist")
        for each in causes
    ):
        return True
    told = "\n".join([text, *map(str, causes)])
    return any(words in told for words in _OF_PEER)

"""PREFIX.json next to PREFIX.bin: what `k25-data prepare` says of the tokens that it wrote."""

import json
from typing import Any

from k25_train.data.folder import MissingFileError
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

MADE_BY = "k25-data prepare"


def check_prepared(files: SourceFiles, name: str, tokenizer: Tokenizer) -> None:
    """Raise DataError if PREFIX.bin was prepared with another tokenizer, or is not whole.

    Tokens that something else made have no such file, or one of another kind, and are taken as they are.
    """
    facts = _facts(files, f"{name.removesuffix('.bin')}.json")
    if facts is None:
        return
    if facts.get("tokenizer_sha256") != tokenizer.sha256:
        raise DataError(
            f"{files.root}/{name}: was prepared with another tokenizer (SHA-256 "
            f"{str(facts.get('tokenizer_sha256'))[:12]}…, not {tokenizer.sha256[:12]}…): its ids would "
            "mean other words. Set data.tokenizer to that one, or prepare the texts again with this one."
        )
    num_bytes = files.folder.num_bytes(name)
    if facts.get("bin_bytes") != num_bytes:
        raise DataError(
            f"{files.root}/{name}: has {num_bytes} bytes, {facts.get('bin_bytes')} were prepared; it was cut "
            "short. Copy it again."
        )


def _facts(files: SourceFiles, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(files.folder.read(name))
    except (MissingFileError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("made_by") == MADE_BY else None

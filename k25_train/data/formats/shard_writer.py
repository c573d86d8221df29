"""Writing of shards: plain tar files of samples in native media formats.

Members follow WebDataset's naming: those with the same stem are one sample. `<key>.json` holds kind, source,
licence and the segments with their words; `<key>.<position>.<format>` holds a media file unchanged.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.index import IndexHeader, bytes_crc32, write_index
from k25_train.data.formats.records import FORMAT_VERSION, MediaSegment, SampleRecord, Segment, TextSegment
from k25_train.data.formats.sample_json import surrogate_in
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError

LONG_TEXT_TOKENS = 4096
"""Texts of more tokens are stored with the token counts of their parts."""
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_FORMAT = re.compile(r"[A-Za-z0-9]+")
_MAX_NAME_CHARACTERS = 100
"""Of a member in a plain tar file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """Text to be written; `num_tokens` as counted by the shard set's tokenizer, without special tokens."""

    text: str
    num_tokens: int
    loss: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPart:
    """A media file to be written unchanged; sizes as `frames.probe_media` reports them."""

    type: str
    """`image` or `video`."""
    data: bytes
    format: str
    width: int
    height: int
    num_frames: int = 1
    duration_s: float = 0.0
    frame_times: str = ""
    """Needed for a video."""


class ShardWriter:
    """Context manager that writes one shard `<name>.tar` and its `<name>.index.jsonl`.

    Both appear under their names only when the block ends without an error; equal calls give equal bytes.
    """

    def __init__(self, path: Path, tokenizer_sha256: str) -> None:
        """`path`: the `.tar` to write; `tokenizer_sha256`: of the tokenizer that counted the tokens."""
        self.path = path
        self.index_path = index_path(path)
        self.tokenizer_sha256 = tokenizer_sha256
        self._records: list[SampleRecord] = []
        self._keys: set[str] = set()
        self._partial_path = path.with_name(path.name + ".partial")

    def __enter__(self) -> Self:
        self._tar = tarfile.open(self._partial_path, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is not None:
            self._partial_path.unlink()
            return
        header = IndexHeader(
            format_version=FORMAT_VERSION,
            shard=self.path.name,
            shard_bytes=self._partial_path.stat().st_size,
            tokenizer_sha256=self.tokenizer_sha256,
            num_samples=len(self._records),
        )
        partial_index = self.index_path.with_name(self.index_path.name + ".partial")
        write_index(str(partial_index), header, self._records)
        self._partial_path.rename(self.path)
        partial_index.rename(self.index_path)

    def add(
        self, key: str, kind: str, source: str, licence: str, parts: Sequence[TextPart | MediaPart]
    ) -> SampleRecord:
        """Append one sample and return its record.

        Raises DataError if the key is used twice or has characters other than letters, digits, `_` and `-`
        (a dot would end the stem), if the kind is unknown, and for text with half of a surrogate pair, which
        readers would skip: only its writer knows what it should be.
        """
        if not _KEY.fullmatch(key) or key in self._keys:
            raise DataError(
                f"{self.path}: sample key {key!r} is taken or has characters other than [A-Za-z0-9_-]."
            )
        if kind not in SAMPLE_KINDS:
            raise DataError(
                f"{self.path}: sample {key!r} has kind {kind!r}, known kinds are {', '.join(SAMPLE_KINDS)}."
            )
        for part in parts:
            defect = surrogate_in(part.text) if isinstance(part, TextPart) else None
            if defect is not None:
                raise DataError(
                    f"{self.path}: a text of sample {key!r} has {defect}. Decode it with errors='replace', "
                    "or leave the sample out."
                )
        segments: list[Segment] = []
        segments_json: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, TextPart):
                segments.append(TextSegment(num_tokens=part.num_tokens, loss=part.loss))
                segments_json.append(self._describe(part))
            else:
                if not _FORMAT.fullmatch(part.format):
                    raise DataError(f"{self.path}: sample {key!r}: {part.format!r} is no file extension.")
                member = f"{len(segments)}.{part.format}"
                segments.append(self._add_media(f"{key}.{member}", part))
                segments_json.append({"type": part.type, "member": member})
        content = {"kind": kind, "source": source, "licence": licence, "segments": segments_json}
        data = json.dumps(content, ensure_ascii=False).encode()
        record = SampleRecord(
            shard=self.path.name,
            key=key,
            kind=kind,
            source=source,
            offset=self._add_member(f"{key}.json", data),
            num_bytes=len(data),
            crc32=bytes_crc32(data),
            segments=tuple(segments),
        )
        self._keys.add(key)
        self._records.append(record)
        return record

    def _describe(self, part: TextPart) -> dict[str, Any]:
        content: dict[str, Any] = {"type": "text", "text": part.text, "loss": part.loss}
        # Readers of a long text then encode the parts that they need; without these they find out themselves.
        if part.num_tokens > LONG_TEXT_TOKENS and self._tokenizer is not None:
            content["part_tokens"] = self._tokenizer.part_tokens(part.text)
        return content

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """The tokenizer that counted the tokens, if it is next to the shard."""
        for path in sorted([*self.path.parent.glob("*.json"), *self.path.parent.glob("*.model")]):
            if hashlib.sha256(path.read_bytes()).hexdigest() == self.tokenizer_sha256:
                return load_tokenizer(path)
        return None

    def _add_media(self, name: str, part: MediaPart) -> MediaSegment:
        return MediaSegment(
            type=part.type,
            shard=self.path.name,
            offset=self._add_member(name, part.data),
            num_bytes=len(part.data),
            format=part.format,
            width=part.width,
            height=part.height,
            num_frames=part.num_frames,
            duration_s=part.duration_s,
            frame_times=part.frame_times,
            crc32=bytes_crc32(part.data),
        )

    def _add_member(self, name: str, data: bytes) -> int:
        if len(name) > _MAX_NAME_CHARACTERS:
            raise DataError(
                f"{self.path}: member {name!r} has more than {_MAX_NAME_CHARACTERS} characters. Shorten its "
                "key."
            )
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded_size = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded_size


def index_path(shard_path: Path) -> Path:
    """`<name>.index.jsonl` next to `<name>.tar`."""
    return shard_path.with_name(shard_path.stem + ".index.jsonl")

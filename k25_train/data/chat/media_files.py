"""Images and videos of conversations: where they are, and their sizes.

A conversation names them relative to its own file, by a URL below the source's folder, or has them in it as
`data:` URIs. Then their place is that of the Base64 text in the line, which `embedded` turns into bytes.
"""

import base64
import binascii
import posixpath
import re
from urllib.parse import unquote

from k25_train.data.chat.messages import MediaPart
from k25_train.data.decode.frames import MediaInfo, probe_media
from k25_train.data.folder import DataFolder, MissingFileError
from k25_train.data.formats.index import bytes_crc32
from k25_train.data.formats.records import MediaSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""What files with conversations end in; no image or video does."""
_DATA_URI = re.compile(r"data:[a-z]+/([a-z0-9.+-]+)(?:;[^,;]+)*;base64,", re.IGNORECASE)
_FORMATS = {"jpeg": "jpg", "quicktime": "mov", "x-matroska": "mkv", "x-msvideo": "avi", "svg+xml": "svg"}
_CACHED_FILES = 1024
"""Files whose sizes are remembered: conversations about the same image often follow one another."""


class MediaFiles:
    """Finds the media of one source."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], MediaSegment] = {}

    def find(self, part: MediaPart, shard: str, line: bytes, offset: int) -> MediaSegment:
        """The segment of a part of the conversation in `line`, which is at `offset` of `shard`.

        Raises SampleError, with the reason alone: no such file, outside of the folder, or it does not decode.
        """
        if part.url[:5].lower() == "data:":
            return self._embedded(part, shard, line, offset)
        name = self._name(part, shard)
        key = (part.type, name)
        if key not in self._known:
            if len(self._known) >= _CACHED_FILES:
                self._known.clear()
            try:
                data = self._folder.read(self._folder.check_name(name))
            except MissingFileError as error:
                raise SampleError(f"its {part.type} {part.url} is not there ({name})") from error
            except DataError as error:
                raise SampleError(f"its {part.type} {part.url} cannot be used: {error}") from error
            suffix = posixpath.splitext(name)[1].removeprefix(".").lower()
            self._known[key] = _segment(part.type, data, suffix, part.url, name, 0, len(data))
        return self._known[key]

    def _name(self, part: MediaPart, shard: str) -> str:
        """Name of a file in the source's folder."""
        root = self._folder.directory.rstrip("/")
        url = unquote(part.url.removeprefix("file://")) if part.url.startswith("file://") else part.url
        if url.startswith(f"{root}/"):
            return posixpath.normpath(url[len(root) + 1 :])
        name = posixpath.normpath(posixpath.join(posixpath.dirname(shard), url))
        if "://" in url or name.startswith(("/", "../")):
            raise SampleError(
                f"its {part.type} {part.url} is outside of the source's folder {root}; copy it there, or "
                "begin the source's path further up, as in FOLDER/{annotations}/*.jsonl"
            )
        return name

    def _embedded(self, part: MediaPart, shard: str, line: bytes, offset: int) -> MediaSegment:
        match = _DATA_URI.match(part.url)
        if match is None:
            raise SampleError(f"its {part.type} is a data: URI without Base64 ({part.url[:40]}…)")
        text = part.url[match.end() :].encode()
        # JSON may have the slashes escaped.
        written = next((each for each in (text, text.replace(b"/", b"\\/")) if each and each in line), None)
        if written is None:
            raise SampleError(
                f"its {part.type} is a data: URI that is empty, or escaped otherwise than `\\/`"
            )
        name = match[1].lower()
        return _segment(
            part.type,
            embedded(written),
            _FORMATS.get(name, name.removeprefix("x-")),
            f"at byte {offset + line.index(written)} of {shard}",
            shard,
            offset + line.index(written),
            len(written),
        )


def embedded(written: bytes) -> bytes:
    """The file that a line of JSON has as Base64. Raises SampleError, with the reason alone."""
    try:
        return base64.b64decode(written.replace(b"\\/", b"/"), validate=True)
    except binascii.Error as error:
        raise SampleError(f"has a data: URI that is not Base64 ({error})") from error


def _segment(
    kind: str, data: bytes, file_format: str, what: str, shard: str, offset: int, num_bytes: int
) -> MediaSegment:
    try:
        info: MediaInfo = probe_media(data, kind, file_format)
    except DataError as error:
        raise SampleError(f"its {kind} {what} {error}") from error
    return MediaSegment(
        type=kind,
        shard=shard,
        offset=offset,
        num_bytes=num_bytes,
        format=file_format,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
        frame_times=info.frame_times,
        crc32=bytes_crc32(data),
    )

"""Tar shards of any members, as other programs write them, and what an index makes of them."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from k25_train.data.folder import DataFolder
from k25_train.data.formats.records import SampleRecord
from k25_train.data.tar.indexer import TarIndexer
from k25_train.data.tar.layouts import Layout, StemLayout
from k25_train.data.tar.members import ReadAhead, Skip
from k25_train.data.tokenizer import Tokenizer
from tests.helpers.media_files import image_bytes
from tests.helpers.tiny_shards import make_picture

Content = bytes | str | Mapping[str, object] | list[object]


def picture(width: int = 40, height: int = 30, file_format: str = "JPEG", seed: int = 0) -> bytes:
    """An image file."""
    return image_bytes(make_picture(width, height, seed), file_format)


def tar_bytes(members: Iterable[tuple[str, Content]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file; content that is no bytes is UTF-8 or JSON."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def indexed(
    path: Path, tokenizer: Tokenizer, layout: Layout | None = None
) -> tuple[list[SampleRecord], list[Skip]]:
    """Samples of a shard, and what is left out of it."""
    folder = DataFolder(str(path.parent))
    num_bytes = folder.num_bytes(path.name)
    ahead = ReadAhead(lambda offset, count: folder.read_range(path.name, offset, count), num_bytes)
    found = list(TarIndexer(path.name, ahead.read, num_bytes, layout or StemLayout(), tokenizer))
    records = [each for each in found if isinstance(each, SampleRecord)]
    return records, [each for each in found if isinstance(each, Skip)]

"""Sources of a tiny shard set, made here instead of read from packages, and the set built from them."""

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from k25_train.data.smoke_set.build import BuildOptions, build_dataset
from k25_train.data.smoke_set.sources.base import Archives, Media, Sample, Source, Text
from k25_train.data.smoke_set.sources.clips import gif_of

NUM_DOCUMENTS = 60
NUM_CAPTIONS = 80
VOCAB_SIZE = 320


def png(width: int, height: int, shade: int) -> bytes:
    """A plain PNG."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 255 - shade, 128)).save(out, "png")
    return out.getvalue()


def _documents(archives: Archives) -> Iterator[Sample]:
    for i in range(NUM_DOCUMENTS):
        text = f"Document number {i} tells of things, of {i * 37} things, and of other documents.\n" * 3
        yield Sample(key=f"doc-{i}", group=f"doc {i}", kind="text", source="docs", parts=(Text(text=text),))


def _captions(archives: Archives) -> Iterator[Sample]:
    for i in range(NUM_CAPTIONS):
        image = Media(type="image", data=png(20 + i, 30 + i % 7, i), format="png")
        parts = (image, Text(text=f"a square of shade {i}"))
        # Two pictures a group, as near-duplicates are.
        yield Sample(key=f"image-{i}", group=f"image {i // 2}", kind="caption", source="images", parts=parts)


def _clips(archives: Archives) -> Iterator[Sample]:
    for i in range(12):
        frames = [Image.new("RGB", (32, 24), (20 * k, i, 0)) for k in range(8)]
        clip = Media(type="video", data=gif_of(frames), format="gif")
        yield Sample(
            key=f"clip-{i}",
            group=f"clip {i}",
            kind="video",
            source="clips",
            parts=(clip, Text(text="a growing red")),
        )


TINY_SOURCES = tuple(
    Source(name=name, archives=(), licence="CC0-1.0", attribution="Made by a test.", samples=samples)
    for name, samples in (("docs", _documents), ("images", _captions), ("clips", _clips))
)


def build_tiny(out: Path, vocab_size: int = VOCAB_SIZE, force: bool = False) -> bool:
    """Build the tiny set at `out`; returns whether it was built."""
    options = BuildOptions(out=out, downloads=out.parent / "downloads", vocab_size=vocab_size, force=force)
    return build_dataset(options, lambda line: None, TINY_SOURCES)

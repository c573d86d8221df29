"""Splits of the smoke set: which samples are held out, and their shards."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from k25_train.data.decode.frames import probe_media
from k25_train.data.formats.shard_writer import MediaPart, ShardWriter, TextPart
from k25_train.data.smoke_set.sources.base import Media, Sample, Text
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

SPLITS = ("train", "heldout")
SPLIT_SALT = "d"
"""Chosen so that every source has samples on both sides."""
HELDOUT_FRACTION = {"text": 0.05, "caption": 0.05, "ocr": 0.05, "video": 0.15}
"""Share of the groups held out. Text and pages are equal since a page is held out with the text it shows."""
MAX_SHARD_BYTES = 16 * 2**20


def split_of(sample: Sample) -> str:
    """`train` or `heldout`, fixed by the sample's group alone."""
    return split_of_group(sample.group, HELDOUT_FRACTION[sample.kind])


def split_of_group(group: str, heldout: float) -> str:
    """The split of a group, of which a share is held out."""
    digest = hashlib.sha256(f"{SPLIT_SALT} {group}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "heldout" if share < heldout else "train"


def write_split(
    folder: Path, split: str, samples: Sequence[Sample], tokenizer: Tokenizer, licences: dict[str, str]
) -> list[str]:
    """Write the shards of a split and return their names."""
    names = []
    for number, members in enumerate(_chunks_of_bytes(samples, MAX_SHARD_BYTES)):
        name = f"{split}-{number:05d}.tar"
        texts = [part.text for sample in members for part in sample.parts if isinstance(part, Text)]
        counts = (len(ids) for ids in tokenizer.encode_batch(texts))
        with ShardWriter(folder / name, tokenizer.sha256) as writer:
            for sample in members:
                parts = [
                    TextPart(text=part.text, num_tokens=next(counts))
                    if isinstance(part, Text)
                    else _probed(sample, part)
                    for part in sample.parts
                ]
                writer.add(sample.key, sample.kind, sample.source, licences[sample.source], parts)
        names.append(name)
    return names


def _chunks_of_bytes(samples: Sequence[Sample], max_bytes: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    chunk_bytes = 0
    for sample in samples:
        sample_bytes = sum(
            len(part.data) if isinstance(part, Media) else len(part.text.encode()) for part in sample.parts
        )
        if chunk and chunk_bytes + sample_bytes > max_bytes:
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(sample)
        chunk_bytes += sample_bytes
    if chunk:
        yield chunk


def _probed(sample: Sample, media: Media) -> MediaPart:
    try:
        info = probe_media(media.data, media.type, media.format)
    except DataError as error:
        raise DataError(f"sample {sample.key} of {sample.source}: {media.type} {error}") from error
    return MediaPart(
        type=media.type,
        data=media.data,
        format=media.format,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
        frame_times=info.frame_times,
    )

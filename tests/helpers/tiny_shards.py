"""Tiny shard sets from generated files, written in about a second, for tests that need real input."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from PIL import Image

from k25_train.config.basics import DType
from k25_train.config.batches import BatchRampConfig
from k25_train.config.data import AugmentConfig, DataConfig, Decoder, ReadIn
from k25_train.config.training import TrainConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.batch import Reads
from k25_train.data.decode.frames import MediaInfo, probe_media
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.dataset import Dataset, SourceInfo, write_manifest
from k25_train.data.formats.reader import WordsReader
from k25_train.data.formats.shard_writer import MediaPart, ShardWriter, TextPart
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.mix.windows import Selection
from k25_train.data.source_items import RecordItems
from k25_train.data.sources import OpenSource
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.helpers.smoke_mix import shard_sources

_TEXT = (
    "the red green blue small large round square picture shows one two three shapes near far left right of "
    "a model learns from words and images while every process keeps its share under over between light dark"
)
WORDS = _TEXT.split()
VOCAB_SIZE = 320
IMAGE_FORMATS = ("png", "jpg", "webp", "gif")
VIDEO_FORMATS = ("mp4", "gif", "webp", "png")
_PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


@dataclass(frozen=True, slots=True)
class Media:
    """A media file for a sample; `info` replaces the sizes found by decoding it, for files that do not."""

    type: str
    format: str
    data: bytes
    info: MediaInfo | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample for `write_shard_set`; texts in `parts` are training targets, those in `Prompt` are not."""

    key: str
    kind: str
    parts: Sequence["str | Prompt | Media"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text without loss."""

    text: str


def make_text(num_words: int, seed: int) -> str:
    """Words drawn from a small list."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def make_picture(width: int, height: int, seed: int) -> Image.Image:
    """A coarse coloured mosaic, so that lossy formats keep its look."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def encode_image(image: Image.Image, file_format: str) -> bytes:
    """The image as a file of one of `IMAGE_FORMATS`."""
    buffer = io.BytesIO()
    image.save(buffer, _PILLOW_NAMES[file_format])
    return buffer.getvalue()


def make_image(width: int, height: int, file_format: str, seed: int) -> Media:
    """A generated image file."""
    return Media("image", file_format, encode_image(make_picture(width, height, seed), file_format))


def make_video(width: int, height: int, file_format: str, num_frames: int, fps: int, seed: int) -> Media:
    """A generated video file in one of `VIDEO_FORMATS` (png: an animated PNG)."""
    frames = [make_picture(width, height, seed + i) for i in range(num_frames)]
    buffer = io.BytesIO()
    if file_format == "mp4":
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
    else:
        frames[0].save(
            buffer,
            _PILLOW_NAMES[file_format],
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
        )
    return Media("video", file_format, buffer.getvalue())


def write_shard_set(
    directory: Path,
    splits: dict[str, Sequence[Sample]],
    samples_per_shard: int = 16,
    *,
    chat_tokens: bool = False,
) -> Path:
    """Write a complete shard set with a tokenizer trained on its texts; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer_path = directory / "tokenizer.json"
    train_tokenizer(
        [make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tokenizer_path, chat_tokens=chat_tokens
    )
    tokenizer = load_tokenizer(tokenizer_path)
    shards: dict[str, list[str]] = {}
    for split, samples in splits.items():
        shards[split] = []
        for first in range(0, len(samples), samples_per_shard):
            name = f"{split}-{first // samples_per_shard:05d}.tar"
            with ShardWriter(directory / name, tokenizer.sha256) as writer:
                for sample in samples[first : first + samples_per_shard]:
                    parts = [_to_part(part, tokenizer) for part in sample.parts]
                    writer.add(sample.key, sample.kind, "generated", "CC0-1.0", parts)
            shards[split].append(name)
    num_samples = sum(len(samples) for samples in splits.values())
    source = SourceInfo(
        name="generated", version="1", registry="none", licence="CC0-1.0", files=0, samples=num_samples
    )
    write_manifest(directory, "tokenizer.json", shards, [source])
    return directory


def write_tiny_shard_set(directory: Path) -> Path:
    """Texts, captions, OCR pages and videos of many sizes and formats, for training and held out."""
    return write_shard_set(
        directory, {"train": tiny_samples(12, seed=0), "heldout": tiny_samples(6, seed=1000)}
    )


def tiny_samples(num_of_each: int, seed: int) -> list[Sample]:
    """`num_of_each` samples of every kind, lengths suited to sequences of 128 tokens and the tiny limits."""
    rng = random.Random(seed)
    samples = []
    for i in range(num_of_each):
        item_seed = seed + 10 * i
        samples.append(Sample(f"text-{i}", "text", [make_text(rng.randint(5, 300), item_seed)]))
        size = (rng.randint(10, 200), rng.randint(10, 200))
        image = make_image(*size, IMAGE_FORMATS[i % 4], item_seed)
        samples.append(
            Sample(f"caption-{i}", "caption", [image, make_text(rng.randint(3, 12), item_seed + 1)])
        )
        page = make_image(rng.randint(60, 120), 40, "png", item_seed + 2)
        parts = [Prompt("read the words"), page, make_text(8, item_seed + 3)]
        samples.append(Sample(f"ocr-{i}", "ocr", parts))
        num_frames = rng.randint(8, 14)
        video = make_video(64, 48, VIDEO_FORMATS[i % 4], num_frames, 4, item_seed + 4)
        samples.append(Sample(f"video-{i}", "video", [video, make_text(5, item_seed + 5)]))
    return samples


def tiny_vision_config() -> VisionConfig:
    """The checkpoint's patch geometry with limits and widths for a test."""
    return VisionConfig(
        patch_size=14,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        pos_emb_height=16,
        pos_emb_width=16,
        pos_emb_time=4,
        merge_size=2,
        rope_theta=10000.0,
        rope_max_grid=512,
        layer_norm_eps=1e-5,
        image_patch_limit=64,
        side_patch_limit=32,
        frame_patch_limit=16,
        video_fps=2.0,
    )


def tiny_data_config(directory: Path) -> DataConfig:
    """All four kinds; no bad sample is put up with."""
    return DataConfig(
        dir=str(directory),
        tokenizer=None,
        sources=shard_sources(text=0.4, caption=0.3, ocr=0.1, video=0.2),
        vision_ratio=None,
        zero_vision=False,
        schedule={},
        shuffle=True,
        limit_samples=None,
        max_skipped_samples=0,
        prefetch_steps=0,
        read_in=ReadIn.thread,
        workers=0,
        decoder=Decoder.pillow,
        augment=AugmentConfig(crop=0.0, flip=0.0, colour=0.0),
        read_timeout_s=60.0,
        cache_dir=None,
        cache_gib=1.0,
        requests_per_s=None,
    )


def tiny_train_config() -> TrainConfig:
    """Eight sequences of 128 tokens a step."""
    return TrainConfig(
        steps=100,
        tokens=None,
        batch_ramp=BatchRampConfig(start=None, increment=1, length=0),
        seq_len=128,
        global_batch_size=8,
        micro_batch_size=2,
        seed=7,
        dtype=DType.float32,
        eval_interval=10,
        eval_sequences=8,
        transformer_engine=False,
        deterministic=False,
        stall_timeout_s=60.0,
        trace_step=None,
    )


def _to_part(part: str | Prompt | Media, tokenizer: Tokenizer) -> TextPart | MediaPart:
    if isinstance(part, Media):
        info = part.info or probe_media(part.data, part.type, part.format)
        return MediaPart(
            type=part.type,
            data=part.data,
            format=part.format,
            width=info.width,
            height=info.height,
            num_frames=info.num_frames,
            duration_s=info.duration_s,
            frame_times=info.frame_times,
        )
    text = part.text if isinstance(part, Prompt) else part
    return TextPart(text=text, num_tokens=len(tokenizer.encode(text)), loss=isinstance(part, str))


def all_words(*, with_pixels: bool) -> Reads:
    """What a rank reads that holds the whole pipeline."""
    return Reads(tokens=True, labels=True, pixels=with_pixels)


def words_reader(dataset: Dataset, tokenizer: Tokenizer) -> WordsReader:
    """What reads the samples of a shard set."""
    return WordsReader(dataset.reader, dataset.reader.read_words, tokenizer)


def open_source_of(dataset: Dataset, documents: DocumentBuilder, media: MediaReader) -> OpenSource:
    """A source of all training samples of a shard set."""
    items = RecordItems(dataset.splits["train"])
    return OpenSource(
        name="all", place=dataset.directory, documents=documents, media_reader=media, stays_whole=True,
        num_frame_tokens=2, training=items, heldout=items, selection=Selection(len(items.records), 0),
        reader=documents._reader,
    )  # fmt: skip

"""Shows what a shard set holds: a table, samples to read, a contact sheet of images with their captions."""

import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.dataset import Dataset
from k25_train.data.formats.records import MediaSegment, SampleRecord

SIDES_PX = (0, 64, 128, 256, 512, 1024)
"""Lower bounds of the size classes: the longer side of an image or frame."""
CELL_PX = 200
CAPTION_PX = 66
COLUMNS = 6
FRAMES_SHOWN = 3
SHEET_WIDTH_CHARACTERS = 34


def print_tables(dataset: Dataset, console: Console) -> None:
    """Per split and kind the samples, tokens, images and videos; the sizes of media; sources and licences."""
    table = _table(dataset.directory)
    for name in ("split", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("samples", "tokens", "longest", "images", "videos", "frames", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, records in dataset.splits.items():
        for kind in SAMPLE_KINDS:
            table.add_row(*_row(split, kind, [record for record in records if record.kind == kind]))
        table.add_section()
    console.print(table)
    console.print(_sizes_table([m for records in dataset.splits.values() for r in records for m in r.media]))
    sources = _table("Sources")
    for name in ("source", "samples", "packages", "licence"):
        sources.add_column(name)
    for source in dataset.sources:
        sources.add_row(source.name, f"{source.samples:,}", source.version, source.licence)
    console.print(sources)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _row(split: str, kind: str, records: Sequence[SampleRecord]) -> list[str]:
    media = [m for record in records for m in record.media]
    videos = [m for m in media if m.type == "video"]
    tokens = [record.num_text_tokens for record in records]
    return [
        split,
        kind,
        f"{len(records):,}",
        f"{sum(tokens):,}",
        f"{max(tokens, default=0):,}",
        f"{len(media) - len(videos):,}",
        f"{len(videos):,}",
        f"{sum(m.num_frames for m in videos):,}",
        f"{sum(m.num_bytes for m in media) / 1e6:.1f}",
    ]


def _sizes_table(media: Sequence[MediaSegment]) -> Table:
    sides = Counter(max(bound for bound in SIDES_PX if bound <= max(m.width, m.height)) for m in media)
    table = _table("Longer side of images and frames, pixels")
    table.add_column("from")
    table.add_column("media", justify="right")
    table.add_column("")
    most = max(sides.values(), default=1)
    for bound in SIDES_PX:
        table.add_row(str(bound), f"{sides[bound]:,}", "█" * round(30 * sides[bound] / most))
    table.caption = f"{len({(m.width, m.height) for m in media}):,} different sizes"
    return table


def print_samples(dataset: Dataset, console: Console, num_samples: int, kind: str | None) -> None:
    """Write out the first samples of each split, one line per image or video."""
    for split, records in dataset.splits.items():
        for record in [r for r in records if kind in (None, r.kind)][:num_samples]:
            console.rule(f"{split} · {record.kind} · {record.source} · {record.key}", align="left")
            for segment, text in zip(record.segments, dataset.reader.read_texts(record), strict=True):
                console.print(_segment_line(segment) if isinstance(segment, MediaSegment) else escape(text))


def _segment_line(media: MediaSegment) -> str:
    size = f"{media.width}x{media.height} {media.format}, {media.num_bytes:,} bytes"
    length = f", {media.num_frames} frames, {media.duration_s:.1f} s" if media.type == "video" else ""
    return f"[bold]<{media.type} {size}{length}>[/bold]"


def write_contact_sheet(dataset: Dataset, path: Path, num_samples: int, kind: str | None) -> None:
    """Write a PNG of media with their captions, samples taken evenly from the whole set."""
    records = [r for split in dataset.splits.values() for r in split if r.media and kind in (None, r.kind)]
    step = max(1, len(records) // num_samples)
    chosen = records[::step][:num_samples]
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL_PX, rows * (CELL_PX + CAPTION_PX)), "#dddddd")
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 10)
    draw = ImageDraw.Draw(sheet)
    for number, record in enumerate(chosen):
        x, y = number % COLUMNS * CELL_PX, number // COLUMNS * (CELL_PX + CAPTION_PX)
        cell = _thumbnail(dataset, record)
        sheet.paste(cell, (x + (CELL_PX - cell.width) // 2, y + (CELL_PX - cell.height) // 2))
        caption = " ".join("".join(dataset.reader.read_texts(record)).split())
        lines = textwrap.wrap(caption, SHEET_WIDTH_CHARACTERS)[:5]
        draw.text((x + 4, y + CELL_PX + 2), "\n".join(lines), fill="black", font=font)
    sheet.save(path)


def _thumbnail(dataset: Dataset, record: SampleRecord) -> Image.Image:
    media = record.media[0]
    data = dataset.reader.read(media.shard, media.offset, media.num_bytes)
    if media.type == "video" and media.format != "gif":
        frame = Image.new("RGB", (CELL_PX - 8, CELL_PX - 8), "black")
        ImageDraw.Draw(frame).text((8, 8), f"{media.format} {media.width}x{media.height}", fill="white")
        return frame
    with Image.open(io.BytesIO(data)) as image:
        frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    shown = [frames[i * (len(frames) - 1) // max(1, FRAMES_SHOWN - 1)] for i in range(FRAMES_SHOWN)]
    shown = shown if media.type == "video" else frames[:1]
    strip = Image.new("RGB", (media.width * len(shown), media.height), "white")
    for position, frame in enumerate(shown):
        strip.paste(frame, (position * media.width, 0), frame)
    strip.thumbnail((CELL_PX - 8, CELL_PX - 8))
    return strip

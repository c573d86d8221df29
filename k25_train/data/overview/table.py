"""Statistics as tables that people read."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from k25_train.data.overview.statistics import SourceStatistics
from k25_train.units import format_count

QUANTILES = (0.05, 0.5, 0.95)


def sources_table(sources: Sequence[SourceStatistics]) -> Table:
    """A row for each source: what there is, and how long its texts are."""
    table = _table("Sources")
    for name in ("source", "format"):
        table.add_column(name, no_wrap=True)
    for name in (
        "samples",
        "text tokens",
        "images",
        "videos",
        "shards",
        "GB",
        "5%",
        "median",
        "95%",
        "longest",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for each in sources:
        videos = round(each.num_media * float(each.is_video.mean())) if each.num_media else 0
        table.add_row(
            each.name,
            each.format,
            format_count(each.num_items),
            format_count(each.num_tokens),
            format_count(each.num_media - videos),
            format_count(videos),
            f"{each.num_shards:,}",
            f"{each.num_bytes / 1e9:,.3g}",
            *(f"{value:,}" for value in lengths_of(each)),
        )
    if any(each.is_sampled for each in sources):
        table.caption = "lengths, and images against videos, are of a million samples, evenly spread"
    return table


def media_table(sources: Sequence[SourceStatistics]) -> Table:
    """A row for each source with media: sizes, shapes and file formats."""
    table = _table("Images and videos")
    table.add_column("source", no_wrap=True)
    for name in ("longer side 5%", "median", "95%", "aspect 5%", "95%", "per sample", "longest video"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("file formats")
    for each in sources:
        if not each.num_media:
            continue
        sides = np.quantile(np.maximum(each.width, each.height), QUANTILES)
        aspects = np.quantile(each.aspect_ratio, (QUANTILES[0], QUANTILES[-1]))
        table.add_row(
            each.name,
            *(f"{side:,.0f} px" for side in sides),
            *(f"{aspect:.2f}" for aspect in aspects),
            f"{each.media_per_item.mean():.2f}",
            f"{each.duration_s.max():,.1f} s" if len(each.duration_s) else "",
            ", ".join(f"{name} {100 * count / len(each.width):.0f}%" for name, count in each.formats[:6]),
        )
    return table


def lengths_of(source: SourceStatistics) -> tuple[int, ...]:
    """Quantiles of the text tokens of its samples, and the most; zeros without samples."""
    if not len(source.text_tokens):
        return (0,) * (len(QUANTILES) + 1)
    quantiles = np.quantile(source.text_tokens, QUANTILES)
    return (*(int(value) for value in quantiles), int(source.text_tokens.max()))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)

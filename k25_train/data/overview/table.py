"""Statistics as tables that people read."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from k25_train.data.overview.statistics import SourceStatistics
from k25_train.tables import fitting_table
from k25_train.units import format_count

QUANTILES = (0.05, 0.5, 0.95)
_LEFT = ("source", "format", "file formats")


def sources_table(sources: Sequence[SourceStatistics], width: int) -> Table:
    """A row for each source: what there is, and how long its texts are; no wider than `width`, if it can."""
    rows = []
    for each in sources:
        videos = round(each.num_media * float(each.is_video.mean())) if each.num_media else 0
        lengths = (f"{value:,}" for value in lengths_of(each))
        row = {
            "source": each.name,
            "format": each.format,
            "samples": format_count(each.num_items),
            "text tokens": format_count(each.num_tokens),
            "images": format_count(each.num_media - videos),
            "videos": format_count(videos),
            "shards": f"{each.num_shards:,}",
            "GB": f"{each.num_bytes / 1e9:,.3g}",
        }
        rows.append(row | dict(zip(("5%", "median", "95%", "longest"), lengths, strict=True)))
    table = fitting_table("Sources", rows, width, least=("shards", "5%", "95%", "format", "GB"), left=_LEFT)
    if any(each.is_sampled for each in sources):
        sampled = "lengths, and images against videos, are of a million samples, evenly spread"
        table.caption = "; ".join([*([str(table.caption)] if table.caption else []), sampled])
    return table


def media_table(sources: Sequence[SourceStatistics], width: int) -> Table:
    """A row for each source with media: sizes, shapes and file formats; `width` as above."""
    rows = []
    for each in sources:
        if not each.num_media:
            continue
        sides = np.quantile(np.maximum(each.width, each.height), QUANTILES)
        aspects = np.quantile(each.aspect_ratio, (QUANTILES[0], QUANTILES[-1]))
        row = {"source": each.name}
        row |= dict(zip(("side 5%", "median", "95%"), (f"{side:,.0f} px" for side in sides), strict=True))
        row |= dict(zip(("aspect 5%", "aspect 95%"), (f"{aspect:.2f}" for aspect in aspects), strict=True))
        row |= {
            "per sample": f"{each.media_per_item.mean():.2f}",
            "longest video": f"{each.duration_s.max():,.1f} s" if len(each.duration_s) else "",
            "file formats": ", ".join(
                f"{name} {100 * count / len(each.width):.0f}%" for name, count in each.formats[:6]
            ),
        }
        rows.append(row)
    least = ("per sample", "longest video", "aspect 5%", "aspect 95%", "side 5%")
    title = "Images and videos (sides: the longer one)"
    return fitting_table(title, rows, width, least=least, left=_LEFT, wraps=("file formats",))


def lengths_of(source: SourceStatistics) -> tuple[int, ...]:
    """Quantiles of the text tokens of its samples, and the most; zeros without samples."""
    if not len(source.text_tokens):
        return (0,) * (len(QUANTILES) + 1)
    quantiles = np.quantile(source.text_tokens, QUANTILES)
    return (*(int(value) for value in quantiles), int(source.text_tokens.max()))
